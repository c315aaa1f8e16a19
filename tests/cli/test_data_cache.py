"""`tune-style data cache`: nothing that is in use is removed."""

import os
import time

import pytest

from torchrecipes.cli.data_cache import DAY
from torchrecipes.cli.main import main
from torchrecipes.data.corpus.cache import use_folder
from torchrecipes.data.corpus.stream import open_stream
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import train_char


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with one folder of a stream that has ended, and two without shards: new and old."""
    monkeypatch.setenv("TORCHRECIPES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of a text" for i in range(50)))
    source = files(str(tmp_path / "text.txt"), sample_by="line")
    stream = open_stream(source, train_char(source), validation_fraction=0)
    while not stream.finished:
        stream.wait()
    stream.process.stop()
    for key, days in (("0new", 0), ("0old", 40)):
        (tmp_path / "cache" / key).mkdir()
        os.close(use_folder(tmp_path / "cache" / key))
        used = time.time() - days * DAY
        os.utime(tmp_path / "cache" / key / ".used", (used, used))
    return tmp_path / "cache", stream


def test_info_lists_what_is_there(cache, capsys):
    folder, stream = cache
    assert main(["data", "cache", "info"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert str(folder) in first
    by_key = {line.split()[0]: line for line in lines}
    assert set(by_key) == {stream.folder.name, "0new", "0old"}
    tokens = stream.corpus(0, 1).num_tokens
    for part in ("in use", ", complete", f"{tokens:,} tokens", "text.txt"):
        assert part in by_key[stream.folder.name]
    assert "not complete" in by_key["0old"] and "40.0 days ago" in by_key["0old"]
    assert main(["data", "cache", "info", "0old", "--cache-dir", str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_clear_removes_what_is_old_or_named_but_nothing_in_use(cache, capsys):
    folder, stream = cache
    assert main(["data", "cache", "clear", "--older-than", "30"]) == 0
    assert {path.name for path in folder.iterdir()} == {stream.folder.name, "0new"}
    assert main(["data", "cache", "clear"]) == 0
    assert {path.name for path in folder.iterdir()} == {stream.folder.name}
    assert f"kept {stream.folder.name}" in capsys.readouterr().out
    name = stream.folder.name
    del stream, cache
    assert main(["data", "cache", "clear", "no-key"]) == 2
    assert name in capsys.readouterr().err
