"""What a source of text gives, and the account of it.

1. A source reads records: lines, JSON objects, table rows, docstrings.
2. A record with a text is a `Document`; one without is a `BadRecord`, with the reason why.
3. A `ReadStats` counts both. It is picklable and adds up, so that several processes can read the parts of one source.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol

from torchrecipes.errors import UserError

# A record whose text is empty or blank is counted, but stops nothing: there is nothing in it to train on, or to fix.
EMPTY_TEXT = "the text is empty"
EXAMPLES_PER_REASON = 5


class Document(NamedTuple):
    """A text, and where it comes from: `file:line` (a row's number in Parquet), or a name.

    The text is never blank, its line ends are `\\n`, and it can be encoded as UTF-8.
    """

    text: str
    source: str


class BadRecord(NamedTuple):
    """A record (or a file) that gives no document.

    `reason` is the same for all of its kind, so that it can be counted; `detail` is its own.
    """

    source: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" + (f": {self.detail}" if self.detail else "")


@dataclass
class ReadStats:
    """How many documents were read, and how many records gave none: by reason, with the first examples of each.

    `characters` are Unicode characters; `examples` are `file:line: detail`.
    """

    documents: int = 0
    characters: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, record: BadRecord) -> None:
        """Count a record that gave no document."""
        self.skipped[record.reason] = self.skipped.get(record.reason, 0) + 1
        examples = self.examples.setdefault(record.reason, [])
        if len(examples) < EXAMPLES_PER_REASON:
            examples.append(f"{record.source}: {record.detail}" if record.detail else record.source)

    def merge(self, other: "ReadStats") -> None:
        """Add the counts of another part of the same source; merge in the order of the parts for the same examples."""
        self.documents += other.documents
        self.characters += other.characters
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
            examples = self.examples.setdefault(reason, [])
            examples += other.examples[reason][: EXAMPLES_PER_REASON - len(examples)]

    def lines(self) -> list[str]:
        """Return the account for people: a line for the total, and for every reason its count and examples."""
        lines = [f"{self.documents:,} documents, {self.characters:,} characters"]
        for reason, count in sorted(self.skipped.items(), key=lambda item: -item[1]):
            lines.append(f"left out {count:,}: {reason}")
            lines += [f"  {example}" for example in self.examples[reason]]
            if count > len(self.examples[reason]):
                lines.append(f"  and {count - len(self.examples[reason]):,} more")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


class Source(Protocol):
    """Documents in an order that is the same every time: what `data.source` of a recipe is.

    `name` says in words where they come from; `num_bytes` is the size of the input in bytes as stored; `fingerprint` is
    equal for equal configuration and unchanged inputs, and is made without reading them. `report` is the account of the
    latest iteration, complete when that has ended; the parts' reports, merged, are the whole's.
    """

    name: str
    num_bytes: int
    fingerprint: str
    report: ReadStats

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents; iterate again to read again."""
        ...

    def parts(self) -> "list[Source]":
        """Return picklable sources whose documents, one part after the other, are those of this source."""
        ...


def documents(items: Iterable[Document | BadRecord], report: ReadStats, stop: bool = False) -> Iterator[Document]:
    """Yield the documents of `items`; count all in `report`, which is complete when the iteration ends.

    Raises:
        UserError: with `stop`, at a bad record (an empty text is none); the message names it, those that follow soon,
            and the remedy.
    """
    items = iter(items)
    count = characters = 0
    try:
        for item in items:
            if type(item) is not BadRecord:
                count += 1
                characters += len(item.text)
                yield item
            elif stop and item.reason != EMPTY_TEXT:
                raise UserError(_explain(item, items))
            else:
                report.add(item)
    finally:
        report.documents += count
        report.characters += characters


def require_documents(source: Source, report: ReadStats) -> None:
    """Check that `source`, which was read to its end with `report` as the account, gave any document.

    Raises:
        UserError: it gave none; the message lists what was seen instead.
    """
    if not report.documents:
        seen = report.lines()[1:] or ["it is empty, or holds blank lines only"]
        raise UserError("\n  ".join([f"no documents in {source.name}", *seen]))


def _explain(first: BadRecord, rest: Iterator[Document | BadRecord]) -> str:
    # Who repairs a file by hand wants to see all that is wrong with it; but to read on for long is a wait.
    near = [item for item in islice(rest, 10_000) if type(item) is BadRecord and item.reason != EMPTY_TEXT]
    bad = [first, *near[:9]]
    key = "name the text's key with data.source.text_column, " * any(item.reason.startswith("no ") for item in bad)
    remedy = f"Repair the data, {key}or count and skip such records with data.source.on_bad_record=skip"
    return "\n".join([*map(str, bad), remedy])
