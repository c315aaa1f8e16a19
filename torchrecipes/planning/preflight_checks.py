"""Checks before a long run: what would fail after hours fails in minutes.

What needs the run itself is checked by running it (dry_run.py). The rest is asked of the parts that the run will use:
the checkpoint to resume from, the corpus, the scheduler, the loggers.
"""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torchrecipes.checkpoint.checkpointer import find_checkpoint
from torchrecipes.checkpoint.resume import check_same_settings
from torchrecipes.config import Component, build, to_yaml
from torchrecipes.devices import choose_device
from torchrecipes.errors import UserError, format_user_error
from torchrecipes.file_lock import lock_folder
from torchrecipes.planning.component_checks import build_scheduler
from torchrecipes.planning.dry_run import STEPS, DryRun, size
from torchrecipes.planning.duration import describe_epochs, planned_steps
from torchrecipes.planning.gradient_check import gradient_error
from torchrecipes.planning.run_estimate import estimate_run

GIB = 2**30
GRADIENT_ERROR = 0.03  # of the norm: bf16 has 0.01, a wrong kernel 1 and more
MANY_EPOCHS = 4  # repeating text more often than this helps little (Muennighoff et al. 2023, 2305.16264)
DRY_RUN_FOLDER = ".preflight-"  # begins the name of the folder inside output_dir that is used and removed
ROWS = (
    *("output_dir", "resume", "loggers", "train step", "checkpoint", "loader workers"),
    *("data", "validation", "duration", "time", "disk"),
)


@dataclass(frozen=True)
class Check:
    """A row of the table: `status` is `passed`, `failed` or `skipped`, `reason` is one line or more."""

    name: str
    status: str
    reason: str


def preflight(
    recipe: ModuleType,
    config: Any,
    command: list[str],
    *,
    world_size: int = 1,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Check]:
    """Checks a run, one thing after another.

    Args:
        recipe: the recipe's module.
        config: its config, checked.
        command: starts the run; settings for the dry run are appended.
        world_size: the processes that the command starts.
        report: called with what begins, before what takes long.

    Yields:
        A check as soon as it is done. What an earlier failure prevents is skipped.
    """
    output_dir = Path(config.output_dir)
    estimate = _estimate(recipe, config, world_size)
    yield (writable := _writable(output_dir, estimate, config.checkpoint.keep_last + 1))
    if writable.status == "failed":
        yield from skipped(ROWS[1:], "output_dir")
        return
    report("reading the checkpoint to resume from")
    resume, resumed = _resume(config)
    yield resume
    if not config.log.loggers:
        yield Check("loggers", "skipped", "log.loggers is empty; metrics.jsonl is always written")
    for number, logger in enumerate(config.log.loggers):
        report(f"logging a value with {logger.path}")
        yield _logger(number, logger)
    if choose_device(config.compute.device).type == "mps":
        report("a micro-batch on mps and on the CPU")
        yield _gradients(recipe, config)
    with _own_folder(output_dir) as folder:
        corpus_dir = Path(config.data.corpus_dir or output_dir / "corpus")
        if hasattr(config, "max_minutes"):
            command = [*command, "max_minutes=null"]
        dry_run = DryRun(command, folder / "run", corpus_dir)
        if resumed:
            past = json.loads((resumed / "state.json").read_text(encoding="utf-8"))["step"]
            dry_run = replace(dry_run, resume=resumed, past=past)
        yield from _try(config, dry_run, estimate, report)


def skipped(names: tuple[str, ...], because_of: str) -> Iterator[Check]:
    """Rows for what was not tried."""
    for name in names:
        yield Check(name, "skipped", f"because of {because_of}")


def _try(config: Any, dry_run: DryRun, estimate: dict[str, Any], report: Callable[[str], None]) -> Iterator[Check]:
    """The checks that need the run, and those that need its corpus, which exists after that."""
    report("making the tokenizer and the corpus if they do not exist, then five steps of the run")
    try:
        lines = dry_run.steps()
    except UserError as error:
        yield Check("train step", "failed", str(error))
        yield from skipped(ROWS[4:], "the train step")
        return
    checkpoint_bytes = dry_run.checkpoint_bytes()
    yield (step := _step(lines, estimate.get("device_bytes")))
    if step.status == "failed":
        yield from skipped(("checkpoint",), "the train step")
    else:
        report("the last step once more, from the checkpoint before it")
        yield _repeated(dry_run, checkpoint_bytes, config.compute.deterministic, report)
    if workers := config.data.num_workers:
        yield Check("loader workers", "passed", f"{workers} per process have made the batches of these steps")
    else:
        yield Check("loader workers", "skipped", "data.num_workers is 0: batches are made in the process itself")

    train, eval_sets = config.data.open(config, dry_run.corpus_dir)
    yield Check("data", "passed", str(train))
    yield _validation(config, eval_sets)
    duration, steps = _duration(config, train, _seconds(_typical(lines)))
    yield duration
    if steps:
        yield _time(steps - dry_run.past, _typical(lines))
    else:
        yield from skipped(("time",), "the duration")
    if checkpoint_bytes:
        freed = size(dry_run.folder.parent)
        yield _room("disk", Path(config.output_dir), checkpoint_bytes, config.checkpoint.keep_last + 1, freed=freed)
    else:  # a step that is not finite is not saved
        yield from skipped(("disk",), "the train step")


def _estimate(recipe: ModuleType, config: Any, world_size: int) -> dict[str, Any]:
    """What is known before there is a checkpoint; empty where nothing is."""
    try:
        return estimate_run(recipe, config, world_size=world_size)
    except (Exception, SystemExit):  # the dry run reports it in better words
        return {}


def _writable(output_dir: Path, estimate: dict[str, Any], number: int) -> Check:
    """Checks that the folder can be written, is not in use, and has room for the checkpoints."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"x")
    except OSError as error:
        return Check("output_dir", "failed", f"{output_dir}: {error.strerror}. Give another output_dir=...")
    try:
        if (output_dir / ".lock").exists():
            for lock in lock_folder(output_dir):
                lock.close()
    except UserError as error:
        return Check("output_dir", "failed", str(error))
    if not estimate:
        return Check("output_dir", "passed", f"{output_dir} can be written")
    return _room("output_dir", output_dir, estimate["checkpoint_bytes"], number)


def _room(name: str, output_dir: Path, checkpoint_bytes: int, number: int, *, freed: int = 0) -> Check:
    """Checks that there is room for `number` checkpoints, those that exist included. `freed` bytes will be free."""
    room = shutil.disk_usage(output_dir).free + freed + size(output_dir / "checkpoints")
    needed = number * checkpoint_bytes
    found = (
        f"{number} checkpoints (keep_last, and one being written) of {_amount(checkpoint_bytes)} take "
        f"{_amount(needed)}; there is room for {_amount(room)}"
    )
    if room < needed:
        return Check(name, "failed", f"{found}. Make room, lower checkpoint.keep_last, or give another output_dir=...")
    return Check(name, "passed", found)


def _resume(config: Any) -> tuple[Check, Path | None]:
    """Checks that the folder belongs to this run and its checkpoint is valid; returns that checkpoint, too."""
    output_dir = Path(config.output_dir)
    has_checkpoints = any((output_dir / "checkpoints").glob("step-*"))
    try:
        if has_checkpoints and config.checkpoint.resume == "never":
            return Check("resume", "failed", f"{output_dir} holds checkpoints, and checkpoint.resume is never"), None
        if has_checkpoints and (output_dir / "config.yaml").exists():
            check_same_settings(output_dir / "config.yaml", to_yaml(config), type(config))
        with contextlib.redirect_stdout(io.StringIO()):
            found, corrupt = find_checkpoint(output_dir, config.checkpoint.resume)
    except UserError as error:
        return Check("resume", "failed", str(error)), None
    if found is None:
        return Check("resume", "passed", "there is no checkpoint: the run starts at step 1"), None
    lines = [f"{found} is valid: the run resumes from it"]
    lines += [f"skipping corrupt checkpoint {path}: {'; '.join(problems)}" for path, problems in corrupt.items()]
    return Check("resume", "passed", "\n".join(lines)), found


def _logger(number: int, logger: Component) -> Check:
    """Checks that a logger can be built and takes a value; nothing is left where the run's own values go."""
    name = f"loggers.{number}"
    arguments = dict(logger.args)
    more = ""
    if logger.path == "torchrecipes.training.loggers.TensorBoard":
        arguments.pop("folder", None)
    if logger.path == "torchrecipes.training.loggers.WandB" and arguments.get("mode", "online") == "online":
        arguments["mode"] = "offline"
        more = ", offline: its server and your login are not tried"
    # Not a folder that vanishes: a logger's thread may write once more after close.
    with tempfile.TemporaryDirectory(prefix="preflight-", ignore_cleanup_errors=True) as folder:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                built = build(replace(logger, args=arguments), output_dir=folder)
                built.log({"step": 0, "preflight": 1.0}, 0)
                built.close()
        except (Exception, SystemExit) as error:  # whatever a logger's package raises without its server or a login
            return Check(
                name, "failed", f"{logger.path}: {format_user_error(error) or f'{type(error).__name__}: {error}'}"
            )
    return Check(name, "passed", f"{logger.path} has taken a value{more}")


@contextlib.contextmanager
def _own_folder(output_dir: Path) -> Iterator[Path]:
    """A folder for the dry run, removed at the end, with those that killed ones have left."""
    for old in output_dir.glob(f"{DRY_RUN_FOLDER}*"):
        with contextlib.suppress(UserError):  # locked: another preflight is running
            if locks := lock_folder(old):
                shutil.rmtree(old, ignore_errors=True)
                for lock in locks:
                    lock.close()
    folder = Path(tempfile.mkdtemp(prefix=DRY_RUN_FOLDER, dir=output_dir))
    locks = lock_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for lock in locks:
            lock.close()


def _step(lines: list[dict], device_bytes: int | None) -> Check:
    """Checks that loss and gradient of the first steps are finite; in fp16 the scale may have to fall first."""
    bad = [line for line in lines if line["loss"] is None or (line["grad_norm"] is None and "loss_scale" not in line)]
    if bad:
        remedy = "Lower optimizer.lr, lengthen the warm-up or try compute.precision=fp32"
        return Check("train step", "failed", f"step {bad[0]['step']}: loss or gradient is not finite. {remedy}")
    losses = ", ".join(f"{line['loss']:.3f}" for line in lines)
    of = f" of {device_bytes / GIB:.0f}" if device_bytes else ""
    norm = next((f"{line['grad_norm']:.2f}" for line in lines[::-1] if line["grad_norm"] is not None), "overflowed")
    memory = f"{lines[-1]['peak_memory_gib']:.2f}{of} GiB"
    return Check(
        "train step",
        "passed",
        f"losses {losses}; gradient norm {norm}; peak memory {memory}; {_seconds(_typical(lines)):.2f} s per step",
    )


def _gradients(recipe: ModuleType, config: Any) -> Check:
    """Compares the gradients of a micro-batch with the CPU's."""
    try:
        error = gradient_error(recipe, config, choose_device(config.compute.device))
    except Exception as problem:  # whatever a model that needs data raises
        return Check("gradients", "skipped", f"{type(problem).__name__}: {problem}")
    if error < GRADIENT_ERROR:
        return Check("gradients", "passed", f"those of mps differ from the CPU's by {error:.1e} of their norm")
    remedy = "Lower micro_batch_size, try another version of torch, or set compute.device=cpu"
    return Check("gradients", "failed", f"those of mps differ from the CPU's by {error:.1e} of their norm. {remedy}")


def _typical(lines: list[dict]) -> dict:
    """The line of the median step, by time, of those in which nothing starts and nothing is saved."""
    return sorted(lines[1:-1], key=_seconds)[(len(lines) - 2) // 2]


def _seconds(line: dict) -> float:
    """Seconds of the step that a line reports."""
    return line["tokens"] / line["step"] / line["tokens_per_second"]


def _repeated(dry_run: DryRun, checkpoint_bytes: int, deterministic: bool, report: Callable[[str], None]) -> Check:
    """Checks that the run resumes and repeats its last step."""
    try:
        names = dry_run.repeat()
    except UserError as error:
        return Check("checkpoint", "failed", f"the run does not resume: {error}")
    step, taken = dry_run.past + STEPS, _amount(checkpoint_bytes)
    if not names:
        return Check("checkpoint", "passed", f"saved ({taken}), loaded, and step {step} repeated bit for bit")
    shown = "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
    differs = f"step {step}, resumed from step {step - 1}, differs: {shown}"
    if deterministic:
        return Check("checkpoint", "failed", f"{differs}. A resumed run would diverge")
    # Kernels of a GPU add up in any order. Whether that is it, or a checkpoint lacks something, shows without them.
    report("the same with compute.deterministic=true, as some kernels do not repeat their last bits")
    again = replace(dry_run, folder=dry_run.folder.with_name("deterministic"), deterministic=True)
    try:
        again.steps()
        names = again.repeat()
    except UserError as error:
        reason = f"{differs}; and compute.deterministic=true, which would show why, ends: {error}"
        return Check("checkpoint", "failed", reason)
    if names:
        reason = f"{differs}; with compute.deterministic=true, too. A resumed run would diverge"
        return Check("checkpoint", "failed", reason)
    return Check(
        "checkpoint",
        "passed",
        f"saved ({taken}), loaded; step {step} is repeated bit for bit with compute.deterministic=true. Without it, as "
        "the config has it, some kernels round in another order each time",
    )


def _validation(config: Any, eval_sets: dict[str, Any]) -> Check:
    """Lists the evaluation sets: without any, the dry run has failed."""
    if not config.eval_every:
        return Check("validation", "skipped", "eval_every is null")
    return Check(
        "validation", "passed", "; ".join(f"{name}: {rows.num_rows:,} rows" for name, rows in eval_sets.items())
    )


def _duration(config: Any, train: Any, seconds: float) -> tuple[Check, int | None]:
    """How often each row is seen, and the run's steps. Builds the scheduler for them, which the dry run replaces."""
    try:
        steps = planned_steps(config, train, {}, lambda: seconds)
        build_scheduler(config, steps)
    except UserError as error:
        return Check("duration", "failed", str(error)), None
    timed = "by the dry run's steps, about " if getattr(config, "max_minutes", None) else ""  # the run times its own
    if not describe_epochs(train, 0):
        return Check("duration", "passed", f"{timed}{steps:,} steps of a stream that has not ended"), steps
    epochs = steps * config.global_batch_size / train.num_rows
    found = f"{timed}{steps:,} steps see the {train.num_rows:,} rows of the corpus {epochs:,.2f} times"
    if epochs > MANY_EPOCHS:
        found += f". Warning: more than {MANY_EPOCHS} times helps little; use more text or fewer steps"
    return Check("duration", "passed", found), steps


def _time(steps: int, line: dict) -> Check:
    """How long the run will take, without evaluation and saving."""
    if steps <= 0:
        return Check("time", "passed", "the run has done all its steps")
    seconds = _seconds(line)
    total = steps * seconds
    length = f"{total / 3600:,.1f} hours" if total >= 3600 else f"{total / 60:.1f} minutes"
    mfu = f", MFU {line['mfu']:.1%}" if line.get("mfu") else ""
    reason = f"{steps:,} steps of {seconds:.2f} s: {length}{mfu}; evaluation and saving not included"
    return Check("time", "passed", reason)


def _amount(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"
