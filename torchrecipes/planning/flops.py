"""FLOPs of training per token, and the peak FLOP/s of a device: the two halves of MFU."""

import functools
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from torchrecipes.planning.fake_model import fake_tensors, give_storage, meta_model
from torchrecipes.training.precision import autocast

# Dense bf16 peaks in FLOP/s, from the makers' data sheets; the first that is a word of the device's name counts.
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


# Of GPUs without bf16, in fp16, with sums in fp32: V100 SXM2 and T4 data sheets, Turing whitepaper (2018), appendix A.
FP16_PEAKS = {"V100": 125e12, "T4": 65e12, "RTX 2080 Ti": 53.8e12}


class Hardware(NamedTuple):
    """A machine to estimate for.

    Attributes:
        name: for people.
        type: `cuda`, `mps` or `cpu`.
        gib: memory that a process can have.
        peaks: FLOP/s by `compute.precision`; the first one is what `auto` chooses.
    """

    name: str
    type: str
    gib: float
    peaks: dict[str, float]


def _nvidia(name: str, gib: float) -> Hardware:
    if name in FP16_PEAKS:
        return Hardware(name, "cuda", gib, {"fp16": FP16_PEAKS[name]})
    return Hardware(name, "cuda", gib, dict.fromkeys(("bf16", "fp16"), PEAKS[name]))


def _apple(chip: str, gib: int, cores: int, ghz: float) -> Hardware:
    """An Apple chip with `gib` of memory and so many GPU cores.

    A core has 128 ALUs, each with one multiply-add per cycle, fp16 or fp32: github.com/philipturner/metal-benchmarks.
    That gives Apple's own figures: 2.6 TFLOP/s for the M1, 3.6 for the M2, 13.6 for the M2 Max, 27.2 for the M2 Ultra.
    Metal recommends to use two thirds of the memory (`recommendedMaxWorkingSetSize`); of more than 32 GiB, three
    quarters.
    """
    usable = gib * (2 / 3 if gib <= 32 else 3 / 4)
    return Hardware(f"Apple {chip}", "mps", usable, dict.fromkeys(("fp32", "bf16", "fp16"), cores * 256 * ghz * 1e9))


# Names for the command line. Apple's clocks are those that tools measure; memory is a common size of each.
DEVICES = {
    "b200": _nvidia("B200", 178),
    "h200": _nvidia("H200", 139),
    "h100": _nvidia("H100", 79),
    "a100-80": _nvidia("A100", 79),
    "a100-40": _nvidia("A100", 39),
    "l40s": _nvidia("L40S", 44),
    "a10": _nvidia("A10", 22),
    "l4": _nvidia("L4", 22),
    "4090": _nvidia("RTX 4090", 23),
    "3090": _nvidia("RTX 3090", 23),
    "v100": _nvidia("V100", 31),
    "t4": _nvidia("T4", 14),
    "m1": _apple("M1", 16, 8, 1.278),
    "m1-max": _apple("M1 Max", 64, 32, 1.278),
    "m2": _apple("M2", 24, 10, 1.398),
    "m2-max": _apple("M2 Max", 64, 38, 1.398),
    "m2-ultra": _apple("M2 Ultra", 128, 76, 1.398),
    "m3": _apple("M3", 24, 10, 1.398),
    "m3-max": _apple("M3 Max", 64, 40, 1.398),
    "m4": _apple("M4", 24, 10, 1.578),
    "m4-pro": _apple("M4 Pro", 48, 20, 1.578),
    "m4-max": _apple("M4 Max", 64, 40, 1.578),
    # 8 cores with AVX2 (2 multiply-adds of 8 numbers per cycle) at 3 GHz under load, and 16 GiB.
    "laptop": Hardware("laptop CPU, 8 cores with AVX2", "cpu", 16, {"fp32": 8 * 32 * 3e9}),
}


def flops_per_token(
    config: Any, tokenizer: Any, build_model: Callable, build_collator: Callable, compute_loss: Callable
) -> float:
    """FLOPs of the forward and backward pass of one row, divided by its tokens: model FLOPs, as MFU counts them.

    Matrix products are counted as the model computes them, on tensors without data, and a backward pass as twice its
    forward pass. The row is one document of `seq_len` tokens, of which causal attention computes half of the scores;
    experts count with the tokens that they get. Activation checkpointing does not count (Chowdhery et al. 2022,
    2204.02311, appendix B).

    Args:
        config: a recipe's config.
        tokenizer: the tokenizer, or a stand-in.
        build_model, build_collator, compute_loss: the recipe's functions.

    Returns:
        FLOPs per token. Where the model cannot run on tensors without data, 6 per parameter (Kaplan et al. 2020,
        2001.08361, section 2.1), which is reported.
    """
    model = meta_model(config, tokenizer, build_model)
    batch = build_collator(config, tokenizer).example_batch(1, config.seq_len)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    try:
        with fake_tensors("cuda"), counter:
            give_storage(model)
            with autocast(torch.device("cpu"), torch.bfloat16):
                loss, _ = compute_loss(model, batch, config)
            loss.backward()
    except Exception as error:  # whatever a model that reads values raises
        print(f"FLOPs are taken to be 6 per parameter: the model does not run without data ({error})", flush=True)
        return 6.0 * sum(parameter.numel() for parameter in model.parameters())
    input_ids = getattr(batch, "input_ids", None)  # an example may have several texts
    return counter.get_total_flops() / (config.seq_len if input_ids is None else input_ids.numel())


def _attention(query, key, value, _dropout_p=0.0, is_causal=False, **_) -> int:
    # Not torch's `sdpa_flop_count`: that of torch 2.11 refuses fewer key heads than query heads.
    flops = 2 * query.shape[:3].numel() * key.shape[2] * (query.shape[3] + value.shape[3])
    return flops // 2 if is_causal else flops


def _attention_backward(_grad, query, key, value, _out, _logsumexp, dropout_p, is_causal, **_) -> int:
    return 2 * _attention(query, key, value, dropout_p, is_causal)


def _grouped_mm(a, b, *_, **__) -> int:
    # Every row of `a` meets one expert's matrix; without a row dimension of experts in `b` it is their outer products.
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


def _raw(formula: Callable) -> Callable:
    formula._get_raw = True  # FlopCounterMode passes tensors, not shapes
    return formula


_FORMULAS = {  # of the operations that FlopCounterMode does not count, or counts otherwise
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _raw(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _raw(_attention_backward),
    torch.ops.aten._grouped_mm: _raw(_grouped_mm),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The highest FLOP/s of the device in `dtype`: NVIDIA GPUs from a table, for bf16 and fp16; a CPU measured; None:
    unknown."""
    if device.type == "cpu":
        # Without instructions for fp16 its large products are slower than fp32's, and a model's are not.
        return max(_cpu_peak(dtype), _cpu_peak(torch.float32)) if dtype == torch.float16 else _cpu_peak(dtype)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    peaks = PEAKS | (FP16_PEAKS if dtype == torch.float16 else {})
    return next((peak for key, peak in peaks.items() if re.search(rf"\b{key}\b", name)), None)


@functools.cache
def _cpu_peak(dtype: torch.dtype) -> float:
    """The fastest matrix product of those that fit into 0.2 s, measured once per process."""
    a, b = (torch.ones(1024, 1024, dtype=dtype) for _ in range(2))
    out, best = torch.empty(1024, 1024, dtype=dtype), float("inf")
    end = time.perf_counter() + 0.2
    while (start := time.perf_counter()) < end:
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
