import pytest

from torchrecipes.data.corpus.corpus import prepare_corpus
from torchrecipes.data.sources.file_slice import text_span
from torchrecipes.data.tokenizers.load import train_char
from torchrecipes.errors import UserError

TEXT = "To be, or not to be:\n\n  that is the question —\r\nwhether 'tis nobler\tin the mind\n" * 40


@pytest.fixture
def path(tmp_path):
    (tmp_path / "play.txt").write_bytes(TEXT.encode())
    return str(tmp_path / "play.txt")


def test_spans_of_a_file_are_its_text_cut_by_characters(path):
    whole = TEXT.replace("\r\n", "\n")
    first, last = (next(iter(text_span(path, *shares))).text for shares in ((0, 0.9), (0.9, 1)))
    assert first + last == whole and len(first) == int(0.9 * len(whole))
    assert next(iter(text_span(path))).text == whole


def test_a_span_becomes_one_document_of_a_corpus(path, tmp_path):
    train, validation = text_span(path, stop=0.9), text_span(path, start=0.9)
    tokenizer = train_char(train, causal=True)
    corpora = prepare_corpus(tmp_path / "corpus", train, tokenizer, validation_source=validation, tokenizer_threads=0)
    for corpus, source in zip(corpora, (train, validation), strict=True):
        assert corpus.num_documents == 1
        begin, *ids = corpus.read(0, corpus.num_tokens).tolist()
        assert begin == tokenizer.eos_id and tokenizer.decode(ids) == next(iter(source)).text


def test_the_fingerprint_is_that_of_the_slice_and_the_content(path, tmp_path):
    before = text_span(path).fingerprint
    assert text_span(path).fingerprint == before != text_span(path, stop=0.9).fingerprint
    (tmp_path / "play.txt").rename(tmp_path / "moved.txt")
    assert text_span(str(tmp_path / "moved.txt")).fingerprint == before
    (tmp_path / "play.txt").write_text("another")
    assert text_span(path).fingerprint != before


@pytest.mark.parametrize("start, stop", [(0.5, 0.5), (0.9, 0.1), (-0.1, 1), (0, 1.5)])
def test_fractions_are_checked(path, start, stop):
    with pytest.raises(UserError) as error:
        text_span(path, start, stop)
    assert error.value.code == "invalid_value" and str(start) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("latin.txt", "Käse".encode("latin-1"), "not_text"),
        ("utf16.txt", "in UTF-16".encode("utf-16"), "not_text"),
        ("a.pdf", b"%PDF-1.7", "not_text"),
        ("blank.txt", b"text" + 100 * b"\n", "no_documents"),
    ],
)
def test_a_file_without_text_is_named(tmp_path, name, content, code):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(text_span(str(tmp_path / name), start=0.5))
    assert error.value.code == code and name in str(error.value)


def test_a_path_without_a_file_is_named(path, tmp_path):
    for wrong in (path + "t", str(tmp_path)):
        with pytest.raises(UserError) as error:
            text_span(wrong)
        assert error.value.code == "no_such_file" and wrong in str(error.value)


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffabcd".encode())
    assert [document.text for document in text_span(str(tmp_path / "a.txt"), stop=0.5)] == ["ab"]
