"""Reads a retrieval data set in BEIR's layout.

    corpus.jsonl    {"_id": "d1", "title": "...", "text": "..."}    also .jsonl.gz, .xz, .zst
    queries.jsonl   {"_id": "q1", "text": "..."}
    qrels/test.tsv  query-id <tab> corpus-id <tab> grade, after a header line

The corpus is read from disk every time: of its passages only identities are ever in memory, and one chunk of texts.
(Thakur et al. 2021, "BEIR: A Heterogeneous Benchmark for Zero-shot Evaluation of Information Retrieval Models")
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchrecipes.data.sources.line_reader import (
    LONGEST_RECORD,
    UnreadableFile,
    numbered_lines,
    open_blocks,
    read_lines,
)
from torchrecipes.data.sources.records import BadRecord
from torchrecipes.errors import UserError

COMPRESSIONS = {"": None, ".gz": "gzip", ".xz": "xz", ".zst": "zstd"}


def is_beir_folder(path: str | Path) -> bool:
    """Whether a folder has a corpus and queries in BEIR's layout."""
    folder = Path(path).expanduser()
    return all(_find(folder, name) is not None for name in ("corpus.jsonl", "queries.jsonl"))


def read_beir_texts(folder: str | Path, name: str) -> Iterator[tuple[str, str]]:
    """Yield the identity and the text of every line of `corpus.jsonl` or `queries.jsonl`; a title goes before the text.

    Args:
        folder: in BEIR's layout.
        name: `corpus` or `queries`.

    Raises:
        UserError: there is no such file (code `no_such_file`), or a line without an identity and a text (`bad_record`).
    """
    folder = Path(folder).expanduser()
    path = _find(folder, f"{name}.jsonl")
    if path is None:
        hint = (
            "A folder in BEIR's layout has corpus.jsonl, queries.jsonl and qrels/. Pairs in a file are read with data: "
        )
        hint += "torchrecipes.data.examples.pairs"
        raise UserError(f"{folder} has no {name}.jsonl", key="path", hint=hint, code="no_such_file")
    for place, line in _lines(path):
        try:
            record: Any = json.loads(line)
            identity, text = str(record["_id"]), record["text"]
            title = record.get("title") or ""
            if not isinstance(text, str) or not isinstance(title, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            problem = f'{place}: not an object with "_id" and "text"'
            raise UserError(problem, key="path", code="bad_record") from None
        yield identity, f"{title} {text}".strip()


def read_qrels(folder: str | Path, split: str) -> dict[str, dict[str, float]]:
    """Return the grades above 0 of every query that has any: query identity to passage identity to grade.

    Args:
        folder: in BEIR's layout.
        split: the file `qrels/<split>.tsv`. Also read is TREC's format: query, 0, passage, grade, without a header.

    Raises:
        UserError: there is no such file (code `no_such_split`), or a line that is not a relevance label (`bad_record`).
    """
    folder = Path(folder).expanduser() / "qrels"
    path = folder / f"{split}.tsv"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.tsv"))) or "none"
        hint = f"Its splits: {names}."
        raise UserError(f"{folder} has no {split}.tsv", key="split", hint=hint, code="no_such_split")
    relevant: dict[str, dict[str, float]] = {}
    for number, (place, line) in enumerate(_lines(path)):
        fields = line.split("\t") if "\t" in line else line.split()
        grade = _number(fields[-1])
        if len(fields) not in (3, 4) or (grade is None and number > 0):
            raise UserError(f"{place}: not query, passage and grade", key="path", code="bad_record")
        if grade is not None and grade > 0:  # None: the header
            relevant.setdefault(fields[0], {})[fields[-2]] = grade
    return relevant


def _find(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}{end}" for end in COMPRESSIONS)
    return next((path for path in paths if path.is_file()), None)


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    compression = COMPRESSIONS.get(path.suffix)
    try:
        with open_blocks(str(path), compression) as file:
            for number, line in numbered_lines(read_lines(file, LONGEST_RECORD), str(path), lambda **_: None):
                if isinstance(line, BadRecord):
                    raise UserError(str(line), key="path", code="bad_record")
                yield f"{path}:{number}", line
    except UnreadableFile as error:
        raise UserError(f"{path}: {error.reason}: {error.detail}", key="path", code="unreadable_file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", key="path", code="unreadable_file") from None
