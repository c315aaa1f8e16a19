"""`Example`, and `ExampleSource`: examples in an order that is the same every time."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from torchrecipes.data.sources.records import Document, ReadStats

READING = 1  # raise it when the same records give other examples than before: it enters the fingerprint
KINDS = ("pairs", "scored_pairs", "labeled", "texts")


class Example(NamedTuple):
    """One example to train on.

    Attributes:
        texts: its texts, none blank, in the order of the source's `columns`.
        values: scores; `()` where there are none.
        label: as the data have it: a name or a number, or a list of them; None where there is none.
        source: `file:line` (in Parquet, the number of the row), or a name.
    """

    texts: tuple[str, ...]
    values: tuple[float, ...] = ()
    label: Any = None
    source: str = ""

    @property
    def text(self) -> str:
        """All texts, a line each: what `ReadStats` counts."""
        return "\n".join(self.texts)


class Records(Protocol):
    """What an `ExampleSource` reads: a source whose documents are `Example`s."""

    report: ReadStats

    @property
    def name(self) -> str: ...  # noqa: D102, see `Source`

    @property
    def num_bytes(self) -> int: ...  # noqa: D102

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Any]: ...  # noqa: D102

    def position(self) -> dict[str, Any] | None: ...  # noqa: D102


class ExampleSource:
    """Examples of one kind. Made by `pairs`, `scored_pairs`, `labeled_texts` and `raw_texts`.

    Args:
        records: yields the examples.
        kind: `pairs`, `scored_pairs`, `labeled` or `texts`.
        columns: the names of the texts in an example. More texts than names are further ones of the last name.
        label_names: the names of the classes in their order, where the source knows them.
        has_labels: whether examples have labels.
        settings: what else the examples depend on, for the fingerprint; its `str` is taken.
        on_bad_record: "stop" or "skip", also for labels that are not among the names.

    Attributes:
        name, num_bytes, fingerprint, report: as for `torchrecipes.data.sources.Source`.
    """

    def __init__(
        self,
        records: Records,
        kind: str,
        columns: Sequence[str],
        *,
        label_names: Sequence[str] | None = None,
        has_labels: bool = False,
        settings: object = None,
        on_bad_record: str = "stop",
    ):
        if kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
        self.records, self.kind, self.columns = records, kind, tuple(columns)
        self.label_names = None if label_names is None else list(label_names)
        self.has_labels, self.on_bad_record = has_labels, on_bad_record
        described = [READING, kind, self.columns, self.label_names, str(settings), records.fingerprint]
        self.fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]

    @property
    def name(self) -> str:
        """Where the examples come from."""
        return self.records.name

    @property
    def num_bytes(self) -> int:
        """Bytes of the input as stored; 0: not known."""
        return self.records.num_bytes

    @property
    def report(self) -> ReadStats:
        """Counts of the latest iteration so far."""
        return self.records.report

    def __iter__(self) -> Iterator[Example]:
        return self.read()

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Example]:
        """Yield the examples from a position, which `position` gave, or from the first one.

        Raises:
            UserError: a bad record, and `on_bad_record` is "stop" (code `bad_record`); unreadable data.
        """
        return self.records.read(position)

    def position(self) -> dict[str, Any] | None:
        """Return the position right after the last example that the latest iteration yielded, for JSON.

        None: reading can start at the first example only.
        """
        return self.records.position() if hasattr(self.records, "position") else None

    def as_documents(self) -> "ExampleTexts":
        """Return the texts as a source of documents, to train a tokenizer on."""
        return ExampleTexts(self)

    def __repr__(self) -> str:
        return f"ExampleSource({self.name!r}, {self.kind})"


class ExampleTexts:
    """Every text of every example as a document; the attributes are those of `Source`."""

    def __init__(self, source: ExampleSource):
        self.source = source
        self.name, self.num_bytes = source.name, source.num_bytes
        self.fingerprint = f"{source.fingerprint}-texts"
        self.report = ReadStats()

    def __iter__(self) -> Iterator[Document]:
        self.report = ReadStats()
        for example in self.source:
            for text in example.texts:
                self.report.documents += 1
                self.report.characters += len(text)
                yield Document(text, example.source)
        self.report.skipped, self.report.examples = self.source.report.skipped, self.source.report.examples


class TextRecords:
    """The documents of a source as examples of one text; those that are examples stay as they are."""

    def __init__(self, source: Any):
        self.source = source
        self.name, self.num_bytes, self.fingerprint = source.name, source.num_bytes, source.fingerprint

    @property
    def report(self) -> ReadStats:
        """Counts of the latest iteration so far."""
        return self.source.report

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Example]:
        """Yield an example for every document."""
        for document in iter(self.source) if position is None else self.source.read(position):
            yield document if type(document) is Example else Example((document.text,), source=document.source)

    def position(self) -> dict[str, Any] | None:
        """Return the source's position, None where it has none."""
        return self.source.position() if hasattr(self.source, "position") else None
