"""The documentation in the standard library: what is in it, and that reading it does nothing else."""

import ast
import inspect
import json
import subprocess
import sys
import sysconfig

import pytest

from torchrecipes.data.sources import standard_library as module
from torchrecipes.data.sources.standard_library import python_docs
from torchrecipes.errors import UserError


@pytest.fixture(scope="module")
def source():
    return python_docs()


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    def make(files: dict[str, str]):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("utf-8", "surrogateescape"))
        monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
        return python_docs

    return make


def test_it_is_megabytes_of_distinct_documents(source):
    found = list(source)
    texts = [document.text for document in found]
    # A distribution may keep some of it in packages of their own; even then there is enough to learn from.
    assert source.num_bytes == sum(len(text.encode()) for text in texts) > 1_000_000
    assert len(set(texts)) == len(texts) > 3000
    assert all(text.strip() and "\r" not in text for text in texts)
    assert (source.report.documents, source.report.skipped) == (len(texts), {})


def test_the_docstrings_are_those_that_python_shows(source):
    texts = {document.source: document.text for document in source}
    assert texts["json"] == inspect.getdoc(json)
    assert texts["json.dumps"] == inspect.getdoc(json.dumps)
    assert texts["json.decoder.JSONDecoder.raw_decode"] == inspect.getdoc(json.JSONDecoder.raw_decode)
    assert texts["ast.NodeVisitor"] == inspect.getdoc(ast.NodeVisitor)
    topics = [source for source in texts if source.startswith("topic ")]
    if topics:
        from pydoc_data.topics import topics as wanted

        assert texts["topic assert"] == inspect.cleandoc(wanted["assert"]) and len(topics) > 50
        assert next(iter(texts)).startswith("topic ")


def test_reading_imports_nothing_and_prints_nothing():
    code = (
        "import sys; from torchrecipes.data.sources.standard_library import python_docs; before = set(sys.modules)\n"
        "list(python_docs(limit_mb=0.7))\n"
        "print(*[name for name in set(sys.modules) - before if not name.startswith(('encodings.', '_sysconfigdata'))])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_a_limit_ends_the_documents_and_changes_the_fingerprint(source):
    first = list(source)[:50]
    limited = python_docs(limit_mb=sum(len(document.text.encode()) for document in first) / 1e6)
    assert list(limited) == first  # topics, which are read without the rest
    assert python_docs().fingerprint == source.fingerprint != limited.fingerprint


def test_what_counts_as_a_document(small_library):
    code = '''# A comment over two lines that
# says in words why the code is as it is.
#
#   And one more.
"""Docstring of the module."""
x = """
# No comment at all, though it begins with the same sign
# as a comment does in the language that this is.
"""
if x:
    def f():
        r"""Return an invalid \\d escape, under a condition."""
class A:
    """A class with a method."""
    async def m(self):
        """Docstring of the module."""
        # if x == 1: y[0] = 2
        # for i in range(3): print(i)
    def short(self):
        """Too short."""
    class B:
        def n(self):
            """
            Indented, with

                more indented.
            """
'''
    build = small_library(
        {
            "b/__init__.py": code,
            "a.py": '"""Comes first by its name."""\r\n# coding is fine\r\n',
            "latin.py": '# -*- coding: latin-1 -*-\n"""Caf\udce9 au lait, s\'il vous plait."""',
            "surrogate.py": '"""Half a pair \\ud83d has no place in UTF-8."""',
            "broken.py": "def (",
            "test/test_a.py": '"""Tests are not documentation."""',
            "site-packages/p.py": '"""Nor is what is installed."""',
            "config-3.11-linux/p.py": '"""Nor is this folder a package."""',
            "pydoc_data/topics.py": 'topics = {"b": "Second of the two topics\\n", "a": "First of the two topics\\n"}',
        }
    )
    source = build()
    assert [(document.source, document.text) for document in source] == [
        ("topic a", "First of the two topics"),
        ("topic b", "Second of the two topics"),
        ("a", "Comes first by its name."),
        ("b", "Docstring of the module."),
        ("b.f", "Return an invalid \\d escape, under a condition."),
        ("b.A", "A class with a method."),
        ("b.A.B.n", "Indented, with\n\n    more indented."),
        ("latin", "Café au lait, s'il vous plait."),
        ("b:1", "A comment over two lines that\nsays in words why the code is as it is.\n\n  And one more."),
    ]
    assert source.report.skipped == {"cannot be read as Python": 1}
    assert source.report.examples["cannot be read as Python"][0].startswith("broken.py: ")


def test_what_has_no_answer_is_an_error(small_library, tmp_path):
    with pytest.raises(UserError) as error:
        python_docs(limit_mb=0)
    assert error.value.key == "limit_mb"
    small_library({"python311.zip": ""})
    with pytest.raises(UserError) as error:
        python_docs()
    assert error.value.code == "no_documents"


def test_a_changed_library_has_another_fingerprint(small_library, tmp_path):
    build = small_library({"a.py": '"""Something to read here."""'})
    first = build().fingerprint
    assert build().fingerprint == first
    (tmp_path / "a.py").write_text('"""Something else to read here."""')
    assert build().fingerprint != first
    assert module.READING == 1
