"""`tune-style data verify`."""

import pytest

from torchrecipes.cli.main import main
from torchrecipes.data import prepare_corpus
from torchrecipes.data.sources.records import Document, ReadStats
from torchrecipes.data.tokenizers import train_char


class Texts(list):
    name, num_bytes, fingerprint = "texts", 0, "texts"

    def __init__(self, texts):
        super().__init__(Document(text, "here") for text in texts)
        self.report = ReadStats(documents=len(self))


@pytest.fixture
def corpus(tmp_path):
    source = Texts(f"document number {i}" for i in range(200))
    prepare_corpus(tmp_path / "corpus", source, train_char(source), validation_fraction=0.1, shard_tokens=1000)
    return tmp_path / "corpus"


def test_a_valid_corpus_gives_a_line_for_each_split(corpus, capsys):
    capsys.readouterr()
    assert main(["data", "verify", str(corpus)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(corpus / "train"), str(corpus / "validation")]
    assert main(["data", "verify", str(corpus / "train")]) == 0


@pytest.mark.parametrize("byte", [-1, 300])
def test_every_corrupt_file_is_named(corpus, capsys, byte):
    # One byte of the tokens or of the offsets, in two splits: sizes are unchanged.
    damaged = [corpus / "train" / "shard-00001.safetensors", corpus / "validation" / "shard-00000.safetensors"]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[byte] ^= 1
        path.write_bytes(content)
    assert main(["data", "verify", str(corpus)]) == 2
    err = capsys.readouterr().err
    assert all(f"{path.parent} is corrupt: {path.name}" in err for path in damaged)
    assert "shard-00002" not in err


@pytest.mark.parametrize("harm", ["truncated", "missing", "account"])
def test_what_a_checksum_is_not_needed_for(corpus, capsys, harm):
    path = corpus / "train" / "shard-00001.safetensors"
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "missing":
        path.unlink()
    else:
        path = corpus / "train" / "corpus.json"
        path.write_text("{")
    assert main(["data", "verify", str(corpus)]) == 2
    assert path.name in capsys.readouterr().err


def test_there_is_no_corpus(tmp_path, capsys):
    assert main(["data", "verify", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
