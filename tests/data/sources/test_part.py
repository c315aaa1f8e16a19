"""Parts of a source for the jobs of an array."""

import random

import pytest

from torchrecipes.data.sources import SourcePart, files
from torchrecipes.errors import UserError


def write(folder, sizes):
    for i, size in enumerate(sizes):
        (folder / f"{i:02d}.txt").write_text(f"{i} " + "x" * size)
    return files(str(folder))


def texts(source):
    return [document.text for document in source]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_hold_every_document_once_in_order_where_there_are_files_enough(tmp_path, count):
    draw = random.Random(count)
    source = write(tmp_path, [draw.choice([1, 10, 1000]) for _ in range(7)])
    parts = [SourcePart(source, i, count) for i in range(count)]
    assert all(part.by_file for part in parts)
    assert [text for part in parts for text in texts(part)] == texts(source)
    assert sum(part.report.documents for part in parts) == source.report.documents
    assert len({part.fingerprint for part in parts} | {source.fingerprint}) == count + 1


def test_parts_have_about_the_same_number_of_bytes(tmp_path):
    source = write(tmp_path, [100] * 40)
    sizes = [SourcePart(source, i, 8).num_bytes for i in range(8)]
    assert max(sizes) <= 2 * min(sizes) and sum(sizes) == source.num_bytes


@pytest.mark.parametrize("sizes", [[9000, 1, 1, 1], [1, 1, 1, 9000], [1, 1, 1, 1]])
def test_no_part_is_empty(tmp_path, sizes):
    source = write(tmp_path, sizes)
    for count in range(1, 5):
        assert all(texts(SourcePart(source, i, count)) for i in range(count))


def test_fewer_files_than_parts_are_shared_document_by_document(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "t{i}"}}\n' for i in range(10)) + "[]\n")
    source = files(str(tmp_path / "a.jsonl"), on_bad_record="skip")
    parts = [SourcePart(source, i, 4) for i in range(4)]
    found = [texts(part) for part in parts]
    assert found[1] == ["t1", "t5", "t9"] and sorted(text for part in found for text in part) == sorted(texts(source))
    # What is skipped is reported by one of them.
    assert [sum(part.report.skipped.values()) for part in parts] == [1, 0, 0, 0]


@pytest.mark.parametrize(("index", "count"), [(3, 3), (-1, 3), (0, 0)])
def test_an_index_out_of_range(tmp_path, index, count):
    with pytest.raises(UserError) as caught:
        SourcePart(write(tmp_path, [1]), index, count)
    assert caught.value.code == "out_of_range"
