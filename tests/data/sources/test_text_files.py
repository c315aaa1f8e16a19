"""`files`: what it finds and in which order, its formats, long texts, fingerprint and report."""

import gzip
import json
import os

import pytest

from torchrecipes.data.sources import line_reader, resolve_paths, tables, text_files
from torchrecipes.data.sources.records import (
    BadRecord,
    Document,
    ReadStats,
    content_checksum,
    documents,
    require_documents,
)
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


def test_a_file_is_a_document_unless_lines_are_asked_for(here):
    content = "one\n\n  two \nthree"
    write(here / "a.txt", content)
    assert list(files("a.txt")) == [Document(content, "a.txt:1")]
    assert list(files("a.txt", sample_by="line")) == [
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
    assert (skipped["d/.git"], skipped["d/c.bin"]) == (resolve_paths.HIDDEN, resolve_paths.UNKNOWN)
    assert skipped["d/gone.txt"] == resolve_paths.NO_FILE
    assert sum(source.report.skipped.values()) == 6 and source.report.documents == 5


def test_a_pattern_a_list_and_a_file_named_twice(here):
    for name in ("x/1.txt", "x/y/2.txt", "x/y/3.log", "z.txt"):
        write(here / name, name)
    assert texts(files("x/**/*.txt")) == ["x/1.txt", "x/y/2.txt"]
    assert texts(files("x/**/*.log")) == ["x/y/3.log"]  # an extension that is asked for is plain text
    assert [record.source for record in files("x/y/*").skipped] == ["x/y/3.log"]
    source = files(["z.txt", "x", "x/1.txt"])
    assert texts(source) == ["z.txt", "x/1.txt", "x/y/2.txt"]
    assert BadRecord("x/1.txt", resolve_paths.TWICE) in source.skipped
    assert texts(files(str(here / "x" / "y" / "3.log"))) == ["x/y/3.log"]


def test_brackets_in_a_name_that_exists_are_no_pattern(here):
    write(here / "a[1].txt", "bracket")
    assert texts(files("a[1].txt")) == ["bracket"]


def test_home_is_expanded(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    write(here / "a.txt", "at home")
    assert texts(files("~/a.txt")) == ["at home"]


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [
        ("data/trian.txt", "no_such_file", ["{}/data/trian.txt", "{}/data/train.txt?"]),
        ("dta/train.txt", "no_such_file", ["{}/dta/train.txt", "{}/data?"]),
        ("qqqq", "no_such_file", ["{}/qqqq", "{} holds: data"]),
        ("data/*.csv", "no_such_file", ["{}/data/*.csv", "{}/data holds: train.txt"]),
        ("dat/*.csv", "no_such_file", ["{}/dat/*.csv", "{}/data?"]),
        ("hf://x/y", "no_such_file", ["hf://x/y"]),
        ("", "no_files", []),
        ([], "no_files", []),
        ("empty", "no_files", ["{}/empty"]),
        ("odd", "no_files", ["{}/odd", "odd/x.bin"]),
        ("odd/x.parquet.gz", "unreadable_file", ["{}/odd/x.parquet.gz"]),
        ("/dev/null", "unreadable_file", ["/dev/null"]),
    ],
)
def test_a_path_that_matches_nothing_is_answered_with_the_closest(here, path, code, expected):
    write(here / "data/train.txt", "x")
    write(here / "odd/x.bin", "x")
    write(here / "odd/x.parquet.gz", "x")
    (here / "empty").mkdir()
    if path == "qqqq":
        for name in ("odd", "empty"):
            (here / name).rename(here / f".{name}")
    with pytest.raises(UserError) as error:
        files(path)
    assert (error.value.code, error.value.key) == (code, "path")
    for part in expected:
        assert part.replace("{}", str(here)) in str(error.value)


@pytest.mark.parametrize(
    ("argument", "value", "valid"),
    [
        ("sample_by", "lines", "line"),
        ("on_bad_record", "ignore", "stop"),
        ("max_document_chars", 3, "100"),
        ("columns", ["n"], "text"),
    ],
)
def test_an_invalid_argument_is_refused(here, argument, value, valid):
    write(here / "a.txt", "x")
    with pytest.raises(UserError) as error:
        files("a.txt", **{argument: value})
    assert (error.value.key, error.value.code) == (argument, "invalid_value")
    assert valid in error.value.hint


# --- folders of other tools


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_save_to_disk_names_the_source_that_reads_it(here, splits):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a b c", "d e f"]})
    (datasets.DatasetDict(train=rows, test=rows) if splits else rows).save_to_disk("saved")
    for path in ("saved", "."):
        with pytest.raises(UserError) as error:
            files(path)
        assert error.value.code == "saved_dataset" and "hf_dataset name=" in error.value.hint
    with pytest.raises(UserError) as error:
        list(files(next(str(path) for path in here.rglob("*.arrow"))))
    assert "hf_dataset" in str(error.value)


def test_a_folder_with_training_files_alone_is_read_whole_without_its_card(here):
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "more.jsonl"):
        write(here / "repo/data" / name, json.dumps({"text": name}))
    write(here / "repo/README.md", "---\nlicense: mit\n---\n# A card\n")
    source = files("repo")
    assert len(texts(source)) == 3 and source.skipped == [BadRecord("repo/README.md", resolve_paths.CARD)]
    assert source.splits() == []
    write(here / "notes/README.md", "---\ntitle: x\n---\n")
    assert len(texts(files("notes"))) == 1, "a folder of texts alone has no card"


def test_a_file_that_cannot_be_read_or_has_changed_is_no_traceback(here):
    path = here / "a.txt"
    write(path, "one\n")
    source = files("a.txt", on_bad_record="skip")
    write(path, "one\ntwo\n")
    with pytest.raises(UserError) as error:
        list(source)
    assert error.value.code == "file_changed" and "a.txt" in str(error.value)
    source = files("a.txt", on_bad_record="skip")
    path.unlink()
    for use in (list, lambda source: source.fingerprint):
        with pytest.raises(UserError) as error:
            use(source)
        assert error.value.code == "unreadable_file" and "a.txt" in str(error.value)


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
    parquet.write_table(table.cast(pyarrow.schema([("n", "int8"), ("text", "string_view")])), "d.parquet")
    for path in here.iterdir():
        assert texts(files(path.name, sample_by="line")) == wanted, path


def test_tables_without_a_header_line(here):
    write(here / "a.csv", 'one,"two, three",4.5\r\nfour,five,0\r\n')
    write(here / "a.tsv", 'one\t"two\t4.5\n')
    columns = ["text", "other", "score"]
    assert list(files("a.csv", columns=columns)) == [Document("one", "a.csv:1"), Document("four", "a.csv:2")]
    assert texts(files("a.csv", columns=columns, text_column="other")) == ["two, three", "five"]
    assert texts(files("a.tsv", columns=columns, text_column="other")) == ['"two']
    with pytest.raises(UserError) as error:
        list(files("a.csv"))
    assert "columns=" in str(error.value)
    source = files("a.csv", columns=columns[:2], on_bad_record="skip")
    assert texts(source) == [] and source.report.skipped == {tables.FIELD_COUNT: 2}


def test_a_quoted_field_may_have_any_number_of_lines(here):
    book = "\n".join(f'line {number} of a long book, ""quoted""' for number in range(12_000))
    write(here / "book.csv", f'id,text\n1,"{book}"\n2,a short one\n')
    for mode in ("stop", "skip"):
        source = files("book.csv", on_bad_record=mode)
        assert list(source) == [
            Document(book.replace('""', '"'), "book.csv:2"),
            Document("a short one", "book.csv:12002"),
        ]
        assert not source.report.skipped


def test_a_quoted_field_beyond_memory_ends_the_file_and_makes_no_documents_of_its_lines(here, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_FIELD", 1000)
    write(here / "a.csv", 'text,n\nfirst,1\n"' + "a line,1\n" * 500 + '",1\nlast,1\n')
    source = files("a.csv", on_bad_record="skip")
    assert texts(source) == ["first"] and sum(source.report.skipped.values()) == 1
    assert "line 3" in str(source.report)


def test_text_column_names_the_key_and_the_column(here):
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
    assert list(files("a.txt", sample_by="line")) == [Document(text, f"a.txt:{number}") for text, number in wanted]
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
    for document in files("a.txt", sample_by="line"):
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
    source = files("a.txt", sample_by="line", on_bad_record="skip")
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
        assert source.report.examples == {line_reader.TOO_LONG: [f"{name}:{number}"]}


# --- fingerprint


def test_the_fingerprint_is_that_of_options_and_content(here):
    write(here / "d/a.txt", "x")
    write(here / "d/sub/b.txt", "y")
    first = files("d").fingerprint
    assert files("d").fingerprint == files(str(here / "d")).fingerprint == first
    assert files("d", sample_by="line").fingerprint != first
    assert files("d", text_column="x").fingerprint != first
    assert files("d", on_bad_record="skip").fingerprint == first, "the documents are the same"
    (here / "d").rename(here / "e")
    assert files("e").fingerprint == first
    os.utime(here / "e/a.txt", ns=(1, 1))
    assert files("e").fingerprint == first, "touched"
    (here / "e/a.txt").rename(here / "e/z.txt")
    assert files("e").fingerprint != first, "another order"
    write(here / "e/z.txt", "y")
    write(here / "e/sub/b.txt", "x")
    assert files("e").fingerprint == first, "the order of the content is the same"
    write(here / "e/z.txt", "z")
    assert files("e").fingerprint != first


def test_a_checksum_is_of_the_size_the_ends_and_samples(here):
    content = bytearray(os.urandom(4_000_000))
    seen = set()
    for change in (None, 0, len(content) - 1, len(content) // 2, "longer"):
        changed = bytearray(content)
        if change == "longer":
            changed += b"x"
        elif change is not None and change != len(content) // 2:
            changed[change] ^= 1
        elif change is not None:
            changed[change : change + 300_000] = bytes(300_000)
        write(here / "a", bytes(changed))
        seen.add(content_checksum("a"))
    assert len(seen) == 5
    small = bytearray(os.urandom(200_000))
    write(here / "a", bytes(small))
    before = content_checksum("a")
    for position in range(0, len(small), 20_011):
        small[position] ^= 1
        write(here / "a", bytes(small))
        assert content_checksum("a") != before
        small[position] ^= 1


# --- the report


def test_a_source_is_read_again_with_a_new_report(here):
    write(here / "a.jsonl", '{"text": "one"}\n{"text": null}\n{"text": "  "}\n')
    source = files("a.jsonl", on_bad_record="skip")
    assert list(source) == list(source)
    assert source.report.documents == 1 and source.report.characters == 3
    assert source.report.skipped == {"the text is null": 1, "the text is empty": 1}
    assert source.report.lines() == [
        "1 documents, 3 characters",
        "skipped 1: the text is null",
        "  a.jsonl:2",
        "skipped 1: the text is empty",
        "  a.jsonl:3",
    ]


def test_a_report_keeps_the_first_examples():
    report = ReadStats()
    items = [BadRecord(f"f:{number}", "odd", "detail" * (number == 1)) for number in range(1, 10)]
    assert list(documents([*items[:3], Document("abc", "g:1"), *items[3:]], report)) == [Document("abc", "g:1")]
    assert (report.documents, report.characters, report.skipped) == (1, 3, {"odd": 9})
    assert report.examples["odd"] == ["f:1: detail", "f:2", "f:3", "f:4", "f:5"]
    assert "4 more" in report.lines()[-1]


def test_stop_names_the_records_that_follow(here):
    good = '{"text": "x"}\n'
    write(here / "a.jsonl", good + "{\n" + '{"text": ""}\n' + good * 3 + '{"body": 1}\n' + "[]\n" * 20)
    reader = iter(files("a.jsonl"))
    assert next(reader).text == "x"
    with pytest.raises(UserError) as error:
        next(reader)
    assert error.value.code == "bad_record"
    message = error.value.problem.split("\n")
    assert len(message) == 10 and "'body'" in message[1]
    assert [line.split(": ")[0] for line in message[:3]] == ["a.jsonl:2", "a.jsonl:7", "a.jsonl:8"]
    assert "text_column" in error.value.hint and "on_bad_record=skip" in error.value.hint


def test_no_documents_is_an_error_that_lists_what_was_skipped(here):
    write(here / "a.jsonl", '{"body": "x"}\n\n{"text": ""}\n')
    source = files("a.jsonl", on_bad_record="skip")
    assert list(source) == []
    with pytest.raises(UserError) as error:
        require_documents(source, source.report)
    assert error.value.code == "no_documents" and f"{here}/a.jsonl" in str(error.value)
    assert "no key 'text'" in str(error.value)
