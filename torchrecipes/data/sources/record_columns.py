"""`RecordColumns`: the keys or columns of a record that has several fields, and what is made of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torchrecipes.data.sources.text_column import value_at


@dataclass(frozen=True)
class RecordColumns:
    """Stands in the readers where `TextColumn` does, for records with several fields.

    Attributes:
        arguments: the columns to read, each with the argument that names it: `{"question": "query"}`.
        make: called with the values of the columns, in their order, and the record's source; returns the record, which
            has the attributes of `Document`, or a `BadRecord`.
        optional: columns that a JSON object may lack; their value is None then.
    """

    arguments: dict[str, str]
    make: Callable[[Sequence[Any], str], Any]
    optional: frozenset[str] = frozenset()
    template: None = None
    limit: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The columns to read."""
        return tuple(self.arguments)

    @property
    def name(self) -> str:
        """All of them, for messages and fingerprints."""
        return ", ".join(self.arguments)

    @property
    def remedy(self) -> str:
        """What to do where there is no such column."""
        return f"name the columns of the data with {', '.join(dict.fromkeys(self.arguments.values()))}"

    def key_of(self, name: str) -> str:
        """Return the argument that names a column."""
        return self.arguments[name]

    def of(self, record: dict[str, Any]) -> list[Any]:
        """Return the values of a record.

        Raises:
            KeyError: it lacks a column, which the exception names.
        """
        if not isinstance(record, dict):
            raise TypeError
        values = []
        for name in self.arguments:
            try:
                values.append(value_at(record, name))
            except KeyError:
                if name not in self.optional:
                    raise
                values.append(None)
        return values

    def of_row(self, values: Sequence[Any]) -> Sequence[Any]:
        """Return the values as they are."""
        return values

    def documents(self, values: Sequence[Any] | None, source: str) -> Iterator[Any]:
        """Yield the record, or the reason why it is none; the values are None where a column is missing."""
        yield self.make([None] * len(self.arguments) if values is None else values, source)
