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
    corpora = prepare_corpus(tmp_path / "corpus", train, tokenizer, validation_source=validation, num_workers=0)
    for corpus, source in zip(corpora, (train, validation), strict=True):
        assert corpus.num_documents == 1
        begin, *ids = corpus.read(0, corpus.num_tokens).tolist()
        assert begin == tokenizer.eos_id and tokenizer.decode(ids) == next(iter(source)).text


def test_the_fingerprint_knows_the_span_and_the_file(path, tmp_path):
    assert text_span(path).fingerprint == text_span(path).fingerprint != text_span(path, stop=0.9).fingerprint
    before = text_span(path).fingerprint
    (tmp_path / "play.txt").write_text("another")
    assert text_span(path).fingerprint != before


def test_wrong_input_is_told(path, tmp_path):
    for start, stop in ((0.5, 0.5), (0.9, 0.1), (-0.1, 1), (0, 1.5)):
        with pytest.raises(UserError, match=r"^text_span: start.*0 <= start < stop <= 1"):
            text_span(path, start, stop)
    with pytest.raises(UserError, match=r"^text_span: .*no such file"):
        text_span(path + "t")
    with pytest.raises(UserError, match="a folder"):
        text_span(str(tmp_path))
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 1"):
        list(text_span(str(tmp_path / "latin.txt")))
    (tmp_path / "blank.txt").write_text("text" + 100 * "\n")
    with pytest.raises(UserError, match="nothing but white space"):
        list(text_span(str(tmp_path / "blank.txt"), start=0.5))
