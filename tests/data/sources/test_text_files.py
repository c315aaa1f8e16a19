"""What `files` finds, in which order, how it is split into parts, and what it says of itself."""

import gzip
import json
import os
import pickle

import pytest

from torchrecipes.data.sources import line_reader, text_files
from torchrecipes.data.sources.records import BadRecord, Document, ReadStats, documents, require_documents
from torchrecipes.data.sources.text_files import files
from torchrecipes.errors import UserError


def texts(source):
    return [document.text for document in source]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# --- what is found


def test_a_file_gives_its_lines_with_their_numbers(here):
    write(here / "a.txt", "one\n\n  two \nthree")
    assert list(files("a.txt")) == [
        Document("one", "a.txt:1"),
        Document("  two ", "a.txt:3"),
        Document("three", "a.txt:4"),
    ]


def test_a_folder_is_read_in_the_order_of_names_and_says_what_it_leaves_out(here):
    for name in ("b.txt", "a/z.md", "a/b/c.jsonl", "a-b.txt", "B.txt", ".git/x.txt", "a/.hidden.txt", "c.bin", "notes"):
        write(here / "d" / name, json.dumps({"text": name}) if name.endswith("l") else name)
    os.symlink(here / "d" / "a", here / "d" / "link")
    os.symlink(here / "nowhere", here / "d" / "gone.txt")
    source = files("d")
    assert texts(source) == ["B.txt", "a/b/c.jsonl", "a/z.md", "a-b.txt", "b.txt"]
    skipped = {record.source: record.reason for record in source.skipped}
    assert set(skipped) == {"d/.git", "d/a/.hidden.txt", "d/c.bin", "d/notes", "d/link", "d/gone.txt"}
    assert "hidden" in skipped["d/.git"] and "unknown format" in skipped["d/c.bin"]
    assert "link to a folder" in skipped["d/link"] and "not a file" in skipped["d/gone.txt"]
    assert sum(source.report.skipped.values()) == 6 and source.report.documents == 5


def test_a_pattern_a_list_and_a_file_named_twice(here):
    for name in ("x/1.txt", "x/y/2.txt", "x/y/3.log", "z.txt"):
        write(here / name, name)
    assert texts(files("x/**/*.txt")) == ["x/1.txt", "x/y/2.txt"]
    assert texts(files("x/**/*.log")) == ["x/y/3.log"]  # an extension that is asked for is plain text
    assert [record.source for record in files("x/y/*").skipped] == ["x/y/3.log"]
    source = files(["z.txt", "x", "x/1.txt"])
    assert texts(source) == ["z.txt", "x/1.txt", "x/y/2.txt"]
    assert BadRecord("x/1.txt", "named twice") in source.skipped
    assert texts(files(str(here / "x" / "y" / "3.log"))) == ["x/y/3.log"]


def test_brackets_in_a_name_that_exists_are_no_pattern(here):
    write(here / "a[1].txt", "bracket")
    assert texts(files("a[1].txt")) == ["bracket"]


def test_home_is_expanded(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    write(here / "a.txt", "at home")
    assert texts(files("~/a.txt")) == ["at home"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("data/trian.txt", ["{}/data/trian.txt", "did you mean {}/data/train.txt?"]),
        ("dta/train.txt", ["{}/dta/train.txt", "did you mean {}/data?"]),
        ("qqqq", ["{}/qqqq", "{} holds: data"]),
        ("data/*.csv", ["{}/data/*.csv", "{}/data holds: train.txt"]),
        ("dat/*.csv", ["{}/dat/*.csv", "did you mean {}/data?"]),
        ("hf://x/y", ["hf://x/y", "download it first"]),
        ("", ["names no file"]),
        ([], ["names no file"]),
        ("empty", ["no file to read in {}/empty", "nothing there"]),
        ("odd", ["no file to read in {}/odd", "odd/x.bin: unknown format"]),
        ("odd/x.parquet.gz", ["{}/odd/x.parquet.gz", "unpack it first"]),
        ("/dev/null", ["/dev/null", "device"]),
    ],
)
def test_a_path_that_leads_nowhere_is_answered_with_the_nearest(here, path, expected):
    write(here / "data/train.txt", "x")
    write(here / "odd/x.bin", "x")
    write(here / "odd/x.parquet.gz", "x")
    (here / "empty").mkdir()
    if path == "qqqq":
        for name in ("odd", "empty"):
            (here / name).rename(here / f".{name}")
    with pytest.raises(UserError) as error:
        files(path)
    for part in expected:
        assert part.replace("{}", str(here)) in str(error.value)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ({"sample_by": "lines"}, "data.source.sample_by is 'lines'; did you mean line?"),
        ({"on_bad_record": "ignore"}, "data.source.on_bad_record is 'ignore'; it is one of stop, skip"),
        ({"max_document_chars": 3}, "the least is 100"),
    ],
)
def test_a_wrong_argument_is_refused(here, argument, expected):
    write(here / "a.txt", "x")
    with pytest.raises(UserError, match=r"data\.source") as error:
        files("a.txt", **argument)
    assert expected in str(error.value)


def test_a_file_that_cannot_be_read_or_has_changed_is_no_traceback(here):
    path = here / "a.txt"
    write(path, "one\n")
    source = files("a.txt", on_bad_record="skip")
    write(path, "one\ntwo\n")
    with pytest.raises(UserError, match=r"a\.txt has changed"):
        list(source)
    source = files("a.txt", on_bad_record="skip")
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"a\.txt has changed"):
        list(source)
    source = files("a.txt", on_bad_record="skip")
    path.unlink()
    with pytest.raises(UserError, match=r"a\.txt cannot be read: No such file"):
        list(source)


# --- formats


def test_every_format_gives_the_same_documents(here):
    import pyarrow
    from pyarrow import parquet

    wanted = ["one, with a comma", 'two "quoted"', "drei: Grüße 日本", "four"]
    rows = [json.dumps({"n": 1, "text": text, "x": [1.5, None]}) for text in wanted]
    write(here / "a.txt", "\n".join(wanted))
    write(here / "a.txt.gz", gzip.compress("\n".join(wanted).encode()))
    write(here / "a.jsonl", "\n".join(rows))
    write(
        here / "a.ndjson.gz",
        gzip.compress("\n".join(rows[:2]).encode()) + gzip.compress("\n".join(["", *rows[2:]]).encode()),
    )
    write(here / "a.json", "  " + "\r\n".join(rows))
    write(here / "A.CSV", "n,text\n" + "".join('1,"' + text.replace('"', '""') + '"\n' for text in wanted))
    write(here / "a.tsv", "text\tn\n" + "".join(f"{text}\t1\n" for text in wanted))
    table = pyarrow.table({"n": range(4), "text": wanted})
    parquet.write_table(table, "a.parquet")
    parquet.write_table(table.set_column(1, "text", table["text"].dictionary_encode()), "b.parquet")
    parquet.write_table(table.cast(pyarrow.schema([("n", "int8"), ("text", "large_string")])), "c.parquet")
    for path in here.iterdir():
        assert texts(files(path.name)) == wanted, path


def test_text_key_names_the_key_and_the_column(here):
    write(here / "a.jsonl", '{"body": "x", "text": "no"}')
    write(here / "a.csv", "body,text\nx,no\n")
    for name in ("a.jsonl", "a.csv"):
        assert texts(files(name, text_column="body")) == ["x"]


def test_a_paragraph_stands_between_blank_lines_and_a_document_is_a_file(here):
    content = "\n\na\nb \n\n \t\n  c\n\nd"
    write(here / "a.txt", content)
    assert list(files("a.txt", sample_by="paragraph")) == [
        Document("a\nb ", "a.txt:3"),
        Document("  c", "a.txt:7"),
        Document("d", "a.txt:9"),
    ]
    assert list(files("a.txt", sample_by="document")) == [Document(content, "a.txt:1")]


def test_line_ends_are_the_same_in_every_reader(here):
    ends = ["a\n", "b\r\n", "c\r", "d\x0b\x0c\x1c\x85\u2028\u2029d\r", "\r\n", "e"]
    write(here / "a.txt", "".join(ends))
    odd = "d\x0b\x0c\x1c\x85\u2028\u2029d"
    wanted = [("a", 1), ("b", 2), ("c", 3), (odd, 4), ("e", 6)]
    assert list(files("a.txt")) == [Document(text, f"a.txt:{number}") for text, number in wanted]
    assert texts(files("a.txt", sample_by="document")) == ["a\nb\nc\n" + odd + "\n\ne"]
    write(here / "a.jsonl", "\r".join(json.dumps({"text": end}, ensure_ascii=False) for end in ends))
    assert texts(files("a.jsonl")) == ["a\n", "b\n", "c\n", odd + "\n", "e"]
    write(here / "a.csv", "text\r" + "".join(f'"{end}"\r\n' for end in ends))
    assert texts(files("a.csv")) == ["a\n", "b\n", "c\n", odd + "\n", "e"]


# --- long texts


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_a_long_text_is_cut_at_white_space_and_nothing_is_dropped(here, sample_by):
    line = " ".join(f"wörd{number}" for number in range(300)) + "x" * 500
    for name in ("a.txt", "a.jsonl"):
        write(here / name, line if name == "a.txt" else json.dumps({"text": line}))
        found = list(files(name, sample_by=sample_by, max_document_chars=100))
        assert "".join(document.text for document in found) == line
        assert all(len(document.text) <= 100 for document in found)
        assert all(document.text.endswith(" ") for document in found[:20])
        assert [document.source for document in found[:2]] == [f"{name}:1", f"{name}:1 (piece 2)"]


def test_a_line_longer_than_memory_allows_comes_in_pieces_with_flat_memory(here):
    import tracemalloc

    with open("a.txt", "w") as file:
        file.write("first\n")
        for number in range(100_000):
            file.write(f"wörter und zahlen {number} " * 30)
        file.write("\nlast")
    size = os.path.getsize("a.txt")
    tracemalloc.start()
    count = length = 0
    for document in files("a.txt"):
        count, length, last = count + 1, length + len(document.text.encode()), document
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 70_000_000 > 30_000_000 > peak
    assert length == size - 2 and last == Document("last", "a.txt:3") and count > 30


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
@pytest.mark.parametrize("repeats", [2_050_000, 2_500_000, 4_100_000])
def test_a_line_longer_than_memory_allows_is_the_same_text_in_pieces(here, sample_by, repeats):
    line = "x" + "ö" * repeats
    write(here / "a.txt", f"a\n{line}\nb\nc\n\nd")
    found = list(files("a.txt", sample_by=sample_by))
    if sample_by == "line":
        assert found[0] == Document("a", "a.txt:1")
        assert found[-3:] == [Document("b", "a.txt:3"), Document("c", "a.txt:4"), Document("d", "a.txt:6")]
        assert "".join(document.text for document in found[1:-3]) == line
        assert {document.source.split(" ")[0] for document in found[1:-3]} == {"a.txt:2"}
    else:
        joined = "".join(document.text for document in found)
        assert joined == f"a\n{line}\nb\nc" + ("\n\nd" if sample_by == "document" else "d")
        assert found[0].source == "a.txt:1" and (found[-1].source == "a.txt:6") == (sample_by == "paragraph")


def test_a_bad_byte_in_a_line_longer_than_memory_allows_ends_that_line_only(here):
    good = b"ten bytes " * 600_000
    write(here / "a.txt", b"first\n" + good + b"\xff" + good + b"\nlast\n")
    source = files("a.txt", on_bad_record="skip")
    found = list(source)
    assert found[0].text == "first" and found[-1] == Document("last", "a.txt:3")
    assert source.report.skipped == {"not UTF-8": 1}
    assert b"".join(document.text.encode() for document in found[1:-1]) == good[: sum(len(d.text) for d in found[1:-1])]


def test_a_json_line_too_long_for_memory_is_a_bad_record(here, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_RECORD", line_reader.BLOCK)
    row = json.dumps({"text": "x"})
    write(here / "a.jsonl", row + "\n" + json.dumps({"text": "y" * 5_000_000}) + "\n" + row)
    write(here / "a.csv", "text\nx\n" + "y" * 5_000_000 + "\nx\n")
    for name, number in (("a.jsonl", 2), ("a.csv", 3)):
        source = files(name, on_bad_record="skip")
        assert [document.source for document in source] == [f"{name}:{number - 1}", f"{name}:{number + 1}"]
        assert source.report.examples == {"a line of more than 256 MiB": [f"{name}:{number}"]}


# --- parts and fingerprints


def content(kind):
    rows = [f"row {number} " + "é" * (number % 7) for number in range(500)]
    if kind == "jsonl":
        return "\n".join(json.dumps({"text": row}) if number % 50 else "{bad" for number, row in enumerate(rows))
    if kind == "crlf":
        return "\r\n".join(row + "\r\n" * (number % 3) for number, row in enumerate(rows))
    if kind == "cr":
        return "\n\n".join("\r".join(rows[start : start + 7]) for start in range(0, 500, 7))
    return "\n".join(row + "\n" * (number % 3) for number, row in enumerate(rows))


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
@pytest.mark.parametrize("kind", ["lf", "crlf", "cr", "jsonl", "long"])
def test_slices_give_what_the_file_gives(here, monkeypatch, kind, sample_by):
    monkeypatch.setattr(text_files, "SLICE", 700)
    monkeypatch.setattr(line_reader, "BLOCK", 64)
    name = "a.jsonl" if kind == "jsonl" else "a.txt"
    # A byte order mark at the start belongs to no line; the long line has no place for a cut in it.
    write(
        here / name,
        b"\xef\xbb\xbf" + (content(kind).encode() if kind != "long" else b"a\n" + b"x" * 3000 + b"\nb\n\nc"),
    )
    source = files(name, sample_by=sample_by, on_bad_record="skip", max_document_chars=200)
    whole = list(source)
    parts = pickle.loads(pickle.dumps(source.parts()))
    assert (len(parts) > (3 if kind != "long" else 1)) == (sample_by != "document" or kind == "jsonl")
    assert [document for part in parts for document in part] == whole
    assert len(whole) > 5
    merged = ReadStats()
    for part in parts:
        merged.merge(part.report)
    assert merged == source.report
    assert sum(part.num_bytes for part in parts) == source.num_bytes == os.path.getsize(name)
    assert len({part.fingerprint for part in parts}) == len(parts)


@pytest.mark.parametrize("name", ["array.jsonl", "utf16.txt", "other.parquet"])
def test_a_large_file_that_is_something_else_is_reported_once(here, monkeypatch, name):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(text_files, "SLICE", 100)
    write(here / "array.jsonl", json.dumps([{"text": str(number)} for number in range(100)], indent=1))
    write(here / "utf16.txt", "\n".join(map(str, range(100))).encode("utf-16"))
    parquet.write_table(pyarrow.table({"body": list(map(str, range(100)))}), "other.parquet", row_group_size=10)
    source = files(name, on_bad_record="skip")
    (part,) = source.parts()
    assert list(part) == list(source) == []
    assert part.report == source.report and sum(part.report.skipped.values()) == 1


def test_a_parquet_file_is_split_by_row_groups(here, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(text_files, "SLICE", 3000)
    parquet.write_table(
        pyarrow.table({"text": [f"row {number}" for number in range(2000)]}), "a.parquet", row_group_size=100
    )
    source = files("a.parquet")
    whole, parts = list(source), source.parts()
    assert whole[0] == Document("row 0", "a.parquet:1") and whole[-1].source == "a.parquet:2000"
    assert len(parts) > 3
    assert [document for part in parts for document in part] == whole


def test_the_parts_of_a_folder_hold_what_is_left_out(here):
    write(here / "d/a.txt", "x")
    write(here / "d/b.bin", "x")
    source = files("d")
    merged = ReadStats()
    for part in pickle.loads(pickle.dumps(source.parts())):
        assert isinstance(part.fingerprint, str) and part.name
        list(part)
        merged.merge(part.report)
    list(source)
    assert merged == source.report and merged.documents == 1 and sum(merged.skipped.values()) == 1


def test_the_fingerprint_follows_the_files_and_the_options_and_not_the_place(here):
    write(here / "d/a.txt", "x")
    write(here / "d/sub/b.txt", "y")
    first = files("d").fingerprint
    assert files("d").fingerprint == files(str(here / "d")).fingerprint == first
    assert files("d", sample_by="document").fingerprint != first
    assert files("d", on_bad_record="skip").fingerprint != first
    assert files("d", text_column="x").fingerprint != first
    (here / "d").rename(here / "e")
    assert files("e").fingerprint == first
    (here / "e/a.txt").rename(here / "e/c.txt")
    assert files("e").fingerprint != first
    (here / "e/c.txt").rename(here / "e/a.txt")
    os.utime(here / "e/a.txt", ns=(1, 1))
    assert files("e").fingerprint != first


# --- the account


def test_a_source_is_read_again_with_a_new_report(here):
    write(here / "a.jsonl", '{"text": "one"}\n{"text": null}\n{"text": "  "}\n')
    source = files("a.jsonl", on_bad_record="skip")
    assert list(source) == list(source)
    assert source.report.documents == 1 and source.report.characters == 3
    assert source.report.skipped == {"the text is null": 1, "the text is empty": 1}
    assert source.report.lines() == [
        "1 documents, 3 characters",
        "left out 1: the text is null",
        "  a.jsonl:2",
        "left out 1: the text is empty",
        "  a.jsonl:3",
    ]


def test_reports_add_up_and_keep_the_first_examples():
    first, second = ReadStats(), ReadStats()
    items = [BadRecord(f"f:{number}", "odd", "detail" * (number == 1)) for number in range(1, 10)]
    assert list(documents([*items[:3], Document("abc", "g:1")], first)) == [Document("abc", "g:1")]
    list(documents(items[3:], second))
    first.merge(second)
    assert (first.documents, first.characters, first.skipped) == (1, 3, {"odd": 9})
    assert first.examples["odd"] == ["f:1: detail", "f:2", "f:3", "f:4", "f:5"]
    assert str(first).endswith("  and 4 more")


def test_stop_names_the_records_that_follow_and_the_remedy(here):
    good = '{"text": "x"}\n'
    write(here / "a.jsonl", good + "{\n" + '{"text": ""}\n' + good * 3 + '{"body": 1}\n' + "[]\n" * 20)
    reader = iter(files("a.jsonl"))
    assert next(reader).text == "x"
    with pytest.raises(UserError) as error:
        next(reader)
    told = str(error.value).split("\n")
    assert told[0].startswith("a.jsonl:2: not JSON: ") and told[1] == "a.jsonl:7: no key 'text': its keys are 'body'"
    assert told[2] == "a.jsonl:8: not a JSON object: it is a list" and len(told) == 11
    assert "data.source.text_column" in told[-1] and told[-1].endswith("data.source.on_bad_record=skip")


def test_no_documents_is_an_error_that_lists_what_was_seen(here):
    write(here / "a.jsonl", '{"body": "x"}\n\n{"text": ""}\n')
    source = files("a.jsonl", on_bad_record="skip")
    assert list(source) == []
    with pytest.raises(UserError) as error:
        require_documents(source, source.report)
    assert str(error.value).startswith(f"no documents in {here}/a.jsonl\n")
    assert "left out 1: no key 'text'" in str(error.value) and "left out 1: the text is empty" in str(error.value)
