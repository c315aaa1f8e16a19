"""Names in files: in documents and in blocks, from every position, and what is said of lines that give none."""

import gzip
import json
import lzma
import random

import numpy as np
import pytest

pytest.importorskip("publicsuffixlist")
pytest.importorskip("idna")

from torchrecipes.data.domains import domain_names, name_files, synthetic_names
from torchrecipes.data.sources import line_reader
from torchrecipes.errors import UserError

LINES = (
    b"# list\nOne.com\ntwo.co.uk\nbad name.de\nxn--99999999.org\n\nco.uk\nthree.example.\n"
    b"b\xc3\xbccher.de\n\xff.net\nfour.io"
)
NAMES = ["one.com", "two.co.uk", "three.example", "xn--bcher-kva.de", "four.io"]
REJECTED = {"comment": 1, "bad_character": 1, "bad_punycode": 1, "blank": 1, "no_registrable_part": 1, "not_utf8": 1}


def zstd(data):
    return pytest.importorskip("pyarrow").compress(data, "zstd", asbytes=True)


COMPRESSED = {"n.txt": bytes, "n.txt.gz": gzip.compress, "n.xz": lzma.compress, "n.txt.zst": zstd}


def in_blocks(source, position=None):
    """The names of the blocks, and the position after each."""
    names, positions = [], [position]
    for block in source.blocks(position):
        parsed = source.parse(block)
        source.count(block, parsed)
        names.append(parsed.names())
        positions.append(json.loads(json.dumps(block.position)))
        assert source.position() == {"documents": 0, "records": 0} | block.position
    return names, positions


def joined(names):
    return [name for some in names for name in some]


def texts(source, position=None):
    return [document.text for document in source.read(position)]


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
def test_documents_and_blocks_give_the_same_names_and_counts(tmp_path, name, ends):
    (tmp_path / name).write_bytes(COMPRESSED[name](b"\xef\xbb\xbf" + LINES.replace(b"\n", ends)))
    source = domain_names(str(tmp_path / name))
    documents = list(source)
    assert [document.text for document in documents] == NAMES
    assert [document.source.rpartition(":")[2] for document in documents] == ["2", "3", "8", "9", "11"]
    report = source.report
    assert report.skipped == REJECTED and report.documents == 5 and report.characters == sum(map(len, NAMES))
    assert report.examples["bad_character"] == [f"{tmp_path / name}:4: bad name.de"]
    assert joined(in_blocks(source)[0]) == NAMES
    assert source.report == report


@pytest.mark.parametrize("name", ["n.txt", "n.txt.xz", "n.csv", "n.jsonl", "n.parquet"])
def test_reading_starts_again_at_any_name_and_at_any_block(tmp_path, monkeypatch, name):
    monkeypatch.setattr(line_reader, "BLOCK", 64)
    monkeypatch.setattr(line_reader, "HEAD", 64)
    monkeypatch.setattr(name_files, "BLOCK_BYTES", 100)
    monkeypatch.setattr(name_files, "TABLE_ROWS", 4)
    lines = [f"name{i}.com" if i % 3 else f"bad {i}" for i in range(25)]
    contents = {
        "n.txt": "\n".join(lines).encode(),
        "n.txt.xz": lzma.compress("\n".join(lines).encode()),
        "n.csv": "\n".join(["rank,domain", *(f'{i},"{line}"' for i, line in enumerate(lines))]).encode(),
        "n.jsonl": "\n".join(json.dumps({"domain": line}) for line in lines).encode(),
    }
    if name == "n.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"domain": lines}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(contents[name])
    (tmp_path / "o.txt").write_text("last.com\n\nof.all.com")
    expected = [line for line in lines if " " not in line] + ["last.com", "of.all.com"]

    source = domain_names(str(tmp_path))
    positions = [source.position()]
    for document in source:
        assert document.text == expected[len(positions) - 1]
        positions.append(json.loads(json.dumps(source.position())))
    report = source.report
    for number, position in enumerate(positions):
        rest = domain_names(str(tmp_path))
        assert texts(rest, position) == expected[number:]
        # What is skipped before the position and what is skipped after it is everything.
        before = domain_names(str(tmp_path))
        for _, _ in zip(range(number), before, strict=False):
            pass
        if 0 < number < len(expected):
            assert before.report.skipped["bad_character"] + rest.report.skipped.get("bad_character", 0) == 9

    names, positions = in_blocks(source)
    assert joined(names) == expected and source.report == report and len(names) > 2
    for number, position in enumerate(positions):
        assert joined(in_blocks(domain_names(str(tmp_path)), position)[0]) == joined(names[number:])
        assert texts(domain_names(str(tmp_path)), position) == joined(names[number:])


def test_a_position_inside_a_block_is_not_one_of_blocks(tmp_path):
    (tmp_path / "n.txt").write_bytes(LINES)
    source = domain_names(str(tmp_path / "n.txt"))
    next(source.read())
    with pytest.raises(ValueError, match="inside a block"):
        next(source.blocks(source.position()))


def test_samples_are_nested_and_of_the_asked_size(tmp_path, monkeypatch):
    (tmp_path / "n.txt").write_text("".join(f"name{i}.com\n" for i in range(20_000)))
    monkeypatch.setitem(name_files.SAMPLES, "tiny", 100)
    monkeypatch.setitem(name_files.SAMPLES, "small", 1000)

    def sample(value, **more):
        return domain_names(str(tmp_path / "n.txt"), sample=value, **more)

    found = {value: texts(sample(value)) for value in ("tiny", "small", 0.5, "medium", "full", 1, None)}
    sets = {value: set(names) for value, names in found.items()}
    assert [len(found[value]) for value in ("tiny", "small")] == [100, 1000]
    assert 9_800 < len(found[0.5]) < 10_200  # 2.8 standard deviations
    assert sets["tiny"] < sets["small"] < sets[0.5] < sets["medium"] == sets["full"] == sets[1] == sets[None]
    assert joined(in_blocks(sample("small"))[0]) == found["small"]
    assert sample(0.5).fingerprint != sample(None).fingerprint
    # Half of a sample is in either half of what the split sees, the highest bit of the hash.
    block = next(sample(0.5).blocks())
    high = sample(0.5).parse(block).hashes >> np.uint64(63)
    assert 0.48 < high.mean() < 0.52
    # A position says which names are in the sample, so that nothing is counted again.
    source = sample("tiny")
    documents = source.read()
    first = [next(documents).text for _ in range(10)]
    position = source.position()
    monkeypatch.setattr(name_files.domain_names, "_sample_limit", None)
    assert first + texts(sample("tiny"), position) == found["tiny"]


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_max_documents(tmp_path, count):
    (tmp_path / "n.txt").write_bytes(LINES)
    source = domain_names(str(tmp_path / "n.txt"), max_documents=count)
    assert texts(source) == NAMES[:count]
    names, positions = in_blocks(source)
    assert joined(names) == NAMES[:count] and positions[-1]["documents"] == min(count, 5)
    if count < 5:
        assert in_blocks(source, positions[-1])[0] == []


def test_a_bad_line_stops_where_it_should(tmp_path):
    (tmp_path / "n.txt").write_bytes(LINES)
    source = domain_names(str(tmp_path / "n.txt"), on_bad_record="stop")
    with pytest.raises(UserError) as error:
        list(source)
    assert error.value.code == "bad_record" and "n.txt:4: bad_character: bad name.de" in error.value.problem
    with pytest.raises(UserError):
        source.parse(next(source.blocks()))
    (tmp_path / "n.txt").write_text("# fine\n\none.com\n")
    assert texts(domain_names(str(tmp_path / "n.txt"), on_bad_record="stop")) == ["one.com"]


def test_tables_without_the_column_name_the_key(tmp_path):
    (tmp_path / "n.csv").write_text("1,one.com\n2,two.com\n")
    assert texts(domain_names(str(tmp_path / "n.csv"), columns=["rank", "domain"])) == ["one.com", "two.com"]
    with pytest.raises(UserError) as error:
        list(domain_names(str(tmp_path / "n.csv"), on_bad_record="stop"))
    assert error.value.code == "bad_record" and "with column" in error.value.hint
    with pytest.raises(UserError) as error:
        domain_names(str(tmp_path / "n.csv"), columns=["rank", "name"])
    assert (error.value.code, error.value.key) == ("invalid_value", "columns")


@pytest.mark.parametrize(
    "key, value", [("sample", 0), ("sample", 1.5), ("sample", "huge"), ("sample", True), ("underscore", "maybe")]
)
def test_invalid_values_name_their_key(tmp_path, key, value):
    (tmp_path / "n.txt").write_bytes(LINES)
    with pytest.raises(UserError) as error:
        domain_names(str(tmp_path / "n.txt"), **{key: value})
    assert (error.value.code, error.value.key) == ("invalid_value", key)


def test_a_line_without_end_takes_little_memory_and_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(line_reader, "BLOCK", 1 << 12)
    (tmp_path / "n.txt").write_bytes(b"one.com\n" + b"x" * 200_000 + b"\ntwo.com\n" + "ü".encode() * 50_000)
    source = domain_names(str(tmp_path / "n.txt"))
    assert [(d.text, d.source[-2:]) for d in source] == [("one.com", ":1"), ("two.com", ":3")]
    assert source.report.skipped == {"line_too_long": 2}
    assert max(len(block.data) for block in source.blocks()) < 50_000


def test_damaged_files_give_what_is_good_and_a_reason(tmp_path):
    many = "".join(f"name{i}.com\n" for i in range(30_000)).encode()
    (tmp_path / "n.txt.xz").write_bytes(lzma.compress(many)[:-2000])
    source = domain_names(str(tmp_path / "n.txt.xz"))
    found = texts(source)
    assert found == [f"name{i}.com" for i in range(len(found))] and len(found) > 1000
    assert source.report.skipped == {"corrupt or truncated xz data": 1}
    stopping = domain_names(str(tmp_path / "n.txt.xz"), on_bad_record="stop")
    with pytest.raises(UserError) as error:
        list(stopping.blocks())
    assert error.value.code == "bad_record"
    (tmp_path / "n.txt.xz").write_bytes(lzma.compress(many))
    with pytest.raises(UserError) as error:
        list(source)
    assert error.value.code == "file_changed"


def test_the_fingerprint_follows_content_options_and_rules(tmp_path):
    (tmp_path / "a.txt").write_bytes(LINES)
    (tmp_path / "b.txt").write_bytes(LINES)
    (tmp_path / "list.dat").write_text("com\nuk\n")
    first = domain_names(str(tmp_path / "a.txt")).fingerprint
    assert first == domain_names(str(tmp_path / "b.txt")).fingerprint
    others = [{"only_icann": True}, {"strip_url": True}, {"idna": False}, {"underscore": "accept"}, {"sample": 0.1}]
    others += [{"public_suffix_list": str(tmp_path / "list.dat")}, {"max_documents": 1}]
    assert len({first, *(domain_names(str(tmp_path / "a.txt"), **other).fingerprint for other in others)}) == 8


def test_synthetic_names_are_the_same_everywhere_and_say_what_they_are(monkeypatch):
    from torchrecipes.data.domains import made_names

    monkeypatch.setattr(made_names, "BLOCK_NAMES", 1000)
    source = synthetic_names(2500, seed=3)
    names = texts(source)
    assert len(names) == 2500 and all("SYNTHETIC" in text for text in (source.name, str(source.report)))
    assert texts(synthetic_names(2500, seed=4)) != names
    blocks, positions = in_blocks(source)
    assert (
        blocks[0] != blocks[1]
        and joined(blocks) == names
        and source.report.documents == 2500
        and not source.report.skipped
    )
    for number, position in enumerate(positions):
        assert joined(in_blocks(synthetic_names(2500, seed=3), position)[0]) == joined(blocks[number:])
    iterator = source.read()
    for _ in range(1234):
        next(iterator)
    assert texts(source, source.position()) == names[1234:]
    assert texts(synthetic_names(1500, seed=3)) == names[:1500]


def test_rows_of_csv_are_read_many_at_a_time_as_one_by_one(tmp_path, monkeypatch):
    rng = random.Random(0)
    monkeypatch.setattr(line_reader, "HEAD", 64)
    (tmp_path / "first.txt").write_text("first.com")
    for number in range(80):
        monkeypatch.setattr(line_reader, "BLOCK", rng.choice([16, 200, 1 << 20]))
        monkeypatch.setattr(name_files, "BLOCK_BYTES", rng.choice([10, 100, 1 << 20]))
        delimiter, rows = rng.choice(",;\t"), []
        for i in range(rng.randint(0, 30)):
            fields = [str(i), rng.choice([f"name{i}.com", f"bad {i}", "co.uk"]), rng.choice(["x", "", "y y"])]
            odd = [[], fields[:2], ["1", "", "2"], ["1", " padded.com", ""], ["1", "  ", ""], ["", "büro.de", "é"]]
            if number % 2:
                odd += [["1", f'"{fields[1]}"', "2"], ["1", "a.com", f'"x\n{delimiter}"'], ["1", "b.com", '"open']]
            rows.append(delimiter.join(rng.choice(odd) if rng.random() < 0.2 else fields))
        header = [delimiter.join(["rank", "domain", "more"])] if number % 3 else []
        content = rng.choice(["\n", "\r\n"]).join(header + rows).encode()
        path = tmp_path / (f"{number}.tsv" if delimiter == "\t" else f"{number}.csv")
        path.write_bytes(content + b"\n9%b\xff.com%b1" % (delimiter.encode(), delimiter.encode()) * (number % 5 == 4))
        columns = None if header else ["rank", "domain", "more"]
        paths = [str(tmp_path / "first.txt"), str(path)]
        source = domain_names(paths, columns=columns, delimiter=delimiter)
        slow = domain_names(paths, columns=columns, delimiter=delimiter)
        slow._csv_lines = slow._table_lines
        found, positions = [], [source.position()]
        for document in source:
            found.append(document)
            positions.append(json.loads(json.dumps(source.position())))
        assert found == list(slow), content
        assert source.report == slow.report, content
        some = rng.randrange(len(positions))
        assert list(source.read(positions[some])) == found[some:]
        names, positions = in_blocks(source)
        assert joined(names) == [document.text for document in found]
        some = rng.randrange(len(positions))
        assert joined(in_blocks(source, positions[some])[0]) == joined(names[some:])
