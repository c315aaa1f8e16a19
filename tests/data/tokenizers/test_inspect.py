"""What a tokenizer is made of, and how well it suits text."""

import json

import pytest

from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers import (
    describe_tokenizer,
    load_tokenizer,
    measure_tokenizer,
    train_bpe,
    train_char,
    train_wordpiece,
)

TEXT = "the quick brown fox jumps over the lazy dog. " * 10


def documents(*texts):
    return [Document(text, "here") for text in texts]


def test_a_byte_level_bpe():
    made = train_bpe(documents(TEXT), vocab_size=300, causal=True)
    found = describe_tokenizer(made)
    assert found["kind"] == "BPE" and found["pre_tokenizer"] and found["decoder"] == "ByteLevel"
    assert found["special_tokens"] == [{"id": 0, "name": "<|endoftext|>", "roles": ["pad", "bos", "eos"]}]
    assert found["vocab_size"] - found["padding"] == made.unpadded_vocab_size
    assert found["holes"] == [] and found["added_tokens"] == 0 and not found["chat_template"]
    assert max(len(token["text"]) for token in found["longest"]) == len(found["longest"][0]["text"])
    # NFC is the only thing that changes a text.
    assert [sample["text"] for sample in found["not_restored"]] == []


def test_a_wordpiece_does_not_restore_blanks_and_case():
    found = describe_tokenizer(train_wordpiece(documents(TEXT), vocab_size=100))
    assert {token["id"]: token["roles"] for token in found["special_tokens"]}[4] == ["mask"]
    assert "Hello, world!" in [sample["text"] for sample in found["not_restored"]]


def test_holes_are_listed(tmp_path):
    train_bpe(documents(TEXT), vocab_size=300, causal=True, pad_vocab_to_multiple_of=1).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] += 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    made = load_tokenizer(tmp_path, pad_vocab_to_multiple_of=1, required=())
    assert describe_tokenizer(made)["holes"] == [vocab[last] - 2, vocab[last] - 1]


def test_measures_are_those_of_a_loop():
    made = train_bpe(documents(TEXT), vocab_size=300, causal=True)
    texts = ["the fox, again", "zzz über 水", "the dog"]
    found = measure_tokenizer(made, documents(*texts))
    tokens = [len(made.text_backend.encode(text, add_special_tokens=False).ids) for text in texts]
    assert found["tokens"] == sum(tokens) and found["words"] == 8
    assert found["tokens_per_word"] == pytest.approx(sum(tokens) / 8)
    assert found["tokens_per_byte"] == pytest.approx(sum(tokens) / sum(len(text.encode()) for text in texts))
    assert found["unknown_share"] == 0 and found["restored_share"] == 1
    used = {i for text in texts for i in made.encode(text)} - {0}
    assert found["vocabulary_used"] == pytest.approx(len(used) / (made.unpadded_vocab_size - 1))
    assert found["split_words"][0]["word"] in ("again", "über", "zzz")
    assert measure_tokenizer(made, documents(*texts), limit=1)["documents"] == 1


def test_unknown_characters_are_counted_and_named():
    made = train_char(documents("abc abc"), causal=True)
    found = measure_tokenizer(made, documents("abc x", "水x"))
    assert found["unknown_share"] == pytest.approx(3 / 7)
    assert found["unknown_characters"] == ["x", "水"]
    assert found["restored_share"] == 0


def test_without_text():
    found = measure_tokenizer(train_char(documents("abc"), causal=True), [])
    assert (
        found["documents"] == 0 and found["split_words"] == [] and found["tokens_per_word"] != found["tokens_per_word"]
    )
