"""Kernels for CUDA, written in Triton, where `torch.compile` takes more than one pass; imported on first use."""
