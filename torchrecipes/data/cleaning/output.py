"""The output folder of `clean` and `decontaminate`: what it holds, and whose it is.

documents/part-*.jsonl.zst     the documents that were kept, one object per line
report.json, .md, .html        what was removed, and why
cleaning.json                  the settings, and whether all is done
.work                          what an interrupted job continues from; removed at the end
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrecipes.atomic_write import check_writable, write_atomically
from torchrecipes.data.cleaning.report import to_html, to_markdown
from torchrecipes.errors import UserError
from torchrecipes.file_lock import lock_folder

SETTINGS_FILE = "cleaning.json"


@dataclass(frozen=True)
class Output:
    """An output folder."""

    folder: Path

    @property
    def documents(self) -> Path:
        """Where the documents are."""
        return self.folder / "documents"

    @property
    def work(self) -> Path:
        """Where unfinished work is."""
        return self.folder / ".work"

    def open(self, settings: dict[str, Any]) -> bool:
        """Make the folder for a job with these settings, or continue in it.

        Returns:
            Whether all is done already.

        Raises:
            UserError: it holds the output of another job, or files of something else (code `other_output`), or cannot
                be written.
        """
        check_writable(self.folder, key="--output")
        file = self.folder / SETTINGS_FILE
        hint = f"Give another --output, or delete {self.folder}."
        if not file.exists():
            if self.folder.exists() and any(entry.name != ".lock" for entry in self.folder.iterdir()):
                problem = f"{self.folder} holds other files, and no {SETTINGS_FILE}"
                raise UserError(problem, key="--output", hint=hint, code="other_output")
            self.documents.mkdir(parents=True, exist_ok=True)
            write_atomically(file, [json.dumps({**settings, "complete": False}, indent=2).encode()])
            return False
        try:
            saved = dict(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{file} cannot be read ({error})", key="--output", hint=hint, code="other_output"
            ) from None
        settings = json.loads(json.dumps(settings))
        differ = [key for key in settings if saved.get(key) != settings[key]]
        if differ:
            lines = [f"{key}: {saved.get(key)} saved, {settings[key]} current" for key in differ]
            problem = "\n  ".join([f"{self.folder} holds the output of another job:", *lines])
            raise UserError(problem, key="--output", hint=hint, code="other_output")
        if saved["complete"]:
            shutil.rmtree(self.work, ignore_errors=True)
        return saved["complete"]

    def finish(self, settings: dict[str, Any]) -> None:
        """Say that all is done, and remove the unfinished work."""
        write_atomically(self.folder / SETTINGS_FILE, [json.dumps({**settings, "complete": True}, indent=2).encode()])
        for leftover in self.documents.glob(".*.tmp"):  # of jobs that were killed
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)

    @contextmanager
    def locked(self, job: str, wait: bool = False) -> Iterator[None]:
        """Keep other processes from doing the same job at the same time."""
        folder = self.work / "locks" / job
        folder.mkdir(parents=True, exist_ok=True)
        held = lock_folder(folder, wait=wait)
        try:
            yield
        finally:
            for file in held:
                file.close()

    def write_report(self, report: dict[str, Any]) -> None:
        """Write the report in its three forms."""
        for name, text in (
            ("report.md", to_markdown(report)),
            ("report.html", to_html(report)),
            ("report.json", json.dumps(report, indent=2, ensure_ascii=False)),
        ):
            write_atomically(self.folder / name, [text.encode()])

    def read_report(self) -> dict[str, Any]:
        """Return the report of a job that is done."""
        return json.loads((self.folder / "report.json").read_text("utf-8"))


def write_lines(file: Path, lines: Iterable[bytes]) -> None:
    """Write JSON lines, compressed with zstd, all or nothing; without lines, no file."""
    import pyarrow

    data = b"".join(line + b"\n" for line in lines)
    if data:
        write_atomically(file, [pyarrow.Codec("zstd", compression_level=3).compress(data, asbytes=True)])


def read_lines(file: Path) -> list[bytes]:
    """Return the lines that `write_lines` wrote; none where there is no file."""
    import pyarrow

    if not file.exists():
        return []
    with pyarrow.input_stream(str(file), compression="zstd") as stream:
        return stream.read().split(b"\n")[:-1]


def check_shards(shard_index: int, num_shards: int, stage: str | None, stages: Sequence[str]) -> None:
    """Check the arguments of one of several jobs.

    Raises:
        UserError: a number is out of range (code `out_of_range`), several jobs without a stage (`missing_stage`), or a
            stage that the work does not have (`unknown_stage`).
    """
    order = ", then ".join(stages)
    if not 0 <= shard_index < num_shards:
        problem = f"{shard_index} is not the number of one of {num_shards} jobs"
        raise UserError(problem, key="--shard-index", hint="Jobs are numbered from 0.", code="out_of_range")
    if stage is None and num_shards > 1:
        hint = f"Run {order}; each when all jobs of the one before have ended, merge as one job."
        raise UserError("several jobs do one stage after the other", key="--stage", hint=hint, code="missing_stage")
    if stage is not None and stage not in stages:
        raise UserError(f"there is no stage '{stage}' here", key="--stage", hint=f"Run {order}.", code="unknown_stage")


def run_stages(output: Output, work: dict[str, Callable[[], None]], stages: Sequence[str], job: str) -> None:
    """Do the work of some stages, one after the other, while no other process does the same job's."""
    try:
        for stage in stages:
            with output.locked(f"{stage}-{job}"):
                work[stage]()
    except KeyboardInterrupt:
        done = len(list(output.work.glob("*/*.json")))
        print(f"\nInterrupted. {done} finished pieces are kept; run the same command to continue.", file=sys.stderr)
        raise
