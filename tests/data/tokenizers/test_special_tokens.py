"""Names of special tokens in documents: characters, which are counted, or the tokens."""

import json
import pickle

import pytest
from transformers import AutoTokenizer

from torchrecipes.data.corpus import prepare_corpus
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import load_tokenizer, train_bpe, train_char, train_unigram, train_wordpiece
from torchrecipes.errors import UserError

TEXT = "the cat sleeps in the house by the river\n" * 50


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return files(str(tmp_path / "a.txt"), sample_by="line")


def test_honored_names_are_the_tokens_that_transformers_gives(tmp_path, source):
    train_bpe(source, 300, causal=True).save(tmp_path / "m")
    other = AutoTokenizer.from_pretrained(tmp_path / "m")
    other.add_special_tokens({"additional_special_tokens": ["<sep2>"]})
    other.save_pretrained(tmp_path / "m")
    text = "the cat <sep2> sleeps<|endoftext|>in"
    as_text = load_tokenizer(tmp_path / "m", causal=True)
    honored = load_tokenizer(tmp_path / "m", causal=True, special_tokens="honor")
    assert honored.encode(text)[1:] == other(text)["input_ids"][-len(honored.encode(text)[1:]) :]
    assert honored.encode(text).count(honored.eos_id) == 2 and as_text.encode(text).count(honored.eos_id) == 1
    assert as_text.encode_prompt(text) == honored.encode_prompt(text)
    assert honored.encode("no names") == as_text.encode("no names")
    assert honored.fingerprint != as_text.fingerprint
    assert pickle.loads(pickle.dumps(honored)).encode(text) == honored.encode(text)


def test_a_saved_tokenizer_keeps_what_names_are(tmp_path, source):
    made = train_bpe(source, 300, causal=True, special_tokens="honor")
    made.save(tmp_path / "m")
    assert load_tokenizer(tmp_path / "m", causal=True).fingerprint == made.fingerprint
    as_text = load_tokenizer(tmp_path / "m", causal=True, special_tokens="text")
    assert as_text.fingerprint != made.fingerprint
    as_text.save(tmp_path / "n")
    assert load_tokenizer(tmp_path / "n", causal=True).special_tokens == "text"
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path / "m", causal=True, special_tokens="honour")
    assert (error.value.key, error.value.code) == ("special_tokens", "invalid_value")


@pytest.mark.parametrize("train", [train_bpe, train_unigram, train_wordpiece, train_char])
def test_honored_names_make_no_vocabulary(tmp_path, train):
    name = "[MASK]"
    (tmp_path / "a.txt").write_text(TEXT.replace("cat", name))
    source = files(str(tmp_path / "a.txt"), sample_by="line")
    size = {} if train is train_char else {"vocab_size": 300}
    as_text, honored = (train(source, **size, special_tokens=kind) for kind in ("text", "honor"))
    assert honored.mask_id in honored.encode(f"the {name} sleeps")
    assert as_text.mask_id not in as_text.encode(f"the {name} sleeps")
    known = {token.lower() for token in honored.backend.get_vocab() if not token.startswith(("[", "<"))}
    assert not any("mask" in token or token == "k" for token in known) or train is train_bpe
    folder = tmp_path / "kept"
    assert train(source, **size, special_tokens="honor", folder=folder).fingerprint == honored.fingerprint
    assert train(source, **size, special_tokens="honor", folder=folder).fingerprint == honored.fingerprint
    with pytest.raises(UserError) as error:
        train(source, **size, folder=folder)
    assert error.value.code == "other_tokenizer"


@pytest.mark.parametrize("kind", ["text", "honor"])
def test_the_corpus_counts_them_and_says_so(tmp_path, source, kind, capsys):
    texts = ["a <|endoftext|> b <|endoftext|>", "none <|endoftext| > <|x|>", "<|endoftext|>", "<|inert_0|>", "[MASK]"]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = train_bpe(source, 300, causal=True, special_tokens=kind)
    documents = files(str(tmp_path / "b.jsonl"))
    corpus, _ = prepare_corpus(tmp_path / "corpus", documents, tokenizer, 0, tokenizer_threads=0, shard_tokens=20)
    stated = json.loads((tmp_path / "corpus/train/corpus.json").read_text())["statistics"]
    assert (stated["special_names"], stated["documents_with_special_names"]) == (3, 2)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "special tokens" in line)
    assert "3 names" in line and "2 documents" in line and ("honor" in line) == (kind == "text")
    inside = sum(int((shard.tokens == tokenizer.eos_id).sum()) for shard in corpus.shards)
    assert inside == corpus.num_documents + (3 if kind == "honor" else 0)
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "no names"}))
    prepare_corpus(tmp_path / "other", files(str(tmp_path / "c.jsonl")), tokenizer, 0, tokenizer_threads=0)
    assert "special tokens" not in capsys.readouterr().out
