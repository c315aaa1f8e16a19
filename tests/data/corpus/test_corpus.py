"""Reading a corpus: against plain lists; and what opening finds of every kind of damage."""

import json
import pickle
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file

from torchrecipes.data.corpus.corpus import open_corpus
from torchrecipes.data.corpus.shard_writer import ShardWriter, Tokenized
from torchrecipes.data.corpus.shards import Statistics, open_shard, write_shard
from torchrecipes.data.sources.records import ReadStats
from torchrecipes.data.tokenizers.load import load_tokenizer, train_wordpiece
from torchrecipes.errors import UserError


class Maker:
    """Stands for a tokenizer in what is written about one."""

    fingerprint, vocab_size, special_tokens = "f" * 32, 1000, "text"


def make(folder, lengths, shard_tokens, dtype="uint16", seed=0, source="source-1"):
    """A corpus of documents with these lengths; gives the documents, too."""
    draw = np.random.default_rng(seed)
    documents = [draw.integers(0, 60_000, length).astype(dtype) for length in lengths]
    writer = ShardWriter({"train": folder}, {"dtype": dtype, "shard_tokens": shard_tokens, "source": source})
    sizes = np.array(lengths)
    writer.add(Tokenized(np.concatenate(documents), sizes, np.stack([sizes, sizes, sizes * 0, sizes * 0], 1)))
    writer.finish(ReadStats(), Maker)
    return open_corpus(folder), documents


@pytest.fixture(params=[(30, 1), (200, 60), (200, 10**6)], ids=["shards of one document", "some shards", "one shard"])
def corpus(request, tmp_path):
    count, shard_tokens = request.param
    draw = random.Random(count + shard_tokens)
    return make(tmp_path / "c", [draw.choice([1, 2, 3, 7, 20, 50]) for _ in range(count)], shard_tokens)


def test_read_and_boundaries_are_slices_of_one_long_row(corpus):
    corpus, documents = corpus
    row = np.concatenate(documents)
    starts = np.cumsum([0, *map(len, documents[:-1])])
    draw = random.Random(0)
    edges = [shard.token_offset for shard in corpus.shards] + [0, len(row)]
    for _ in range(1500):
        near = [draw.randrange(len(row) + 1), draw.choice(edges), draw.choice(edges) + draw.choice([-1, 1])]
        start, stop = sorted(min(max(one, 0), len(row)) for one in draw.sample(near, 2))
        found = corpus.read(start, stop)
        assert found.dtype == np.uint16 and np.array_equal(found, row[start:stop])
        inside = corpus.boundaries(start, stop)
        assert inside.dtype == np.int64 and np.array_equal(inside, starts[(starts > start) & (starts < stop)])


def test_spans_are_the_documents(corpus):
    corpus, documents = corpus
    chosen = np.random.default_rng(0).permutation(len(documents))
    starts, stops = corpus.spans(chosen)
    for document, start, stop in zip(chosen, starts, stops, strict=True):
        assert np.array_equal(corpus.read(int(start), int(stop)), documents[document])
    assert [len(one) for one in corpus.spans(np.array([], np.int64))] == [0, 0]


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_more_shards_than_a_process_may_usually_open(tmp_path):
    make(tmp_path / "c", [1] * 200, 1)
    program = (
        "import resource, sys\n"
        "from torchrecipes.data.corpus import open_corpus\n"
        "soft, hard = map(int, sys.argv[2:])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "try: print(len(open_corpus(sys.argv[1]).shards))\n"
        "except Exception as error: print(error.code)\n"
    )

    def opened(soft, hard):
        words = [sys.executable, "-c", program, str(tmp_path / "c"), str(soft), str(hard)]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    assert opened(100, 300) == "200"
    assert opened(100, 100) == "too_many_files"


def test_numbers(corpus):
    corpus, documents = corpus
    lengths = [len(one) for one in documents]
    assert (corpus.num_documents, corpus.num_tokens) == (len(lengths), sum(lengths))
    assert (corpus.shortest_document, corpus.longest_document) == (min(lengths), max(lengths))
    assert corpus.tokenizer_fingerprint == Maker.fingerprint


def test_positions_outside_are_bugs(corpus):
    corpus, _ = corpus
    for start, stop in ((-1, 3), (5, 4), (0, corpus.num_tokens + 1)):
        for method in (corpus.read, corpus.boundaries):
            with pytest.raises(ValueError, match="is not in a corpus of"):
                method(start, stop)
    for document in (-1, corpus.num_documents):
        with pytest.raises(ValueError, match="numbered from 0"):
            corpus.spans(np.array([document]))


def test_arrays_cannot_be_written_to(corpus):
    corpus, _ = corpus
    with pytest.raises(ValueError, match="read-only"):
        corpus.read(0, 1)[0] = 1


def test_in_another_process_it_is_opened_again(corpus):
    corpus, _ = corpus
    data = pickle.dumps(corpus)
    copy = pickle.loads(data)
    assert len(data) < 500 and copy.fingerprint == corpus.fingerprint
    assert np.array_equal(copy.read(0, 20), corpus.read(0, 20))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_shards_are_safetensors(tmp_path, dtype):
    corpus, documents = make(tmp_path / "c", [3, 4, 5, 6], 8, dtype)
    assert len(corpus.shards) == 3
    for shard in corpus.shards:
        arrays = load_file(shard.path)
        assert set(arrays) == {"tokens", "document_offsets"} and arrays["document_offsets"].dtype == np.int64
        assert arrays["tokens"].dtype == dtype == shard.tokens.dtype
        assert np.array_equal(arrays["tokens"], shard.tokens) and shard.tokens.flags.aligned
        assert (
            np.array_equal(arrays["document_offsets"], shard.document_offsets) and shard.document_offsets.flags.aligned
        )
    assert np.array_equal(load_file(corpus.shards[0].path)["tokens"], np.concatenate(documents[:2]))


def test_the_fingerprint_is_the_content(tmp_path):
    one, _ = make(tmp_path / "a", [3, 4, 5, 6], 8)
    same, _ = make(tmp_path / "b", [3, 4, 5, 6], 8, source="another")
    other, _ = make(tmp_path / "c", [3, 4, 5, 6], 8, seed=1)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.account["shards"][0]["xxh3"] != same.account["shards"][0]["xxh3"], "its header names the source"


def test_statistics_add_up():
    empty = Statistics(seen=2, empty=2)
    full = Statistics(seen=3, documents=3, tokens=30, shortest=5, longest=20)
    for both in (empty + full, full + empty):
        assert (both.seen, both.empty, both.documents, both.shortest, both.longest) == (5, 2, 3, 5, 20)


# What is refused


def test_folders_that_are_no_corpus(tmp_path):
    corpus, _ = make(tmp_path / "all" / "train", [3, 4, 5, 6], 8)
    for folder, name in ((tmp_path / "none", "none"), (tmp_path, ""), (tmp_path / "all", "all/train")):
        with pytest.raises(UserError) as error:
            open_corpus(folder)
        assert error.value.code == "no_corpus" and name in str(error.value)
    (corpus.folder / "corpus.json").unlink()
    with pytest.raises(UserError) as error:
        open_corpus(corpus.folder)
    assert error.value.code == "unfinished_corpus"


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path):
    corpus, _ = make(tmp_path / "c", [3], 8)
    texts = [type("Document", (), {"text": "one two"})] * 2
    tokenizer = train_wordpiece(texts, vocab_size=100)
    with pytest.raises(UserError) as error:
        open_corpus(corpus.folder, tokenizer)
    assert error.value.code == "other_tokenizer"
    assert Maker.fingerprint in str(error.value) and tokenizer.fingerprint in str(error.value)
    tokenizer.save(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").fingerprint == tokenizer.fingerprint


def damage(path, position, content):
    data = bytearray(path.read_bytes())
    data[position : position + len(content)] = content
    path.write_bytes(data)


def test_every_changed_byte_of_a_shard_is_found(tmp_path):
    corpus, _ = make(tmp_path / "c", [3, 4, 5, 6], 8)
    path = corpus.shards[1].path
    whole = path.read_bytes()
    corpus.verify()
    for position in range(len(whole)):
        damage(path, position, bytes([whole[position] ^ 1 << position % 8]))
        with pytest.raises(UserError) as error:
            open_corpus(corpus.folder).verify()
        assert error.value.code == "corrupt_corpus" and "shard-00001.safetensors" in str(error.value)
        path.write_bytes(whole)
    open_corpus(corpus.folder).verify()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: damage(path, 0, struct.pack("<Q", 2**63)),
        lambda path: damage(path, 0, struct.pack("<Q", 0)),
        lambda path: damage(path, 8, b"[]"),
        lambda path: damage(path, 8, b"\xff\xff"),
    ],
)
def test_a_corrupt_shard_is_found_when_opening(tmp_path, change):
    corpus, _ = make(tmp_path / "c", [3, 4, 5, 6], 8)
    change(corpus.shards[1].path)
    with pytest.raises(UserError) as error:
        open_corpus(corpus.folder)
    assert error.value.code == "corrupt_corpus" and "shard-00001.safetensors" in str(error.value)


def test_another_corpus_s_shard_of_the_same_size_is_found(tmp_path):
    corpus, _ = make(tmp_path / "c", [3, 4, 5, 6], 8)
    other, _ = make(tmp_path / "d", [3, 4, 5, 6], 8, seed=1)
    corpus.shards[1].path.write_bytes(other.shards[1].path.read_bytes())
    with pytest.raises(UserError) as error:
        open_corpus(corpus.folder).verify()
    assert error.value.code == "corrupt_corpus" and "shard-00001.safetensors" in str(error.value)


def without(key):
    return lambda account: account.pop(key)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        *((without(key), key) for key in ("format", "tokenizer", "statistics", "shards")),
        (lambda account: account.update(format="torchrecipes-corpus-9"), "torchrecipes-corpus-9"),
        (lambda account: account["shards"].pop(), "totals"),
        (lambda account: account.update(shards=[]), "totals"),
        (lambda account: account["shards"][0].pop("size"), "size"),
        (lambda account: account["shards"][0].update(documents=7), "shard-00000"),
        (lambda account: account["statistics"].update(tokens=7), "totals"),
        (lambda account: account["statistics"].update(other=7), "other"),
    ],
)
def test_a_changed_corpus_json(tmp_path, change, name):
    corpus, _ = make(tmp_path / "c", [3, 4, 5, 6], 8)
    file = corpus.folder / "corpus.json"
    account = json.loads(file.read_text())
    change(account)
    file.write_text(json.dumps(account))
    with pytest.raises(UserError) as error:
        open_corpus(corpus.folder)
    assert error.value.code in ("corrupt_corpus", "corpus_format") and name in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff"])
def test_a_corpus_json_that_is_not_json(tmp_path, content):
    corpus, _ = make(tmp_path / "c", [3, 4, 5, 6], 8)
    (corpus.folder / "corpus.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        open_corpus(corpus.folder)
    assert error.value.code == "corrupt_corpus" and "corpus.json" in str(error.value)


# Columns, and the format without them


def test_columns_are_numbers_of_every_document(tmp_path):
    draw, folders = np.random.default_rng(0), {"train": tmp_path / "train", "validation": tmp_path / "validation"}
    lengths = draw.integers(0, 9, 300)
    documents = [draw.integers(0, 43, length).astype(np.uint8) for length in lengths]
    columns = {"wide": draw.integers(0, 60_000, 300).astype(np.uint16), "narrow": np.arange(300).astype(np.uint8)}
    for name, rare in (("often", 0.5), ("rarely", 0.02)):
        splits = (draw.random(300) < rare).astype(np.int64)
        folders = {split: tmp_path / name / split for split in ("train", "validation")}
        writer = ShardWriter(folders, {"dtype": "uint8", "shard_tokens": 100, "format": "torchrecipes-corpus-3"})
        for first in range(0, 300, 70):
            part = slice(first, first + 70)
            own = {column: values[part] for column, values in columns.items()}
            counts = np.ones((len(lengths[part]), 4), np.uint8)
            writer.add(Tokenized(np.concatenate(documents[part]), lengths[part], counts, splits[part], own))
        writer.finish(ReadStats(), Maker)
        for number, folder in enumerate(folders.values()):
            corpus = open_corpus(folder)
            corpus.verify()
            chosen = (splits == number) & (lengths > 0)
            assert corpus.column_names == ("wide", "narrow") and corpus.dtype == np.uint8
            for column, values in columns.items():
                found = np.concatenate([shard.columns[column] for shard in corpus.shards])
                assert found.dtype == values.dtype and np.array_equal(found, values[chosen])
            tokens = np.concatenate([documents[i] for i in np.flatnonzero(chosen)])
            assert np.array_equal(corpus.read(0, corpus.num_tokens), tokens)
            assert corpus.statistics.characters == (splits == number).sum()
            shard = corpus.shards[0]
            stored = load_file(shard.path)
            assert {key: values.tolist() for key, values in stored.items()} == {
                "document_offsets": shard.document_offsets.tolist(),
                "tokens": shard.tokens.tolist(),
                **{key: values.tolist() for key, values in shard.columns.items()},
            }
            assert pickle.loads(pickle.dumps(corpus)).shards[0].columns.keys() == columns.keys()


def test_without_columns_a_shard_is_of_format_2_byte_for_byte(tmp_path):
    """As it was before there were columns: offsets, tokens, and this header."""
    tokens, offsets = np.arange(5, dtype="<u2"), np.array([0, 2, 5], "<i8")
    arrays = offsets.tobytes() + tokens.tobytes()
    header = {
        "__metadata__": {
            "format": "torchrecipes-corpus-2",
            "statistics": "{}",
            "arrays_xxh3": xxhash.xxh3_64_hexdigest(arrays),
        },
        "document_offsets": {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]},
        "tokens": {"dtype": "U16", "shape": [5], "data_offsets": [24, 34]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "shard"
    write_shard(path, [tokens[:3], tokens[3:]], offsets, {"statistics": "{}"})
    assert path.read_bytes() == struct.pack("<Q", len(text)) + text + arrays
    shard, metadata = open_shard(path, 0, 0)
    assert shard.columns == {} and metadata["format"] == "torchrecipes-corpus-2"


def test_a_corpus_of_format_2_is_what_it_was(tmp_path):
    """The checksum is that of the files which the code wrote before there were columns."""
    lengths = np.array([3, 1, 4, 7, 2])
    writer = ShardWriter({"train": tmp_path}, {"dtype": "uint16", "shard_tokens": 8, "source": "s"})
    writer.add(
        Tokenized(np.arange(17, dtype=np.uint16), lengths, np.stack([lengths, lengths, lengths * 0, lengths * 0], 1))
    )
    writer.finish(ReadStats(), Maker)
    content = b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert xxhash.xxh3_128_hexdigest(content) == "32cdfd2945134d8d517037f590eb5e96"
    assert open_corpus(tmp_path).fingerprint == "74d392ddcda02c2637d4b3da6a939c86"


def test_a_column_of_another_length_is_damage(tmp_path):
    path = tmp_path / "shard"
    write_shard(path, [np.arange(4, dtype=np.uint8)], np.array([0, 1, 4]), {}, {"column": [np.zeros(3, np.uint8)]})
    with pytest.raises(ValueError, match="size"):
        open_shard(path, 0, 0)
