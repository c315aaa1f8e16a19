"""`python_docs` and `python_source`: documentation and code of Python's standard library, which every machine has.

The documentation:

1. The language reference's topics, as `help("assert")` shows them.
2. The docstrings of modules, classes and functions, in the order of their names.
3. The comments that stand between the lines of code, where they are two or more lines of prose.

Nothing is imported (modules such as `antigravity` or `idlelib` have side effects): the source files are parsed. It is
about 3 MB of English about programming, enough to see a small model learn within minutes.
"""

import ast
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from torchrecipes.data.sources.records import BadRecord, Cursor, Document, ReadStats, documents
from torchrecipes.errors import UserError

READING = 1  # raise it when the same library gives other documents than before: it enters the fingerprint
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "__phello__"}
TOPICS = "pydoc_data/topics.py"
SHORTEST = 20  # characters; below are remarks such as "See base class."

DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
COMMENT = re.compile(r"^[ \t]*#(.*)$")
WORD = re.compile(r"[A-Za-z][a-z']*[.,:;!?)]?")


@dataclass
class python_docs:
    """Documentation in the standard library of the running Python.

    Where a distribution ships parts of the library in separate packages, there are fewer documents.

    Args:
        limit_mb: megabytes (10^6 bytes of UTF-8) of documents to stop after; None is all.

    Raises:
        UserError: `limit_mb` is not above 0; this Python comes without the source of its library.
    """

    limit_mb: float | None = None
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)
    _cursor: Cursor = field(default_factory=Cursor, init=False, repr=False, compare=False)

    def __post_init__(self):
        self.library, self.name, self._sizes = python_library(self.limit_mb)

    @property
    def num_bytes(self) -> int:
        """Bytes of the documents as UTF-8."""
        return sum(len(item.text.encode()) for item in self._items if isinstance(item, Document))

    @property
    def fingerprint(self) -> str:
        """A hash of Python's version, the names and sizes of the library's files, and the limit."""
        text = json.dumps([READING, sys.version.split()[0], sorted(self._sizes.items()), self.limit_mb])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yield topics, docstrings, comments, with a new report; a file that cannot be parsed is only counted.

        Args:
            position: what `position` returned; None: from the first one.
        """
        self.report, self._cursor = ReadStats(), Cursor(position)
        return documents(self._items, self.report, cursor=self._cursor)

    def position(self) -> dict[str, Any]:
        """Return the position after the last document that was read, for `read`."""
        return self._cursor.position

    @cached_property
    def _items(self) -> tuple[Document | BadRecord, ...]:
        return tuple(_up_to(self.limit_mb, _read_library(self.library, list(self._sizes))))


@dataclass
class python_source:
    """Code of the standard library of the running Python, without its docstrings and comments: a file is a document.

    A domain beside `python_docs`, which has what is left out here. About 8 MB.

    Args:
        limit_mb: megabytes (10^6 bytes of UTF-8) of documents to stop after; None is all.

    Raises:
        UserError: `limit_mb` is not above 0; this Python comes without the source of its library.
    """

    limit_mb: float | None = None
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)
    _cursor: Cursor = field(default_factory=Cursor, init=False, repr=False, compare=False)

    def __post_init__(self):
        self.library, self.name, self._sizes = python_library(self.limit_mb)

    @property
    def num_bytes(self) -> int:
        """Bytes of the documents as UTF-8."""
        return sum(len(item.text.encode()) for item in self._items if isinstance(item, Document))

    @property
    def fingerprint(self) -> str:
        """A hash of Python's version, the names and sizes of the library's files, and the limit."""
        text = json.dumps(["source", READING, sys.version.split()[0], sorted(self._sizes.items()), self.limit_mb])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        """Yield the files in an order without meaning, with a new report; one that cannot be parsed is only counted.

        Args:
            position: what `position` returned; None: from the first one.
        """
        self.report, self._cursor = ReadStats(), Cursor(position)
        return documents(self._items, self.report, cursor=self._cursor)

    def position(self) -> dict[str, Any]:
        """Return the position after the last document that was read, for `read`."""
        return self._cursor.position

    @cached_property
    def _items(self) -> tuple[Document | BadRecord, ...]:
        # With a limit, files of all kinds: not only the packages whose names come first.
        names = sorted(self._sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
        return tuple(_up_to(self.limit_mb, _read_code(self.library, names)))


def python_library(limit_mb: float | None = None) -> tuple[Path, str, dict[str, int]]:
    """The folder of the library, its title for people, and the size of each of its files."""
    if limit_mb is not None and limit_mb <= 0:
        hint = "Set megabytes, or null for all."
        raise UserError(f"{limit_mb} is not above 0", key="limit_mb", hint=hint, code="invalid_value")
    library = Path(sysconfig.get_path("stdlib"))
    title = f"the standard library of Python {sys.version.split()[0]} in {library}"
    sizes = {}  # bytes by file name
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in SKIPPED and name.isidentifier()]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            if path.is_file():  # a link may lead nowhere
                sizes[path.relative_to(library).as_posix()] = path.stat().st_size
    if not sizes:
        hint = "Read text of your own with _component_=torchrecipes.data.sources.files path=..."
        problem = f"{library} holds no Python files, so there is nothing to read"
        raise UserError(problem, hint=hint, code="no_documents")
    return library, title, sizes


def _up_to(limit_mb: float | None, items: Iterator[Document | BadRecord]) -> Iterator[Document | BadRecord]:
    """The items before the limit is passed."""
    size = 0
    for item in items:
        if isinstance(item, Document):
            size += len(item.text.encode())
            if limit_mb is not None and size > round(limit_mb * 1e6):
                return
        yield item


def _read_code(library: Path, names: list[str]) -> Iterator[Document | BadRecord]:
    for name in names:
        try:
            source = (library / name).read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an invalid escape in somebody's docstring
                text = _code_of(source.decode("utf-8", "replace"), ast.parse(source))
        except (SyntaxError, ValueError, RecursionError, OSError) as error:
            yield BadRecord(name, "cannot be read as Python", str(error))
            continue
        if name != TOPICS and text.strip() and _can_be_encoded(text):
            yield Document(text, name)


def _code_of(source: str, tree: ast.Module) -> str:
    """The lines that are no docstring, no comment and not blank."""
    left_out: set[int] = set()
    inside: set[int] = set()  # lines of other strings over several lines, where # is no comment
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node) is not None:
            left_out.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno > node.lineno:
            inside.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(re.split(r"\r\n|\r|\n", source), 1)
    kept = (
        line
        for number, line in lines
        if number not in left_out and (number in inside or (line.strip() and not COMMENT.match(line)))
    )
    return "\n".join(kept)


def _read_library(library: Path, names: list[str]) -> Iterator[Document | BadRecord]:
    seen = set()
    for item in _read_files(library, names):
        if isinstance(item, BadRecord):
            yield item
        elif len(item.text) >= SHORTEST and item.text not in seen and _can_be_encoded(item.text):
            seen.add(item.text)
            yield item


def _read_files(library: Path, names: list[str]) -> Iterator[Document | BadRecord]:
    comments: list[Document] = []  # prose first
    for name in sorted(names, key=lambda name: (name != TOPICS, name)):
        try:
            source = (library / name).read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an invalid escape in somebody's docstring
                tree = ast.parse(source)
            topics = list(_topics(tree)) if name == TOPICS else []
        except (SyntaxError, ValueError, RecursionError, OSError) as error:
            yield BadRecord(name, "cannot be read as Python", str(error))
            continue
        if name == TOPICS:
            yield from topics
            continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        yield from _docstrings(tree, module)
        comments += _comments(source.decode("utf-8", "replace"), tree, module)
    yield from comments


def _topics(tree: ast.Module) -> Iterator[Document]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield Document(inspect.cleandoc(text), f"topic {topic}")


def _docstrings(node: ast.AST, name: str) -> Iterator[Document]:
    # In the order of the source: a class, then its methods. An `if` or `try` around them is no part of the name.
    if isinstance(node, DEFINITIONS):
        text = ast.get_docstring(node)
        if text and not text.isspace():
            yield Document(text, name)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _docstrings(child, name)


def _comments(source: str, tree: ast.Module, module: str) -> Iterator[Document]:
    inside = set()  # lines of strings over several lines, where # is no comment
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno > node.lineno:
            inside.update(range(node.lineno, node.end_lineno + 1))
    lines = re.split(r"\r\n|\r|\n", source)
    matches = [None if number in inside else COMMENT.match(line) for number, line in enumerate(lines, 1)]
    for is_comment, block in groupby(enumerate(matches, 1), key=lambda item: item[1] is not None):
        if is_comment:
            block = list(block)
            text = inspect.cleandoc("\n".join(match[1].lstrip("#") for _, match in block))
            if len(block) > 1 and _is_prose(text):
                yield Document(text, f"{module}:{block[0][0]}")


def _is_prose(text: str) -> bool:
    # Commented-out code, rulers and tables have few tokens that look like words.
    tokens = text.split()
    return len(tokens) >= 8 and sum(map(bool, map(WORD.fullmatch, tokens))) >= 0.7 * len(tokens)


def _can_be_encoded(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
