"""Training steps of the recipes on made-up text: speed, memory, kinds of kernels. A part of `benchmarks/gpu.py`."""

import contextlib
import dataclasses
import importlib.util
import io
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from gpu_bench import GIB, Bench, clean_up, describe
from gpu_corpus import write_corpus
from gpu_kernels import add_times, kernel_times, longest, shares
from torch import Tensor
from torch._dynamo.utils import counters

from torchrecipes.cli.run import load_recipe
from torchrecipes.config import build, load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.data import Batch, Loader, PackedDataset
from torchrecipes.distributed import clip_grad_norm
from torchrecipes.planning import flops_per_token, peak_flops
from torchrecipes.planning.fake_model import TokenizerStandIn
from torchrecipes.training import ComputeConfig, setup_model, start_run

MICRO_BATCHES = 2  # of a measured step; the time of the config's own step is put together from its parts
CORPUS_TOKENS = 4_000_000
TINY = (
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.max_position_embeddings=64",
)


class Model(NamedTuple):
    """A model of a shipped config: name in the tables, config, vocabulary, tokens per row, rows, and overrides."""

    name: str
    recipe: str
    config: str
    vocab_size: int
    seq_len: int
    micro_batch: int
    overrides: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()  # overrides beside `TINY` for `--tiny`


_LLAMA = ("model._component_=torchrecipes.models.llama", "model.size=700m", "model.max_position_embeddings=2048")
_INNER = ("model.intermediate_size=128",)
_KEYS = ("model.num_key_value_heads=1", "model.head_dim=32")
_EXPERTS = ("model.num_key_value_heads=1", "model.moe_intermediate_size=64", "model.num_experts=4")
MODELS = (
    Model("neobert/base", "mlm_pretrain", "neobert/base", 30_522, 1024, 32, (), _INNER),
    Model("llama 700m", "causal_pretrain", "gpt2/750m", 50_304, 2048, 16, _LLAMA, _INNER),
    Model("gpt2/750m", "causal_pretrain", "gpt2/750m", 50_304, 1024, 16),
    Model("qwen3/0_6b", "causal_pretrain", "qwen3/0_6b", 151_936, 2048, 16, (), (*_INNER, *_KEYS)),
    Model(
        "moe/500m", "causal_pretrain", "moe/500m_fineweb", 50_304, 2048, 16, ("tokenizer.path=.",), (*_INNER, *_EXPERTS)
    ),
)


def run(bench: Bench) -> None:
    """All models compiled, then eager, then with an fp32 residual stream; at last whether that changes the losses."""
    for model in MODELS:
        bench.run(f"{model.name}, compiled", measure, model, ("compute.compile=true",))
    few = MODELS[:1] if bench.tiny else MODELS
    for model in few:
        bench.run(f"{model.name}, eager", measure, model, ("compute.compile=false",))
    if "residual" not in {field.name for field in dataclasses.fields(ComputeConfig)}:
        return
    for model in few:
        options = ("compute.compile=true", "compute.residual=fp32")
        bench.run(f"{model.name}, compiled, residual fp32", measure, model, options)
    bench.run("losses with a residual stream in bf16 and fp32", _agreement)


def run_float8(bench: Bench) -> None:
    """Compiled, in bf16 and with float8 products."""
    if importlib.util.find_spec("torchao") is None:
        bench.note("torchao is not installed: float8 was not measured")
        return
    emulated = ("compute.emulate_float8=true",) if bench.device.type != "cuda" else ()
    for model in MODELS[1:2] if bench.tiny else (MODELS[1], MODELS[2], MODELS[0]):
        for precision in ("float8", "float8_rowwise"):
            options = ("compute.compile=true", f"compute.precision={precision}", *emulated)
            bench.run(f"{model.name}, {precision}", measure, model, options)
        if not any(r["part"] == "train" and r["case"] == f"{model.name}, compiled" for r in bench.rows):
            bench.run(f"{model.name}, bf16", measure, model, ("compute.compile=true",))


class Data(NamedTuple):
    """A recipe with its config, its tokenizer's stand-in, and batches of a made-up corpus."""

    recipe: ModuleType
    config: Any
    tokenizer: TokenizerStandIn
    loader: Loader
    micro_batch: str  # rows x tokens


def make_data(bench: Bench, model: Model, options: tuple[str, ...], rows: int) -> Data:
    """Loads the recipe and the config with `options` over them, and opens (once: writes) the corpus."""
    vocab_size = 512 if bench.tiny else model.vocab_size
    seq_len = 64 if bench.tiny else model.seq_len
    overrides = [
        f"output_dir={bench.folder / f'run-{time.time_ns()}'}",
        f"seq_len={seq_len}",
        f"micro_batch_size={rows}",
    ]
    overrides += ["compute.activation_checkpointing=none", "compute.precision=bf16", *model.overrides]
    overrides += [*(TINY + model.tiny if bench.tiny else ()), *options]
    if "fineweb" not in model.config:
        overrides.append("data.source.path=.")  # not read
    recipe = load_recipe(find_recipe(model.recipe))
    config = load(recipe.Config, model.config, overrides)
    tokenizer, causal = TokenizerStandIn(vocab_size), model.recipe == "causal_pretrain"
    folder = bench.folder / f"corpus-{vocab_size}-{causal}"
    documents = ("lines", 20_000) if bench.tiny else ("web", CORPUS_TOKENS)
    corpus = write_corpus(folder, tokenizer, *documents, causal=causal)
    dataset = PackedDataset(corpus, seq_len, tokenizer.pad_id, lookahead=int(causal))
    sizes = {"global_batch_size": MICRO_BATCHES * rows, "micro_batch_size": rows}
    loader = Loader(dataset, recipe.build_collator(config, tokenizer), seed=0, **sizes, device=bench.device)
    return Data(recipe, config, tokenizer, loader, f"{rows} x {seq_len}")


class Trainer:
    """A recipe's run up to its loop, and the parts of a step."""

    def __init__(self, data: Data):
        self.recipe, self.config, self.loader = data.recipe, data.config, data.loader
        with contextlib.redirect_stdout(io.StringIO()):
            self.run = start_run(self.config)
            self.model = setup_model(self.recipe.build_model, self.config, data.tokenizer, self.run)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build(self.config.optimizer, model=self.model, params=trainable)
        self.lr_scheduler = build(self.config.lr_scheduler, optimizer=self.optimizer, max_steps=100_000)
        self.guard = build(self.config.guard)

    def backward(self, batch: Batch, num_targets: int) -> Tensor:
        """Forward and backward pass of a micro-batch; returns the sum of its losses."""
        with self.run.autocast():
            loss, sums = self.recipe.compute_loss(self.model, batch, self.config)
        (loss / num_targets).backward()
        return sums["loss"]

    def update(self, loss: Tensor) -> None:
        """The rest of a step: clipping, guard, optimizer."""
        grad_norm = clip_grad_norm(self.model, self.config.max_grad_norm or float("inf"))
        self.guard.step(self.optimizer, loss, grad_norm)
        self.optimizer.zero_grad()
        self.lr_scheduler.step()


def measure(bench: Bench, model: Model, options: tuple[str, ...]) -> None:
    """Trains a few steps and adds a row; with half the rows where memory does not suffice."""
    with_fewer_rows(bench, model, lambda rows: _measure(bench, model, options, rows))


def with_fewer_rows(bench: Bench, model: Model, function: Callable[[int], None]) -> None:
    """Calls a function with the rows of a micro-batch, and after an out-of-memory error with half of them."""
    rows = 2 if bench.tiny else model.micro_batch
    while True:
        try:
            return function(rows)
        except torch.OutOfMemoryError:
            if rows < 2:
                raise
        rows //= 2  # outside of the handler, which holds the failed step's tensors
        clean_up(bench.device)
        print(f"  out of memory: again with {rows} rows", flush=True)


def _measure(bench: Bench, model: Model, options: tuple[str, ...], rows: int) -> None:
    data = make_data(bench, model, options, rows)
    trainer = Trainer(data)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    time_training(bench, data, trainer.backward, trainer.update, flops=model, parameters=parameters)


def time_training(
    bench: Bench,
    data: Data,
    backward: Callable[[Batch, int], Tensor],
    update: Callable[[Tensor], None],
    flops: Model | None,
    **labels: Any,
) -> None:
    """Adds a row with figures of a few steps, after two that compile and warm up, and then the kinds of kernels.

    Args:
        bench: for the device and `tiny`.
        data: the batches, and the config, whose `global_batch_size` decides how much the optimizer counts.
        backward: (micro-batch, targets of the step) -> sum of its losses; forward and backward pass.
        update: takes the mean loss: clipping, optimizer.
        flops: the model whose FLOPs per token count for MFU. None: no MFU.
        labels: more of the row.
    """
    counters.clear()
    begun = time.perf_counter()
    steps = _Steps(bench, data.loader, backward, update)
    steps.run(1)
    first = time.perf_counter() - begun
    steps.run(1)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    graphs = counters["stats"]["unique_graphs"]
    micro_ms, update_ms, loader_ms, losses = steps.run(*((1, 0) if bench.tiny else (3, 2.5)))
    rows, seq_len = map(int, data.micro_batch.split(" x "))
    per_step = data.config.global_batch_size / rows  # micro-batches of the config's step, on one GPU
    rate = rows * seq_len * per_step / (micro_ms * per_step + update_ms) * 1e3
    step_ms = MICRO_BATCHES * micro_ms + update_ms
    bench.add(
        **labels,
        micro_batch=data.micro_batch,
        tokens_per_second=rate,
        mfu=flops and _mfu(bench, flops, data, rate),
        peak_gib=torch.cuda.max_memory_allocated() / GIB if bench.device.type == "cuda" else 0.0,
        micro_batch_ms=micro_ms,
        update_ms=update_ms,
        loader_ms=loader_ms,
        compile_s=max(0.0, first - step_ms / 1e3),
        graphs=graphs,
        recompiled=counters["stats"]["unique_graphs"] - graphs,
        graph_breaks=sum(counters["graph_break"].values()),
        loss=losses[-1],
        flash_attention=torch.nn.attention.current_flash_attention_impl() or "",
    )
    try:
        bench.extend(**steps.profile(step_ms))
    except Exception as error:  # the figures above do not depend on it
        bench.extend(profile_error=describe(error))


class _Steps:
    def __init__(self, bench: Bench, loader: Loader, backward: Callable, update: Callable):
        self.bench, self.loader, self.backward, self.update = bench, loader, backward, update

    def run(self, least: int, seconds: float = 0.0) -> tuple[float, float, float, list[float]]:
        """Steps, at least so many and for so long: median ms of a micro-batch, of the update, of loading, and losses.

        The time of a micro-batch begins when the batches of its step are there. On a GPU the host stays a step ahead.
        """
        marks, losses, waits, begun = [], [], [], time.perf_counter()
        while len(marks) < least or time.perf_counter() - begun < seconds:
            loading = time.perf_counter()
            batches, num_targets = self._next()
            waits.append((time.perf_counter() - loading) * 1e3)
            points, sums = [_mark(self.bench)], []
            for batch in batches:
                sums.append(self.backward(batch, num_targets))
                points.append(_mark(self.bench))
            losses.append(torch.stack(sums).sum() / num_targets)
            self.update(losses[-1])
            marks.append([*points, _mark(self.bench)])
            if self.bench.device.type == "cuda" and len(marks) > 1:
                marks[-2][-1].synchronize()
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize()
        micro = [_between(a, b) for points in marks for a, b in pairwise(points[:-1])]
        update = [_between(*points[-2:]) for points in marks]
        medians = (statistics.median(times) for times in (micro, update, waits))
        return *medians, [loss.item() for loss in losses]

    def profile(self, step_ms: float) -> dict[str, Any]:
        """Kernels of two steps (tiny: one), those of forward and backward passes apart from the update's."""
        training, update = {}, {}
        steps = 1 if self.bench.tiny else 2
        for _ in range(steps):
            batches, num_targets = self._next()
            sums: list[Tensor] = []

            def micro_batches(batches=batches, num_targets=num_targets, sums=sums) -> None:
                sums.extend(self.backward(batch, num_targets) for batch in batches)

            training = add_times(training, kernel_times(self.bench.device, micro_batches))
            loss = torch.stack(sums).sum() / num_targets
            update = add_times(update, kernel_times(self.bench.device, lambda loss=loss: self.update(loss)))
        if not training:
            raise RuntimeError("the profiler saw no kernels: this process may not read the GPU's counters")
        busy = sum(milliseconds for milliseconds, _ in (*training.values(), *update.values())) / steps
        return {
            "shares": shares(training, update),
            "idle_percent": round(100 * max(0.0, 1 - busy / step_ms), 1),  # of the step: the GPU waits for the host
            "kernels": {"training": longest(training), "update": longest(update, 10)},
        }

    def _next(self) -> tuple[list[Batch], int]:
        batches = self.loader.next_step()
        return batches, sum(batch.num_targets for batch in batches)


_flops: dict[str, float] = {}  # per token, by model: counting takes seconds


def _mfu(bench: Bench, model: Model, data: Data, rate: float) -> float | None:
    """MFU at `rate` tokens per second; None where the device's peak is not known."""
    peak = peak_flops(bench.device, torch.bfloat16)
    if peak is None:
        return None
    if model.name not in _flops:
        functions = (data.recipe.build_model, data.recipe.build_collator, data.recipe.compute_loss)
        _flops[model.name] = flops_per_token(data.config, data.tokenizer, *functions)
    return rate * _flops[model.name] / peak


def _agreement(bench: Bench) -> None:
    """Losses of the same steps with a residual stream in bf16 and in fp32: means over tenths of the run."""
    steps = 4 if bench.tiny else 1000 if bench.limit > 1500 else 200
    model = MODELS[0]._replace(overrides=("model.num_hidden_layers=12",))
    options = ("compute.compile=true", "lr_scheduler.warmup_steps=20", "optimizer.lr=1e-3")
    curves = {}
    for residual in ("bf16", "fp32"):
        clean_up(bench.device)
        data = make_data(bench, model, (*options, f"compute.residual={residual}"), 2 if bench.tiny else 8)
        trainer = Trainer(data)
        run = _Steps(bench, data.loader, trainer.backward, trainer.update)
        curves[residual] = run.run(steps)[-1]
        del data, trainer, run
    last = max(1, steps // 10)
    ends = {residual: statistics.mean(curve[-last:]) for residual, curve in curves.items()}
    bench.add(
        steps=steps,
        bf16=ends["bf16"],
        fp32=ends["fp32"],
        difference=ends["bf16"] - ends["fp32"],
        noise=statistics.stdev(curves["fp32"][-last:]) if last > 1 else 0.0,
        losses=curves,
    )


def _mark(bench: Bench) -> Any:
    """A point in time: an event of the GPU, or seconds."""
    if bench.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Milliseconds."""
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)
