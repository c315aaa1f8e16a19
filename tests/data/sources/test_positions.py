"""Positions: reading from the position after any number of documents gives exactly the rest, in every format."""

import gzip
import json
import lzma
import random
from itertools import islice, product

import pytest

from torchrecipes.data.sources import (
    files,
    hf_dataset,
    hugging_face,
    line_reader,
    python_docs,
    tables,
    text_files,
    text_span,
)

WORDS = ["a", "wort", "日本", "é" * 30, "x" * 150, "two words", "", "   ", "tab\tinside", '"quoted"']


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def zstd(data):
    return pytest.importorskip("pyarrow").compress(data, "zstd", asbytes=True)


def rest_from_everywhere(make, every=1):
    """Read from the position after each number of documents; positions survive JSON."""
    source = make()
    whole, positions = [], [source.position()]
    for document in source:
        whole.append(document)
        positions.append(source.position())
    report = source.report
    assert whole, "a test of nothing"
    for number in range(0, len(positions), every):
        position = json.loads(json.dumps(positions[number]))
        assert position["documents"] == number
        other = make()
        found = []
        for document in other.read(position):
            found.append(document)
            assert other.position()["documents"] == number + len(found)
        assert found == whole[number:], position
        assert other.report.documents == len(found)
        # Once more from the middle of what was read from a position.
        if len(found) > 1:
            middle = len(found) // 2
            iterator = other.read(position)
            for _ in islice(iterator, middle):
                pass
            assert list(make().read(other.position())) == whole[number + middle :]
    return whole, report


def random_lines(rng, count):
    return [" ".join(rng.choices(WORDS, k=rng.randrange(8))) for _ in range(count)]


def content(kind, rng):
    """Bytes of a file with every odd thing that a reader skips, its line ends mixed."""
    lines = random_lines(rng, 40)
    if kind == "txt":
        rows = [line.encode() for line in lines] + [b"\xff bad", b"", b""] * rng.randrange(2)
        rows += [("long " * rng.randrange(500)).encode(), "ö".encode() * rng.randrange(900)]
    elif kind == "jsonl":
        rows = [json.dumps({"text": line}, ensure_ascii=rng.random() < 0.5).encode() for line in lines]
        rows += [b"{oops", b'{"body": 1}', b'{"text": null}', b"\xff", b""]
    elif kind == "csv":
        fields = [line.replace('"', '""') for line in lines]
        rows = [f'1,"{field}\n{field}"'.encode() for field in fields] + [b'2,"never closed', b"3", b"4,\xff", b"5,ok"]
    elif kind == "json":
        rows = [json.dumps({"text": line}, indent=rng.choice([None, 1])) for line in lines]
        rows += ["17", '{"body": 1}', json.dumps({"text": "long " * rng.randrange(500)})]
        rng.shuffle(rows)
        return ("[" + rng.choice([",", ",\n", "\r\n,"]).join(rows) + rng.choice(["]", "", "oops]"])).encode()
    else:
        rows = [f"{line}\t1".replace("\tinside", "").encode() for line in lines] + [b"no fields", b"\xff\t1", b""]
    rng.shuffle(rows)
    header = {"csv": [b"n,text"], "tsv": [b"text\tn"]}.get(kind, [])
    ends = rng.choice([[b"\n"], [b"\r\n"], [b"\n", b"\r\n", b"\r"]])
    mark = rng.choice([b"", b"\xef\xbb\xbf"])
    return mark + b"".join(row + rng.choice(ends) for row in [*header, *rows])


PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("seed", range(6))
def test_the_rest_is_exact_from_every_position(here, monkeypatch, kind, seed):
    rng = random.Random(f"{kind}{seed}")
    monkeypatch.setattr(line_reader, "BLOCK", rng.choice([16, 100, 700, 1 << 20]))
    for number, suffix in enumerate(rng.sample([*PACK, ""], 3)):
        (here / f"{number}.{kind}{suffix}").write_bytes(PACK[suffix](content(kind, rng)))
    monkeypatch.setattr(text_files, "BLOCK", line_reader.BLOCK)
    options = [{}]
    if kind == "txt":
        options = [{"sample_by": unit} for unit in ("document", "paragraph", "line")]
        options += [{"separator": "word"}, {"separator": "a\n"}]
    for option, limit in product(options, (100, 1000)):
        rest_from_everywhere(lambda: files(".", on_bad_record="skip", max_document_chars=limit, **option), every=5)  # noqa: B023


@pytest.mark.parametrize("seed", range(3))
def test_parquet_from_every_position(here, monkeypatch, seed):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rng = random.Random(seed)
    monkeypatch.setattr(tables, "PARQUET_ROWS", rng.choice([3, 64]))
    for number in range(2):
        texts = [*random_lines(rng, 60), None, "long " * 100]
        rng.shuffle(texts)
        parquet.write_table(
            pyarrow.table({"n": range(len(texts)), "text": texts}), f"{number}.parquet", row_group_size=25
        )
    (here / "1.parquet").with_name("0a.parquet").write_bytes(b"no parquet")
    rest_from_everywhere(lambda: files(".", on_bad_record="skip", max_document_chars=100))


def test_a_corrupt_end_is_met_again(here):
    text = "".join(json.dumps({"text": random.Random(n).randbytes(20).hex()}) + "\n" for n in range(300)).encode()
    for suffix in (".gz", ".xz", ".zst"):
        packed = PACK[suffix](text)
        (here / f"a.jsonl{suffix}").write_bytes(packed[: len(packed) - 40])
    (here / "b.jsonl").write_bytes(text[:200])
    _, report = rest_from_everywhere(lambda: files(".", on_bad_record="skip"), every=50)
    assert sum(report.skipped.values()) == 4


@pytest.mark.parametrize("sample_by", ["document", "paragraph", "line"])
def test_a_position_in_a_long_line_is_near_its_place(here, monkeypatch, sample_by):
    """A line that never ends is read from its middle, too, at most a few pieces before the position."""
    text = "".join(f"wörd {number} " for number in range(60_000)) + "\n\nlast"
    (here / "a.txt").write_text(text)
    source = files("a.txt", sample_by=sample_by, max_document_chars=1000)
    monkeypatch.setattr(line_reader, "BLOCK", 1 << 12)
    monkeypatch.setattr(text_files, "BLOCK", 1 << 12)
    whole, positions = [], []
    for document in source:
        whole.append(document)
        positions.append(source.position())
    for number in range(0, len(whole), 40):
        read = sum(len(document.text.encode()) for document in whole[: number + 1])
        assert read - positions[number]["byte"] < 12_000
        assert list(source.read(positions[number])) == whole[number + 1 :]


@pytest.mark.parametrize("name", ["b.jsonl", "b.txt", "b.csv", "b.parquet"])
def test_reading_from_a_position_reads_nothing_before_it(here, monkeypatch, name):
    """The first file may be gone, and what is read of the second is what follows the position."""
    texts = [f"document {number} " + "of some words " * 20 for number in range(20_000)]
    (here / "a.txt").write_text("first\nfile")
    if name == "b.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), name, row_group_size=1000, compression=None)
    else:
        rows = {"jsonl": [json.dumps({"text": text}) for text in texts], "csv": ["text", *texts], "txt": texts}
        (here / name).write_text("\n".join(rows[name.split(".")[1]]))
    source = files(".", sample_by="line")
    iterator = iter(source)
    for _ in range(19_012):
        next(iterator)
    position = source.position()
    size, rest = (here / name).stat().st_size, list(iterator)
    (here / "a.txt").unlink()
    read = 0

    def counting_open(*arguments):
        file = open(*arguments)  # noqa: SIM115

        class Counted:
            def __getattr__(self, attribute):
                return getattr(file, attribute)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def read(self, *size):
                nonlocal read
                data = file.read(*size)
                read += len(data)
                return data

        return Counted()

    monkeypatch.setattr(line_reader, "open", counting_open, raising=False)
    assert list(source.read(position)) == rest and len(rest) == 990
    if name != "b.parquet":
        assert 0 < read < size / 5
    else:
        assert position["row_group"] == 19


def test_other_sources(here):
    (here / "a.txt").write_text("one two three four")
    rest_from_everywhere(lambda: text_span("a.txt", 0.2, 0.9))
    rest_from_everywhere(lambda: python_docs(limit_mb=0.02))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "parquet", "jsonl"])
def test_datasets_from_every_position(here, monkeypatch, streaming, kind):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", here / "cache")
    monkeypatch.setattr(hugging_face, "BATCH", 4)
    rng = random.Random(kind)
    texts = [*random_lines(rng, 50), None, "long " * 300]
    rng.shuffle(texts)
    rows = library.Dataset.from_dict({"n": list(range(len(texts))), "text": texts})
    if kind == "saved":
        rows.save_to_disk("data", num_shards=3)
    else:
        for number in range(3):
            part = rows.shard(3, number, contiguous=True)
            getattr(part, "to_parquet" if kind == "parquet" else "to_json")(f"data/train-{number}.{kind}")
    for max_documents in (None, 30):
        make = lambda n=max_documents: hf_dataset(  # noqa: E731
            "data", streaming=streaming, on_bad_record="skip", max_document_chars=100, max_documents=n
        )
        rest_from_everywhere(make, every=9)
