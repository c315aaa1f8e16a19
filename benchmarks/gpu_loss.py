"""Time and memory of the losses, beside compiled full logits: a part of `benchmarks/gpu.py`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_bench import GIB, Bench, clean_up, peak_bytes, relative_error, time_ms
from torch import Tensor, nn

from torchrecipes.losses import linear_cross_entropy, masked_lm_loss
from torchrecipes.training.precision import autocast

SIZES = ((16_384, 1280, 50_304), (8192, 768, 131_072))  # rows, width, vocabulary
MASKED = (32, 1024, 768, 30_522)  # rows, tokens, width, vocabulary
TINY_SIZES, TINY_MASKED = ((96, 32, 512),), (2, 64, 32, 512)
PROBABILITY = 0.2


def run(bench: Bench) -> None:
    for size in TINY_SIZES if bench.tiny else SIZES:
        bench.run(" x ".join(f"{n:,}" for n in size), _linear, *size)
    bench.run("masked, 20 %", _masked, *(TINY_MASKED if bench.tiny else MASKED))


def _full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def _linear(bench: Bench, rows: int, width: int, vocabulary: int) -> None:
    hidden, weight, labels = _tensors(bench, rows, width, vocabulary)
    _check(bench, hidden[:64], weight, labels[:64])
    clean_up(bench.device)  # a kernel that was compiled for other shapes would be compiled again for shapes of any size
    compiled = torch.compile(_full, dynamic=False)
    _compare(bench, hidden, weight, lambda: linear_cross_entropy(hidden, weight, labels), "linear_cross_entropy")
    _compare(bench, hidden, weight, lambda: compiled(hidden, weight, labels), "compiled full logits")


def _masked(bench: Bench, rows: int, tokens: int, width: int, vocabulary: int) -> None:
    """Targets are at 20 % of the positions; the other side gathers them and computes full logits of them, compiled."""
    hidden, weight, labels = _tensors(bench, rows * tokens, width, vocabulary)
    count = int(PROBABILITY * len(labels))
    positions = torch.randperm(len(labels), device=bench.device)[:count].sort().values
    labels = labels[positions]
    head = nn.Linear(width, vocabulary, bias=False, device=bench.device)
    head.weight = nn.Parameter(weight.detach())
    weight = head.weight
    shaped = hidden.detach().view(rows, tokens, width).requires_grad_()

    def gathered(hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        return _full(hidden.flatten(0, 1).index_select(0, positions), weight, labels)

    compiled = torch.compile(gathered, dynamic=False)
    _compare(bench, shaped, weight, lambda: masked_lm_loss(shaped, head, positions, labels), "masked_lm_loss")
    _compare(bench, shaped, weight, lambda: compiled(shaped, weight, positions, labels), "compiled gather and logits")


def _tensors(bench: Bench, rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states in bf16 and weights in fp32, as a training step under autocast has them."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=bench.device, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=bench.device) * 0.05).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,), device=bench.device)


def _compare(bench: Bench, hidden: Tensor, weight: Tensor, loss: Callable[[], Tensor], variant: str) -> None:
    def step() -> tuple[Tensor, ...]:
        with autocast(bench.device, torch.bfloat16):
            value = loss()
        return torch.autograd.grad(value, (hidden, weight))

    (milliseconds,) = time_ms(bench.device, step, seconds=0.5)
    positions = hidden.numel() // hidden.shape[-1]
    rows = positions if "masked" not in bench.case else int(PROBABILITY * positions)
    flops = 6 * rows * weight.numel()
    bench.add(
        variant=variant,
        ms=milliseconds,
        tflops=flops / milliseconds / 1e9,
        extra_gib=peak_bytes(bench.device, step) / GIB,
    )


def _check(bench: Bench, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Loss and gradients of a few rows against float64."""
    ours = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    with autocast(bench.device, torch.bfloat16):
        loss = linear_cross_entropy(*ours, labels)
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy(F.linear(*exact), labels, reduction="sum")
    expected.backward()
    bench.add(
        variant="agreement with float64",
        loss_error=relative_error(loss.detach(), expected.detach()),
        hidden_gradient_error=relative_error(ours[0].grad, exact[0].grad),
        weight_gradient_error=relative_error(ours[1].grad, exact[1].grad),
    )
