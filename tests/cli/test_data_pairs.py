"""`tune-style data pairs`."""

import json

import pytest

from torchrecipes.cli.main import main
from torchrecipes.data.examples import labeled_texts, open_examples, pairs, prepare_examples
from torchrecipes.data.tokenizers import load_tokenizer, train_wordpiece

RECIPE = """
from dataclasses import dataclass, field
from torchrecipes.config import Component
from torchrecipes.data import ExampleData
from torchrecipes.models import EmbeddingConfig

@dataclass
class Config:
    output_dir: str
    data: ExampleData = field(default_factory=ExampleData)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    tokenizer: Component | None = None
    init_from: str | None = None
    seq_len: int = 32
    global_batch_size: int = 4
    task: str = "single_label"
    label_names: list[str] | None = None

def main(config):
    raise AssertionError
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"what is number {i}", "answer": f"it is {i}", "label": "xy"[i % 2]} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = pairs("a.jsonl", "question", "answer").as_documents()
    train_wordpiece(source, vocab_size=120).save(tmp_path / "tokenizer")
    return tmp_path


def run(*words):
    return main(["data", "pairs", *words])


PAIRS = ("--data", "a.jsonl", "--set", "query=question", "positive=answer")


def test_it_writes_the_files_that_prepare_examples_would(here, capsys):
    words = ("--tokenizer", "tokenizer", "--seq-len", "16", "--prompt", "query=what ", "--validation-fraction", "0.2")
    assert run(*PAIRS, *words, "-o", "corpus") == 0
    made = prepare_examples(
        "expected",
        pairs("a.jsonl", "question", "answer"),
        load_tokenizer("tokenizer"),
        max_length=16,
        prompts={"query": "what "},
        validation_fraction=0.2,
    )
    for corpus, split in zip(made, ("train", "validation"), strict=True):
        assert open_examples(f"corpus/{split}").fingerprint == corpus.fingerprint
        assert corpus.summary() in capsys.readouterr().out or split == "validation"
    assert load_tokenizer("corpus/tokenizer").fingerprint == made[0].tokenizer_fingerprint


def test_other_verbs_know_a_corpus_of_examples(here, capsys):
    run(*PAIRS, "--tokenizer", "tokenizer", "--validation-fraction", "0.2", "-o", "corpus")
    summary = open_examples("corpus/train").summary()
    capsys.readouterr()
    assert main(["data", "verify", "corpus"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["data", "stats", "corpus"]) == 0
    assert summary in capsys.readouterr().out
    assert main(["data", "stats", "corpus", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["corpus/train"]["totals"]["examples"] == 16
    assert main(["data", "stats", "corpus", "--seq-len", "8"]) == 2
    path = here / "corpus" / "validation" / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert main(["data", "verify", "corpus"]) == 2
    assert path.name in capsys.readouterr().err


def test_labels_are_named(here):
    words = ("--kind", "labeled", "--data", "a.jsonl", "--set", "text=question", "--tokenizer", "tokenizer")
    assert run(*words, "--label-names", "y,x", "-o", "corpus") == 0
    assert open_examples("corpus/train").label_names == ["y", "x"]


def test_a_config_says_what_is_read_and_how(here, capsys):
    (here / "recipe.py").write_text(RECIPE)
    source = "{_component_: torchrecipes.data.examples.labeled_texts, path: a.jsonl, text: question}"
    (here / "run.yaml").write_text(
        f"# recipe: recipe.py\ndata:\n  source: {source}\n  validation_fraction: 0.2\n"
        "tokenizer: {_component_: torchrecipes.data.tokenizers.load_tokenizer, path: tokenizer}\n"
        "embedding: {prompts: {query: 'what '}}\nlabel_names: [y, x]\n"
    )
    assert run("--config", "run.yaml", "-o", "corpus", "seq_len=24") == 0, capsys.readouterr().err
    made = open_examples("corpus/train")
    assert (made.max_length, made.label_names, made.account["settings"]["prompts"]) == (
        24,
        ["y", "x"],
        {"query": "what "},
    )
    assert open_examples("corpus/validation").num_examples == 4
    again = prepare_examples(
        "corpus", labeled_texts("a.jsonl", "question"), load_tokenizer("tokenizer"), max_length=24,
        validation_fraction=0.2, prompts={"query": "what "}, label_names=["y", "x"],
    )  # fmt: skip
    assert again[0].fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--set", "query=question"), "--tokenizer"),
        (("--tokenizer", "tokenizer", "--set", "qurey=question"), "qurey"),
        (("--tokenizer", "tokenizer", "--set", "path=b"), "--set"),
        (("--tokenizer", "tokenizer", "--set", "max_examples=0"), "--set max_examples"),
        ((*PAIRS[2:], "--tokenizer", "tokenizer", "--seq-len", "1"), "--seq-len"),
        ((*PAIRS[2:], "--tokenizer", "tokenizer", "--prompt", "qurey=a"), "--prompt"),
        ((*PAIRS[2:], "--tokenizer", "tokenizer", "--prompt", "query"), "--prompt"),
        ((*PAIRS[2:], "--tokenizer", "tokenizer", "--validation-fraction", "1"), "--validation-fraction"),
        ((*PAIRS[2:], "--tokenizer", "tokenizer", "--threads", "-1"), "--threads"),
        (("--kind", "scored_pairs", "--set", "low=1", "--tokenizer", "tokenizer"), "--set high"),
    ],
)
def test_a_mistake_names_its_option(here, capsys, words, told):
    assert run("--data", "a.jsonl", *words, "-o", "corpus") == 2
    assert told in capsys.readouterr().err


def test_a_config_that_is_none_of_fine_tuning(here, capsys):
    assert run("--config", "gpt2/quickstart", "-o", "corpus") == 2
    assert "data tokenize" in capsys.readouterr().err
    (here / "run.yaml").write_text("seed: 1\n")
    assert run("--config", "run.yaml", "-o", "corpus") == 2
    assert "# recipe:" in capsys.readouterr().err
    assert run("--config", "run.yaml", "--threads", "1", "-o", "corpus") == 2
    assert "--threads" in capsys.readouterr().err
