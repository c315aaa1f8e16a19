"""Everything that can be known to go wrong in a long run, tried in minutes before it is started.

What needs the run itself is tried by running it: see trial.py. The rest is asked of the parts that will be asked then:
the checkpointer for the checkpoint to resume from, the corpus, the schedule, the writers.
"""

import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchrecipes.checkpoint.checkpointer import Checkpointer
from torchrecipes.checkpoint.resume import check_same_settings as _check_same_settings
from torchrecipes.config import Component, build, to_yaml
from torchrecipes.data.batching.packing import PackedDataset, PaddedDataset
from torchrecipes.data.corpus.corpus import Corpus, open_corpus
from torchrecipes.errors import UserError, format_user_error
from torchrecipes.file_lock import lock_folder as _lock
from torchrecipes.planning.dry_run import STEPS, Trial, size
from torchrecipes.planning.run_estimate import estimate_run
from torchrecipes.training.duration import resolve_max_steps

GIB = 2**30
MANY_EPOCHS = 4  # repeating text more often than this helps little (Muennighoff et al. 2023, 2305.16264)
TRIES = ".preflight-"  # begins the name of the folder inside output_dir that is used, and removed
ROWS = (
    *("output_dir", "resume", "loggers", "a real step", "checkpoint", "loader workers"),
    *("data", "validation", "budget", "time", "disk"),
)
KEYS = (  # of a recipe's config, which are read or set here
    *("output_dir", "data.corpus_dir", "data.packing", "data.num_workers", "seq_len", "global_batch_size"),
    *("max_steps", "total_tokens", "epochs", "lr_scheduler", "deterministic", "log_every", "eval_every", "save_every"),
    *("keep_last", "resume", "loggers"),
)


@dataclass(frozen=True)
class Check:
    """A row of the table: `status` is `passed`, `failed` or `skipped`, `reason` is one line or more."""

    name: str
    status: str
    reason: str


def preflight(
    config: Any, command: list[str], *, world_size: int = 1, tell: Callable[[str], None] = lambda _: None
) -> Iterator[Check]:
    """Checks a run, one thing after another.

    Args:
        config: the recipe's config, checked.
        command: what starts the run, without settings of its own for what is tried here.
        world_size: the processes that the command starts.
        tell: is told what begins to be tried, before what takes long.

    Yields:
        A check as soon as it is done. What could not be tried because of an earlier failure is skipped.
    """
    if lacking := [key for key in KEYS if not _has(config, key)]:
        reason = (
            f"its config has no {', '.join(lacking)}, which preflight needs to try it: see tune-style cat mlm_pretrain"
        )
        yield Check("recipe", "failed", reason)
        yield from skipped(ROWS, "the recipe")
        return
    output_dir = Path(config.output_dir)
    estimate = _estimate(config, world_size)
    yield (writable := _writable(output_dir, estimate, config.keep_last + 1))
    if writable.status == "failed":
        yield from skipped(ROWS[1:], "output_dir")
        return
    tell("reading the checkpoint to resume from")
    resume, resumed = _resume(config)
    yield resume
    if not config.loggers:
        yield Check("loggers", "skipped", "loggers names no writer; metrics.jsonl is always written")
    for number, writer in enumerate(config.loggers):
        tell(f"writing a value with {writer.path}")
        yield _writer(number, writer)
    with _own_folder(output_dir) as folder:
        corpus_dir = Path(config.data.corpus_dir or output_dir / "corpus")
        trial = Trial(command, folder / "run", corpus_dir)
        if resumed:
            trial = replace(trial, resume=resumed.path, past=resumed.step)
        yield from _try(config, trial, resumed, estimate, tell)


def skipped(names: tuple[str, ...], because_of: str) -> Iterator[Check]:
    """Rows for what cannot be tried."""
    for name in names:
        yield Check(name, "skipped", f"because of {because_of}")


def _try(
    config: Any, trial: Trial, resumed: Any | None, estimate: dict[str, Any], tell: Callable[[str], None]
) -> Iterator[Check]:
    """The checks that need the run, and those that need its corpus, which is there after that."""
    tell("making the tokenizer and the corpus if they are not there, then five steps of the run")
    try:
        lines = trial.steps()
    except UserError as error:
        yield Check("a real step", "failed", str(error))
        yield from skipped(ROWS[4:], "the step")
        return
    checkpoint_bytes = trial.checkpoint_bytes()
    yield (step := _step(lines, estimate.get("device_bytes")))
    if step.status == "failed":
        yield from skipped(("checkpoint",), "the step")
    else:
        tell("the last step once more, from the checkpoint before it")
        yield _repeated(trial, checkpoint_bytes, config.deterministic, tell)
    if workers := config.data.num_workers:
        yield Check("loader workers", "passed", f"{workers} per process have made the batches of these steps")
    else:
        yield Check("loader workers", "skipped", "data.num_workers is 0: batches are made in the process itself")

    train = open_corpus(trial.corpus_dir / "train")
    rows = (PackedDataset if config.data.packing else PaddedDataset)(train, config.seq_len, pad_id=0)
    yield _data(config, train, resumed)
    yield _validation(config, trial.corpus_dir / "validation")
    budget, steps = _budget(config, rows)
    yield budget
    if steps:
        yield _time(steps - trial.past, _typical(lines))
    else:
        yield from skipped(("time",), "the budget")
    if checkpoint_bytes:
        freed = size(trial.folder.parent)
        yield _room("disk", Path(config.output_dir), checkpoint_bytes, config.keep_last + 1, freed=freed)
    else:  # what is not finite is not saved
        yield from skipped(("disk",), "the step")


def _has(config: Any, key: str) -> bool:
    for part in key.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


def _estimate(config: Any, world_size: int) -> dict[str, Any]:
    """What is known before there is a checkpoint; empty where nothing is."""
    try:
        return estimate_run(config, world_size=world_size)
    except (Exception, SystemExit):  # a recipe of another kind, or what the trial will tell in better words
        return {}


def _writable(output_dir: Path, estimate: dict[str, Any], number: int) -> Check:
    """Whether the folder can be written, is nobody else's, and has room for the checkpoints."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"x")
    except OSError as error:
        return Check("output_dir", "failed", f"{output_dir}: {error.strerror}. Give another output_dir=...")
    try:
        if (output_dir / ".lock").exists():
            for lock in _lock(output_dir):
                lock.close()
    except UserError as error:
        return Check("output_dir", "failed", str(error))
    if not estimate:
        return Check("output_dir", "passed", f"{output_dir} can be written")
    return _room("output_dir", output_dir, estimate["checkpoint_bytes"], number)


def _room(name: str, output_dir: Path, checkpoint_bytes: int, number: int, *, freed: int = 0) -> Check:
    """Whether so many checkpoints find room; those that are there are among them. `freed` bytes will be free."""
    room = shutil.disk_usage(output_dir).free + freed + size(output_dir / "checkpoints")
    needed = number * checkpoint_bytes
    said = (
        f"{number} checkpoints (keep_last, and one being written) of {_amount(checkpoint_bytes)} take "
        f"{_amount(needed)}; there is room for {_amount(room)}"
    )
    if room < needed:
        return Check(name, "failed", f"{said}. Make room, lower keep_last, or give another output_dir=...")
    return Check(name, "passed", said)


def _resume(config: Any) -> tuple[Check, Any | None]:
    """Whether the folder is that of this run, and its checkpoint whole; and that checkpoint."""
    output_dir = Path(config.output_dir)
    there = any((output_dir / "checkpoints").glob("step-*"))
    told = io.StringIO()
    try:
        if there and config.resume == "never":
            raise UserError(
                f"{output_dir} holds the checkpoints of a run, and resume=never would write over them. Give another "
                "output_dir=..., or delete the folder, or continue the run with resume=auto."
            )
        if there and (output_dir / "config.yaml").exists():
            _check_same_settings(output_dir / "config.yaml", to_yaml(config))
        with contextlib.redirect_stdout(told):
            found = Checkpointer(output_dir, config.keep_last).resume(config.resume)
    except UserError as error:
        return Check("resume", "failed", str(error)), None
    if found is None:
        return Check("resume", "passed", "there is no checkpoint: the run begins at step 1"), None
    damaged = [line for line in told.getvalue().splitlines() if "damaged" in line]
    reason = "\n".join([f"{found.path} is whole: the run goes on behind step {found.step:,}", *damaged])
    return Check("resume", "passed", reason), found


def _writer(number: int, writer: Component) -> Check:
    """Whether a metrics writer can be built, and takes a value; nothing is left where the run's own values go."""
    name = f"loggers.{number}"
    arguments = dict(writer.args)
    more = ""
    if writer.path == "torchrecipes.training.loggers.TensorBoard":
        arguments.pop("folder", None)
    if writer.path == "torchrecipes.training.loggers.WandB" and arguments.get("mode", "online") == "online":
        arguments["mode"] = "offline"
        more = ", offline: its server and your login are not tried"
    # Not a folder that vanishes: a writer's thread may write once more after close.
    with tempfile.TemporaryDirectory(prefix="preflight-", ignore_cleanup_errors=True) as folder:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                built = build(replace(writer, args=arguments), output_dir=folder)
                built.log({"step": 0, "preflight": 1.0}, 0)
                built.close()
        except (Exception, SystemExit) as error:  # whatever a logger's package raises without its server or a login
            return Check(
                name, "failed", f"{writer.path}: {format_user_error(error) or f'{type(error).__name__}: {error}'}"
            )
    return Check(name, "passed", f"{writer.path} has taken a value{more}")


@contextlib.contextmanager
def _own_folder(output_dir: Path) -> Iterator[Path]:
    """A folder for this try, removed at the end; those that killed ones have left are removed, too."""
    for old in output_dir.glob(f"{TRIES}*"):
        with contextlib.suppress(UserError):  # locked: another preflight is at work
            if locks := _lock(old):
                shutil.rmtree(old, ignore_errors=True)
                for lock in locks:
                    lock.close()
    folder = Path(tempfile.mkdtemp(prefix=TRIES, dir=output_dir))
    locks = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for lock in locks:
            lock.close()


def _step(lines: list[dict], device_bytes: int | None) -> Check:
    """What the first steps have shown."""
    bad = [line for line in lines if line["loss"] is None or line["grad_norm"] is None]
    if bad:
        remedy = "Lower optimizer.lr, lengthen the warm-up or try precision=fp32"
        return Check("a real step", "failed", f"step {bad[0]['step']}: loss or gradient is not finite. {remedy}")
    losses = ", ".join(f"{line['loss']:.3f}" for line in lines)
    of = f" of {device_bytes / GIB:.0f}" if device_bytes else ""
    memory = f"{lines[-1]['peak_memory_gib']:.2f}{of} GiB"
    return Check(
        "a real step",
        "passed",
        f"losses {losses}; gradient norm {lines[-1]['grad_norm']:.2f}; peak memory {memory}; "
        f"{_seconds(_typical(lines)):.2f} s per step",
    )


def _typical(lines: list[dict]) -> dict:
    """The line of the step in the middle, by time, of those in which nothing begins and nothing is saved."""
    return sorted(lines[1:-1], key=_seconds)[(len(lines) - 2) // 2]


def _seconds(line: dict) -> float:
    """Seconds of the step that a line is of."""
    return line["tokens"] / line["step"] / line["tokens_per_second"]


def _repeated(trial: Trial, checkpoint_bytes: int, deterministic: bool, tell: Callable[[str], None]) -> Check:
    """Whether the run resumes and makes its last step once more."""
    try:
        names = trial.repeat()
    except UserError as error:
        return Check("checkpoint", "failed", f"the run does not resume: {error}")
    step, taken = trial.past + STEPS, _amount(checkpoint_bytes)
    if not names:
        return Check("checkpoint", "passed", f"saved ({taken}), loaded, and step {step} repeated to the last bit")
    shown = "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
    differs = f"step {step}, resumed from step {step - 1}, differs: {shown}"
    if deterministic:
        return Check("checkpoint", "failed", f"{differs}. A resumed run would go another way")
    # Kernels of a GPU add up in any order. Whether it is that, or something a checkpoint lacks, shows without them.
    tell("the same with deterministic=true, as some kernels do not repeat their last bits")
    again = replace(trial, folder=trial.folder.with_name("deterministic"), deterministic=True)
    try:
        again.steps()
        names = again.repeat()
    except UserError as error:
        return Check("checkpoint", "failed", f"{differs}; and deterministic=true, which would show why, ends: {error}")
    if names:
        return Check("checkpoint", "failed", f"{differs}; with deterministic=true, too. A resumed run goes another way")
    return Check(
        "checkpoint",
        "passed",
        f"saved ({taken}), loaded; step {step} is repeated to the last bit with deterministic=true. Without it, as the "
        "config has it, some kernels round in another order each time",
    )


def _data(config: Any, train: Corpus, resumed: Any | None) -> Check:
    """Whether the text is that of the checkpoint to resume from. That it fills a row, the step has shown."""
    if resumed:
        try:
            pass
        except UserError as error:
            return Check("data", "failed", str(error))
    of = f"; the corpus of {resumed.path}" if resumed and config.resume == "auto" else ""
    return Check("data", "passed", f"{train.num_documents:,} documents, {train.num_tokens:,} tokens{of}")


def _validation(config: Any, folder: Path) -> Check:
    """Whether there is something to evaluate on."""
    if not config.eval_every:
        return Check("validation", "skipped", "eval_every is null")
    try:
        corpus = open_corpus(folder)
    except UserError as error:
        return Check("validation", "failed", f"eval_every={config.eval_every}, and: {error}")
    rows = (PackedDataset if config.data.packing else PaddedDataset)(corpus, config.seq_len, pad_id=0)
    return Check("validation", "passed", f"{rows.num_rows:,} rows, {corpus.num_tokens:,} tokens")


def _budget(config: Any, rows: PackedDataset | PaddedDataset) -> tuple[Check, int | None]:
    """How often each row is seen, and the run's steps. The schedule of so many, which the trial replaces, is made."""
    try:
        steps = resolve_max_steps(
            rows,
            config.global_batch_size,
            max_steps=config.max_steps,
            total_tokens=config.total_tokens,
            epochs=config.epochs,
        )
        import torch

        build(config.lr_scheduler, optimizer=torch.optim.SGD([torch.zeros(1)]), max_steps=steps)
    except UserError as error:
        return Check("budget", "failed", str(error)), None
    epochs = steps * config.global_batch_size / rows.num_rows
    said = f"{steps:,} steps see the {rows.num_rows:,} rows of the corpus {epochs:,.2f} times"
    if epochs > MANY_EPOCHS:
        said += (
            f". Warning: more than {MANY_EPOCHS} times teaches little; more text, or a smaller budget, would be better"
        )
    return Check("budget", "passed", said), steps


def _time(steps: int, line: dict) -> Check:
    """How long the run will take, without evaluation and what saving adds."""
    if steps <= 0:
        return Check("time", "passed", "the run has made all its steps already")
    seconds = _seconds(line)
    total = steps * seconds
    long = f"{total / 3600:,.1f} hours" if total >= 3600 else f"{total / 60:.1f} minutes"
    mfu = f", MFU {line['mfu']:.1%}" if line.get("mfu") else ""
    return Check(
        "time", "passed", f"{steps:,} steps of {seconds:.2f} s: {long}{mfu}; evaluation and saving come on top"
    )


def _amount(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"
