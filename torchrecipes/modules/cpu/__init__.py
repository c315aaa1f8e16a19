"""Kernels for the CPU, written in PyTorch: attention in tiles, GELU in one pass, experts in batched products."""
