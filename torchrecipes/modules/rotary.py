"""Rotary position embedding in the half-split form of `transformers` (Su et al. 2021, arXiv:2104.09864)."""

import math

import torch
from torch import Tensor

# rope_type -> the keys that go with it, required and optional, under the names of `transformers`.
ROPE_SCALING_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
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
            those of long wavelengths (Llama 3.1; `transformers`' formula); so does `yarn`, which also lengthens queries
            and keys so that the softmax is sharper (Peng et al. 2023, arXiv:2309.00071).

    Returns:
        cos, sin: `[B, S, 1, H / 2]`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    frequencies, length = 1.0 / theta**exponents, 1.0
    if scaling is not None:
        keys = {key: value for key, value in scaling.items() if key != "rope_type"}
        if scaling["rope_type"] == "linear":
            frequencies = frequencies / keys["factor"]
        elif scaling["rope_type"] == "llama3":
            frequencies = _llama3(frequencies, **keys)
        elif scaling["rope_type"] == "yarn":
            frequencies, length = _yarn(frequencies, theta, **keys)
    angles = position_ids[..., None, None].float() * frequencies
    return (angles.cos() * length).to(dtype), (angles.sin() * length).to(dtype)


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


def _llama3(
    frequencies: Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    # Turns that a pair makes within the original length: few are lowered, many stay, and between the two it is mixed.
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def _yarn(
    frequencies: Tensor,
    theta: float,
    *,
    factor: float,
    original_max_position_embeddings: int,
    attention_factor: float | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> tuple[Tensor, float]:
    """Frequencies, and the factor of queries and keys: section 3.2 and 3.4 of the paper, as `transformers` reads it."""
    pairs = len(frequencies)

    def pair_with(turns: float) -> float:
        """The (fractional) number of the pair that makes so many turns within the original length."""
        return pairs * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_with(beta_fast or 32), pair_with(beta_slow or 1)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    last = last + 0.001 if first == last else last
    number = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
    lowered = ((number - first) / (last - first)).clamp(0, 1)  # from first to last pair: more of it is divided
    if attention_factor is None:
        attention_factor = _sharpening(factor, 1.0)
        if mscale and mscale_all_dim:
            attention_factor = _sharpening(factor, mscale) / _sharpening(factor, mscale_all_dim)
    return frequencies * (1 - lowered) + frequencies / factor * lowered, attention_factor


def _sharpening(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
