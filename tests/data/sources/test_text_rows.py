"""`TextRows`: the same texts from a file and from standard input."""

import io
import sys
from types import SimpleNamespace

import pytest

from torchrecipes.data.sources import TextRows


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r"])
def test_standard_input_has_the_lines_of_a_file(tmp_path, monkeypatch, end):
    content = b"\xef\xbb\xbfa.com\nmid\rdle.com\r\n\r\r\n\n \xff\rb.com\x0b\xc2\x85 \rlast.com" + end
    (tmp_path / "names.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    rows = [TextRows(path, on_bad_row="empty") for path in (str(tmp_path / "names.txt"), "-")]
    of_file, of_input = map(list, rows)
    assert of_file == of_input == ["a.com", "mid", "dle.com", "", "", "", "", "b.com\x0b\x85 ", "last.com"]
    assert rows[0].num_bad == rows[1].num_bad == 1
