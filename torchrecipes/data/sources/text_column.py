"""`TextColumn`: which key or column of a record holds its text, and how the value becomes documents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torchrecipes.data.sources.chat_template import ChatTemplate, UnusableMessages
from torchrecipes.data.sources.line_reader import NOT_UTF8, not_utf8
from torchrecipes.data.sources.pieces import cut_long
from torchrecipes.data.sources.records import EMPTY_TEXT, BadRecord, Document
from torchrecipes.errors import UserError


@dataclass(frozen=True)
class TextColumn:
    """The column that holds the text of a record.

    Attributes:
        name: key or column. `data.text` is the key `text` in the object `data`, unless there is a key `data.text`.
        limit: characters of a document; a longer text becomes several.
        template: renders the column's value, a list of chat messages. None: the value is the text.
    """

    name: str = "text"
    limit: int = 1_000_000
    template: ChatTemplate | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns to read: this one."""
        return (self.name,)

    @property
    def remedy(self) -> str:
        """What to do where there is no such column."""
        return "name the column that holds the text with text_column"

    def of(self, record: dict[str, Any]) -> Any:
        """Return the column's value.

        Raises:
            KeyError: the record has no such column.
        """
        return value_at(record, self.name)

    def of_row(self, values: Sequence[Any]) -> Any:
        """Return the column's value, given those of `names`."""
        return values[0]

    def documents(self, value: object, source: str) -> Iterator[Document | BadRecord]:
        """Yield the value as documents with `\\n` as line end, or the reason why it is not a text."""
        if self.template is not None and value is not None:
            try:
                value = self.template.render(value)
            except UnusableMessages as error:
                yield BadRecord(source, error.reason, error.detail)
                return
        text = checked_text(value, source)
        if isinstance(text, BadRecord):
            yield text
        else:
            yield from cut_long(text, source, self.limit)


def checked_text(value: object, source: str) -> str | BadRecord:
    """Return a text with `\\n` as line end, or the reason why the value is none."""
    if value is None:
        return BadRecord(source, "the text is null")
    if isinstance(value, bytes):
        return BadRecord(source, NOT_UTF8, not_utf8(value))
    if not isinstance(value, str):
        return BadRecord(source, "the text is not a string", f"it is {kind_of(value)}")
    if not value or value.isspace():
        return BadRecord(source, EMPTY_TEXT)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        where = f"\\u{ord(value[error.start]):04x} at character {error.start + 1}"
        return BadRecord(source, "half of a surrogate pair, which no encoding can write", where)
    return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value


def text_column(name: str, messages: str | None, chat_template: str | None, limit: int) -> TextColumn:
    """Return the column that a source's arguments name.

    Raises:
        UserError: messages without a template, a template without messages, or no such template.
    """
    if messages is None and chat_template is None:
        return TextColumn(name, limit)
    if chat_template is None:
        problem, hint = "chat messages need a template", "Set chat_template to the folder of a tokenizer that has one."
        raise UserError(problem, key="chat_template", hint=hint, code="invalid_value")
    if messages is None:
        problem, hint = "a chat template renders messages", "Set messages_column to the column that holds them."
        raise UserError(problem, key="messages_column", hint=hint, code="invalid_value")
    return TextColumn(messages, limit, ChatTemplate(chat_template))


def kind_of(value: object) -> str:
    """Return what a JSON value is, in words."""
    if isinstance(value, bool):
        return "true or false"
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def value_at(record: dict[str, Any], name: str) -> Any:
    """Return the value of a key, or of `inner.key` in an object of the record; KeyError: there is none."""
    if name in record:
        return record[name]
    dot = name.find(".")
    while dot >= 0:
        inner = record.get(name[:dot])
        if isinstance(inner, dict):
            try:
                return value_at(inner, name[dot + 1 :])
            except KeyError:
                pass
        dot = name.find(".", dot + 1)
    raise KeyError(name)
