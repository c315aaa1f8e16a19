"""`run_result`: the result of a run as a folder of its own, without what only resuming needs."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrecipes.checkpoint.find import step_of
from torchrecipes.manifest import HIDDEN, flush, fsync, write_manifest
from torchrecipes.model_folder import FINAL

ONLY_FOR_RESUMING = ("optimizer", "state", "state.json", "rng.safetensors", "manifest.json")


@contextmanager
def run_result(checkpoint: Path, output_dir: Path) -> Iterator[Path]:
    """Makes `<output_dir>/model` of a checkpoint; the folder of an earlier call is replaced at once.

        with run_result(checkpointer.saved, run.output_dir) as folder:
            write_model_card(folder, ...)

    Call it on one rank.

    Args:
        checkpoint: of a run.
        output_dir: the run's folder.

    Yields:
        The folder under another name. What is written into it becomes part of the result; an error leaves the earlier
        result as it was.
    """
    hidden, target = output_dir / f"{HIDDEN}{FINAL}", output_dir / FINAL
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, hidden, ignore=lambda _, names: [n for n in names if n in ONLY_FOR_RESUMING])
        yield hidden
        names = [str(file.relative_to(hidden)) for file in hidden.rglob("*") if file.is_file()]
        write_manifest(hidden, step_of(checkpoint), flush(hidden, names))
        if target.exists():
            old = output_dir / f"{HIDDEN}old-{FINAL}"
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(hidden, target)
        fsync(output_dir)
        shutil.rmtree(output_dir / f"{HIDDEN}old-{FINAL}", ignore_errors=True)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
