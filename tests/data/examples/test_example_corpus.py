"""Example corpora: what is read back is what a loop over the source gives, however the corpus was built."""

import csv
import json
import pickle

import numpy as np
import pytest
import xxhash

from torchrecipes.data.corpus.shard_writer import CORPUS_FILE
from torchrecipes.data.examples import (
    Example,
    ExampleSource,
    build,
    labeled_texts,
    open_examples,
    pairs,
    prepare_examples,
    raw_texts,
    scored_pairs,
)
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers import train_wordpiece
from torchrecipes.errors import UserError

WORDS = "the a dog cat bird runs sleeps eats sees big small red blue house tree".split()


def sentence(number: int) -> str:
    generator = np.random.default_rng(number)
    return " ".join(generator.choice(WORDS, generator.integers(2, 20)))


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([Document(sentence(i), str(i)) for i in range(50)], vocab_size=200)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def ids(tokenizer, text, max_length=64):
    """A text as `transformers` would cut it: the end of its own tokens goes, the special ones stay."""
    whole = tokenizer.encode(text)
    return whole if len(whole) <= max_length else [*whole[: max_length - 1], whole[-1]]


def hash_of(text):
    return np.uint64(xxhash.xxh3_64_intdigest(text.encode())).view(np.int64)


def texts_of(block):
    return [part.tolist() for part in np.split(block.tokens, np.cumsum(block.text_lengths)[:-1])]


def test_pairs_come_back_in_any_order_with_their_scores(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 200)
    rows = []
    for i in range(60):
        negatives = [sentence(1000 * j + i) for j in range(1, 1 + i % 4)]
        scores = [i + 0.5, *(float(j) for j in range(len(negatives)))]
        rows.append({"q": sentence(i), "p": sentence(100 + i), "n": negatives, "s": scores})
    source = pairs(write_jsonl(tmp_path / "a.jsonl", rows), "q", "p", "n", "s")
    corpus, none = prepare_examples(tmp_path / "corpus", source, tokenizer, max_length=12, shard_tokens=400)
    assert corpus.read([]).example_texts.shape == (0, 5) and not len(corpus.read([]).tokens)
    assert none is None and len(corpus.shards) > 3 and corpus.kind == "pairs"
    assert (corpus.num_examples, corpus.texts_per_example, corpus.scores_per_example) == (60, 5, 4)
    numbers = np.random.default_rng(0).permutation(60)[:40]
    block = corpus.read(numbers)
    texts, truncated = texts_of(block), 0
    for place, number in enumerate(numbers):
        row = rows[number]
        wanted = [row["q"], row["p"], *row["n"]]
        own = block.example_texts[place]
        assert (own[len(wanted) :] == -1).all()
        assert [texts[i] for i in own[: len(wanted)]] == [ids(tokenizer, text, 12) for text in wanted]
        assert [block.text_hashes[i] for i in own[: len(wanted)]] == [hash_of(text) for text in wanted]
        assert np.array_equal(block.values[place], row["s"] + [np.nan] * (4 - len(row["s"])), equal_nan=True)
    truncated = sum(len(tokenizer.encode(text)) > 12 for row in rows for text in [row["q"], row["p"], *row["n"]])
    assert truncated == corpus.num_truncated > 0 and block.labels is None
    lengths = [sum(len(ids(tokenizer, text, 12)) for text in [row["q"], row["p"], *row["n"]]) for row in rows]
    for column, index in (("query", 0), ("positive", 1)):
        own = [len(ids(tokenizer, row["qp"[index]], 12)) for row in rows]
        wanted = [np.mean(own), *np.quantile(own, [0.5, 0.9], method="inverted_cdf"), max(own)]
        assert corpus.account["statistics"]["lengths"][column] == pytest.approx(wanted)
    assert corpus.example_lengths.tolist() == lengths and corpus.num_tokens == sum(lengths)
    assert pickle.loads(pickle.dumps(corpus)).read([3]).tokens.tolist() == corpus.read([3]).tokens.tolist()


def test_scores_are_scaled(tokenizer, tmp_path):
    path = write_csv(tmp_path / "a.csv", [[sentence(i), sentence(i + 50), i / 2] for i in range(11)])
    source = scored_pairs(path, low=0, high=5, columns=["sentence1", "sentence2", "score"])
    corpus, _ = prepare_examples(tmp_path / "corpus", source, tokenizer, max_length=64)
    assert np.allclose(corpus.read(np.arange(11)).values[:, 0], np.linspace(0, 1, 11))


@pytest.mark.parametrize("written", [["10", "2", "1"], [10, 2, 1], [10.0, 2.0, 1.0]])
def test_classes_that_are_numbers_are_sorted_as_numbers(tokenizer, tmp_path, written):
    rows = [{"text": sentence(i), "label": written[i % 3]} for i in range(12)]
    source = labeled_texts(write_jsonl(tmp_path / "a.jsonl", rows))
    corpus, _ = prepare_examples(tmp_path / "corpus", source, tokenizer, max_length=64)
    assert corpus.read([7, 0, 5]).labels.tolist() == [1, 2, 0]
    assert corpus.label_names == ["1", "2", "10"] and corpus.label_counts == [4, 4, 4]
    assert corpus.read(np.arange(6)).labels.tolist() == [2, 1, 0, 2, 1, 0]


def test_an_interrupted_call_continues_to_the_same_files(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 200)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": sentence(i), "label": "ab"[i % 2]} for i in range(80)])
    options = {"max_length": 64, "validation_fraction": 0.25, "shard_tokens": 200, "tokenizer_threads": 0}
    whole = prepare_examples(tmp_path / "whole", labeled_texts(path), tokenizer, **options)
    written = build.write_arrays
    left = 3

    def interrupted(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return written(*args)

    for _ in range(3):
        left = 3
        monkeypatch.setattr(build, "write_arrays", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_examples(tmp_path / "parts", labeled_texts(path), tokenizer, **options)
        with pytest.raises(UserError) as error:
            open_examples(tmp_path / "parts" / "train")
        assert error.value.code == "unfinished_corpus"
    monkeypatch.setattr(build, "write_arrays", written)
    parts = prepare_examples(tmp_path / "parts", labeled_texts(path), tokenizer, **options | {"tokenizer_threads": 2})
    assert [part.fingerprint for part in parts] == [part.fingerprint for part in whole]
    assert [part.account for part in parts] == [part.account for part in whole]
    train, order = parts[0], np.random.default_rng(0).permutation(parts[0].num_examples)
    assert len(train.shards) > 3 and train.read(order).labels.tolist() == train.labels[order].tolist()
    expected = {int(hash_of(sentence(i))): i % 2 for i in range(80)}
    block = train.read(order)
    assert [expected[text] for text in block.text_hashes.tolist()] == block.labels.tolist()
    names = [
        sorted(p.name for p in folder.rglob("*") if p.is_file()) for folder in (tmp_path / "parts", tmp_path / "whole")
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("fraction", [0.1, 0.12, 0.5])
def test_the_share_that_is_held_out_is_exact_for_every_label(tokenizer, tmp_path, fraction):
    labels = ["common"] * 60 + ["rare"] * 20 + ["pair"] * 2 + ["single"]
    rows = [{"text": f"{sentence(i)} {WORDS[i % 15]} {i}", "label": label} for i, label in enumerate(labels)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    train, validation = prepare_examples(
        tmp_path / "corpus", labeled_texts(path), tokenizer, max_length=64, validation_fraction=fraction
    )
    counts = dict(zip(validation.label_names, validation.label_counts, strict=True))
    assert counts == {"common": round(60 * fraction), "rare": round(20 * fraction), "pair": 1, "single": 0}
    assert train.num_examples + validation.num_examples == len(rows)
    again = prepare_examples(
        tmp_path / "other", labeled_texts(write_jsonl(tmp_path / "b.jsonl", rows[::-1])), tokenizer, max_length=64,
        validation_fraction=fraction,
    )  # fmt: skip
    assert set(again[1].read(range(validation.num_examples)).text_hashes) == set(
        validation.read(range(validation.num_examples)).text_hashes
    )


def test_a_corpus_of_other_settings_is_refused(tokenizer, tmp_path):
    source = raw_texts(write_jsonl(tmp_path / "a.jsonl", [{"text": sentence(i)} for i in range(5)]))
    corpus, _ = prepare_examples(tmp_path / "corpus", source, tokenizer, max_length=64)
    again, _ = prepare_examples(tmp_path / "corpus", source, tokenizer, max_length=64)
    assert again.fingerprint == corpus.fingerprint and corpus.texts_per_example == 1
    with pytest.raises(UserError) as error:
        prepare_examples(tmp_path / "corpus", source, tokenizer, max_length=32)
    assert error.value.code == "other_corpus" and "max_length" in error.value.problem


def test_damage_is_found(tokenizer, tmp_path):
    source = raw_texts(write_jsonl(tmp_path / "a.jsonl", [{"text": sentence(i)} for i in range(5)]))
    prepare_examples(tmp_path / "corpus", source, tokenizer, max_length=64)
    path = tmp_path / "corpus" / "train" / "shard-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\0\1")
    with pytest.raises(UserError) as error:
        open_examples(tmp_path / "corpus" / "train").verify()
    assert error.value.code == "corrupt_corpus"
    path.write_bytes(content[:-2])
    with pytest.raises(UserError) as error:
        open_examples(tmp_path / "corpus" / "train")
    assert error.value.code == "corrupt_corpus"
    (tmp_path / "corpus" / "train" / CORPUS_FILE).write_text("{}")
    with pytest.raises(UserError) as error:
        open_examples(tmp_path / "corpus" / "train")
    assert error.value.code == "corrupt_corpus"


def test_a_source_of_ones_own(tokenizer, tmp_path):
    class Records:
        name, num_bytes, fingerprint = "mine", 0, "1"

        def read(self, position=None):
            from torchrecipes.data.sources import ReadStats

            self.report = ReadStats()
            return iter([Example((sentence(i), sentence(i + 1)), (), "xy"[i % 2]) for i in range(4)])

    corpus, _ = prepare_examples(
        tmp_path, ExampleSource(Records(), "labeled", ("text", "text_pair"), has_labels=True), tokenizer, max_length=64
    )
    block = corpus.read([0])
    first, second = (tokenizer.encode(sentence(i)) for i in (0, 1))
    assert block.tokens.tolist() == [*first, *second[1:]] and block.second_starts.tolist() == [len(first)]
