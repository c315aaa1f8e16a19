"""Files as they come: corrupt, misnamed, empty, odd. Each has one answer, and none of them is a traceback.

The first half writes such files itself; the second goes through the folder `bad` of the shared data, where it is there.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from torchrecipes.cli.main import main
from torchrecipes.data.corpus import open_corpus
from torchrecipes.data.sources import line_reader
from torchrecipes.data.sources.records import EMPTY_TEXT, require_documents
from torchrecipes.data.sources.text_files import files
from torchrecipes.data.tokenizers import train_char
from torchrecipes.errors import UserError

GOOD = json.dumps({"text": "a good row", "n": 1}) + "\n"


def read(path, **arguments):
    """(documents, report), or the error's message. A line of text is a document, so that bad ones can be counted."""
    try:
        source = files(str(path), **{"sample_by": "line", **arguments})
        found = list(source)
        require_documents(source, source.report)
    except UserError as error:
        return str(error)
    return found, source.report


def texts(path, **arguments):
    return [document.text for document in read(path, **arguments)[0]]


# name, content, (lines that are bad, what is said of them), texts of the documents
RECORDS = {
    "bad_json": ("a.jsonl", GOOD * 2 + "{oops\n" + GOOD + '{"text": "cut', {3: "not JSON", 5: "not JSON"}, 3),
    "scalars": (
        "a.jsonl",
        '"s"\n42\nnull\n["a"]\ntrue\n' + GOOD,
        {1: "a string", 2: "a number", 3: "null", 4: "a list", 5: "true or false"},
        1,
    ),
    "missing_key": ("a.jsonl", GOOD + '{"Text": "x", "y": 1}\n{}\n', {2: "'Text', 'y'", 3: "none at all"}, 1),
    "no_string": (
        "a.jsonl",
        '{"text": null}\n{"text": 17}\n{"text": ["a"]}\n{"text": {}}\n{"text": false}\n{"text": NaN}\n' + GOOD,
        {1: "null", 2: "a number", 3: "a list", 4: "an object", 5: "true or false", 6: "a number"},
        1,
    ),
    "surrogate": ("a.jsonl", '{"text": "half \\ud83d"}\n{"text": "\\udc00"}\n' + GOOD, {1: "\\ud83d", 2: "\\udc00"}, 1),
    "huge_int": ("a.jsonl", '{"n": ' + "9" * 6000 + ', "text": "x"}\n' + GOOD, {1: "too many digits"}, 1),
    "deep": ("a.jsonl", '{"n": ' + "[" * 200_000 + "]" * 200_000 + ', "text": "x"}\n' + GOOD, {1: "too deeply"}, 1),
    "latin1_json": ("a.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}\n' + GOOD.encode(), {2: "0xe9"}, 2),
    "trailing": ("a.jsonl", GOOD.strip() + "," + "\n" + GOOD, {1: "Extra data"}, 1),
    "control": ("a.jsonl", '{"text": "a\x01b"}\n' + GOOD, {1: "control character"}, 1),
    "utf8_text": (
        "a.txt",
        b"clean\nbad \xff\nover\xc0\xaflong\nclean\nca\xe6\x97",
        {2: "0xff", 3: "0xc0", 5: "inside"},
        2,
    ),
    "ragged": ("a.csv", "text,label\none,1\ntwo\nthree,0,x\nfive,\n", {3: "1, not 2", 4: "3, not 2"}, 2),
    "unclosed": ("a.csv", 'text,label\n"fine",1\n"never closed,0\nnext,1\nlast,0\n', {3: "quote"}, 3),
    "unclosed_later_closed": ("a.csv", 'text,label\n"never,0\n"next",1\nlast,0\n', {2: "quote"}, 2),
    "unclosed_then_latin1": ("a.csv", b'text,label\n"never,0\ncaf\xe9,1\nlast,0\n', {2: "quote", 3: "0xe9"}, 1),
    "tsv": ("a.tsv", 'text\tlabel\n"quotes\t1\nx\n', {3: "1, not 2"}, 1),
}


@pytest.mark.parametrize("name, content, bad, good", RECORDS.values(), ids=RECORDS)
def test_bad_records_are_named_or_counted(tmp_path, name, content, bad, good):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = read(path)
    assert isinstance(message, str)
    for line, (number, detail) in zip(message.split("\n"), bad.items(), strict=False):
        assert line.startswith(f"{path}:{number}: ") and detail in line
    assert message.count(f"{path}:") == len(bad)
    found, report = read(path, on_bad_record="skip")
    assert len(found) == report.documents == good
    assert sum(report.skipped.values()) == len(bad)
    examples = [example for group in report.examples.values() for example in group]
    assert {int(example.removeprefix(f"{path}:").split(":")[0]) for example in examples} == set(bad)


def archive(*names):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in names:
            file.writestr(name, "content")
    return data.getvalue()


def tar():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.txt"))
    return data.getvalue()


WHOLE_FILES = {
    "gzip_named_jsonl": ("a.jsonl", gzip.compress(GOOD.encode()), "a name that ends in .gz"),
    "gzip_named_txt": ("a.txt", gzip.compress(b"text"), "gzip data"),
    "gzip_in_gzip": ("a.txt.gz", gzip.compress(gzip.compress(b"text")), "gzip data"),
    "text_named_gz": ("a.txt.gz", b"text", "gzip"),
    "zip": ("a.txt", b"PK\x03\x04 and so on", "zip archive"),
    "docx": ("a.txt", archive("[Content_Types].xml", "word/document.xml"), "Word document"),
    "xlsx_named_csv": ("a.csv", archive("xl/workbook.xml"), "Excel workbook"),
    "tar": ("a.txt", tar(), "a tar archive"),
    "tar_gz": ("a.txt.gz", gzip.compress(tar()), "a tar archive"),
    "xz": ("a.jsonl", lzma.compress(b"text"), "a name that ends in .xz"),
    "text_named_xz": ("a.txt.xz", b"text", "xz data"),
    "text_named_zst": ("a.txt.zst", b"text", "zstd data"),
    "bzip2": ("a.txt", bz2.compress(b"text"), "bzip2 data"),
    "zstd": ("a.txt", b"\x28\xb5\x2f\xfd and so on", "a name that ends in .zst"),
    "pdf": ("a.txt", b"%PDF-1.7\n and so on", "a PDF"),
    "sqlite": ("a.txt", b"SQLite format 3\x00 and so on", "an SQLite database"),
    "parquet_named_csv": ("a.csv", b"PAR1\x15 and so on", "a name that ends in .parquet"),
    "arrow_named_txt": ("a.txt", b"ARROW1\x00\x00 and so on", "an Arrow file"),
    "arrow_stream": ("a.txt", b"\xff\xff\xff\xff\x08\x01 and so on", "an Arrow stream"),
    "old_word": ("a.txt", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    "utf16": ("a.txt", "in UTF-16".encode("utf-16"), "it is UTF-16"),
    "utf16_be": ("a.jsonl", b"\xfe\xff" + GOOD.encode("utf-16-be"), "it is UTF-16"),
    "utf16_no_mark": ("a.txt", "Latin letters in UTF-16".encode("utf-16-le"), "looks like UTF-16"),
    "utf32": ("a.csv", "in UTF-32".encode("utf-32"), "it is UTF-32"),
    "object": ("a.json", json.dumps({"text": "a", "b": 1}, indent=2).encode(), "one object over several lines"),
    "text_named_parquet": ("a.parquet", b"just text", "not a Parquet file"),
    "empty_parquet": ("a.parquet", b"", "not a Parquet file"),
    "no_header": ("a.csv", b"A plane.,A jet.,4.5\nx,y,1\n", "'A plane.', 'A jet.', '4.5'"),
}


@pytest.mark.parametrize("name, content, expected", WHOLE_FILES.values(), ids=WHOLE_FILES)
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_files_that_are_something_else_are_named_for_what_they_are(tmp_path, name, content, expected, mode):
    (tmp_path / name).write_bytes(content)
    message = read(tmp_path / name, on_bad_record=mode)
    assert isinstance(message, str) and expected in message and str(tmp_path / name) in message
    (tmp_path / "good.txt").write_text("good")
    beside = read(tmp_path, on_bad_record=mode)
    if mode == "stop":
        assert expected in beside
    else:
        assert [document.text for document in beside[0]] == ["good"] and sum(beside[1].skipped.values()) == 1


EMPTY = {
    "no bytes": b"",
    "blank": b"\n \n\t\n\n   \n",
    "mark": b"\xef\xbb\xbf",
    "mark and line ends": b"\xef\xbb\xbf\r\n\r",
}


@pytest.mark.parametrize("content", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv", "a.txt.gz"])
@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_nothing_to_read_is_an_error(tmp_path, name, content, sample_by):
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    source = files(str(tmp_path / name), sample_by=sample_by)
    assert list(source) == []
    with pytest.raises(UserError) as error:
        require_documents(source, source.report)
    assert error.value.code == "no_documents" and str(tmp_path / name) in str(error.value)


def test_corrupt_gzip_gives_the_documents_before_the_damage(tmp_path):
    content = "".join(json.dumps({"text": os.urandom(20).hex()}) + "\n" for _ in range(2000))
    whole = gzip.compress(content.encode())
    for number, corrupt in enumerate([whole[:-40], whole[: len(whole) // 2], whole[:-8] + bytes(8), whole[:30]]):
        path = tmp_path / f"{number}.jsonl.gz"
        path.write_bytes(corrupt)
        message = read(path)
        assert message.startswith(f"{path}: corrupt or truncated gzip data")
        source = files(str(path), on_bad_record="skip")
        found = [document.text for document in source]
        assert found == [json.loads(line)["text"] for line in content.splitlines()[: len(found)]]
        assert (len(found) > 900) == (number < 3) and source.report.skipped == {"corrupt or truncated gzip data": 1}


def test_parquet_that_is_corrupt_or_has_no_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [os.urandom(20).hex() for _ in range(3000)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "whole.parquet", row_group_size=500)
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) * 6 // 10])
    (tmp_path / "hole.parquet").write_bytes(whole[:60_000] + bytes(30_000) + whole[90_000:])
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "none.parquet")
    values = pyarrow.array([b"ok", None, b"", b"caf\xe9", b"fine\r\n"], "binary")
    unchecked = pyarrow.Array.from_buffers(pyarrow.string(), 5, values.buffers())
    parquet.write_table(pyarrow.table({"text": unchecked}), tmp_path / "values.parquet")
    assert "cut.parquet: not a Parquet file, or a corrupt one" in read(tmp_path / "cut.parquet")
    hole = files(str(tmp_path / "hole.parquet"), on_bad_record="skip")
    found = [document.text for document in hole]
    corrupt = hole.report.skipped["corrupt Parquet data"]
    assert 0 < corrupt < 6 and set(found) < set(rows) and len(found) >= 500 * (6 - corrupt)
    assert found == [row for row in rows if row in set(found)] and (found[0], found[-1]) == (rows[0], rows[-1])
    assert "no column 'text': its columns are 'body', 'n'" in read(tmp_path / "other.parquet")
    assert "the column 'text' holds no strings: but int64" in read(tmp_path / "numbers.parquet")
    assert read(tmp_path / "none.parquet").startswith("no documents in ")
    message = read(tmp_path / "values.parquet")
    assert "values.parquet:2: the text is null" in message and "values.parquet:4: not UTF-8" in message
    found, report = read(tmp_path / "values.parquet", on_bad_record="skip")
    assert [document.text for document in found] == ["ok", "fine\n"] and sum(report.skipped.values()) == 3


def test_what_is_odd_but_good_is_read_as_it_is(tmp_path):
    odd = [
        "tab\there",
        "bell \x07 \x1b[31m",
        "NUL \x00 inside",
        "\x00" * 40,
        "zero\u200bwidth \ufeff mark",
        "\U0001f468\u200d\U0001f469",
    ]
    (tmp_path / "a.txt").write_text("\ufeff" + "\n".join(odd), encoding="utf-8")
    assert texts(tmp_path / "a.txt") == odd
    (tmp_path / "a.jsonl").write_text(
        "\ufeff" + "\n".join(json.dumps({"text": text}) for text in odd), encoding="utf-8"
    )
    assert texts(tmp_path / "a.jsonl") == odd
    (tmp_path / "b.jsonl").write_text(
        '{"text": "one", "text": "two"}\n{"text": "x", "n": NaN}\n{"text": "y", "n": -Infinity}'
    )
    assert texts(tmp_path / "b.jsonl") == ["two", "x", "y"]
    (tmp_path / "c.jsonl").write_text(' \t{"text": "\\ud83d\\ude00 whole pair"} \r\n')
    assert texts(tmp_path / "c.jsonl") == ["\U0001f600 whole pair"]
    (tmp_path / "d.csv").write_text('text,n\n"a ""quoted""\nline, and more",1\n\nx,2\n')
    assert [tuple(document) for document in read(tmp_path / "d.csv")[0]] == [
        ('a "quoted"\nline, and more', f"{tmp_path / 'd.csv'}:2"),
        ("x", f"{tmp_path / 'd.csv'}:5"),
    ]
    (tmp_path / "e.csv").write_text('text\n"' + "long " * 100_000 + '"\n')
    assert len(texts(tmp_path / "e.csv")[0]) == 500_000


def test_what_follows_an_unclosed_quote_is_read_in_its_order(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\n"never,1\n' + "".join(f"row {number},1\n" for number in range(50)))
    assert texts(tmp_path / "a.csv", on_bad_record="skip") == [f"row {number}" for number in range(50)]


def test_a_bad_line_takes_its_paragraph_or_file_with_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\nthree\n\xff\nfour\n\nfive\n")
    assert texts(tmp_path / "a.txt", sample_by="paragraph", on_bad_record="skip") == ["one\ntwo", "five"]
    assert "a.txt:5: not UTF-8" in read(tmp_path / "a.txt", sample_by="paragraph")
    assert "skipped 1: not UTF-8" in read(tmp_path / "a.txt", sample_by="document", on_bad_record="skip")


def test_random_damage_is_never_a_traceback_whatever_the_size_of_blocks(tmp_path, monkeypatch):
    rng = random.Random(0)
    seeds = {
        "a.jsonl": "".join(f'{{"text": "wört {number}", "n": [1, {{"a": null}}]}}\n' for number in range(30)),
        "a.txt": "".join(f"line é {number}\n" + "\n" * (number % 2) for number in range(60)),
        "a.csv": "text,n\n" + "".join(f'"two\nlines ""q"" {number}",1\n' for number in range(20)),
        "a.tsv": "text\tn\n" + "x y\t1\n" * 20,
    }
    odd = [
        b"\n",
        b"\r",
        b"\r\n",
        b'"',
        b"\xff",
        b"\x00",
        b"\xe6\x97",
        b"{",
        b"[",
        b"\n\n",
        b"\\ud800",
        b"\t",
        b",",
        b" " * 50,
    ]
    skipped = 0
    for _ in range(600):
        name = rng.choice(list(seeds))
        content = bytearray(seeds[name].encode())
        for _ in range(rng.randrange(1, 5)):
            place = rng.randrange(len(content))
            content[place : place + rng.choice([0, 0, 1, 30])] = rng.choice([*odd, rng.randbytes(1)])
        (tmp_path / name).write_bytes(content)
        arguments = {
            "sample_by": rng.choice(["line", "paragraph", "document"]),
            "max_document_chars": rng.choice([100, 999]),
        }
        source = files(str(tmp_path / name), on_bad_record="skip", **arguments)
        whole, report = list(source), source.report
        monkeypatch.setattr(line_reader, "BLOCK", rng.choice([4, 64, 1 << 20]))
        assert list(source) == whole and source.report == report, bytes(content)
        try:
            assert list(files(str(tmp_path / name), **arguments)) == whole
            assert not set(source.report.skipped) - {EMPTY_TEXT}
        except UserError:
            skipped += 1
            assert source.report.skipped
    assert 100 < skipped < 600


# --- the shared folder: name -> (documents when stopping, when skipping; None is an error; words in the messages)

SHARED = Path(os.environ.get("TORCHRECIPES_DATA", Path(__file__).parents[3] / "shared" / "data")) / "bad"
ANSWERS = {
    "all_missing_text_key.jsonl": (None, None, "jsonl:1|'text'|'body', 'title'"),
    "bad_json_middle.jsonl": (None, 5, "jsonl:3|jsonl:5|jsonl:7"),
    "blank_lines.jsonl": (10, 10, ""),
    "control_chars.txt": (4, 4, ""),
    "control_ok.jsonl": (10, 10, ""),
    "control_ok.parquet": (200, 200, ""),
    "control_ok.txt": (10, 10, ""),
    "crlf.jsonl": (10, 10, ""),
    "crlf.txt": (10, 10, ""),
    "deep_nesting.jsonl": (..., ..., ""),  # newer Pythons can read it
    "domain_names_odd.txt": (29, 29, ""),
    "duplicate_keys.jsonl": (2, 2, ""),
    "duplicates.jsonl": (200, 200, ""),
    "empty.jsonl": (None, None, "no documents"),
    "empty.txt": (None, None, "no documents"),
    "gzip_named_jsonl.jsonl": (None, None, "not text|gzip"),
    "huge_int.jsonl": (None, 1, "jsonl:1|digits"),
    "invalid_utf8.jsonl": (None, 2, "jsonl:2|not UTF-8"),
    "invalid_utf8.txt": (None, 2, "txt:2|txt:3|not UTF-8"),
    "json_array.jsonl": (10, 10, ""),
    "json_scalars.jsonl": (None, 1, "jsonl:1|jsonl:2|jsonl:3|jsonl:4|jsonl:5"),
    "latin1.txt": (None, None, "txt:1|txt:2|not UTF-8"),
    "lone_surrogate.jsonl": (None, 1, "jsonl:1|surrogate"),
    "long_token.txt": (1, 1, ""),
    "many_tiny_docs.jsonl": (2000, 2000, ""),
    "missing_text_key.jsonl": (None, 2, "jsonl:2|jsonl:3|jsonl:5|jsonl:6|'content', 'source'|'Text'"),
    "mixed_dir": (4, 4, "c.bin|.hidden.txt"),
    "mixed_dir/.hidden.txt": (1, 1, ""),
    "mixed_dir/a.txt": (1, 1, ""),
    "mixed_dir/b.jsonl": (1, 1, ""),
    "mixed_dir/c.bin": (None, None, "c.bin:1: |not UTF-8"),
    "mixed_dir/sub/d name with spaces.md": (2, 2, ""),
    "mixed_eol.txt": (5, 5, ""),
    "mixed_schema.jsonl": (5, 5, ""),
    "nan_infinity.jsonl": (2, 2, ""),
    "no_final_newline.jsonl": (10, 10, ""),
    "no_text_column.parquet": (None, None, "'body', 'n'"),
    "not_parquet.parquet": (None, None, "not a Parquet file"),
    "nul_bytes.txt": (6, 6, ""),
    "nul_escape.jsonl": (2, 2, ""),
    "null_text.jsonl": (None, 1, "jsonl:1|jsonl:4|jsonl:5|jsonl:6|jsonl:7"),
    "null_text.parquet": (None, 2, "parquet:2"),
    "one_class_only.csv": (50, 50, ""),
    "pair_scores_bad.csv": (None, None, "no column 'text'"),
    "ragged.csv": (None, 2, "csv:3|csv:4"),
    "single_line_1mb.txt": (2, 2, ""),
    "tiny_one_doc.jsonl": (1, 1, ""),
    "truncated.jsonl": (None, 9, "jsonl:10"),
    "truncated.jsonl.gz": (None, ..., "gz: |gzip data"),
    "truncated.parquet": (None, None, "not a Parquet file, or a corrupt one"),
    "truncated_multibyte.txt": (None, None, "txt:1|inside a character"),
    "u2028_in_string.jsonl": (2, 2, ""),
    "unclosed_quote.csv": (None, 3, "csv:3|quote"),
    "unknown_labels.csv": (5, 5, ""),
    "utf16le_bom.txt": (None, None, "not UTF-8|UTF-16"),
    "utf8_bom.jsonl": (10, 10, ""),
    "whitespace_only.txt": (None, None, "no documents"),
    "zero_rows.parquet": (None, None, "no documents"),
}
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")


@needs_shared
def test_every_shared_bad_file_has_an_answer():
    present = {str(path.relative_to(SHARED)) for path in SHARED.rglob("*") if path.is_file()} - {"README.md"}
    assert present == set(ANSWERS) - {"mixed_dir"}


@needs_shared
@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("name", ANSWERS)
def test_a_shared_bad_file_ends_in_its_answer(name, mode):
    when_stopping, when_skipping, words = ANSWERS[name]
    expected = when_stopping if mode == "stop" else when_skipping
    message = read(SHARED / name, on_bad_record=mode)
    if expected is None or isinstance(message, str):
        assert isinstance(message, str) and name in message and expected in (None, ...)
    else:
        found, report = message
        assert expected is ... or len(found) == expected
        for document in found:
            document.text.encode()
            assert document.text.strip() and "\r" not in document.text and not document.text.startswith("\ufeff")
        message = str(report)
    if expected is None or mode == "skip" or name == "mixed_dir":
        assert all(word in message for word in words.split("|"))


@needs_shared
def test_data_tokenize_makes_a_corpus_of_what_is_good_in_every_shared_file(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text for a vocabulary")
    train_char(files(str(tmp_path / "a.txt")), causal=True).save(tmp_path / "tokenizer")
    for number, (name, (_, when_skipping, _)) in enumerate(ANSWERS.items()):
        command = ["data", "tokenize", "--output", str(tmp_path / str(number)), "--data", str(SHARED / name)]
        command += ["--tokenizer", str(tmp_path / "tokenizer"), "--objective", "causal", "--sample-by", "line"]
        code = main([*command, "--on-bad-record", "skip", "--validation-fraction", "0", "--threads", "0"])
        message = capsys.readouterr()
        if when_skipping is ... and code == 2:
            continue
        assert code == (2 if when_skipping is None else 0), (name, message)
        if when_skipping is None:
            assert name in message.err
        elif when_skipping is not ...:
            assert open_corpus(tmp_path / str(number) / "train").num_documents == when_skipping, name


@needs_shared
def test_shared_files_that_are_odd_but_good_keep_their_text():
    assert texts(SHARED / "mixed_eol.txt") == [
        "LF line",
        "CRLF line",
        "CR line",
        "next line\x85form\x0cfeed\u2028line sep\u2029para sep",
        "last",
    ]
    assert texts(SHARED / "crlf.txt") == texts(SHARED / "control_ok.txt")
    for name in ("crlf", "utf8_bom", "no_final_newline", "blank_lines"):
        assert texts(SHARED / f"{name}.jsonl") == texts(SHARED / "control_ok.jsonl")
    assert "".join(texts(SHARED / "single_line_1mb.txt")) == (SHARED / "single_line_1mb.txt").read_text()
    assert "\n".join(texts(SHARED / "control_chars.txt")) + "\n" == (SHARED / "control_chars.txt").read_bytes().decode()
    assert any("\x00" in text for text in texts(SHARED / "nul_escape.jsonl"))
    assert texts(SHARED / "u2028_in_string.jsonl")[0].count("\u2028") == 1
    found, report = read(SHARED / "null_text.jsonl", on_bad_record="skip")
    assert [document.source.rsplit(":")[-1] for document in found] == ["8"] and sum(report.skipped.values()) == 7
    found, report = read(SHARED / "null_text.parquet", on_bad_record="skip")
    assert [document.text for document in found] == ["ok", "fine"] and sum(report.skipped.values()) == 2
    found, report = read(SHARED / "ragged.csv", on_bad_record="skip")
    assert [document.text for document in found] == ["one", "five"] and sum(report.skipped.values()) == 3
