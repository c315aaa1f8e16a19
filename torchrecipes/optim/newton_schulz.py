"""Orthogonalizes matrices with Newton-Schulz iterations, which are matrix products only.

A matrix `X = U S V^T` with singular values in (0, 1] is replaced several times by `a X + b (X X^T) X + c (X X^T)^2 X`,
which applies the polynomial `a s + b s^3 + c s^5` to every singular value. The values approach 1, which leaves `U V^T`.
It need not be exact: Muon works as well with values between 0.7 and 1.2.
"""

import torch
from torch import Tensor

from torchrecipes.estimation import kernel_device

# Jordan et al. 2024 (kellerjordan.github.io/posts/muon): the same polynomial in every step, steep at 0.
QUINTIC = (3.4445, -4.7750, 2.0315)

# Amsel et al. 2025, arXiv:2505.16932, algorithm 1: the best polynomial of each step after those before it, for singular
# values from 0.001 up. The last one is used for all further steps.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01  # keeps rounding errors inside the interval of the next polynomial

COEFFICIENTS = ("quintic", "polar_express")
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}
# Elements that are multiplied at once: on a GPU a bound on memory, on a CPU what stays in its caches, which is at least
# 10 % faster than all at once.
_BATCH, _BATCH_ON_CPU = 2**27, 2**20


def polynomials(coefficients: str, steps: int) -> list[tuple[float, float, float]]:
    """(a, b, c) of every step, for `quintic` or `polar_express`."""
    if coefficients == "quintic":
        return [QUINTIC] * steps
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]]
    safe.append(_POLAR_EXPRESS[-1])
    return [safe[min(step, len(safe) - 1)] for step in range(steps)]


def orthogonalize(
    matrices: Tensor, steps: int = 5, coefficients: str = "polar_express", dtype: torch.dtype | None = None
) -> Tensor:
    """About `U V^T` of every matrix `U S V^T`, all of them in the same products.

    Args:
        matrices: `[..., R, C]`, of any scale; 0 stays 0.
        steps: iterations; each is three products.
        coefficients: one of `COEFFICIENTS`.
        dtype: computes and returns in it; None: `fast_dtype`.

    Returns:
        `[..., R, C]` of that dtype.
    """
    rows, columns = matrices.shape[-2:]
    dtype = dtype or fast_dtype(matrices.device)
    x = matrices.to(dtype).reshape(-1, rows, columns)
    most = max(1, at_once(x.device) // max(1, rows * columns))
    done = [_iterate(batch, polynomials(coefficients, steps), coefficients) for batch in x.split(most)]
    x = done[0] if len(done) == 1 else torch.cat(done)
    return x.reshape(matrices.shape)


def _iterate(x: Tensor, polynomials: list[tuple[float, float, float]], coefficients: str) -> Tensor:
    # The Frobenius norm is never less than the largest singular value.
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x / (norm * _SAFETY + 1e-7 if coefficients == "polar_express" else norm.clamp(min=1e-7))
    tall = x.shape[1] > x.shape[2]
    for a, b, c in polynomials:
        # The smaller one of X X^T and X^T X. It and its square are symmetric, but to compute half of each would save no
        # more than 0.25 % of a step of 524,288 tokens (10 of 34 ms for 700 million parameters at 600 TFLOP/s).
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, gram, beta=a) if tall else torch.baddbmm(x, gram, x, beta=a)
    return x


def at_once(device: torch.device) -> int:
    """The number of elements that are best multiplied at once."""
    return _BATCH_ON_CPU if kernel_device(device) == "cpu" else _BATCH


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies bf16 matrices in hardware, else fp32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    elif kernel_device(device) == "cuda":  # an estimate for a GPU
        fast = True
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32
