"""Share of a step's time by kind of kernel, from the names that the profiler gives."""

import re
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first pattern that is found in a kernel's name decides. Names of Hopper and Blackwell with torch 2.11 to 2.13:
# cuBLAS has `nvjet_...` and `sm90_xmma_gemm_...`, CUTLASS its own name in both products and attention; Inductor names a
# kernel by what it is (`poi`, `red`, `per`: pointwise and reductions, `tem`: templates) and by all operators that it
# came from. Names with `aten::` are operators on a CPU.
RULES = (
    (r"triton_(red|per)\w*flex_attention_backward|triton_tem\w*flex", "attention"),
    (r"triton_(poi|red|per|unk|spl|for)", "norms and elementwise"),
    (r"memcpy|memset|copy_kernel|CatArrayBatchedCopy|aten::(copy_|cat)$", "copies"),
    (r"flash|fmha|cudnn|sdpa|convert_dq|varlen|scaled_dot_product", "attention"),
    (r"grouped|GroupProblem", "grouped products"),
    (r"multi_tensor_apply|FusedAdam|FusedOptimizer|aten::_(fused|foreach)_", "optimizer"),
    (r"gemm|gemv|nvjet|xmma|cutlass|cublas|splitK|triton_tem|triton_mm|aten::(add|b|badd)?mm$", "products"),
    (r"aten::_scaled_mm", "products"),
    (
        r"elementwise|reduce_kernel|layer_norm|rms_norm|RowwiseMoments|GammaBeta|softmax"
        r"|aten::(mul|add|sub|div|neg|silu|gelu|rsqrt|pow|mean|sum|exp|log|sigmoid|where)",
        "norms and elementwise",
    ),
)
KINDS = ("attention", "products", "grouped products", "norms and elementwise", "optimizer", "copies", "other")


def kind_of(kernel: str) -> str:
    """The kind, one of `KINDS`, of a kernel by its name."""
    return next((kind for pattern, kind in RULES if re.search(pattern, kernel, re.IGNORECASE)), "other")


def kernel_times(device: torch.device, function: Callable[[], None]) -> dict[str, tuple[float, int]]:
    """Runs a function under the profiler: name of a kernel -> (milliseconds, number of calls).

    On a CPU the names are operators, and the times are their own, without those of operators that they call.
    """
    found: dict[str, tuple[float, int]] = {}
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        function()
        if cuda:
            torch.cuda.synchronize()
    if not cuda:
        return {
            event.key: (event.self_cpu_time_total / 1e3, event.count)
            for event in profiler.key_averages()
            if event.key.startswith("aten::")
        }
    for event in profiler.events():
        # An annotation, such as that of `Optimizer.step`, spans kernels that are there by themselves.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            time, calls = found.get(event.name, (0.0, 0))
            found[event.name] = (time + event.time_range.elapsed_us() / 1e3, calls + 1)
    return found


def add_times(*parts: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """The sum of what several calls of `kernel_times` found."""
    total: dict[str, tuple[float, int]] = {}
    for part in parts:
        for name, (time, calls) in part.items():
            before = total.get(name, (0.0, 0))
            total[name] = (before[0] + time, before[1] + calls)
    return total


def shares(training: dict[str, tuple[float, int]], update: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Percent of all kernels' time, by kind.

    Args:
        training: `kernel_times` of forward and backward passes.
        update: those of gradient clipping and the optimizer, which count as `optimizer` whatever they are: Muon's are
            products.
    """
    sums = dict.fromkeys(KINDS, 0.0)
    for name, (time, _) in training.items():
        sums[kind_of(name)] += time
    sums["optimizer"] += sum(time for time, _ in update.values())
    total = sum(sums.values()) or 1.0
    return {kind: round(100 * time / total, 1) for kind, time in sums.items()}


def longest(times: dict[str, tuple[float, int]], count: int = 30) -> list[list]:
    """The kernels that take the most time: [name, milliseconds, calls], the name cut at 160 characters."""
    ordered = sorted(times.items(), key=lambda item: -item[1][0])[:count]
    return [[name[:160], round(time, 3), calls] for name, (time, calls) in ordered]
