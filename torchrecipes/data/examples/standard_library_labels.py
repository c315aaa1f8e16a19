"""`docstring_packages`: docstrings of Python's standard library, each with the package that it is from.

A labeled set that every machine has: about 3,700 texts with ten labels. The files are parsed, nothing is imported.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrecipes.data.examples.example import Example, ExampleSource
from torchrecipes.data.sources.records import Cursor, ReadStats, documents
from torchrecipes.data.sources.standard_library import python_docs
from torchrecipes.errors import UserError

# The ten largest that all supported versions of Python have.
PACKAGES = (
    *("asyncio", "email", "http", "importlib", "logging"),
    *("multiprocessing", "tkinter", "unittest", "urllib", "xml"),
)


def docstring_packages(packages: Sequence[str] = PACKAGES) -> ExampleSource:
    """Docstrings and comments of some packages of the running Python's standard library, labeled with the package.

    Args:
        packages: the labels. One that this Python was installed without has no examples, and is left out.

    Raises:
        UserError: fewer than two of the packages are there (code `one_class`).
    """
    records = _Docstrings(tuple(packages))
    found = {example.label for example in records.read()}
    if len(found) < 2:
        problem = f"this Python has {len(found)} of the packages {', '.join(packages)}"
        raise UserError(problem, key="packages", hint="Name at least two that it has.", code="one_class")
    names = [package for package in packages if package in found]
    return ExampleSource(records, "labeled", ("text",), label_names=names, has_labels=True)


@dataclass
class _Docstrings:
    packages: tuple[str, ...]
    report: ReadStats = field(default_factory=ReadStats, init=False, repr=False, compare=False)
    _cursor: Cursor = field(default_factory=Cursor, init=False, repr=False, compare=False)

    def __post_init__(self):
        self._docs = python_docs()
        self.name, self.num_bytes = f"docstrings of {self._docs.name}", 0

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self._docs.fingerprint, self.packages]).encode()).hexdigest()[:32]

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Example]:
        self.report, self._cursor = ReadStats(), Cursor(position)
        return documents(self._examples(), self.report, cursor=self._cursor)

    def position(self) -> dict[str, Any]:
        return self._cursor.position

    def _examples(self) -> Iterator[Example]:
        for document in self._docs:
            package, dot, _ = document.source.partition(".")  # topics and modules have no package
            if dot and package in self.packages:
                yield Example((document.text,), label=package, source=document.source)
