"""Normalization layers."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalization, computed in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467).

    `y = x / sqrt(mean(x^2) + eps) * weight`, in the dtype of x whatever the dtype of the weight.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Args: x `[..., D]`."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * self.weight).to(x.dtype)
