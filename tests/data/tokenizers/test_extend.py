"""Adding tokens to a tokenizer, and the check that ids have not changed."""

import json

import pytest
import tokenizers

from torchrecipes.data.sources import python_docs
from torchrecipes.data.sources.records import Document, ReadStats
from torchrecipes.data.tokenizers import (
    extend_tokenizer,
    learn_tokens,
    load_tokenizer,
    train_bpe,
    train_char,
    train_unigram,
    train_wordpiece,
)
from torchrecipes.errors import UserError


class Texts(list):
    name, num_bytes, fingerprint = "texts", 0, "texts"

    def __init__(self, *texts):
        super().__init__(Document(text, "here") for text in texts)
        self.report = ReadStats(documents=len(self))


GENERAL = "the quick brown fox jumps over the lazy dog and runs away from a bear, again and again. " * 20
DOMAIN = "hydroxychloroquine and azithromycin; hydroxychloroquine, then azithromycin again " * 20
TRAINERS = {
    "bpe": lambda: train_bpe(Texts(GENERAL), vocab_size=300, causal=True, pad_vocab_to_multiple_of=64),
    "bpe mlm": lambda: train_bpe(Texts(GENERAL), vocab_size=300),
    "wordpiece": lambda: train_wordpiece(Texts(GENERAL, "hydroxcqunzitm ;"), vocab_size=100),
    "unigram": lambda: train_unigram(Texts(GENERAL, "hydroxcqunzitm ;"), vocab_size=60),
}


@pytest.fixture(params=TRAINERS)
def tokenizer(request, tmp_path):
    # As `tokenizer extend` has it: from a folder, without the padding at its end.
    TRAINERS[request.param]().save(tmp_path)
    return load_tokenizer(tmp_path, pad_vocab_to_multiple_of=1, required=())


def vocabulary(tokenizer):
    return tokenizer.backend.get_vocab(with_added_tokens=True)


def test_learned_tokens_save_tokens_and_move_no_id(tokenizer, tmp_path):
    extension = learn_tokens(tokenizer, Texts(DOMAIN), 12)
    made, before = extension.tokenizer, vocabulary(tokenizer)
    assert 0 < len(extension.names) <= 12 and extension.first_id == tokenizer.unpadded_vocab_size
    after = vocabulary(made)
    assert {name: after[name] for name in before} == before
    assert [after[name] for name in extension.names] == list(range(len(before), len(before) + len(extension.names)))
    words = "hydroxychloroquine and azithromycin"
    assert len(made.encode(words)) < 0.7 * len(tokenizer.encode(words))
    assert made.decode(made.encode(words)) == tokenizer.decode(tokenizer.encode(words))
    # Text without the new words is what it was.
    assert made.encode("the quick brown bear") == tokenizer.encode("the quick brown bear")
    # From disk, too, by this library and by `tokenizers`.
    made.save(tmp_path / "new")
    loaded = load_tokenizer(tmp_path / "new", pad_vocab_to_multiple_of=1, required=())
    assert loaded.encode(DOMAIN) == made.encode(DOMAIN) and loaded.fingerprint == made.fingerprint
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    assert {name: plain.token_to_id(name) for name in after} == after


def test_pieces_are_what_the_token_consisted_of(tokenizer):
    extension = learn_tokens(tokenizer, Texts(DOMAIN), 12)
    for name, pieces in zip(extension.names, extension.pieces, strict=True):
        assert len(pieces) > 1 and max(pieces) < extension.first_id
        joined = "".join(tokenizer.backend.id_to_token(i).removeprefix("##") for i in pieces)
        assert joined == name.removeprefix("##")


def test_bpe_joins_the_most_frequent_pair_first():
    tokenizer = train_bpe(Texts("x"), vocab_size=257, causal=True, pad_vocab_to_multiple_of=1)
    # " ab" x 5: Ġa and ab are equally frequent (abc adds one more ab); then what is left.
    extension = learn_tokens(tokenizer, Texts("z ab ab ab ab ab abc"), 2)
    assert extension.names == ["ab", "Ġab"]
    assert len(learn_tokens(tokenizer, Texts("z ab ab ab ab ab abc"), 100).names) == 2  # nothing else occurs twice


def test_learned_merges_agree_with_training_from_scratch():
    """Continuing from the bytes gives the merges that the trainer of `tokenizers` finds."""
    source = python_docs(limit_mb=0.02)
    start = train_bpe(Texts("x"), vocab_size=257, causal=True, pad_vocab_to_multiple_of=1)
    ours = learn_tokens(start, source, 60).names
    trained = json.loads(train_bpe(source, vocab_size=257 + 60, causal=True).backend.to_str())["model"]["merges"]
    theirs = ["".join(pair) for pair in trained]
    # Pairs of one frequency may come in another order.
    assert len(set(ours[:40]) & set(theirs[:45])) >= 38


@pytest.mark.parametrize("special", [False, True])
def test_given_tokens_are_found_in_text_or_in_prompts_only(tokenizer, special):
    extension = extend_tokenizer(tokenizer, ["<|user|>", "covid", "<|user|>"], special=special)
    made, first = extension.tokenizer, extension.first_id
    assert extension.names == ["<|user|>", "covid"]
    assert (first in made.encode("a <|user|> b")) != special
    assert first in made.encode_prompt("a <|user|> b")
    if not special:
        assert first + 1 in made.encode("the covid, again") and first + 1 not in made.encode("the covidity, again")
    before = vocabulary(tokenizer)
    assert {name: vocabulary(made)[name] for name in before} == before


def test_further_tokens_follow_the_ones_before(tokenizer, tmp_path):
    given = extend_tokenizer(tokenizer, ["<|a|>"], special=True)
    given.tokenizer.save(tmp_path / "given")
    again = learn_tokens(load_tokenizer(tmp_path / "given", 1, ()), Texts(DOMAIN), 5)
    assert again.first_id == given.first_id + 1
    third = extend_tokenizer(again.tokenizer, ["<|b|>"])
    assert third.first_id == again.first_id + len(again.names)
    assert vocabulary(third.tokenizer)["<|a|>"] == given.first_id
    third.tokenizer.save(tmp_path / "third")
    assert vocabulary(load_tokenizer(tmp_path / "third", 1, ())) == vocabulary(third.tokenizer)


def test_padding_moves_behind_the_new_tokens():
    tokenizer = TRAINERS["bpe"]()
    assert tokenizer.vocab_size > tokenizer.unpadded_vocab_size
    made = extend_tokenizer(tokenizer, ["<|a|>"], pad_vocab_to_multiple_of=64).tokenizer
    assert vocabulary(made)["<|a|>"] == tokenizer.unpadded_vocab_size
    assert (made.vocab_size, made.unpadded_vocab_size) == (tokenizer.vocab_size, tokenizer.unpadded_vocab_size + 1)


def test_what_cannot_be_added():
    tokenizer = TRAINERS["bpe"]()
    for tokens, code in ((["a", " "], "blank_token"), (["a", "b"], "nothing_to_add")):
        with pytest.raises(UserError) as caught:
            extend_tokenizer(tokenizer, tokens)
        assert caught.value.code == code
    with pytest.raises(UserError) as caught:
        learn_tokens(train_char(Texts(GENERAL), causal=True), Texts(DOMAIN), 5)
    assert caught.value.code == "unsupported_tokenizer"
    with pytest.raises(UserError) as caught:
        learn_tokens(tokenizer, Texts(), 5)
    assert caught.value.code == "no_documents"
    with pytest.raises(UserError) as caught:
        learn_tokens(tokenizer, Texts("the"), 5)
    assert caught.value.code == "nothing_to_add"


def test_a_vocabulary_with_holes_learns_words_but_gets_no_added_tokens(tmp_path):
    TRAINERS["wordpiece"]().save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] += 5
    content["added_tokens"] = [token for token in content["added_tokens"] if "inert" not in token["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path, pad_vocab_to_multiple_of=1, required=())
    with pytest.raises(UserError) as caught:
        extend_tokenizer(tokenizer, ["<|a|>"])
    assert caught.value.code == "holes"
    extension = learn_tokens(tokenizer, Texts(DOMAIN), 3)
    extension.tokenizer.save(tmp_path / "new")
    loaded = vocabulary(load_tokenizer(tmp_path / "new", 1, ()))
    assert loaded == vocabulary(tokenizer) | {
        name: max(vocab.values()) + 1 + i for i, name in enumerate(extension.names)
    }


def swap(content):
    vocab = content["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def rename(content):
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab["renamed"] = vocab.pop(last)
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != last]


@pytest.mark.parametrize("doctor", [swap, rename])
def test_ids_that_have_changed_since_a_tokenizer_was_saved_are_refused(tmp_path, doctor):
    TRAINERS["bpe"]().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    doctor(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path, causal=True)
    assert caught.value.code == "changed_ids"
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps({key: value for key, value in json.loads(config.read_text()).items() if "xxh3" not in key})
    )
    load_tokenizer(tmp_path, causal=True)


def test_tokens_that_transformers_added_are_no_change(tmp_path):
    transformers = pytest.importorskip("transformers")
    made = TRAINERS["bpe"]()
    made.save(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    other.add_tokens(["covid"])
    other.save_pretrained(tmp_path / "more")
    loaded = load_tokenizer(tmp_path / "more", causal=True)
    assert loaded.backend.token_to_id("covid") == made.vocab_size
    loaded.save(tmp_path / "again")
    load_tokenizer(tmp_path / "again", causal=True)
