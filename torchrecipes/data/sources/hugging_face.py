"""`hf_dataset`: a Hugging Face dataset as a source, from the hub, a folder of files, or a folder of `save_to_disk`.

No code of a dataset is ever run. A streamed dataset is read as it arrives and never held; one on disk is a memory map.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.sources.records import BadRecord, Document, ReadStats, check_options, content_checksum, documents
from torchrecipes.data.sources.text_and_jsonl import text_field
from torchrecipes.errors import UserError

BATCH = 1_000  # rows read at once


def hf_dataset(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    text_column: str = "text",
    data_files: str | list[str] | None = None,
    revision: str | None = None,
    on_bad_record: str = "stop",
    max_document_chars: int = 1_000_000,
    max_documents: int | None = None,
) -> "DatasetSource":
    """Return the documents of a dataset: one column of one split.

    Args:
        name: a dataset on the hub, or a folder: what `save_to_disk` wrote, or one of Parquet or JSON-lines files.
        config: the configuration, where the dataset has several: FineWeb's `sample-10BT`.
        split: also a part of one, as in `train[:10%]` (not with `streaming`, nor for a folder of `save_to_disk`).
        streaming: read rows as they arrive instead of downloading all of them first.
        text_column: the column that holds the text.
        data_files: some files of the dataset, see `datasets.load_dataset`.
        revision: a commit of the dataset on the hub, so that it is the same tomorrow.
        on_bad_record: "stop" raises at a row without a text; "skip" counts and reports it. Empty texts are always
            counted and skipped.
        max_document_chars: a longer text becomes several documents, cut at white space where there is any.
        max_documents: rows to read at most, from the first; None: all.

    Raises:
        UserError: no such dataset, configuration, split or column, no network, or an invalid value; and, when the
            source is read, what `on_bad_record` says.
    """
    check_options(on_bad_record, max_document_chars)
    if max_documents is not None and max_documents < 1:
        raise _error("max_documents", f"{max_documents} is less than 1", "Set 1 or more, or null for all.")
    options = Options(
        name, config, split, streaming, text_column, data_files, revision, max_document_chars, max_documents
    )
    options.check()
    rows = _open(options)
    columns = rows.column_names
    if columns and text_column not in columns:
        hint = did_you_mean(text_column, columns, "Its columns are")
        raise _error("text_column", f"{name} has no column '{text_column}'", hint, "no_such_column")
    count = max_documents
    if not streaming:
        count = len(rows) if max_documents is None else min(len(rows), max_documents)
        if not count:
            raise _error("name", f"{options.label} is empty", None, "no_documents")
    return DatasetSource(options, _fingerprint(options, rows), count, on_bad_record)


@dataclass(frozen=True)
class Options:
    """The arguments of `hf_dataset` that decide what is read."""

    name: str
    config: str | None
    split: str
    streaming: bool
    text_column: str
    data_files: str | list[str] | None
    revision: str | None
    max_document_chars: int
    max_documents: int | None

    @property
    def label(self) -> str:
        """The dataset, for messages."""
        return ", ".join(filter(None, (self.name, self.config, self.split)))

    @property
    def is_saved(self) -> bool:
        """Whether `save_to_disk` wrote the folder."""
        return any(Path(self.name, file).is_file() for file in ("dataset_dict.json", "state.json"))

    def check(self) -> None:
        """Refuse options that `datasets` ignores silently, or refuses without saying what to do.

        Raises:
            UserError: there is one (code `invalid_value`).
        """
        name, path = self.name, Path(self.name)
        if path.is_file():
            hint = f"Give its folder, {path.parent}, or use _component_=torchrecipes.data.sources.files path={name}"
            raise _error("name", f"{name} is a file", hint)
        first_rows = "For the first rows of a split, leave the brackets out and set max_documents."
        is_slice = "[" in self.split
        if self.streaming and is_slice:
            raise _error("split", f"{self.split} is a slice, which cannot be streamed", first_rows)
        if not self.is_saved:
            return
        given = [key for key in ("config", "data_files", "revision") if getattr(self, key) is not None]
        if given:
            raise _error(given[0], f"{name} was written by save_to_disk", f"Remove {', '.join(given)}.")
        if is_slice:
            problem = f"{name} was written by save_to_disk, so {self.split} cannot be read"
            raise _error("split", problem, first_rows)
        if self.split != "train" and not (path / "dataset_dict.json").is_file():
            hint = "Leave split out, or give the folder of the other split."
            raise _error("split", f"{name} holds one dataset without splits, so no '{self.split}'", hint)


@dataclass
class DatasetSource:
    """A source made by `hf_dataset`: the first `count` rows of a dataset (None, of a streamed one: all).

    `fingerprint` is a hash of the options, and of the content of a folder or what the hub says about the dataset.
    """

    options: Options
    fingerprint: str
    count: int | None
    on_bad_record: str
    report: ReadStats = field(default_factory=ReadStats, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The dataset."""
        return self.options.label

    @property
    def num_bytes(self) -> int:
        """Not known before the rows are read: 0."""
        return 0

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents, with a new report.

        Raises:
            UserError: a row without a text and `on_bad_record` is "stop"; the dataset cannot be read.
        """
        self.report = ReadStats()
        return documents(self._read(), self.report, stop=self.on_bad_record == "stop")

    def _read(self) -> Iterator[Document | BadRecord]:
        options = self.options
        rows = _open(options)
        if options.streaming:
            rows = rows if self.count is None else rows.take(self.count)
            texts = (row.get(options.text_column) for row in rows)
        else:
            rows = rows.select(range(self.count)).select_columns(options.text_column).with_format("arrow")
            batches = rows.iter(batch_size=BATCH)
            texts = (text for batch in batches for text in batch.column(options.text_column).to_pylist())
        for number, text in enumerate(_readable(texts, options), start=1):
            yield from text_field(text, f"{options.label}:{number}", options.max_document_chars)


def _readable(texts: Iterator[Any], options: Options) -> Iterator[Any]:
    """Yield `texts`; nothing but `datasets` and `pyarrow` runs inside, so whatever they raise is about the data."""
    while True:
        try:
            text = next(texts)
        except StopIteration:
            return
        except Exception as error:
            raise _cannot_be_read(options, error) from error
        yield text


def _open(options: Options) -> Any:
    """Open the split; no row is read, except by `datasets` itself where it converts files first.

    Raises:
        UserError: see `hf_dataset`.
    """
    import datasets  # 0.6 s, which other sources need not wait for

    datasets.disable_progress_bars()
    try:
        if options.is_saved:
            found = datasets.load_from_disk(options.name)
            if isinstance(found, datasets.DatasetDict):
                if options.split not in found:
                    hint = did_you_mean(options.split, found, "Its splits are")
                    raise _error("split", f"{options.name} has no split '{options.split}'", hint, "no_such_split")
                found = found[options.split]
            return found.to_iterable_dataset() if options.streaming else found
        return datasets.load_dataset(
            options.name,
            options.config,
            split=options.split,
            data_files=options.data_files,
            revision=options.revision,
            streaming=options.streaming,
        )
    except UserError:
        raise
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        hint = (
            "Without a network, download it where there is one, e.g. `hf download --repo-type dataset "
            f"{options.name} --local-dir my_data`, and give the folder."
        )
        raise _error("name", f"{options.name} cannot be found: {_first_line(error)}", hint, "no_such_dataset") from None
    except Exception as error:
        if isinstance(error, ValueError) and "split" in str(error).lower():
            problem = f"{options.name} has no split '{options.split}'"
            raise _error("split", problem, _first_line(error), "no_such_split") from None
        raise _cannot_be_read(options, error) from error


def _cannot_be_read(options: Options, error: Exception) -> UserError:
    """Return the error in place of one of `datasets`, with its cause: files with other columns are the usual one."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    hint = None
    if Path(options.name).is_dir() and not options.is_saved:
        hint = (
            "If its files have different columns, read them with _component_=torchrecipes.data.sources.files "
            f"path={options.name}, which needs the text column only."
        )
    return _error("name", f"{options.label} cannot be read: {_first_line(cause)}", hint, "unreadable_dataset")


def _error(key: str, problem: str, hint: str | None, code: str = "invalid_value") -> UserError:
    return UserError(problem, key=key, hint=hint, code=code)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _fingerprint(options: Options, rows: Any) -> str:
    described, folder = asdict(options) | {"streaming": None}, Path(options.name)
    if folder.is_dir():
        described["name"] = None  # it may be moved
        # Hidden folders hold what tools note on their downloads.
        names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        described["content"] = [[name.as_posix(), content_checksum(folder / name)] for name in names]
    elif not options.streaming:
        info = rows.info
        sizes = [len(rows), info.dataset_size, info.download_size]
        described["content"] = [*sizes, str(info.version), str(rows.features)]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
