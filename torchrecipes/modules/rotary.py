"""Rotary position embedding in the half-split form of `transformers` (Su et al. 2021, arXiv:2104.09864)."""

import torch
from torch import Tensor


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's rotation angles, once per forward for all layers.

    The angles are computed from the positions in fp32 and rounded at the end: nothing is stored in the model, so
    nothing can be rounded by `model.to(bfloat16)` or lost on the meta device, and no position is too large.

    Args:
        position_ids: `[B, S]` or `[1, S]` integers.
        head_dim: H, even.
        theta: base of the wavelengths: pair i turns by `position * theta ** (-2 i / H)`.
        dtype: of the tables; that of the queries.

    Returns:
        cos, sin: `[B, S, 1, H / 2]`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None, None].float() * (1.0 / theta**exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x_BSNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + H / 2]) of every head by the angles of `rotary_tables`; shape and dtype stay."""
    a, b = x_BSNH.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
