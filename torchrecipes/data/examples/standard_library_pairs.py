"""`docstring_code_pairs`: what functions of Python's standard library do, and their code: pairs that every machine has.

A query is the first paragraph of a docstring, its passage the function without the docstring and without comments. The
files are parsed, nothing is imported. There are about 6,000 pairs.
"""

import ast
import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from torchrecipes.data.examples.example import Example, ExampleSource
from torchrecipes.data.sources.records import BadRecord, Cursor, ReadStats, documents
from torchrecipes.data.sources.standard_library import python_library
from torchrecipes.errors import UserError

READING = 1  # raise it when the same library gives other pairs than before: it enters the fingerprint
PARTS = ("train", "test", "all")
TEST_SHARE = 10  # one function in so many is for the test
QUERY_CHARACTERS, CODE_CHARACTERS = range(20, 401), range(40, 4001)


def docstring_code_pairs(part: Literal["train", "test", "all"] = "train") -> ExampleSource:
    """Descriptions of functions in the standard library of the running Python, each with the function's code.

    Args:
        part: `test` has a tenth of the functions, chosen by a hash of their descriptions, `train` the others.

    Raises:
        UserError: an unknown part; this Python comes without the source of its library.
    """
    if part not in PARTS:
        hint = f"Set one of {', '.join(PARTS)}."
        raise UserError(f"{part!r} is not a part", key="part", hint=hint, code="invalid_value")
    return ExampleSource(_Functions(part), "pairs", ("query", "positive"))


@dataclass
class _Functions:
    part: str
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)
    _cursor: Cursor = field(default_factory=Cursor, init=False, repr=False, compare=False)

    def __post_init__(self):
        self._library, title, self._sizes = python_library()
        self.name, self.num_bytes = f"functions ({self.part}) of {title}", 0

    @property
    def fingerprint(self) -> str:
        text = json.dumps([READING, sys.version.split()[0], sorted(self._sizes.items()), self.part])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Example]:
        self.report, self._cursor = ReadStats(), Cursor(position)
        return documents(self._items, self.report, cursor=self._cursor)

    def position(self) -> dict[str, Any]:
        return self._cursor.position

    @cached_property
    def _items(self) -> tuple[Example | BadRecord, ...]:
        found = _functions(self._library, tuple(sorted(self._sizes)))
        if self.part == "all":
            return found
        return tuple(x for x in found if isinstance(x, BadRecord) or _is_test(x.texts[0]) == (self.part == "test"))


@cache  # a run reads both parts
def _functions(library: Path, names: tuple[str, ...]) -> tuple[Example | BadRecord, ...]:
    found: list[Example | BadRecord] = []
    seen: set[str] = set()
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an invalid escape in somebody's docstring
                tree = ast.parse((library / name).read_bytes())
        except (SyntaxError, ValueError, RecursionError, OSError) as error:
            found.append(BadRecord(name, "cannot be read as Python", str(error)))
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not (pair := _pair(node)):
                continue
            if not seen.intersection(pair):  # files of the library have functions in common
                found.append(Example(pair, source=f"{name}:{node.lineno}"))
            seen.update(pair)
    return tuple(found)


def _is_test(query: str) -> bool:
    return int.from_bytes(hashlib.sha256(query.encode()).digest()[:8]) % TEST_SHARE == 0


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, str] | None:
    """What a function does and its code; None: it is not described, or one of the two is too short or too long."""
    text = ast.get_docstring(node)
    if not text or len(node.body) < 2:
        return None
    query = " ".join(text.split("\n\n")[0].split())
    if len(query) not in QUERY_CHARACTERS:
        return None
    node.body = node.body[1:]
    try:
        code = ast.unparse(node)
        (query + code).encode()
    except (RecursionError, UnicodeEncodeError):
        return None
    return (query, code) if len(code) in CODE_CHARACTERS else None
