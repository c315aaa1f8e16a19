"""How much arithmetic training takes, and how much a device can do: the two halves of MFU."""

import functools
import re
import time

import torch
from torch import nn

from torchrecipes.models.param_count import active_parameters

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


# What people call them on a command line, with the memory that a process can have, in GiB.
DEVICES = {
    "b200": ("B200", 178),
    "h200": ("H200", 139),
    "h100": ("H100", 79),
    "a100-80": ("A100", 79),
    "a100-40": ("A100", 39),
    "l40s": ("L40S", 44),
    "a10": ("A10", 22),
    "l4": ("L4", 22),
    "4090": ("RTX 4090", 23),
    "3090": ("RTX 3090", 23),
}


def mlm_flops_per_token(model: nn.Module, seq_len: int, mlm_probability: float) -> float:
    """Training FLOPs (forward and backward) per token of a masked language model.

    `6 N + 12 L D S + 6 p (V D + T)`: N parameters of the blocks (Kaplan et al. 2020, 2001.08361, section 2.1; two FLOPs
    per weight forward, four backward), attention over rows of S tokens (Chowdhery et al. 2022, 2204.02311, appendix B;
    packed rows compute less: it is the count of a dense row), and the head, with its transform of T parameters, at the
    share p of the tokens that is masked.

    Args:
        model: has `blocks`, `head` and a `config` with Hugging Face's keys.
        seq_len: S, tokens per row.
        mlm_probability: p.
    """
    config = model.config
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    head = config.vocab_size * config.hidden_size + sum(p.numel() for p in model.head.transform.parameters())
    attention = 12 * config.num_hidden_layers * config.hidden_size * seq_len
    return 6 * blocks + attention + 6 * mlm_probability * head


def causal_flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Training FLOPs (forward and backward) per token of a causal language model.

    `6 N + 12 L A S`: N parameters that compute with a token, those of the blocks and of the head (Kaplan et al. 2020,
    2001.08361, section 2.1), of a mixture of experts only the chosen ones; attention of L layers, A = heads x their
    size, over rows of S tokens (Chowdhery et al. 2022, 2204.02311, appendix B). That counts the whole square of scores,
    as published MFUs do, of which causality needs half and packed documents less.

    Args:
        model: has `blocks` and a `config` with Hugging Face's keys.
        seq_len: S, tokens per row.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * seq_len
    head = config.vocab_size * config.hidden_size
    return 6 * (active_parameters(model.blocks) + head) + attention


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most FLOP/s that the device does in `dtype`: GPUs from a table, for bf16; a CPU measured; None: unknown."""
    if device.type != "cuda":
        return _cpu_peak(dtype)
    name = torch.cuda.get_device_name(device) if dtype == torch.bfloat16 else ""
    return next((peak for key, peak in PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


@functools.cache
def _cpu_peak(dtype: torch.dtype) -> float:
    """The best of the products of matrices that fit into 0.2 s: once per process."""
    a, b = (torch.ones(1024, 1024, dtype=dtype) for _ in range(2))
    out, best = torch.empty(1024, 1024, dtype=dtype), float("inf")
    end = time.perf_counter() + 0.2
    while (start := time.perf_counter()) < end:
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
