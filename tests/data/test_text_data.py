"""`load_text`: what corpora and evaluation sets a config gives."""

import json
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path

import numpy as np
import pytest

from torchrecipes.config import Component, changed_keys, component
from torchrecipes.data import text_data
from torchrecipes.data.sources import Document, Mixture, files, mixture
from torchrecipes.data.text_data import TextData, load_text, open_rows
from torchrecipes.errors import UserError

WORDS = {"law": "court judge statute appeal", "code": "return value list index", "news": "today city river mayor"}


def texts(folder: Path, name: str, count: int) -> Path:
    """A file of paragraphs that differ."""
    words = WORDS[name].split()
    lines = [" ".join(words[(i >> shift) % 4] for shift in (0, 2, 4, 6)) + f" {i}" for i in range(count)]
    path = folder / f"{name}.txt"
    path.write_text("\n\n".join(lines))
    return path


def source(folder: Path, name: str, count: int = 120) -> Component:
    arguments = {"path": str(texts(folder, name, count)), "sample_by": "paragraph"}
    return Component("torchrecipes.data.sources.files", arguments)


@dataclass
class Config:
    output_dir: str
    data: TextData
    tokenizer: Component = component("torchrecipes.data.tokenizers.train_char")
    init_from: str | None = None
    seq_len: int = 16
    global_batch_size: int = 8
    eval_every: int | None = 10


def config(tmp_path, source, **data):
    return Config(str(tmp_path / "run"), TextData(source=source, tokenizer_threads=0, **data))


def mixed(tmp_path, **args) -> Component:
    sources = {"law": source(tmp_path, "law"), "code": source(tmp_path, "code", 240)}
    return Component("torchrecipes.data.sources.mixture", {"sources": sources, **args})


def test_one_source_has_one_evaluation_set(tmp_path):
    text = load_text(config(tmp_path, source(tmp_path, "law"), validation_fraction=0.1), causal=True)
    assert list(text.eval_sets) == ["validation"]
    assert text.train.corpus.num_documents + text.eval_sets["validation"].corpus.num_documents == 120
    assert text.train.source_names == ()


def test_a_named_evaluation_set_replaces_the_held_out_share(tmp_path):
    data = {"validation_fraction": 0.1, "eval_sets": {"validation": source(tmp_path, "news", 30)}}
    text = load_text(config(tmp_path, source(tmp_path, "law"), **data), causal=True)
    assert text.train.corpus.num_documents == 120
    assert text.eval_sets["validation"].corpus.num_documents == 30


def test_evaluation_sets_are_added(tmp_path):
    data = {"validation_fraction": 0.1, "eval_sets": {"news": source(tmp_path, "news", 30)}}
    text = load_text(config(tmp_path, source(tmp_path, "law"), **data), causal=True)
    assert list(text.eval_sets) == ["validation", "news"]
    assert text.train_corpora("news") == text.train_corpora("validation") == [text.train.corpus]
    batches = text.eval_batches(None, 4, None)
    assert list(batches) == ["validation", "news"]


def test_a_mixture_holds_out_a_share_of_every_part(tmp_path):
    made = config(tmp_path, mixed(tmp_path, weights={"law": 0.25, "code": 0.75}), validation_fraction=0.1)
    text = load_text(made, causal=True)
    assert list(text.eval_sets) == ["law", "code"]
    assert text.train.source_names == ("law", "code")
    for name, total in (("law", 120), ("code", 240)):
        assert text.train.parts[name].corpus.num_documents + text.eval_sets[name].corpus.num_documents == total
    assert text.train_corpora("code") == [text.train.parts["code"].corpus]
    assert text.train_corpora("another") == [part.corpus for part in text.train.parts.values()]
    rows = [line["rows"] for line in text.train.account(1024)]
    assert rows == [256, 768]
    opened, eval_sets = open_rows(made, Path(made.output_dir) / "corpus", text.tokenizer, lookahead=1)
    assert opened.identity() == text.train.identity() and list(eval_sets) == ["law", "code"]


def test_weights_by_step_change_at_the_row_of_the_step(tmp_path):
    weights = [[0, {"law": 1, "code": 1}], [300, {"law": 3, "code": 1}]]  # step 300 of 8 rows: row 2,400, block 3
    text = load_text(config(tmp_path, mixed(tmp_path, weights=weights)), causal=True)
    assert [line["rows"] for line in text.train.account(3 * 1024)] == [1536, 1536]
    assert [line["rows"] for line in text.train.account(4 * 1024)] == [1536 + 768, 1536 + 256]


def test_a_replay_ratio_is_a_pair_of_weights(tmp_path):
    text = load_text(config(tmp_path, mixed(tmp_path, replay_ratio=0.25)), causal=True)
    assert [line["rows"] for line in text.train.account(1024)] == [768, 256]


def test_nothing_to_evaluate_on_is_refused(tmp_path):
    made = config(tmp_path, mixed(tmp_path), validation_fraction=0.0)
    with pytest.raises(UserError) as error:
        load_text(made, causal=True)
    assert (error.value.code, error.value.key) == ("no_validation_text", "eval_every")


class Lines:
    """A source in memory."""

    name, num_bytes = "lines", 10

    def __init__(self, *lines):
        self.lines, self.fingerprint = lines, str(lines)

    def __iter__(self):
        return iter([Document(line, "here") for line in self.lines])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"sources": {"a": Lines("x")}}, "sources"),
        ({"sources": {"a": Lines("x"), "b/c": Lines("y")}}, "sources"),
        ({"sources": {"a": Lines("x"), "eval_sets": Lines("y")}}, "sources"),
        ({"weights": {"a": 1, "c": 1}}, "weights"),
        ({"weights": {"a": -1, "b": 2}}, "weights"),
        ({"weights": {"a": 0, "b": 0}}, "weights"),
        ({"weights": [[5, {"a": 1, "b": 1}]]}, "weights"),
        ({"weights": [[0, {"a": 1, "b": 1}], [0, {"a": 1, "b": 2}]]}, "weights"),
        ({"replay_ratio": 1.0}, "replay_ratio"),
        ({"replay_ratio": 0.2, "weights": {"a": 1, "b": 1}}, "replay_ratio"),
        ({"sources": {name: Lines(name) for name in "abc"}, "replay_ratio": 0.2}, "replay_ratio"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": 0.5, "weights": {"a": 1, "b": 1}}, "alpha"),
        ({"max_epochs": {"c": 1}}, "max_epochs"),
        ({"max_epochs": {"a": 0}}, "max_epochs"),
        ({"added": ["c"]}, "added"),
    ],
)
def test_wrong_mixtures_are_refused(arguments, key):
    with pytest.raises(UserError) as error:
        mixture(**{"sources": {"a": Lines("x"), "b": Lines("y")}, **arguments})
    assert (error.value.code, error.value.key) == ("mixture", key)


def test_a_mixture_is_a_source_of_all_its_documents(tmp_path):
    parts = {name: files(str(texts(tmp_path, name, 5)), sample_by="paragraph") for name in WORDS}
    made = mixture(parts)
    assert isinstance(made, Mixture)
    assert [document.text for document in made] == [document.text for part in parts.values() for document in part]
    assert made.report.documents == 15 and made.num_bytes == sum(part.num_bytes for part in parts.values())
    assert made.fingerprint != mixture(dict(reversed(parts.items()))).fingerprint


# Streams


def stream_config(tmp_path, node, **data):
    data = {"validation_fraction": 0.1, "cache_dir": str(tmp_path / "cache"), "block_rows": 10} | data
    return config(tmp_path, node, mode="streaming", **data)


def finish(rows):
    while not rows.stream.finished:
        rows.stream.wait()
    return rows


def test_a_stream_trains_on_the_documents_that_a_prepared_corpus_has(tmp_path):
    node = source(tmp_path, "law")
    prepared = load_text(config(tmp_path / "prepared", node, validation_fraction=0.1), causal=True)
    text = load_text(stream_config(tmp_path, node), causal=True)
    assert list(text.eval_sets) == ["validation"]
    # The text fits into one shard, which is one block.
    assert finish(text.train).num_rows == prepared.train.num_rows
    assert text.train.stream.corpus(0, 1).fingerprint == prepared.train.corpus.fingerprint
    assert text.train_corpora("validation")[0].fingerprint == prepared.train.corpus.fingerprint
    assert text.eval_sets["validation"].corpus.fingerprint == prepared.eval_sets["validation"].corpus.fingerprint
    again = load_text(stream_config(tmp_path, node), causal=True)
    assert again.train.stream.process is None and again.train.identity() == text.train.identity()


def test_the_first_documents_or_another_split_are_held_out(tmp_path):
    node = source(tmp_path, "law")
    for make in (config, stream_config):
        text = load_text(make(tmp_path / make.__name__, node, eval_samples=7), causal=True)
        assert text.eval_sets["validation"].corpus.num_documents == 7
    with pytest.raises(UserError) as error:
        load_text(stream_config(tmp_path, node, eval_split="auto"), causal=True)
    assert (error.value.code, error.value.key) == ("no_such_split", "data.eval_split")
    assert "eval_samples" in error.value.hint


@pytest.mark.parametrize("mode", ["prepare", "streaming"])
@pytest.mark.parametrize("split", ["auto", "test"])
def test_a_split_of_a_dataset_is_evaluated_on(tmp_path, mode, split):
    datasets = pytest.importorskip("datasets")
    rows = {name: [f"{name} {i} words of a text" for i in range(size)] for name, size in SIZES.items()}
    splits = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    node = Component("torchrecipes.data.sources.hf_dataset", {"name": str(tmp_path / "saved")})
    data = {"eval_split": split, "mode": mode, "cache_dir": str(tmp_path / "cache"), "block_rows": 10}
    text = load_text(config(tmp_path, node, **data), causal=True)
    assert text.eval_sets["validation"].corpus.num_documents == SIZES["validation" if split == "auto" else "test"]
    train = finish(text.train).stream.corpus(0, 1) if mode == "streaming" else text.train.corpus
    assert train.num_documents == SIZES["train"]
    if split == "test" and mode == "prepare":
        text = load_text(config(tmp_path / "few", node, **data, eval_samples=3), causal=True)
        assert text.eval_sets["validation"].corpus.num_documents == 3


def test_a_split_of_a_dataset_repository_is_evaluated_on(tmp_path):
    for name, size in SIZES.items():
        lines = [json.dumps({"text": f"{name} {i} words of a text"}) for i in range(size)]
        (tmp_path / f"{name}-00000-of-00001.jsonl").write_text("\n".join(lines))
    node = Component("torchrecipes.data.sources.files", {"path": str(tmp_path)})
    text = load_text(config(tmp_path / "run", node, eval_split="auto", eval_samples=4), causal=True)
    assert text.eval_sets["validation"].corpus.num_documents == 4
    assert text.train.corpus.num_documents == SIZES["train"]


SIZES = {"train": 40, "test": 9, "validation": 6}


def test_a_tokenizer_is_trained_on_the_beginning_of_a_stream(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("abc\n" * 50 + "xyz\n" * 500)
    node = Component("torchrecipes.data.sources.files", {"path": str(path), "sample_by": "line"})
    monkeypatch.setattr(text_data, "TOKENIZER_CHARACTERS", 60)
    for number, one in enumerate((node, Component(mixture_path, {"sources": {"p": node, "q": node}, "weights": HALF}))):
        run = stream_config(tmp_path / str(number), one, validation_fraction=0, eval_samples=3)
        vocabulary = load_text(run, causal=True).tokenizer.backend.get_vocab()
        assert "a" in vocabulary and "x" not in vocabulary


HALF = {"p": 1, "q": 1}
mixture_path = "torchrecipes.data.sources.mixture"


def test_other_ranks_read_what_the_first_one_started(tmp_path, monkeypatch):
    text = load_text(stream_config(tmp_path, source(tmp_path, "law")), causal=True)
    monkeypatch.setattr(text_data, "rank", lambda: 1)
    monkeypatch.setattr(text_data, "open_stream", lambda *_, **__: pytest.fail("starts a process"))
    other = load_text(stream_config(tmp_path, source(tmp_path, "law")), causal=True)
    assert other.train.identity() == text.train.identity()
    assert other.eval_sets["validation"].identity() == text.eval_sets["validation"].identity()


def test_a_mixture_of_streams_needs_weights(tmp_path):
    for options, key in (({}, "weights"), ({"weights": {"law": 1, "code": 1}, "max_epochs": {"law": 1}}, "max_epochs")):
        with pytest.raises(UserError) as error:
            load_text(stream_config(tmp_path, mixed(tmp_path, **options)), causal=True)
        assert (error.value.code, error.value.key) == ("unfinished_stream", f"data.source.{key}")
    text = load_text(stream_config(tmp_path, mixed(tmp_path, weights={"law": 1, "code": 3})), causal=True)
    assert text.train.source_names == ("law", "code") and list(text.eval_sets) == ["law", "code"]


def test_a_stream_whose_first_block_has_nothing_to_evaluate_on_is_refused(tmp_path):
    with pytest.raises(UserError) as error:
        load_text(stream_config(tmp_path, source(tmp_path, "law"), validation_fraction=1e-9), causal=True)
    assert (error.value.code, error.value.key) == ("no_validation_text", "eval_every")
    assert "eval_samples" in error.value.hint


def tokens(tmp_path, name: str, documents: int) -> Component:
    """Ids of two documents' worth of letters in nanoGPT's format."""
    path = tmp_path / f"{name}.bin"
    np.tile(np.array([5, 6, 7, 4, 3], "<u2"), documents).tofile(path)
    return Component("torchrecipes.data.token_files.nanogpt_tokens", {"path": str(path), "eos_id": 3})


def test_tokens_of_another_tool_are_read_where_they_lie(tmp_path):
    trained = config(tmp_path, source(tmp_path, "law"))
    load_text(trained, causal=True)
    tokenizer = Component(
        "torchrecipes.data.tokenizers.load_tokenizer", {"path": str(tmp_path / "run" / "corpus" / "tokenizer")}
    )
    data = {"eval_sets": {"validation": tokens(tmp_path, "val", 20)}, "corpus_dir": str(tmp_path / "other")}
    made = config(tmp_path, tokens(tmp_path, "train", 100), **data)
    made.tokenizer = tokenizer
    text = load_text(made, causal=True)
    assert text.train.corpus.num_documents == 100 and text.eval_sets["validation"].corpus.num_documents == 20
    assert not list((tmp_path / "other").rglob("shard-*"))

    made.data.eval_sets, made.data.eval_samples = {}, 10
    text = load_text(made, causal=True)
    assert text.train.corpus.num_documents == 90 and text.eval_sets["validation"].corpus.num_documents == 10

    made.data.eval_samples = None
    with pytest.raises(UserError) as error:  # a fraction is the default
        load_text(made, causal=True)
    assert (error.value.code, error.value.key) == ("tokens_not_split", "data.validation_fraction")

    parts = {"old": tokens(tmp_path, "train", 100), "new": source(tmp_path, "code")}
    mixed = Component("torchrecipes.data.sources.mixture", {"sources": parts, "weights": {"old": 1, "new": 1}})
    made.data.source, made.data.eval_sets = mixed, {"old": tokens(tmp_path, "val", 20)}
    text = load_text(made, causal=True)
    assert set(text.eval_sets) == {"old", "new"} and text.train.source_names == ("old", "new")


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"weights": {"law": 0.5, "cod": 0.5}}, "source.weights"),
        ({"weights": {"law": 0.5, "code": -0.5}}, "source.weights"),
        ({"replay_ratio": 1.5}, "source.replay_ratio"),
        ({"max_epochs": {"cod": 1}}, "source.max_epochs"),
    ],
)
def test_names_and_weights_of_a_mixture_are_checked_with_the_config(tmp_path, args, key):
    assert TextData(source=mixed(tmp_path)).check() == []
    assert [error.key for error in TextData(source=mixed(tmp_path, **args)).check()] == [key]


def test_the_summary_names_parts_and_the_sets_that_would_replace_what_is_held_out(tmp_path, capsys):
    load_text(config(tmp_path, mixed(tmp_path), eval_sets={"law": source(tmp_path, "news", 30)}), causal=True)
    printed = capsys.readouterr().out
    assert "law, evaluation set: 30 documents" in printed and "law: 120 documents" in printed
    assert "code, validation: " in printed and "or give data.eval_sets.code" in printed


def test_a_part_of_a_stream_without_held_out_text_is_named(tmp_path):
    sources = {"law": source(tmp_path, "law"), "code": source(tmp_path, "code", 12)}
    node = Component("torchrecipes.data.sources.mixture", {"sources": sources, "weights": {"law": 0.5, "code": 0.5}})
    made = stream_config(tmp_path, node, validation_fraction=0.02)
    with pytest.raises(UserError, match="no text of code to evaluate on") as error:
        load_text(made, causal=True)
    assert (error.value.code, error.value.key) == ("no_validation_text", "eval_every")


def test_a_run_may_move_with_the_corpus_that_is_in_its_folder():
    """The corpus is compared by its content; `${output_dir}/corpus` is another path in the new place."""
    schema = make_dataclass("Config", [("data", TextData)])
    saved, current = ({"data": asdict(TextData(corpus_dir=f"{place}/run/corpus"))} for place in ("old", "new"))
    assert changed_keys(saved, current, schema) == {}
