"""Tokenizers for models that predict the next token."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from torchrecipes.data.sources.text_files import files
from torchrecipes.data.tokenizers.load import load_tokenizer, train_bpe, train_char, train_unigram, train_wordpiece
from torchrecipes.errors import UserError

END = "<|endoftext|>"
TEXT = "The cat sat on the mat.\nThe  dog\tsaw the cat; the cat saw the dog — twice!\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i}.txt").write_text(TEXT * 3)
    return files(str(folder), sample_by="document")


TRAINED = {
    "bpe": lambda source, **more: train_bpe(source, vocab_size=300, causal=True, **more),
    "unigram": lambda source, **more: train_unigram(source, vocab_size=60, causal=True, **more),
    "char": lambda source, **more: train_char(source, causal=True, **more),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_a_document_begins_with_the_token_that_ends_the_one_before(source, kind):
    tokenizer = TRAINED[kind](source)
    end = tokenizer.backend.token_to_id(END)
    assert tokenizer.eos_id == tokenizer.bos_id == tokenizer.pad_id == end
    assert tokenizer.mask_id is tokenizer.cls_id is tokenizer.sep_id is None
    ids = tokenizer.encode("the cat")
    assert ids[0] == end and end not in ids[1:]
    assert tokenizer.encode_prompt("the cat") == ids
    assert tokenizer.encode_prompt("") == [end]
    assert tokenizer.encode_prompt(f"the{END}").count(end) == 2, "in a prompt it is the token itself"
    assert tokenizer.encode(f"the{END}").count(end) == 1, "in a document it is the characters that it is written with"


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_text_comes_back_exactly(source, kind):
    tokenizer = TRAINED[kind](source)
    assert tokenizer.decode(tokenizer.encode(TEXT)[1:]) == TEXT


def test_a_character_is_a_token():
    class Two(list):
        fingerprint = "two"

    from torchrecipes.data.sources.records import Document

    tokenizer = train_char(Two([Document("abba\n", "1"), Document("b c", "2")]), causal=True)
    assert tokenizer.vocab_size == 2 + len("\n abc")
    names = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("a\n b?")]
    assert names == [END, "a", "\n", " ", "b", "<unk>"]
    limited = train_char(Two([Document("abba\n", "1")]), limit_alphabet=2, causal=True)
    assert limited.encode("ab\n")[1:] == [2, 3, limited.unk_id]


def test_characters_for_an_encoder_have_its_special_tokens(source):
    tokenizer = train_char(source)
    first, *ids, last = tokenizer.encode("cat")
    assert (first, last, len(ids)) == (tokenizer.cls_id, tokenizer.sep_id, 3)
    assert tokenizer.encode_prompt("c[MASK]t")[2] == tokenizer.mask_id


@pytest.mark.parametrize("kind", TRAINED)
def test_transformers_gives_the_same_ids(source, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = TRAINED[kind](source, folder=tmp_path / "kept")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "kept")
    for text in ("the cat", "", TEXT, "unseen: é 漢"):
        assert hf(text)["input_ids"] == tokenizer.encode(text)
    assert hf.eos_token == hf.bos_token == hf.pad_token == END
    again = load_tokenizer(tmp_path / "kept", pad_vocab_to_multiple_of=1, causal=True)
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.fingerprint == tokenizer.fingerprint


def test_what_is_kept_for_a_causal_model_is_not_taken_for_an_encoder(source, tmp_path):
    train_bpe(source, vocab_size=300, causal=True, folder=tmp_path)
    with pytest.raises(UserError) as error:
        train_bpe(source, vocab_size=300, folder=tmp_path)
    assert error.value.code == "other_tokenizer" and "causal" in str(error.value)


def word_tokenizer(folder, special, **roles):
    """A tokenizer.json that adds nothing to a text, as GPT-2's does, and its tokenizer_config.json."""
    vocabulary = {name: i for i, name in enumerate(["the", "cat", "?", *special])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(special))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({f"{role}_token": name for role, name in roles.items()}))


def test_a_loaded_tokenizer_gets_the_form_of_documents(tmp_path):
    word_tokenizer(tmp_path, [END], eos=END)
    tokenizer = load_tokenizer(tmp_path, causal=True)
    assert tokenizer.encode("the cat") == [3, 0, 1] == tokenizer.encode_prompt("the cat")
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == 3


def test_begin_and_end_stay_two_where_they_are_two(tmp_path):
    word_tokenizer(tmp_path, ["<s>", "</s>"], bos="<s>", eos="</s>")
    tokenizer = load_tokenizer(tmp_path, causal=True)
    assert tokenizer.encode("the cat") == [3, 0, 1, 4]
    assert tokenizer.encode_prompt("the cat") == [3, 0, 1] and tokenizer.encode_prompt("") == [3]
    tokenizer.save(tmp_path / "saved")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert hf("the cat").input_ids == [3, 0, 1], "what a model goes on with does not end"
    kept = load_tokenizer(tmp_path / "saved", causal=True)
    assert kept.encode("the cat") == [3, 0, 1, 4] and kept.fingerprint == tokenizer.fingerprint
    word_tokenizer(tmp_path, ["<s>", "</s>"], bos="<s>", eos="<s>")
    assert load_tokenizer(tmp_path, causal=True).fingerprint != tokenizer.fingerprint
    assert tokenizer.pad_id == 4


def test_without_an_end_the_remedy_is_named(tmp_path, source):
    word_tokenizer(tmp_path, [])
    train_wordpiece(source, vocab_size=100, folder=tmp_path / "encoder")
    for folder in (tmp_path, tmp_path / "encoder"):
        with pytest.raises(UserError) as error:
            load_tokenizer(folder, causal=True)
        assert error.value.code == "no_special_token" and '"eos_token"' in error.value.hint


def test_a_causal_sentencepiece_model_gets_no_bert_tokens(tmp_path, source):
    spm = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("".join(document.text for document in source))
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=60, minloglevel=2, hard_vocab_limit=False
    )
    tokenizer = load_tokenizer(tmp_path / "m.model", pad_vocab_to_multiple_of=1, causal=True)
    plain = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert tokenizer.vocab_size == plain.vocab_size()
    assert tokenizer.encode("the cat") == [plain.bos_id(), *plain.encode("the cat"), plain.eos_id()]


def test_a_vocabulary_of_a_sample_is_that_of_the_documents_chosen(tmp_path):
    from torchrecipes.data.sources.records import Document

    class Words(list):
        fingerprint = "words"

    documents = Words(Document(f"{chr(0x400 + i)} {chr(0x400 + i)}", str(i)) for i in range(200))

    def characters(fraction):
        tokenizer = train_char(documents, causal=True, sample_fraction=fraction)
        return {chr(0x400 + i) for i in range(200) if tokenizer.backend.token_to_id(chr(0x400 + i)) is not None}

    tenth, half = characters(0.1), characters(0.5)
    assert 8 < len(tenth) < 35 and 70 < len(half) < 130 and tenth < half < characters(1.0), "by a hash of the text"
    for wrong in (0, 1.5):
        with pytest.raises(UserError) as error:
            characters(wrong)
        assert error.value.key == "sample_fraction"
    with pytest.raises(UserError) as error:
        characters(1e-9)
    assert error.value.key == "sample_fraction" and "200" in str(error.value)
    train_bpe(documents, vocab_size=300, causal=True, folder=tmp_path)
    with pytest.raises(UserError) as error:
        train_bpe(documents, vocab_size=300, causal=True, folder=tmp_path, sample_fraction=0.5)
    assert error.value.code == "other_tokenizer"
