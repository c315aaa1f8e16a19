"""Documents, bad records, and the statistics of reading them.

1. A source reads records: files, lines, JSON objects, table rows, docstrings.
2. A record with a text is a `Document`; one without is a `BadRecord` with the reason.
3. `ReadStats` counts both.
4. A `Cursor` knows where reading can start again to get exactly the documents that follow.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.errors import UserError

EMPTY_TEXT = "the text is empty"  # counted, but never an error: there is nothing in it to train on, or to repair
EXAMPLES_PER_REASON = 5
SAMPLES, SAMPLE_BYTES = 8, 1 << 16  # of a file, for its checksum


class Document(NamedTuple):
    """A text and where it comes from: `file:line` (in Parquet, the number of the row), or a name.

    The text is never blank, its line ends are `\\n`, and it can be encoded as UTF-8.
    """

    text: str
    source: str


class BadRecord(NamedTuple):
    """A record, or a file, that gives no document.

    Records are counted by `reason`, which names the kind of fault; `detail` is about this one.
    """

    source: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" + (f": {self.detail}" if self.detail else "")


@dataclass
class ReadStats:
    """Counts of the documents that were read and of the records that were skipped.

    `characters` are Unicode characters. `skipped` and `examples` are by reason; an example is `file:line: detail`.
    `note` says what a reader should know of the documents.
    """

    documents: int = 0
    characters: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""

    def add(self, record: BadRecord) -> None:
        """Count a record that gave no document."""
        self.skipped[record.reason] = self.skipped.get(record.reason, 0) + 1
        examples = self.examples.setdefault(record.reason, [])
        if len(examples) < EXAMPLES_PER_REASON:
            examples.append(f"{record.source}: {record.detail}" if record.detail else record.source)

    def lines(self) -> list[str]:
        """Return a line with the totals, then for every reason its count and examples."""
        lines = [
            f"{self.documents:,} documents, {self.characters:,} characters" + (f" ({self.note})" * bool(self.note))
        ]
        for reason, count in sorted(self.skipped.items(), key=lambda item: -item[1]):
            lines.append(f"skipped {count:,}: {reason}")
            lines += [f"  {example}" for example in self.examples[reason]]
            if count > len(self.examples[reason]):
                lines.append(f"  and {count - len(self.examples[reason]):,} more")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


class Cursor:
    """The position of a reader: a place where reading can start, and the number of records it has given since.

    A reader calls `at` when the record that it will give next starts at such a place; `documents` counts the records
    from there. So a reader names as few places as it likes: the records after the last one are read again and dropped.

    Args:
        position: an earlier `position`, where this reader starts; None: at the beginning.

    Attributes:
        place: arguments of the latest `at`; at first those of the position.
        inside: what is added to every place: which file it is in.
        skip: records to drop before the first one is given.
    """

    def __init__(self, position: dict[str, Any] | None = None):
        self.place = dict(position or {})
        self.skip: int = self.place.pop("records", 0)
        self.documents: int = self.place.pop("documents", 0)
        self.inside: dict[str, Any] = {}
        self.records = 0

    def at(self, **place: Any) -> None:
        """Reading can start at this place; values are strings, numbers, and lists and dicts of these."""
        self.place, self.records = place, 0

    @property
    def position(self) -> dict[str, Any]:
        """The position after the latest record, for JSON; `documents` counts those before it."""
        return {**self.inside, **self.place, "records": self.records, "documents": self.documents}


class Source(Protocol):
    """Documents in an order that is the same every time: `data.source` in a config is one.

    Attributes:
        name: where the documents come from, for messages.
        num_bytes: size of the input in bytes as stored, for the progress bar; 0 if it is not known.
        fingerprint: equal for equal arguments and equal content, wherever the input is and whenever it was written.
        report: counts of the latest iteration so far.
    """

    report: ReadStats

    @property
    def name(self) -> str: ...  # noqa: D102, see above

    @property
    def num_bytes(self) -> int: ...  # noqa: D102

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents; a second iteration reads them again."""
        ...

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yield the documents from a position, which `position` gave, or from the first one."""
        ...

    def position(self) -> dict[str, Any]:
        """Return the position right after the last document that the latest iteration yielded, for JSON."""
        ...


def documents(
    items: Iterable[Document | BadRecord],
    report: ReadStats,
    stop: bool = False,
    cursor: Cursor | None = None,
    max_documents: int | None = None,
    remedy: str = "",
) -> Iterator[Document]:
    """Yield the documents of `items`; count all items in `report` and `cursor`.

    Args:
        items: what a reader gives.
        report: counts documents and bad records.
        stop: a bad record raises.
        cursor: where the reader started; the records that it says to skip are dropped and not reported.
        max_documents: documents to yield at most, those before the cursor's start included.
        remedy: what to do where a column is missing.

    Raises:
        UserError: with `stop`, at a bad record other than an empty text (code `bad_record`); names it and those that
            follow soon.
    """
    items, cursor = iter(items), cursor or Cursor()
    skip = cursor.skip
    while max_documents is None or cursor.documents < max_documents:
        item = next(items, None)
        if item is None:
            return
        cursor.records += 1
        if skip:
            skip -= 1
        elif type(item) is not BadRecord:
            cursor.documents += 1
            report.documents += 1
            report.characters += len(item.text)
            yield item
        elif stop and item.reason != EMPTY_TEXT:
            raise _bad_records(item, items, remedy)
        else:
            report.add(item)


def require_documents(source: Source, report: ReadStats) -> None:
    """Check that `source`, which was read to its end with these counts, gave any document.

    Raises:
        UserError: it gave none (code `no_documents`); lists what was skipped.
    """
    if not report.documents:
        skipped = report.lines()[1:] or ["it is empty, or holds blank lines only"]
        raise UserError("\n  ".join([f"no documents in {source.name}", *skipped]), code="no_documents")


def check_options(
    on_bad_record: str, max_document_chars: int, max_documents: int | None, **choices: tuple[str, tuple[str, ...]]
) -> None:
    """Check the arguments that sources share; `choices` maps further arguments to (value, valid values).

    Raises:
        UserError: a value is not valid (code `invalid_value`).
    """
    for key, (value, valid) in {"on_bad_record": (on_bad_record, ("stop", "skip")), **choices}.items():
        if value not in valid:
            hint = did_you_mean(str(value), valid, "Valid values")
            raise UserError(f"'{value}' is not a valid value", key=key, hint=hint, code="invalid_value")
    if max_documents is not None and max_documents < 1:
        raise UserError(
            f"{max_documents} is less than 1", key="max_documents", hint="Set 1 or more, or null for all.",
            code="invalid_value",
        )  # fmt: skip
    if max_document_chars < 100:
        raise UserError(
            f"{max_document_chars} is less than 100", key="max_document_chars", hint="Set 100 or more.",
            code="invalid_value",
        )  # fmt: skip


def content_checksum(path: str | Path) -> str:
    """Return the size of a file and the xxh3-128 of its beginning, its end and evenly spaced samples, 512 KiB at most.

    The time of the last change does not enter: a file that is copied or touched is the same file.

    Raises:
        OSError: the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        last = max(size - SAMPLE_BYTES, 0)
        for start in range(SAMPLES):
            file.seek(start * SAMPLE_BYTES if size <= SAMPLES * SAMPLE_BYTES else start * last // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return f"{size}-{digest.hexdigest()}"


def _bad_records(first: BadRecord, rest: Iterator[Document | BadRecord], remedy: str) -> UserError:
    # Whoever repairs a file by hand wants to see all its faults, but reading on for long is a wait.
    near = [item for item in islice(rest, 10_000) if type(item) is BadRecord and item.reason != EMPTY_TEXT]
    bad = [first, *near[:9]]
    column = f"{remedy}, " if remedy and any(item.reason.startswith("no ") for item in bad) else ""
    lines = list(map(str, bad))
    if len(near) > 2 and all(item[1:] == first[1:] for item in near):  # a wrong column: one line says it
        lines = [f"{first} (as in {len(near):,} more records)"]
    return UserError(
        "\n".join(lines),
        hint=f"Repair the data, {column}or count and skip such records with on_bad_record=skip.",
        code="bad_record",
    )
