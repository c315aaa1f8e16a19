"""Token files of other tools give the ids and the documents that were written, in every kind of row."""

import json
import pickle
import struct

import numpy as np
import pytest

from torchrecipes.data.batching.packing import make_rows
from torchrecipes.data.sources import Document
from torchrecipes.data.token_files import datatrove_tokens, mds_tokens, megatron_tokens, nanogpt_tokens
from torchrecipes.data.tokenizers import train_char
from torchrecipes.errors import UserError

EOS = 0
VOCAB = 200


class Letters:
    """A source of one document with 250 characters."""

    name, num_bytes, fingerprint = "letters", 1, "letters"

    def __iter__(self):
        return iter([Document("".join(map(chr, range(300, 550))), "here")])


@pytest.fixture(scope="module")
def tokenizer():
    return train_char(Letters(), causal=True)


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(0)
    lengths = [1, 5, 40, 3, 100, 17, 2, 64, 9, 33]
    return [np.append(random.integers(1, VOCAB, n - 1), EOS).astype(np.int64) for n in lengths]


def write_nanogpt(folder, documents):
    path = folder / "train.bin"
    np.concatenate(documents).astype("<u2").tofile(path)
    return nanogpt_tokens(str(path), eos_id=EOS)


def write_nanogpt_files(folder, documents):
    np.concatenate(documents[:4]).astype("<u4").tofile(folder / "a.bin")
    np.concatenate(documents[4:]).astype("<u4").tofile(folder / "b.bin")
    return nanogpt_tokens(str(folder), dtype="uint32", eos_id=EOS)


def write_megatron(folder, documents):
    # The fifth document is two sequences; an empty document lies between the first two.
    sequences = [*documents[:4], documents[4][:60], documents[4][60:], *documents[5:]]
    boundaries = [0, 1, 1, 2, 3, 4, *range(6, len(sequences) + 1)]
    np.concatenate(sequences).astype("<i4").tofile(folder / "text.bin")
    sizes = np.array([len(sequence) for sequence in sequences])
    places = 4 * (np.cumsum(sizes) - sizes)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(sizes), len(boundaries))
    arrays = (sizes.astype("<i4"), places.astype("<i8"), np.array(boundaries, "<i8"))
    (folder / "text.idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))
    return megatron_tokens(str(folder / "text"))


def write_datatrove(folder, documents):
    for name, part in (("00000.ds", documents[:6]), ("00001.ds", documents[6:])):
        np.concatenate(part).astype("<u2").tofile(folder / name)
        np.cumsum([len(document) for document in part]).astype("<u8").tofile(folder / f"{name}.index")
    return datatrove_tokens(str(folder))


def write_mds_bytes(folder, documents):
    return _write_mds(folder, documents, "bytes", lambda ids: ids.astype("<i8").tobytes(), dtype="int64")


def write_mds_arrays(folder, documents):
    def encode(ids):
        return bytes([1 << 2 | 1]) + struct.pack("<H", len(ids)) + ids.astype("<u2").tobytes()

    return _write_mds(folder, documents, "ndarray:uint16", encode)


def _write_mds(folder, documents, encoding, encode, **options):
    shards = []
    columns = {"column_names": ["id", "text", "tokens"], "column_encodings": ["int", "str", encoding]}
    for number, part in enumerate((documents[:3], documents[3:])):
        samples = []
        for index, ids in enumerate(part):
            text, tokens = b"x" * index, encode(ids)
            samples.append(struct.pack("<IIq", len(text), len(tokens), index) + text + tokens)
        settings = b'{"a copy": "of the settings"}'
        first = 4 + 4 * (len(samples) + 1) + len(settings)
        places = first + np.cumsum([0, *map(len, samples)])
        content = struct.pack("<I", len(samples)) + places.astype("<u4").tobytes() + settings + b"".join(samples)
        name = f"shard.{number:05}.mds"
        (folder / name).write_bytes(content)
        data = {"raw_data": {"basename": name, "bytes": len(content)}, "samples": len(samples), "format": "mds"}
        shards.append({**data, **columns, "column_sizes": [8, None, None], "compression": None})
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))
    return mds_tokens(str(folder), **options)


WRITERS = [
    write_nanogpt,
    write_nanogpt_files,
    write_megatron,
    write_datatrove,
    write_mds_bytes,
    write_mds_arrays,
]


@pytest.mark.parametrize("write", WRITERS)
def test_documents_are_those_that_were_written(write, documents, tokenizer, tmp_path):
    corpus = write(tmp_path, documents).open(tokenizer)
    assert (corpus.num_documents, corpus.num_tokens) == (len(documents), sum(map(len, documents)))
    assert (corpus.shortest_document, corpus.longest_document) == (1, 100)
    starts, stops = corpus.spans(np.arange(len(documents)))
    for document, start, stop in zip(documents, starts, stops, strict=True):
        assert np.array_equal(corpus.read(start, stop), document)
    everything = np.concatenate(documents)
    assert np.array_equal(corpus.read(0, len(everything)), everything)
    assert np.array_equal(corpus.read(7, 7), everything[:0])
    assert np.array_equal(corpus.boundaries(0, len(everything)), starts[1:])
    again = pickle.loads(pickle.dumps(corpus))
    assert again.fingerprint == corpus.fingerprint and np.array_equal(again.read(3, 90), everything[3:90])


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
@pytest.mark.parametrize("write", WRITERS)
def test_rows_hold_every_token_once(write, packing, documents, tokenizer, tmp_path):
    rows = make_rows(packing, write(tmp_path, documents).open(tokenizer), seq_len=16, pad_id=VOCAB, lookahead=0)
    block = rows.rows(np.arange(rows.num_rows))
    found = np.sort(block.tokens[block.tokens != VOCAB])
    assert np.array_equal(found, np.sort(np.concatenate(documents)))


@pytest.mark.parametrize("write", WRITERS)
def test_the_first_documents_are_held_out(write, documents, tokenizer, tmp_path):
    source = write(tmp_path, documents)
    held_out, train = source.open(tokenizer, 0, 5), source.open(tokenizer, 5)
    assert np.array_equal(held_out.read(0, held_out.num_tokens), np.concatenate(documents)[:149])
    assert np.array_equal(train.read(0, train.num_tokens), np.concatenate(documents)[149:])
    assert held_out.fingerprint != train.fingerprint
    with pytest.raises(UserError) as error:
        source.open(tokenizer, 20)
    assert error.value.code == "no_training_documents"


def test_the_writer_of_datatrove_is_read(documents, tokenizer, tmp_path):
    tokens = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    file = tokens.TokenizedFile(str(tmp_path), "00000.ds", token_size=4)
    for document in documents:
        file.write(document.tolist(), None)
    file.close()
    corpus = datatrove_tokens(str(tmp_path)).open(tokenizer)
    assert np.array_equal(corpus.read(0, corpus.num_tokens), np.concatenate(documents))
    assert corpus.num_documents == len(documents)


def test_a_file_without_ends_of_documents_is_one_document(documents, tokenizer, tmp_path):
    write_nanogpt(tmp_path, documents)
    assert nanogpt_tokens(str(tmp_path / "train.bin")).open(tokenizer).num_documents == 1


def test_ids_of_another_tokenizer_are_refused(documents, tokenizer, tmp_path):
    write_nanogpt(tmp_path, documents)
    np.array([1, tokenizer.vocab_size, 2], "<u2").tofile(tmp_path / "other.bin")
    with pytest.raises(UserError) as error:
        nanogpt_tokens(str(tmp_path / "other.bin")).open(tokenizer)
    assert (error.value.code, error.value.key) == ("other_tokenizer", "tokenizer")
    with pytest.raises(UserError) as error:  # two ids of 16 bits are a large one of 32
        nanogpt_tokens(str(tmp_path / "train.bin"), dtype="uint32").open(tokenizer)
    assert error.value.code == "other_tokenizer"


def test_no_tokenizer_is_trained_on_tokens(documents, tmp_path):
    with pytest.raises(UserError) as error:
        train_char(write_nanogpt(tmp_path, documents), causal=True)
    assert (error.value.code, error.value.key) == ("no_text", "tokenizer")


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def shorten(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


@pytest.mark.parametrize(
    ("writer", "damage", "code"),
    [
        (write_nanogpt, shorten("train.bin"), "corrupt_corpus"),
        (write_datatrove, write("00000.ds", b"123"), "corrupt_corpus"),
        (write_datatrove, remove("00001.ds.index"), "no_such_file"),
        (write_megatron, write("text.idx", b"MMIDIDX\x00\x00" + b"\x00" * 10), "corrupt_corpus"),
        (write_megatron, write("text.idx", b"something else"), "corrupt_corpus"),
        (write_megatron, shorten("text.idx"), "corrupt_corpus"),
        (write_megatron, remove("text.idx"), "no_such_file"),
        (write_mds_bytes, shorten("shard.00001.mds"), "corrupt_corpus"),
        (write_mds_bytes, remove("shard.00000.mds"), "no_such_file"),
    ],
)
def test_damaged_files_are_named(writer, damage, code, documents, tokenizer, tmp_path):
    source = writer(tmp_path, documents)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        source.open(tokenizer)
    assert error.value.code == code and str(tmp_path) in error.value.problem


@pytest.mark.parametrize(
    ("options", "key", "code"),
    [
        ({"column": "ids"}, "column", "no_column"),
        ({"column": "text"}, "column", "unsupported_format"),
        ({}, "dtype", "unsupported_format"),
    ],
)
def test_columns_that_are_not_ids_are_refused(options, key, code, documents, tmp_path):
    write_mds_bytes(tmp_path, documents)
    with pytest.raises(UserError) as error:
        mds_tokens(str(tmp_path), **options)
    assert (error.value.key, error.value.code) == (key, code)


@pytest.mark.parametrize("read", [nanogpt_tokens, megatron_tokens, datatrove_tokens, mds_tokens])
def test_missing_files_are_named(read, tmp_path):
    with pytest.raises(UserError) as error:
        read(str(tmp_path / "nowhere"))
    assert error.value.code == "no_such_file"


def test_an_end_of_document_that_is_in_no_file_is_refused(tmp_path):
    np.array([5, 6, EOS, 7], np.uint16).tofile(tmp_path / "train.bin")
    assert len(nanogpt_tokens(str(tmp_path / "train.bin"), eos_id=EOS).read()[0].document_offsets) == 3
    with pytest.raises(UserError) as error:
        nanogpt_tokens(str(tmp_path / "train.bin"), eos_id=999).read()
    assert (error.value.code, error.value.key) == ("no_end_of_document", "eos_id")
