"""`tune-style data mine-negatives`."""

import json
import shutil

import pytest

from torchrecipes.cli.main import main
from torchrecipes.data.examples import pairs
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import load_tokenizer, train_wordpiece
from torchrecipes.evaluation import TextClassifier, TextEncoder
from torchrecipes.mining import NegativeRules, mine_hard_negatives
from torchrecipes.models import EmbeddingModel, SequenceClassifier, bert, load_classifier, load_embedding_model, save_hf

WORDS = "cat dog bird tree sea stone road house rain wind fire river moon star field hill".split()
OTHERS = WORDS[3:] + WORDS[:3]
ROWS = [
    (f"where is the {a} of {b}", f"the {a} is near the {b}", f"d{i}")
    for i, (a, b) in enumerate(zip(WORDS, OTHERS, strict=True))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    rows = [{"question": q, "answer": p, "doc": d} for q, p, d in ROWS]
    (folder / "faq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    passages = [{"_id": f"d{i % 20}", "text": f"a {word} and a {WORDS[i // 2]}"} for i, word in enumerate(WORDS * 2)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    (folder / "texts.txt").write_text("\n".join(text for row in ROWS for text in row[:2]))
    tokenizer = train_wordpiece(files(str(folder / "texts.txt")), vocab_size=200)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = bert(vocab_size=tokenizer.vocab_size, max_position_embeddings=32, initializer_range=0.3, **size)
    save_hf(EmbeddingModel(encoder, prompts={"query": "where is "}), folder / "model", tokenizer)
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mine(*words):
    data = ["--data", "faq.jsonl", "--set", "query=question", "positive=answer"]
    return main(["data", "mine-negatives", "--model", "model", *data, "--device", "cpu", *map(str, words)])


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_it_does_what_the_function_does_and_pairs_reads_it(here, capsys):
    words = ["--corpus", "corpus.jsonl", "--corpus-id", "_id", "--positive-id", "doc", "--range", "1", "30"]
    words += ["--num-negatives", "4", "--relative-margin", "0.05", "--strategy", "random", "--seed", "3"]
    assert mine(*words, "-o", "mined.jsonl") == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    rules = NegativeRules(range=(1, 30), num_negatives=4, relative_margin=0.05, strategy="random", seed=3)
    encoder = TextEncoder(load_embedding_model("model"), load_tokenizer("model", pad_vocab_to_multiple_of=1))
    source = pairs("faq.jsonl", "question", "answer", label="doc")
    corpus = [(row["_id"], row["text"]) for row in read("corpus.jsonl")]
    stats = mine_hard_negatives(encoder, source, "x.jsonl", corpus=corpus, rules=rules, labels_are_ids=True)
    assert read("mined.jsonl") == read("x.jsonl") and f"{stats.negatives:,} negatives" in out
    assert f"removed {stats.removed['relative_margin']:,}: relative_margin" in out
    by_document = {}
    for name, text in corpus:
        by_document.setdefault(name, set()).add(text)
    document = {question: name for question, _, name in ROWS}
    back = list(pairs("mined.jsonl", negatives="negatives", scores="scores"))
    for example, line in zip(back, read("mined.jsonl"), strict=True):
        assert example.texts == (line["query"], line["positive"], *line["negatives"])
        assert len(example.values) == len(example.texts) - 1
        assert not set(line["negatives"]) & by_document.get(document[line["query"]], set())
    assert not (here / "mined.jsonl.work").exists()


def test_embeddings_are_kept_for_other_rules(here, capsys, monkeypatch):
    assert mine("--range", "0", "16", "--work-dir", "work", "-o", "a.jsonl") == 0, capsys.readouterr().err

    def encode(*args, **kwargs):
        raise AssertionError("encoded again")

    monkeypatch.setattr(TextEncoder, "encode", encode)
    assert mine("--range", "3", "16", "--work-dir", "work", "-o", "b.jsonl") == 0, capsys.readouterr().err
    first, second = read("a.jsonl"), read("b.jsonl")
    assert [line["negatives"][3:5] for line in first] == [line["negatives"][:2] for line in second]


def test_a_corpus_in_beirs_layout(here, capsys):
    beir = here / "beir"
    beir.mkdir()
    rows = [{"_id": f"x{i}", "title": word, "text": f"all about a {word}"} for i, word in enumerate(WORDS)]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (beir / "queries.jsonl").write_text("")
    assert mine("--corpus", "beir", "--range", "0", "40", "--num-negatives", "40", "-o", "mined.jsonl") == 0
    assert all(f"{word} all about a {word}" in read("mined.jsonl")[0]["negatives"] for word in WORDS)


def test_a_reranker_judges(here, capsys):
    tokenizer = load_tokenizer("model", pad_vocab_to_multiple_of=1)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = bert(vocab_size=tokenizer.vocab_size, max_position_embeddings=64, initializer_range=0.5, **size)
    for name, labels in (("reranker", 1), ("classes", 3)):
        task = "regression" if labels == 1 else "single_label"
        save_hf(SequenceClassifier(encoder, num_labels=labels, task=task), name, tokenizer)
    words = ["--range", "0", "15", "--num-negatives", "15", "--absolute-margin", "0.0", "--cross-encoder"]
    assert mine(*words, "reranker", "-o", "mined.jsonl") == 0, capsys.readouterr().err
    classifier = TextClassifier(load_classifier("reranker"), tokenizer)
    lines = read("mined.jsonl")
    for line in lines:
        asked = [(line["query"], text) for text in (line["positive"], *line["negatives"])]
        assert line["scores"] == pytest.approx(classifier.logits(asked)[:, 0].tolist(), abs=1e-4)
        assert all(score <= line["scores"][0] for score in line["scores"][1:])
    assert len({len(line["negatives"]) for line in lines}) > 1
    assert mine(*words, "classes", "-o", "other.jsonl") == 2
    assert "--cross-encoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--range", "10", "12"], "--range"),
        (["--relative-margin", "-1"], "--relative-margin"),
        (["--min-negatives", "9"], "--min-negatives"),
        (["--max-length", "999"], "--max-length"),
        (["--corpus", "nothing.jsonl"], "--corpus"),
        (["--corpus", "corpus.jsonl", "--corpus-text", "body"], "body"),
        (["--range", "0", "9", "--max-score", "-2"], "--range"),
        (["-o", "faq.jsonl"], "--output"),
    ],
)
def test_mistakes(here, capsys, words, key):
    assert mine(*(["-o", "mined.jsonl"] if "-o" not in words else []), *words) == 2
    assert key in capsys.readouterr().err
    assert not (here / "mined.jsonl").exists()
    assert (here / "mined.jsonl.work").exists() == ("--max-score" in words)  # where something was encoded
