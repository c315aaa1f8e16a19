"""`pairs`, `scored_pairs`, `labeled_texts` and `raw_texts`: sources of examples, from files or datasets."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrecipes.data.examples.example import ExampleSource, TextRecords
from torchrecipes.data.examples.fields import LabeledFields, PairFields, ScoredFields, TextField
from torchrecipes.data.sources import RecordColumns, files, hf_dataset
from torchrecipes.errors import UserError


def pairs(
    path: str | list[str] | None = None,
    query: str = "query",
    positive: str = "positive",
    negatives: str | list[str] | None = None,
    scores: str | list[str] | None = None,
    label: str | None = None,
    *,
    dataset: str | None = None,
    subset: str | None = None,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    columns: list[str] | None = None,
    delimiter: str = ",",
    on_bad_record: str = "stop",
    max_examples: int | None = None,
) -> ExampleSource:
    """Queries with a passage that answers them, and passages that do not.

    Args:
        path: files, folders or patterns: .jsonl, .json, .csv, .tsv and .parquet; all but Parquet may be compressed.
        query, positive: keys or columns of the texts; `data.text` is a key in an object.
        negatives: that of hard negatives, a text or a list of texts; or several, a text each. An example may have none:
            empty ones and null are left out.
        scores: that of a teacher's scores of the positive and then the negatives, a list; or several, a number each.
        label: that of the class, for batches by label.
        dataset: a dataset on the Hugging Face hub, or a folder of one, in place of `path`.
        subset, split: of a dataset, or of a folder that is a dataset repository.
        streaming, revision: see `torchrecipes.data.sources.hf_dataset`.
        columns: names of the columns of CSV and TSV files that have no header line.
        delimiter: the character between the fields of .csv files.
        on_bad_record: "stop" raises at a record that gives no example; "skip" counts and reports it. Records with an
            empty text are always counted and skipped.
        max_examples: records to read at most, from the first.

    Raises:
        UserError: no such files or dataset, no such column, an invalid value.
    """
    roles = {"query": query, "positive": positive, "negatives": negatives, "scores": scores, "label": label}
    arguments = _arguments(roles)
    make = PairFields(tuple(arguments), query, positive, _listed(negatives), _listed(scores), label)
    optional = frozenset(_listed(negatives)) - {query, positive}
    records = _open(path, dataset, subset, split, streaming, revision, columns, delimiter, on_bad_record, max_examples,
                    RecordColumns(arguments, make, optional))  # fmt: skip
    names = ("query", "positive", *(["negative"] if negatives else []))
    return ExampleSource(
        records, "pairs", names, has_labels=label is not None, settings=make, on_bad_record=on_bad_record,
        label_names=_class_names(records, label),
    )  # fmt: skip


def scored_pairs(
    path: str | list[str] | None = None,
    sentence1: str = "sentence1",
    sentence2: str = "sentence2",
    score: str = "score",
    low: float | None = None,
    high: float | None = None,
    *,
    dataset: str | None = None,
    subset: str | None = None,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    columns: list[str] | None = None,
    delimiter: str = ",",
    on_bad_record: str = "stop",
    max_examples: int | None = None,
) -> ExampleSource:
    """Two sentences and how similar they are, as in the STS benchmark.

    Args:
        sentence1, sentence2, score: keys or columns.
        low, high: the ends of the scale of the scores, such as 0 and 5: scores are scaled to [0, 1], and one outside is
            a bad record. None: scores are taken as they are.
        path, dataset, subset, split, streaming, revision, columns, delimiter, on_bad_record, max_examples: see `pairs`.

    Raises:
        UserError: see `pairs`; `low` without `high`, or not below it (code `invalid_value`).
    """
    if (low is None) != (high is None) or (low is not None and not (-math.inf < low < high < math.inf)):
        problem, hint = f"low {low} and high {high} are no scale", "Set both ends, such as low=0 high=5, or neither."
        raise UserError(problem, key="low" if low is None else "high", hint=hint, code="invalid_value")
    arguments = _arguments({"sentence1": sentence1, "sentence2": sentence2, "score": score})
    make = ScoredFields(tuple(arguments), sentence1, sentence2, score, low, high)
    records = _open(path, dataset, subset, split, streaming, revision, columns, delimiter, on_bad_record, max_examples,
                    RecordColumns(arguments, make))  # fmt: skip
    names = ("sentence1", "sentence2")
    return ExampleSource(records, "scored_pairs", names, settings=make, on_bad_record=on_bad_record)


def labeled_texts(
    path: str | list[str] | None = None,
    text: str = "text",
    text_pair: str | None = None,
    label: str | list[str] = "label",
    label_delimiter: str | None = None,
    *,
    dataset: str | None = None,
    subset: str | None = None,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    columns: list[str] | None = None,
    delimiter: str = ",",
    on_bad_record: str = "stop",
    max_examples: int | None = None,
) -> ExampleSource:
    """Texts, or pairs of texts, with a label, several labels or a number.

    Args:
        text, text_pair: keys or columns of the text and, for pairs, of the second one.
        label: that of the label: a name, a number, true or false, or a list of names. A list of columns are the classes
            of a multi-label task, each 0 or 1; it may be one column.
        label_delimiter: what stands between the names of several labels in one string, such as `;`.
        path, dataset, subset, split, streaming, revision, columns, delimiter, on_bad_record, max_examples: see `pairs`.

    Raises:
        UserError: see `pairs`.
    """
    labels = _listed(label)
    arguments = _arguments({"text": text, "text_pair": text_pair, "label": label})
    texts = (text,) if text_pair is None else (text, text_pair)
    make = LabeledFields(tuple(arguments), texts, labels, label_delimiter, is_class=not isinstance(label, str))
    records = _open(path, dataset, subset, split, streaming, revision, columns, delimiter, on_bad_record, max_examples,
                    RecordColumns(arguments, make))  # fmt: skip
    return ExampleSource(
        records, "labeled", ("text", "text_pair")[: len(texts)], has_labels=True, settings=make,
        label_names=_class_names(records, label) if isinstance(label, str) else labels, on_bad_record=on_bad_record,
    )  # fmt: skip


def raw_texts(
    path: str | list[str] | None = None,
    text: str = "text",
    sample_by: str = "line",
    *,
    dataset: str | None = None,
    subset: str | None = None,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    columns: list[str] | None = None,
    delimiter: str = ",",
    on_bad_record: str = "stop",
    max_examples: int | None = None,
) -> ExampleSource:
    """Texts without labels, for SimCSE or to embed.

    Args:
        text: key or column of the text.
        sample_by: what an example of plain text is: "line", "paragraph" or "document" (a file).
        path, dataset, subset, split, streaming, revision, columns, delimiter, on_bad_record, max_examples: see `pairs`.

    Raises:
        UserError: see `pairs`.
    """
    fields = RecordColumns({text: "text"}, TextField(text))
    records = _open(path, dataset, subset, split, streaming, revision, columns, delimiter, on_bad_record, max_examples,
                    fields, sample_by)  # fmt: skip
    return ExampleSource(TextRecords(records), "texts", ("text",), on_bad_record=on_bad_record)


def _listed(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _arguments(roles: dict[str, Any]) -> dict[str, str]:
    """Return the columns with the argument that names each; the first one counts."""
    arguments: dict[str, str] = {}
    for argument, names in roles.items():
        for name in _listed(names):
            arguments.setdefault(name, argument)
    return arguments


def _class_names(records: Any, label: str | None) -> list[str] | None:
    return records.class_names(label) if label is not None and isinstance(records, hf_dataset) else None


def _open(
    path: str | list[str] | None,
    dataset: str | None,
    subset: str | None,
    split: str,
    streaming: bool,
    revision: str | None,
    columns: list[str] | None,
    delimiter: str,
    on_bad_record: str,
    max_examples: int | None,
    fields: RecordColumns,
    sample_by: str | None = None,
) -> files | hf_dataset:
    """Return the files or the dataset that yields records with these fields; plain text where `sample_by` is given."""
    if (path is None) == (dataset is None):
        problem = "neither path nor dataset is given" if path is None else "path and dataset are both given"
        hint = "Set path to files of your own, or dataset to a Hugging Face dataset."
        raise UserError(problem, key="path", hint=hint, code="invalid_value")
    if dataset is not None and Path(dataset).is_file():
        raise UserError(
            f"{dataset} is a file", key="dataset", hint="Set path to it, not dataset.", code="invalid_value"
        )
    first = fields.names[0]
    common = {"on_bad_record": on_bad_record, "max_documents": max_examples}
    try:
        if path is not None:
            one = first if columns is None else columns[0]  # `records` checks all of them
            source = files(
                path, text_column=one, sample_by=sample_by or "document", columns=columns, delimiter=delimiter,
                split=split, subset=subset, **common,
            )  # fmt: skip
            return source.records(fields, plain_text=sample_by is not None)
        dataset_source = hf_dataset(dataset, subset, split, streaming, text_column=first, revision=revision, **common)
        return dataset_source.records(fields)
    except UserError as error:
        keys = {"name": "dataset", "config": "subset", "max_documents": "max_examples"}
        keys["text_column"] = fields.key_of(first)
        raise UserError(error.problem, key=keys.get(error.key, error.key), hint=error.hint, code=error.code) from None
