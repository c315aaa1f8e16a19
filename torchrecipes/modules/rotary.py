"""Rotary position embedding in the half-split form of `transformers` (Su et al. 2021, arXiv:2104.09864)."""

import math

import torch
from torch import Tensor

# rope_type -> the keys that go with it, under the names of `transformers`.
ROPE_SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_cos_sin(
    position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: dict | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's rotation angles, computed once per forward for all layers.

    Angles are computed from the positions in fp32 and rounded at the end. Nothing is stored in the model, so nothing is
    rounded by `model.to(bfloat16)` or lost on the meta device, and no position is too large.

    Args:
        position_ids: `[B, S]` or `[1, S]` integers.
        head_dim: H, even.
        theta: base of the wavelengths: pair i turns by `position * theta ** (-2 i / H)`.
        dtype: dtype of the result: that of the queries.
        scaling: lowers frequencies for documents longer than those in training: None, or `rope_type` and its keys in
            `ROPE_SCALING_KEYS`. `linear` divides all by `factor` (Chen et al. 2023, arXiv:2306.15595); `llama3` only
            those of long wavelengths (Llama 3.1; `transformers`' formula).

    Returns:
        cos, sin: `[B, S, 1, H / 2]`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None and scaling["rope_type"] != "default":
        frequencies = _scaled(frequencies, **scaling)
    angles = position_ids[..., None, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x_BSNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + H / 2]) of every head by the angles of `rope_cos_sin`; keeps shape and dtype."""
    if torch.compiler.is_compiling() and x_BSNH.is_cuda:
        return _rotary_without_cat(x_BSNH, cos, sin)
    a, b = x_BSNH.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _rotary_without_cat(x_BSNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as one expression per element: compiled, its gradient is written where that of q, k and v belongs.

    With `torch.cat` the compiler makes a kernel of its own, which reads and writes all of it once more.
    """
    pairs = x_BSNH.unflatten(-1, (2, -1))
    return (pairs * cos.unsqueeze(-2) + pairs.flip(-2) * torch.stack((-sin, sin), dim=-2)).flatten(-2)


def _scaled(
    frequencies: Tensor,
    *,
    rope_type: str,
    factor: float,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 1.0,
    original_max_position_embeddings: int = 0,
) -> Tensor:
    if rope_type == "linear":
        return frequencies / factor
    # Turns that a pair makes within the original length: few are lowered, many stay, and between the two it is mixed.
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)
