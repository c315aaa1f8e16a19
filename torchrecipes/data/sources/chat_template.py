"""`ChatTemplate`: renders a list of chat messages as the text of a document, as the tokenizer's template says.

A template is a Jinja program that somebody else wrote. It runs in Jinja's immutable sandbox, as in `transformers`, and
sees the messages and the names of special tokens, nothing else.
"""

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from torchrecipes.errors import UserError

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"


class UnusableMessages(Exception):
    """A record's messages that give no text: a reason and a detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        path: a tokenizer's folder (with `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`), or a
            Jinja file; the names of special tokens are those of the `tokenizer_config.json` beside it.

    Attributes:
        fingerprint: a hash of the template and the names of the special tokens.

    Raises:
        UserError: there is no template (code `no_chat_template`), or it is not valid Jinja (`bad_chat_template`);
            Jinja is not installed.
    """

    def __init__(self, path: str):
        found = Path(path).expanduser()
        if not found.exists():
            raise _error(f"there is no file or folder {found}", "Give a tokenizer's folder or a .jinja file.")
        folder = found if found.is_dir() else found.parent
        try:
            config = json.loads((folder / CONFIG_FILE).read_text("utf-8")) if (folder / CONFIG_FILE).is_file() else {}
            if found.is_dir():
                file = folder / TEMPLATE_FILE
                text = file.read_text("utf-8") if file.is_file() else _of_config(config.get("chat_template"))
            else:
                text = found.read_text("utf-8")
        except (OSError, ValueError, AttributeError) as error:
            raise _error(f"{found} cannot be read ({error})", None, "bad_chat_template") from error
        if not text:
            hint = "A base model has none: give the folder of a chat model, or a .jinja file."
            raise _error(f"{folder} holds no {TEMPLATE_FILE}, and its {CONFIG_FILE} no chat_template", hint)
        self.path = path
        self.tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token") and isinstance(value, str | dict)
        }
        self._template = _compile(text, found)
        self.fingerprint = hashlib.sha256(json.dumps([text, self.tokens]).encode()).hexdigest()[:32]

    def __reduce__(self) -> tuple:
        return ChatTemplate, (self.path,)

    def render(self, messages: Any) -> str:
        """Return the text of a conversation.

        A `bos` token at its start is left out: a tokenizer puts one before every document.

        Args:
            messages: a list of objects with `role` and `content`, or the same as JSON text.

        Raises:
            UnusableMessages: it is no such list, or the template refuses it.
        """
        if isinstance(messages, str):
            try:
                messages = json.loads(messages)
            except (ValueError, RecursionError):
                raise UnusableMessages("the messages are not a list") from None
        if not isinstance(messages, list):
            raise UnusableMessages("the messages are not a list")
        if not messages:
            raise UnusableMessages("the list of messages is empty")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                keys = (
                    f"its keys are {', '.join(map(repr, message))}" if isinstance(message, dict) else "it is no object"
                )
                raise UnusableMessages("a message without a role", f"message {number}: {keys}")
        # Arrow's structs have all keys in all rows: those that are null were not there.
        messages = [
            {key: value for key, value in message.items() if value is not None or key == "content"}
            for message in messages
        ]
        try:
            text = self._template.render(messages=messages, add_generation_prompt=False, **self.tokens)
        except Exception as error:  # whatever a template does
            raise UnusableMessages("the chat template refuses the messages", str(error).split("\n")[0]) from error
        return text.removeprefix(self.tokens.get("bos_token", ""))


def _of_config(stated: Any) -> str | None:
    if isinstance(stated, list):  # several by name, as older folders have them
        return next((item["template"] for item in stated if item.get("name") == "default"), None)
    return stated


def _compile(text: str, path: Path) -> Any:
    try:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise _error("chat templates need Jinja", "Install it: pip install 'jinja2>=3.1.6'", "not_installed") from None

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's text, which is text like the rest here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        problem = f"{path} is not valid Jinja: {error.message}, line {error.lineno}"
        raise _error(problem, None, "bad_chat_template") from error


def _error(problem: str, hint: str | None, code: str = "no_chat_template") -> UserError:
    return UserError(problem, key="chat_template", hint=hint, code=code)
