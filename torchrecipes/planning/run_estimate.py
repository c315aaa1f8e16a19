"""The estimate of a whole run from its config: parameters, memory per rank, arithmetic, time and disk.

What is particular to an objective is in two functions: `_loss_of` and `_flops_per_token`.
"""

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchrecipes.config import build
from torchrecipes.config.components import parameters, resolve
from torchrecipes.config.suggest import closest
from torchrecipes.data.batching.loader import largest_micro_batch
from torchrecipes.data.batching.packing import PackedDataset, PaddedDataset
from torchrecipes.data.corpus.corpus import open_corpus
from torchrecipes.data.tokenizers.train import SPECIAL
from torchrecipes.distributed.fsdp import BYTES_PER_PARAMETER, SHARE_FOR_DDP
from torchrecipes.errors import UserError
from torchrecipes.losses import causal_lm_loss, masked_lm_loss
from torchrecipes.models.hub import meta_model_from_hf
from torchrecipes.models.param_count import active_parameters
from torchrecipes.modules import compute_dtype
from torchrecipes.planning.auto_batch_size import SHARE
from torchrecipes.planning.flops import DEVICES, PEAKS, causal_flops_per_token, mlm_flops_per_token, peak_flops
from torchrecipes.planning.memory_estimate import on_rank, trace_step
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing
from torchrecipes.training.precision import autocast, resolve_dtype
from torchrecipes.training.run import Run

linear_cross_entropy = importlib.import_module("torchrecipes.losses.chunked_cross_entropy")  # also a function's name

GIB = 2**30
PROCESS = {"cuda": GIB, "cpu": int(0.35 * GIB)}  # what torch and its libraries take before the first tensor
# On a CPU: what the C library's heap takes on top of what a step makes and frees, as a share of it: freed pieces that
# do not fit the next tensor. Measured with glibc 2.36, to within a fifth.
HEAP = {"none": 0.7, "selective": 0.7, "full": 1.8}


class Device(NamedTuple):
    """`name` for people, `kind` cuda or cpu, the bytes `memory` of a process, `peak` FLOP/s in the run's precision."""

    name: str
    kind: str
    memory: int
    peak: float | None


def estimate_run(
    config: Any, *, device: str | None = None, world_size: int = 1, per_node: int = 8, mfu: float = 0.4
) -> dict[str, Any]:
    """Estimates a run of a pretraining recipe, without its text and without memory for its weights.

    Args:
        config: a recipe's config, checked.
        device: a name of `DEVICES`, `cpu`, or None for this machine's.
        world_size: processes in all.
        per_node: processes on a machine, at most.
        mfu: share of the device's peak that is reached, for the time.

    Returns:
        JSON values: `parameters` (by part), `memory` (bytes on a rank at the peak of a step, by part, and `total`),
        `micro_batch_size`, `max_micro_batch_size` (None: not one row fits), `flops_per_token`,
        `tokens_per_step`, `steps` (None: it depends on a corpus that is not there yet), `hours` (None: of these, or of
        a peak that is not known), `checkpoint_bytes`, `kept_bytes`, `notes` (sentences: what was assumed), and what it
        was estimated for.

    Raises:
        UserError: an unknown device, or numbers of processes and rows that do not go together.
    """
    problems = []
    if world_size < 1 or per_node < 1:
        problems.append(f"--world-size {world_size}, --nproc-per-node {per_node}: they are 1 or more.")
    elif config.global_batch_size % world_size:
        problems.append(
            f"--world-size {world_size} does not divide global_batch_size={config.global_batch_size}. Take a "
            f"multiple, such as "
            f"global_batch_size={-(-config.global_batch_size // world_size) * world_size}, or another number of "
            f"processes."
        )
    if not 0 < mfu <= 1:
        problems.append(f"--mfu {mfu}: it is a share of the device's peak, between 0 and 1.")
    if problems:
        raise UserError("\n".join(problems))
    here = _device(device, config.precision, min(world_size, per_node))
    dtype = _dtype(config.precision, here.kind)
    with torch.device("meta"):
        network = _network(config)
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in network.named_children()}
    total = sum(counts.values())
    strategy, shards = _shards(config.parallel.strategy, total, here.memory, world_size, per_node)

    rows_per_rank = config.global_batch_size // world_size
    memory_of = cache(partial(_memory, config, rows_per_rank, here.kind, dtype, shards))
    divisors = [rows for rows in range(1, rows_per_rank + 1) if rows_per_rank % rows == 0]
    room = SHARE * here.memory
    largest = _last(divisors, lambda rows: sum(memory_of(rows)[0].values()) <= room)
    asked = config.micro_batch_size
    rows = largest or 1 if asked == "auto" else largest_micro_batch(rows_per_rank, asked)
    memory, saved = memory_of(rows)

    flops = _flops_per_token(config, network)
    tokens, steps = config.global_batch_size * config.seq_len, _steps(config)
    checkpoint = 4 * total + saved
    known = steps is not None and here.peak is not None
    return {
        "device": here.name,
        "device_bytes": here.memory,
        "world_size": world_size,
        "strategy": strategy,
        "precision": str(dtype).removeprefix("torch."),
        "micro_batch_size": rows,
        "micro_batches": rows_per_rank // rows,
        "max_micro_batch_size": largest,
        "parameters": {name: count for name, count in counts.items() if count}
        | {"total": total, "active": active_parameters(network)},
        "memory": memory | {"total": sum(memory.values())},
        "flops_per_token": flops,
        "tokens_per_step": tokens,
        "steps": steps,
        "mfu": mfu,
        "hours": steps * tokens * flops / (mfu * here.peak * world_size) / 3600 if known else None,
        "checkpoint_bytes": checkpoint,
        "kept_bytes": (config.keep_last + 1) * checkpoint,
        "notes": _notes(config),
    }


def step_fits(config: Any, run: Run, free: int) -> Callable[[int], bool]:
    """For `find_micro_batch_size`: rows -> whether a step of so many is estimated to fit into `SHARE` of `free`.

    Ask it when the model is on its device, and the optimizer has no state yet.

    Args:
        config: the recipe's config.
        run: says on which device, and among how many processes.
        free: bytes that the process can still take: `auto_rows.free_memory`.
    """
    kind, rows_per_rank = run.device.type, config.global_batch_size // run.world_size
    dtype = resolve_dtype(config.precision, run.device, config.emulate_float8)
    with torch.device("meta"):
        total = sum(p.numel() for p in _network(config).parameters())
    _, shards = _shards(
        config.parallel.strategy,
        total,
        _device(None, config.precision, run.local_world_size).memory,
        run.world_size,
        run.local_world_size,
    )

    @cache
    def fits(rows: int) -> bool:
        parts, _ = _memory(config, rows_per_rank, kind, dtype, shards, rows)
        return sum(parts.values()) - parts["weights"] - parts["process"] <= SHARE * free

    return fits


def _loss_of(config: Any, rows: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """The recipe's loss of a micro-batch."""

    def masked(model: nn.Module, hidden: Tensor) -> Tensor:
        targets = torch.zeros(rows * math.ceil(config.data.mlm_probability * config.seq_len), dtype=torch.long)
        return masked_lm_loss(hidden, model.head, targets, targets, masked_logits_only=config.masked_logits_only)

    def causal(model: nn.Module, hidden: Tensor) -> Tensor:
        # One chunk stands for all: they take turns in the same memory, and there can be thousands of them.
        tokens, vocab_size = rows * config.seq_len, len(model.head.weight)
        chunk = linear_cross_entropy.default_chunk_size(tokens, vocab_size, compute_dtype(hidden), hidden.device)
        first, labels = hidden.flatten(0, 1)[None, :chunk], torch.zeros(1, min(chunk, tokens), dtype=torch.long)
        loss = causal_lm_loss(first, model.head, labels, config.z_loss, config.label_smoothing, chunk_size=chunk)
        return loss + model.router_loss

    return masked if _is_masked(config) else causal


def _flops_per_token(config: Any, network: nn.Module) -> float:
    if _is_masked(config):
        return mlm_flops_per_token(network, config.seq_len, config.data.mlm_probability)
    return causal_flops_per_token(network, config.seq_len)


def _is_masked(config: Any) -> bool:
    """Whether the recipe predicts masked tokens; otherwise it predicts next ones."""
    return hasattr(config.data, "mlm_probability")


def _memory(
    config: Any, rows_per_rank: int, kind: str, dtype: torch.dtype, shards: int, rows: int
) -> tuple[dict[str, int], int]:
    """The bytes of a rank at the peak of a step, by part, and those of the optimizer in a checkpoint of all."""
    micro_batches = rows_per_rank // rows
    offloaded = config.optimizer.path == "torchrecipes.optim.adamw_cpu_offload" and kind == "cuda"

    def build_model() -> nn.Module:
        model = _network(config)
        apply_activation_checkpointing(model, config.activation_checkpointing)
        return model.train()

    def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if offloaded:  # it is for models that are on a GPU, and has nothing there
            return torch.optim.SGD(model.parameters())
        return build(config.optimizer, model=model)

    step = trace_step(
        build_model,
        build_optimizer,
        lambda model: model(torch.zeros(rows, config.seq_len, dtype=torch.long)),
        _loss_of(config, rows),
        autocast=partial(autocast, torch.device("cpu"), dtype),
        device=kind,
        micro_batches=micro_batches,
    )
    if offloaded:
        step = replace(step, saved=2 * step.weights)
    saved = step.saved
    ranks = config.global_batch_size // rows_per_rank
    step = on_rank(step, ranks=ranks, shards=shards, half=dtype == torch.bfloat16, micro_batches=micro_batches)
    parts = {name: getattr(step, name) for name in ("weights", "optimizer", "gradients", "activations", "loss")}
    if step.gathered:
        parts["gathered"] = step.gathered
    if kind == "cpu" or dtype == torch.float32:  # where no kernel takes documents, a mask keeps them apart
        parts["activations"] += rows * config.seq_len**2 * dtype.itemsize
    if kind == "cpu":
        lasting = parts["weights"] if micro_batches > 1 else 0  # gradients that wait for the last micro-batch
        made = parts["gradients"] + parts["activations"] + parts["loss"] - lasting
        parts["heap"] = int(HEAP[config.activation_checkpointing] * max(0, made))
        if config.async_save:
            parts["copy to save"] = parts["weights"] + parts["optimizer"]
    return parts | {"process": PROCESS[kind]}, saved


def _last(divisors: list[int], fits: Callable[[int], bool]) -> int | None:
    """The last that fits: what fits is at the beginning."""
    first, end = 0, len(divisors)
    while first < end:
        middle = (first + end) // 2
        if fits(divisors[middle]):
            first = middle + 1
        else:
            end = middle
    return divisors[first - 1] if first else None


def _device(name: str | None, precision: str, processes: int) -> Device:
    """A device by its name, or this machine's; `processes` share the memory of a CPU."""
    if name is None and torch.cuda.is_available():
        here = torch.device("cuda")
        memory, peak = torch.cuda.get_device_properties(here).total_memory, peak_flops(here, _dtype(precision, "cuda"))
        return Device(torch.cuda.get_device_name(here), "cuda", memory, peak)
    if name in (None, "cpu"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device("cpu", "cpu", memory // processes, peak_flops(torch.device("cpu"), _dtype(precision, "cpu")))
    if name not in DEVICES:
        known = [*DEVICES, "cpu"]
        near = closest(name, known)
        hint = f" Did you mean '{near}'?" if near else ""
        raise UserError(f"--device {name} is not known. There are: {', '.join(known)}.{hint}")
    full_name, gib = DEVICES[name]
    return Device(name, "cuda", gib * GIB, PEAKS[full_name] if _dtype(precision, "cuda") == torch.bfloat16 else None)


def _dtype(precision: str, kind: str) -> torch.dtype:
    if precision == "auto" and kind == "cpu":
        return resolve_dtype(precision, torch.device("cpu"))
    return torch.float32 if precision == "fp32" else torch.bfloat16  # float8 keeps activations in bf16


def _network(config: Any) -> nn.Module:
    """The model as the recipe makes it, on the default device, with weights that nobody reads."""
    if config.init_from:
        described = meta_model_from_hf(config.init_from)  # on the meta device
        return type(described)(described.config)
    return build(config.model, vocab_size=_vocab_size(config), seed=config.seed)


def _vocab_size(config: Any) -> int:
    """That of a tokenizer that is to be trained, as long as text allows, or of one that is loaded."""
    given = parameters(resolve(config.tokenizer.path))
    if "source" not in given:
        return _loaded_vocab_size(config)
    values = {name: argument.default for name, argument in given.items()} | config.tokenizer.args
    if "vocab_size" in values:
        size = values["vocab_size"]
    elif "limit_alphabet" in values:  # characters: how many there are is up to the text
        size = values["limit_alphabet"] + len(SPECIAL)
    else:
        raise UserError(
            f"tokenizer._component_: {config.tokenizer.path} takes no vocab_size, so how many ids it will make is not "
            "known before. Estimate with another that makes as many, as in "
            "tokenizer._component_=torchrecipes.data.tokenizers.train_bpe tokenizer.vocab_size=..."
        )
    multiple = values.get("pad_vocab_to_multiple_of", 1)
    return -(-size // multiple) * multiple


def _notes(config: Any) -> list[str]:
    """What a reader should know of the numbers beside what they say themselves."""
    given = parameters(resolve(config.tokenizer.path))
    if config.init_from or "source" not in given or "vocab_size" in given:
        return []
    return [
        f"counted with {_vocab_size(config):,} ids, the most that tokenizer.limit_alphabet allows; a text of fewer "
        "characters makes fewer"
    ]


def _loaded_vocab_size(config: Any) -> int:
    # Its rows are counted in tensors that have data, outside of the mode that takes the step.
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return build(config.tokenizer).vocab_size


def _shards(strategy: str, total: int, memory: int, world_size: int, per_node: int) -> tuple[str, int]:
    """The strategy, as `parallelize` chooses it, and over how many ranks it splits a weight."""
    if strategy == "none" and world_size > 1:
        raise UserError(f"parallel.strategy=none, and --world-size is {world_size}. Use auto, ddp, fsdp or hsdp.")
    if world_size == 1:
        return "none", 1
    several = world_size > per_node
    if strategy == "hsdp" and not several:
        raise UserError(
            f"parallel.strategy=hsdp, and --world-size {world_size} is one machine of {per_node} processes at most. "
            "Use fsdp, or say --nproc-per-node."
        )
    if several and world_size % per_node:
        raise UserError(
            f"--world-size {world_size} is no multiple of the {per_node} processes of a machine: see --nproc-per-node."
        )
    if strategy == "auto":
        small = BYTES_PER_PARAMETER * total < SHARE_FOR_DDP * memory
        strategy = "ddp" if small else "hsdp" if several and per_node > 1 else "fsdp"
    return strategy, {"ddp": 1, "fsdp": world_size, "hsdp": per_node}[strategy]


def _steps(config: Any) -> int | None:
    """Optimizer steps; None: epochs of a corpus that is not made yet."""
    folder = Path(config.data.corpus_dir or Path(config.output_dir) / "corpus") / "train"
    num_rows, tokens_per_row = None, config.seq_len  # full rows, where nobody knows better
    if (folder / "corpus.json").exists():
        kind = PackedDataset if config.data.packing else PaddedDataset
        rows = kind(open_corpus(folder), config.seq_len, pad_id=0)
        num_rows, tokens_per_row = rows.num_rows, rows.tokens_per_row
    if config.max_steps is not None:
        return config.max_steps
    if config.total_tokens is not None:
        return math.ceil(config.total_tokens / (config.global_batch_size * tokens_per_row))
    return math.ceil(config.epochs * num_rows / config.global_batch_size) if num_rows else None
