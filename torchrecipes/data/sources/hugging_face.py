"""A source over Hugging Face `datasets`: a dataset of the hub, a local folder, or what `save_to_disk` wrote.

No code of a dataset is ever run. A streamed dataset is read as it comes and never held; one that is on disk is a memory
map, of which several threads can tokenize parts.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchrecipes.data.sources.records import BadRecord, Document, ReadStats, documents
from torchrecipes.data.sources.text_and_jsonl import text_field
from torchrecipes.errors import UserError

PART = 100_000  # rows of one part
BATCH = 1_000  # rows at once
ON_BAD_RECORD = ("stop", "skip")


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
        name: of a dataset on the hub, or a folder: what `save_to_disk` wrote, or one of Parquet or JSON-lines files.
        config: of the dataset, where it has several: FineWeb's `sample-10BT`.
        split: also a part of one, as in `train[:10%]` (not when streaming, nor of what `save_to_disk` wrote).
        streaming: read rows as they arrive instead of downloading all of them first.
        text_column: the column that holds the text.
        data_files: some files of the dataset, see `datasets.load_dataset`.
        revision: of the dataset on the hub: a commit, so that it is the same tomorrow.
        on_bad_record: "stop" raises at a row without a text; "skip" counts and reports it. Empty texts are always
            counted and skipped.
        max_document_chars: a longer text becomes several documents, cut at white space where there is any.
        max_documents: rows to read at most, from the first; None: all.

    Raises:
        UserError: no such dataset, config, split or column, no network, or a value that is none of these; and, when the
            source is read, what `on_bad_record` says.
    """
    if on_bad_record not in ON_BAD_RECORD:
        raise UserError(f"data.source.on_bad_record is '{on_bad_record}'; {_one_of(on_bad_record, ON_BAD_RECORD)}")
    if max_document_chars < 100:
        raise UserError(f"data.source.max_document_chars is {max_document_chars}; the least is 100")
    if max_documents is not None and max_documents < 1:
        raise UserError(f"data.source.max_documents is {max_documents}; it is 1 or more, or null for all")
    options = Options(
        name,
        config,
        split,
        streaming,
        text_column,
        data_files,
        revision,
        on_bad_record,
        max_document_chars,
        max_documents,
    )
    _check(options)
    rows = _open(options)
    columns = rows.column_names
    if columns and text_column not in columns:
        raise UserError(
            f"data.source.text_column: {name} has no column '{text_column}'; {_one_of(text_column, columns)}"
        )
    if streaming:
        return DatasetSource(options, _stated_fingerprint(options), 0, max_documents)
    count = len(rows) if max_documents is None else min(len(rows), max_documents)
    if not count:
        raise UserError(f"data.source: {options.label} is empty")
    return DatasetSource(options, _fingerprint(options, rows), 0, count)


@dataclass(frozen=True)
class Options:
    """What is read, and how: the arguments of `datasets`."""

    name: str
    config: str | None
    split: str
    streaming: bool
    text_column: str
    data_files: str | list[str] | None
    revision: str | None
    on_bad_record: str
    max_document_chars: int
    max_documents: int | None

    @property
    def label(self) -> str:
        """The dataset for people."""
        return ", ".join(filter(None, (self.name, self.config, self.split)))


@dataclass
class DatasetSource:
    """A source: the rows from `start` up to `stop` of a dataset (None, of a streamed one: to its end).

    Made by `datasets`.
    """

    options: Options
    content: str
    start: int
    stop: int | None
    report: ReadStats = field(default_factory=ReadStats, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The dataset, and which rows of it."""
        label = self.options.label
        return label if self.options.streaming else f"{label}, rows {self.start:,} to {self.stop:,}"

    @property
    def num_bytes(self) -> int:
        """Not known before it is read: 0."""
        return 0

    @property
    def fingerprint(self) -> str:
        """Of the options, and of what the dataset says of its content without being read."""
        text = json.dumps([vars(self.options), self.content, self.start, self.stop], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def parts(self) -> "list[DatasetSource]":
        """Return a source for every so many rows; a streamed dataset is one part."""
        if self.options.streaming:
            return [self]
        return [
            replace(self, start=first, stop=min(first + PART, self.stop), report=ReadStats())
            for first in range(self.start, self.stop, PART)
        ]

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents, and begin a new report.

        Raises:
            UserError: a row without a text and `on_bad_record` is "stop"; the dataset cannot be read.
        """
        self.report = ReadStats()
        return documents(self._read(), self.report, stop=self.options.on_bad_record == "stop")

    def _read(self) -> Iterator[Document | BadRecord]:
        options = self.options
        rows = _open(options)
        if options.streaming:
            rows = rows if self.stop is None else rows.take(self.stop)
            texts = (row.get(options.text_column) for row in rows)
        else:
            rows = rows.select(range(self.start, self.stop)).select_columns(options.text_column).with_format("arrow")
            texts = (
                text for batch in rows.iter(batch_size=BATCH) for text in batch.column(options.text_column).to_pylist()
            )
        for number, text in enumerate(texts, start=self.start + 1):
            yield from text_field(text, f"{options.label}:{number}", options.max_document_chars)


def _check(options: Options) -> None:
    """That no option is one which `datasets` would pass over in silence, or refuse in words that help nobody.

    Raises:
        UserError: one is.
    """
    name, folder = options.name, Path(options.name)
    if folder.is_file():
        raise UserError(
            f"data.source.name: {name} is a file. Give its folder, {folder.parent}, or read the file with "
            f"data.source._component_=torchrecipes.data.sources.files data.source.path={name}"
        )
    first_rows = "for the first rows of a split, leave the brackets out and set data.source.max_documents"
    if options.streaming and "[" in options.split:
        raise UserError(f"data.source.split: {options.split} is a slice, which streaming=true has not: {first_rows}")
    if not _is_saved(folder):
        return
    given = [key for key in ("config", "data_files", "revision") if getattr(options, key) is not None]
    if given:
        keys = ", ".join(f"data.source.{key}" for key in given)
        raise UserError(f"{keys}: {name} was written by save_to_disk, which has none of these. Remove what is set.")
    if "[" in options.split:
        raise UserError(
            f"data.source.split: {name} was written by save_to_disk, of which no slice is read: {first_rows}"
        )
    if options.split != "train" and not (folder / "dataset_dict.json").is_file():
        raise UserError(
            f"data.source.split: {name} holds one dataset without splits, so no '{options.split}' either. Leave "
            "split out, or give the folder of the other split."
        )


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder: several splits, or one."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _open(options: Options) -> Any:
    """The split, with columns; nothing of it is read.

    Raises:
        UserError: see `datasets`.
    """
    import datasets as library  # 0.6 s, which other sources need not wait for

    library.disable_progress_bars()
    try:
        if _is_saved(Path(options.name)):
            found = library.load_from_disk(options.name)
            if isinstance(found, library.DatasetDict):
                if options.split not in found:
                    raise UserError(_no_split(options, list(found)))
                found = found[options.split]
            return found.to_iterable_dataset() if options.streaming else found
        return library.load_dataset(
            options.name,
            options.config,
            split=options.split,
            data_files=options.data_files,
            revision=options.revision,
            streaming=options.streaming,
        )
    except (ConnectionError, library.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"data.source.name: {options.name} cannot be had: {_first_line(error)}. Without a network, download it "
            f"where there is one, e.g. `hf download --repo-type dataset {options.name} --local-dir my_data`, and give "
            "the folder."
        ) from None
    except (ValueError, FileNotFoundError, OSError) as error:
        if "split" in str(error).lower():
            raise UserError(_no_split(options, None, error)) from None
        raise UserError(f"data.source: {options.label} cannot be read: {_first_line(error)}") from None


def _no_split(options: Options, splits: list[str] | None, error: Exception | None = None) -> str:
    known = _one_of(options.split, splits) if splits else _first_line(error)
    return f"data.source.split: {options.name} has no split '{options.split}': {known}"


def _one_of(name: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]}?" if near else f"it is one of {', '.join(valid)}"


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _fingerprint(options: Options, rows: Any) -> str:
    """What a dataset on disk says of its content."""
    if Path(options.name).is_dir():
        return _stated_fingerprint(options)
    info = rows.info
    return json.dumps([len(rows), info.dataset_size, info.download_size, str(info.version), str(rows.features)])


def _stated_fingerprint(options: Options) -> str:
    """Of a folder: its files, their sizes and times of change. Of a dataset of the hub nothing beside its name."""
    folder = Path(options.name)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return json.dumps([[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files])
