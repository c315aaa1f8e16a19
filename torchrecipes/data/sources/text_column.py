"""`TextColumn`: which key or column of a record holds its text, and how the value becomes documents."""

from collections.abc import Iterator
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

    def of(self, record: dict[str, Any]) -> Any:
        """Return the column's value.

        Raises:
            KeyError: the record has no such column.
        """
        return _value(record, self.name)

    def documents(self, value: object, source: str) -> Iterator[Document | BadRecord]:
        """Yield the value as documents with `\\n` as line end, or the reason why it is not a text."""
        if value is None:
            yield BadRecord(source, "the text is null")
            return
        if self.template is not None:
            try:
                value = self.template.render(value)
            except UnusableMessages as error:
                yield BadRecord(source, error.reason, error.detail)
                return
        if isinstance(value, bytes):
            yield BadRecord(source, NOT_UTF8, not_utf8(value))
        elif not isinstance(value, str):
            yield BadRecord(source, "the text is not a string", f"it is {kind_of(value)}")
        elif not value or value.isspace():
            yield BadRecord(source, EMPTY_TEXT)
        else:
            try:
                value.encode()
            except UnicodeEncodeError as error:
                where = f"\\u{ord(value[error.start]):04x} at character {error.start + 1}"
                yield BadRecord(source, "half of a surrogate pair, which no encoding can write", where)
            else:
                yield from cut_long(value.replace("\r\n", "\n").replace("\r", "\n"), source, self.limit)


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


def _value(record: dict[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    dot = name.find(".")
    while dot >= 0:
        inner = record.get(name[:dot])
        if isinstance(inner, dict):
            try:
                return _value(inner, name[dot + 1 :])
            except KeyError:
                pass
        dot = name.find(".", dot + 1)
    raise KeyError(name)
