"""The length of a run: optimizer steps, from the budget that a config states in steps, tokens, epochs or minutes."""

import contextlib
import gc
import io
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from torchrecipes.checkpoint import stored_length
from torchrecipes.config import build
from torchrecipes.data.batching.loader import Loader
from torchrecipes.data.text_data import Text
from torchrecipes.devices import empty_cache, fork_rng
from torchrecipes.distributed import all_reduce_max, all_reduce_sum, clip_grad_norm, set_grad_sync
from torchrecipes.distributed.collectives import run_on_rank0_and_broadcast
from torchrecipes.errors import UserError
from torchrecipes.planning.auto_batch_size import auto_micro_batch_size
from torchrecipes.planning.component_checks import UNKNOWN_LENGTH
from torchrecipes.training import oom_hint
from torchrecipes.training.run import Run
from torchrecipes.training.setup import setup_model

BUDGETS = ("max_steps", "total_tokens", "epochs", "max_minutes")
TIMED = 5.0  # seconds of training steps that are timed, at least
FOR_STEPS = 0.95  # of max_minutes, for steps and evaluations; the rest is for checkpoints and samples


def resolve_max_steps(
    config: Any,
    tokenizer: Any,
    build_model: Callable,
    build_collator: Callable,
    compute_loss: Callable,
    run: Run,
    text: Text,
) -> int:
    """The number of optimizer steps that the run's budget pays for, rounded up, and prints it.

    `max_minutes` is time for steps, evaluations, checkpoints and samples; preparing the text, compiling and the timing
    itself come on top. Steps of a copy of the model are timed (`seconds_per_step`). The number is stored in every
    checkpoint, and a resumed run reads it from there: its learning rates do not depend on the machine it resumes on.
    Where a run begins with the checkpoint of another run, `max_minutes` pays for steps after that one.

    Args:
        config: a recipe's, with exactly one of `BUDGETS` that is not None.
        tokenizer: the run's tokenizer.
        build_model, build_collator, compute_loss: the recipe's functions.
        run: its processes, device and folder.
        text: what `load_text` gave.

    Raises:
        UserError: none or several budgets are given, or it is not positive (code `budget`).
    """
    objective = (config, tokenizer, build_model, build_collator, compute_loss)
    steps = planned_steps(config, text.train, text.eval_sets, lambda: seconds_per_step(*objective, run, text.train))
    tokens_per_step = config.global_batch_size * text.train.tokens_per_row
    print(
        f"duration: {steps:,} steps of {round(tokens_per_step):,} tokens, {round(steps * tokens_per_step):,} in total"
        f"{describe_epochs(text.train, steps * config.global_batch_size)}",
        flush=True,
    )
    if text.train.source_names:
        print(text.train.describe(steps * config.global_batch_size), flush=True)
    return steps


def describe_epochs(train: Any, rows: int) -> str:
    """How often `rows` rows go through the text: `, 1.50 epochs`; empty for a stream that has not ended."""
    try:
        return f", {rows / train.num_rows:.2f} epochs"
    except UserError as error:
        if error.code != "unfinished_stream":
            raise
        return ""


def planned_steps(config: Any, train: Any, eval_sets: dict[str, Any], seconds: Callable[[], float]) -> int:
    """`resolve_max_steps` for a step of known duration.

    Args:
        config: a recipe's, or an object with its keys for the length.
        train: the training rows: has `num_rows`, those of one epoch, and `tokens_per_row`, the mean number of tokens
            in a row that are not padding.
        eval_sets: the rows of an evaluation, by set.
        seconds: measures an optimizer step; called for `max_minutes` alone.

    Raises:
        UserError: none or several are given, or the budget is not positive (code `budget`).
    """
    given = {name: value for name in BUDGETS if (value := getattr(config, name, None)) is not None}
    if len(given) != 1:
        raise UserError(
            f"{' and '.join(given)} are set" if given else "none of them is set",
            key=", ".join(BUDGETS),
            hint="Set exactly one, and the others to null, as in max_steps=1000 epochs=null.",
            code="budget",
        )
    ((name, value),) = given.items()
    if value <= 0:
        raise UserError(f"{value} trains nothing", key=name, hint="Give a number above 0.", code="budget")
    if name == "total_tokens":
        return math.ceil(value / (config.global_batch_size * train.tokens_per_row))
    if name == "epochs":
        return math.ceil(value * train.num_rows / config.global_batch_size)
    if name == "max_steps":
        return value
    find = partial(stored_length, config.output_dir, config.checkpoint.resume)
    stored, past = run_on_rank0_and_broadcast(find)
    return stored or past + _steps_in(60 * value, seconds(), config, eval_sets)


def _steps_in(budget: float, seconds: float, config: Any, eval_sets: dict[str, Any]) -> int:
    """Steps of so many seconds that fit into a budget of seconds, evaluations counted."""
    evaluation, every = 0.0, math.inf
    limit = getattr(config, "eval_sequences", None)
    if config.eval_every:
        rows = sum(min(rows.num_rows, limit or rows.num_rows) for rows in eval_sets.values())
        evaluation = seconds * rows / config.global_batch_size / 3  # a forward pass is a third of a training step
        evaluation, every = evaluation * (2 if getattr(config, "ema", None) else 1), config.eval_every
    # One before the first step, one every `every` steps, one after the last.
    return max(1, math.floor((FOR_STEPS * budget - 2 * evaluation) / (seconds + evaluation / every)))


def seconds_per_step(
    config: Any,
    tokenizer: Any,
    build_model: Callable,
    build_collator: Callable,
    compute_loss: Callable,
    run: Run,
    train: Any,
) -> float:
    """Seconds of an optimizer step, on the slowest rank: trains a copy of the model for some seconds and discards it.

    The copy takes the run's own rows in its own micro-batches, and is compiled and sharded as the model will be.
    Random number generators are left as they were, and no file is written.

    Args:
        config, tokenizer, build_model, build_collator, compute_loss, run: as for `resolve_max_steps`.
        train: the training rows.
    """
    print(f"max_minutes={config.max_minutes:g}: timing the steps of a copy of the model", flush=True)
    with _same_random_numbers(), contextlib.redirect_stdout(io.StringIO()):  # what this prints, the run prints again
        seconds = _time_steps((config, tokenizer, build_model, build_collator, compute_loss), run, train)
    gc.collect()
    empty_cache(run.device)
    print(f"a step takes {seconds:.4g} s", flush=True)
    return seconds


def _time_steps(objective: tuple, run: Run, train: Any) -> float:
    config, tokenizer, build_model, build_collator, compute_loss = objective
    # As if resumed: weights need not be read.
    model = setup_model(build_model, config, tokenizer, replace(run, resumes=True))
    order = {"seed": config.seed, "shuffle": config.data.shuffle, "num_workers": config.data.num_workers}
    sizes = {"global_batch_size": config.global_batch_size, "micro_batch_size": config.micro_batch_size}
    loader = Loader(train, build_collator(config, tokenizer), **order, **sizes, **run.placement)
    if loader.micro_batch_size == "auto":
        loader.micro_batch_size = auto_micro_batch_size(*objective, run, model)
    optimizer = build(config.optimizer, model=model, params=[p for p in model.parameters() if p.requires_grad])
    # It never ends its warm-up: a copy that diverges would choose its experts in another way.
    build(config.lr_scheduler, optimizer=optimizer, max_steps=UNKNOWN_LENGTH)
    ema = build(getattr(config, "ema", None), model=model)

    def train_steps(number: int) -> float:
        """Takes steps. Returns the seconds that they took on the slowest rank."""
        start = time.perf_counter()
        for _ in range(number):
            batches = loader.next_step()
            num_targets = max(1, all_reduce_sum(sum(batch.num_targets for batch in batches)))
            for batch in batches:
                set_grad_sync(model, last=batch is batches[-1])
                with run.autocast():
                    loss, _ = compute_loss(model, batch, config)
                (loss * (run.world_size / num_targets)).backward()
            clip_grad_norm(model, config.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update()
        torch.get_device_module(run.device).synchronize()
        return all_reduce_max(round(1e6 * (time.perf_counter() - start))) / 1e6

    with oom_hint(loader.micro_batch_size):
        train_steps(2)  # compiles, and allocates what the others use again
        number = 1
        while (elapsed := train_steps(number)) < TIMED:
            number = math.ceil(number * min(10.0, 1.2 * TIMED / max(elapsed, 1e-6)))
    return elapsed / number


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)
