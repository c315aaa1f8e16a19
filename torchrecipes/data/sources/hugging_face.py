"""`hf_dataset`: a Hugging Face dataset as a source, from the hub, a folder of files, or a folder of `save_to_disk`.

No code of a dataset is ever run. A streamed dataset is read as it arrives and never held; one on disk is a memory map.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.sources.record_columns import RecordColumns
from torchrecipes.data.sources.records import (
    BadRecord,
    Cursor,
    Document,
    ReadStats,
    check_options,
    content_checksum,
    documents,
)
from torchrecipes.data.sources.tables import row_values
from torchrecipes.data.sources.text_column import TextColumn, text_column
from torchrecipes.errors import UserError

BATCH = 1_000  # rows read at once


@dataclass
class hf_dataset:
    """Documents of a dataset: one column of one split.

    Args:
        name: a dataset on the hub, or a folder: what `save_to_disk` wrote, or one of Parquet or JSON-lines files.
        config: the configuration, where the dataset has several: FineWeb's `sample-10BT`.
        split: also a part of one, as in `train[:10%]` (not with `streaming`, nor for a folder of `save_to_disk`).
        streaming: read rows as they arrive instead of downloading all of them first.
        text_column: the column that holds the text; `data.text` is a field of a column of structs.
        messages_column: column of chat messages in place of a text, see `files`.
        chat_template: folder of a tokenizer that has one, or a Jinja file.
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

    name: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    text_column: str = "text"
    messages_column: str | None = None
    chat_template: str | None = None
    data_files: str | list[str] | None = None
    revision: str | None = None
    on_bad_record: str = "stop"
    max_document_chars: int = 1_000_000
    max_documents: int | None = None
    num_bytes: int = field(default=0, init=False)  # not known before the rows are read
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)
    _cursor: Cursor = field(default_factory=Cursor, init=False, repr=False, compare=False)
    _column: TextColumn | RecordColumns = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        check_options(self.on_bad_record, self.max_document_chars, self.max_documents)
        limit = self.max_document_chars
        self._column = text_column(self.text_column, self.messages_column, self.chat_template, limit)
        self._check()
        rows = self._open()
        if rows.column_names:
            self._paths(rows)
        if not self.streaming and not len(rows):
            raise _error("name", f"{self._label} is empty", None, "no_documents")
        self.fingerprint = self._fingerprint(rows)

    @property
    def _label(self) -> str:
        return ", ".join(filter(None, (self.name, self.config, self.split)))

    @property
    def _is_saved(self) -> bool:
        # `save_to_disk` wrote the folder.
        return any(Path(self.name, file).is_file() for file in ("dataset_dict.json", "state.json"))

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yield the documents, with a new report.

        Args:
            position: what `position` returned, for a source with the same fingerprint; None: from the first document.

        Raises:
            UserError: a row without a text and `on_bad_record` is "stop"; the dataset cannot be read.
        """
        self.report, self._cursor = ReadStats(), Cursor(position)
        stop, remedy = self.on_bad_record == "stop", self._column.remedy
        return documents(self._read(), self.report, stop, self._cursor, remedy=remedy)

    def splits(self) -> list[str]:
        """Return the names of the splits that the dataset has.

        Raises:
            UserError: the dataset cannot be found.
        """
        import datasets

        if self._is_saved:
            found = datasets.load_from_disk(self.name)
            return list(found) if isinstance(found, datasets.DatasetDict) else []
        try:
            options = {"data_files": self.data_files, "revision": self.revision}
            return datasets.get_dataset_split_names(self.name, self.config, **options)
        except Exception as error:
            raise self._unreadable(error) from error

    def records(self, columns: RecordColumns) -> "hf_dataset":
        """Return this dataset as a source of records with several fields.

        Raises:
            UserError: it has no such column (code `no_such_column`).
        """
        source = copy.copy(self)
        source._column, source.report = columns, ReadStats()
        rows = source._open()
        if rows.column_names:
            source._paths(rows)
        source.fingerprint = source._fingerprint(rows)
        return source

    def class_names(self, column: str) -> list[str] | None:
        """Return the names of the classes of a column of `ClassLabel`s, in their order; None for other columns."""
        names = getattr((self._open().features or {}).get(column), "names", None)
        return None if names is None else list(names)

    def position(self) -> dict[str, Any]:
        """Return the position after the last document that was read: a row, and of a stream its `state_dict`."""
        return self._cursor.position

    def _read(self) -> Iterator[Document | BadRecord]:
        first = self._cursor.place.get("row", 0)
        texts = self._texts(self._open(), first)
        for number in count(first + 1):
            # Nothing but `datasets` and `pyarrow` runs in here, so whatever they raise is about the data.
            try:
                text = next(texts)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreadable(error) from error
            yield from self._column.documents(text, f"{self._label}:{number}")

    def _texts(self, rows: Any, first: int) -> Iterator[Any]:
        if self.streaming:
            rows = rows if self.max_documents is None else rows.take(self.max_documents)
            if first:
                rows.load_state_dict(self._cursor.place["state"])
            for number, row in enumerate(rows, first):
                try:
                    yield self._column.of(row)
                except KeyError:
                    yield None
                if (number + 1) % BATCH == 0:  # a copy of the state takes longer than a row
                    self._cursor.at(row=number + 1, state=rows.state_dict())
            return
        rows = rows.select(range(first, min(len(rows), self.max_documents or len(rows))))
        paths = self._paths(rows)
        columns = list(dict.fromkeys(path[0] for path in paths))
        batches = rows.select_columns(columns).with_format("arrow").iter(batch_size=BATCH)
        for batch in batches:
            self._cursor.at(row=first)
            yield from row_values(batch, paths, self._column)
            first += len(batch)

    def _paths(self, rows: Any) -> list[list[str]]:
        """Return, for every column to read, its name and those of the struct fields in it that lead to the value.

        Raises:
            UserError: there is no such column (code `no_such_column`).
        """
        return [self._path(rows, name) for name in self._column.names]

    def _path(self, rows: Any, name: str) -> list[str]:
        columns = rows.column_names
        if name in columns:
            return [name]
        for dot in (index for index, character in enumerate(name) if character == "."):
            if name[:dot] in columns:
                return [name[:dot], *name[dot + 1 :].split(".")]
        if isinstance(self._column, RecordColumns):
            key = self._column.key_of(name)
        else:
            key = "text_column" if self._column.template is None else "messages_column"
        hint = did_you_mean(name, columns, "Its columns are")
        raise _error(key, f"{self.name} has no column '{name}'", hint, "no_such_column")

    def _check(self) -> None:
        # Options that `datasets` ignores silently, or refuses without saying what to do.
        path = Path(self.name)
        if path.is_file():
            hint = f"Give its folder, {path.parent}, or use _component_=torchrecipes.data.sources.files path={path}"
            raise _error("name", f"{path} is a file", hint)
        first_rows = "For the first rows of a split, leave the brackets out and set max_documents."
        is_slice = "[" in self.split
        if self.streaming and is_slice:
            raise _error("split", f"{self.split} is a slice, which cannot be streamed", first_rows)
        if not self._is_saved:
            return
        given = [key for key in ("config", "data_files", "revision") if getattr(self, key) is not None]
        if given:
            raise _error(given[0], f"{path} was written by save_to_disk", f"Remove {', '.join(given)}.")
        if is_slice:
            raise _error("split", f"{path} was written by save_to_disk, so {self.split} cannot be read", first_rows)
        if self.split != "train" and not (path / "dataset_dict.json").is_file():
            hint = "Leave split out, or give the folder of the other split."
            raise _error("split", f"{path} holds one dataset without splits, so no '{self.split}'", hint)

    def _open(self) -> Any:
        """Open the split; no row is read, except by `datasets` itself where it converts files first."""
        import datasets  # 0.6 s, which other sources need not wait for

        datasets.disable_progress_bars()
        try:
            if self._is_saved:
                found = datasets.load_from_disk(self.name)
                if isinstance(found, datasets.DatasetDict):
                    if self.split not in found:
                        hint = did_you_mean(self.split, found, "Its splits are")
                        raise _error("split", f"{self.name} has no split '{self.split}'", hint, "no_such_split")
                    found = found[self.split]
                return found.to_iterable_dataset() if self.streaming else found
            options = {"data_files": self.data_files, "revision": self.revision, "streaming": self.streaming}
            return datasets.load_dataset(self.name, self.config, split=self.split, **options)
        except UserError:
            raise
        except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
            hint = (
                "Without a network, download it where there is one, e.g. `hf download --repo-type dataset "
                f"{self.name} --local-dir my_data`, and give the folder."
            )
            problem = f"{self.name} cannot be found: {_first_line(error)}"
            raise _error("name", problem, hint, "no_such_dataset") from None
        except Exception as error:
            if isinstance(error, ValueError) and "split" in str(error).lower():
                problem = f"{self.name} has no split '{self.split}'"
                raise _error("split", problem, _first_line(error), "no_such_split") from None
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UserError:
        """Return the error in place of one of `datasets`, with its cause: usually files with different columns."""
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        hint = None
        if Path(self.name).is_dir() and not self._is_saved:
            hint = (
                "If its files have different columns, read them with _component_=torchrecipes.data.sources.files "
                f"path={self.name}, which needs the text column only."
            )
        return _error("name", f"{self._label} cannot be read: {_first_line(cause)}", hint, "unreadable_dataset")

    def _fingerprint(self, rows: Any) -> str:
        # Of a folder its content, wherever it is; of a dataset on the hub what is known without reading it.
        described = [self.config, self.split, self.text_column, self.data_files, self.revision]
        described += [self.max_document_chars, self.max_documents]
        if isinstance(self._column, RecordColumns):
            described.append(self._column.name)
        elif self._column.template is not None:
            described += [self._column.name, self._column.template.fingerprint]
        folder = Path(self.name)
        if folder.is_dir():
            # Hidden folders hold what tools note on their downloads.
            names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
            names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
            described += [[name.as_posix(), content_checksum(folder / name)] for name in names]
        else:
            described.append(self.name)
            if not self.streaming:
                info = rows.info
                described += [len(rows), info.dataset_size, info.download_size, str(info.version), str(rows.features)]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _error(key: str, problem: str, hint: str | None, code: str = "invalid_value") -> UserError:
    return UserError(problem, key=key, hint=hint, code=code)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
