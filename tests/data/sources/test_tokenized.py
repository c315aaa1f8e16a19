"""Corpora that other tools have tokenized: the same tokens and documents, read where they lie.

Files are written here from the published layouts; datatrove's by datatrove itself, where it is installed.
"""

import json
import pickle
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from torchrecipes.data.corpus import open_corpus, open_stream, prepare_corpus
from torchrecipes.data.sources import tokenized
from torchrecipes.data.sources.eval_split import split_for_evaluation
from torchrecipes.errors import UserError

EOS = 0
TOKENIZER = SimpleNamespace(
    fingerprint="f" * 32, vocab_size=1000, eos_id=EOS, special_tokens="text", unknown_id=None, count_special_names=None
)
WITHOUT_EOS = SimpleNamespace(**{**vars(TOKENIZER), "eos_id": None})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 1000, size).tolist() for size in rng.integers(1, 40, 50)]


def nanogpt(path, texts, dtype="<u2"):
    np.array([token for text in texts for token in [*text, EOS]], dtype).tofile(path)


def megatron(prefix, texts, code=8, dtype="<u2", per_document=1):
    """Layout of Megatron-LM's `indexed_dataset.py`: sequences, of which a document has one or more."""
    sequences = [[*text, EOS] for text in texts]
    np.array([token for sequence in sequences for token in sequence], dtype).tofile(f"{prefix}.bin")
    sizes = [len(sequence) for sequence in sequences]
    width = np.dtype(dtype).itemsize
    pointers = [width * sum(sizes[:i]) for i in range(len(sizes))]
    first = [*range(0, len(sizes), per_document), len(sizes)]
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(first)))
        file.write(struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers))
        file.write(struct.pack(f"<{len(first)}q", *first))


def mds(folder, values, encoding, sizes=(None,), pack=None, shards=2):
    """Layout of mosaicml-streaming's `MDSWriter`: per shard a count, offsets, a config, and samples of two columns."""
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for number in range(shards):
        samples = []
        for value in values[number::shards]:
            name = f"id {len(value)}".encode()
            fixed = sizes[0] is not None
            samples.append(
                struct.pack("<I", len(name)) + (b"" if fixed else struct.pack("<I", len(value))) + name + value
            )
        config = json.dumps({"any": "thing"}).encode()
        offsets = np.cumsum([4 + 4 * (len(samples) + 1) + len(config), *map(len, samples)]).astype("<u4")
        content = struct.pack("<I", len(samples)) + offsets.tobytes() + config + b"".join(samples)
        raw = f"shard.{number:05d}.mds"
        shard = {
            "column_names": ["id", "tokens"],
            "column_encodings": ["str", encoding],
            "column_sizes": [None, sizes[0]],
            "compression": "zstd:7" if pack else None,
            "format": "mds",
            "hashes": [],
            "raw_data": {"basename": raw, "bytes": len(content), "hashes": {}},
            "samples": len(samples),
            "size_limit": 1 << 26,
            "version": 2,
            "zip_data": {"basename": f"{raw}.zstd", "bytes": 0, "hashes": {}} if pack else None,
        }
        (folder / (f"{raw}.zstd" if pack else raw)).write_bytes(pack(content) if pack else content)
        described.append(shard)
    (folder / "index.json").write_text(json.dumps({"shards": described, "version": 2}))


def prepare(source, tokenizer=TOKENIZER, folder="corpus", **options):
    return prepare_corpus(folder, source, tokenizer, 0, **options)


def documents(corpus):
    starts, stops = corpus.spans(np.arange(corpus.num_documents))
    return [corpus.read(start, stop).tolist() for start, stop in zip(starts, stops, strict=True)]


def after_eos(texts):
    """What is expected: `eos text`, but for the first text, and with the eos at the end of the last one."""
    found = [texts[0], *([EOS, *text] for text in texts[1:])]
    return [*found[:-1], [*found[-1], EOS]]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_nanogpt(here, texts, dtype):
    nanogpt("train.bin", texts, np.dtype(dtype).newbyteorder("<"))
    corpus, validation = prepare(tokenized("train.bin", dtype=dtype))
    assert documents(corpus) == after_eos(texts) and validation is None
    assert corpus.dtype == dtype and corpus.shards[0].path == here / "train.bin"
    assert not list(here.glob("corpus/**/*.safetensors")), "read where it lies"
    assert documents(open_corpus("corpus/train", TOKENIZER)) == documents(pickle.loads(pickle.dumps(corpus)))
    assert corpus.longest_document == max(map(len, after_eos(texts)))
    assert documents(prepare(tokenized("train.bin", dtype=dtype))[0]) == after_eos(texts), "opened again"
    one, _ = prepare(tokenized("train.bin", dtype=dtype), WITHOUT_EOS, "other")
    assert one.num_documents == 1 and one.num_tokens == corpus.num_tokens
    assert "train.bin" in corpus.summary(128)


def test_the_header_of_llm_c(here, texts):
    tokens = np.array([token for text in texts for token in [*text, EOS]], "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    (here / "train_000001.bin").write_bytes(header.tobytes() + tokens.tobytes())
    assert documents(prepare(tokenized("train_000001.bin"))[0]) == after_eos(texts)
    (here / "cut.bin").write_bytes(header.tobytes() + tokens.tobytes()[:-2])
    with pytest.raises(UserError) as error:
        prepare(tokenized("cut.bin"), folder="cut")
    assert error.value.code == "unreadable_file" and "cut.bin" in str(error.value)


def test_eos_between_texts_and_before_them_is_one_form(here, texts):
    before = [token for text in texts for token in [EOS, *text]]
    runs = [EOS, EOS, *texts[0], EOS, EOS, EOS, *texts[1], EOS]
    np.array(before, "<u2").tofile("before.bin")
    np.array(runs, "<u2").tofile("runs.bin")
    assert documents(prepare(tokenized("before.bin"))[0]) == [[EOS, *text] for text in texts]
    found = documents(prepare(tokenized("runs.bin"), folder="runs")[0])
    assert found == [[EOS], [EOS, *texts[0], EOS, EOS], [EOS, *texts[1], EOS]]


@pytest.mark.parametrize("code, dtype", [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_megatron(here, texts, code, dtype):
    megatron("a_text_document", texts, code, dtype)
    for number, path in enumerate(["a_text_document", "a_text_document.bin", "a_text_document.idx"]):
        corpus, _ = prepare(tokenized(path), folder=f"corpus{number}")
        assert documents(corpus) == after_eos(texts) and corpus.dtype == np.dtype(dtype)
    corpus, _ = prepare(tokenized("a_text_document"), WITHOUT_EOS, "ends")
    assert documents(corpus) == [[*text, EOS] for text in texts]
    megatron("pairs", texts, code, dtype, per_document=2)
    corpus, _ = prepare(tokenized("pairs"), WITHOUT_EOS, "pairs_corpus")
    assert documents(corpus) == [[*a, EOS, *b, EOS] for a, b in zip(texts[::2], texts[1::2], strict=True)]


def test_damaged_megatron_files_are_named(here, texts):
    megatron("a", texts)
    index, tokens = (here / "a.idx").read_bytes(), (here / "a.bin").read_bytes()
    damaged = {
        "magic": (b"MMIDXXX" + index[7:], tokens),
        "version": (index[:9] + b"\x02" + index[10:], tokens),
        "type": (index[:17] + b"\x06" + index[18:], tokens),
        "short": (index[:-9], tokens),
        "tokens": (index, tokens[:-2]),
        "size": (index[:34] + b"\xff\xff\x00\x00" + index[38:], tokens),
        "empty": (b"", tokens),
    }
    for name, (content, data) in damaged.items():
        (here / "a.idx").write_bytes(content)
        (here / "a.bin").write_bytes(data)
        with pytest.raises(UserError) as error:
            prepare(tokenized("a.bin"), folder=name)
        assert error.value.code == "unreadable_file" and "a.bin" in str(error.value), name


def test_datatrove(here, texts):
    module = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    for number, width in enumerate((2, 4)):
        file = module.TokenizedFile(f"{here}/d{width}", f"0000{number}.ds", save_final_metadata=True, token_size=width)
        for text in texts:
            file.write([*text, EOS], None)
        file.close()
        corpus, _ = prepare(tokenized(f"d{width}"), folder=f"corpus{width}")
        assert documents(corpus) == after_eos(texts) and corpus.dtype.itemsize == width
        (here / f"d{width}/0000{number}.ds.metadata").unlink()
        corpus, _ = prepare(tokenized(f"d{width}"), WITHOUT_EOS, f"ends{width}")
        assert documents(corpus) == [[*text, EOS] for text in texts]
    (here / "d2/00000.ds").write_bytes((here / "d2/00000.ds").read_bytes()[:-2])
    with pytest.raises(UserError) as error:
        prepare(tokenized("d2"), folder="cut")
    assert error.value.code == "unreadable_file"


def test_mds(here, texts):
    pyarrow = pytest.importorskip("pyarrow")

    def zstd(data):
        return pyarrow.compress(data, "zstd", asbytes=True)

    ordered = [*texts[::2], *texts[1::2]]
    dimension = [bytes([(1 << 2) | 1]) + struct.pack("<H", len(text)) for text in texts]
    as_u4, as_i8 = ([np.array(text, kind).tobytes() for text in texts] for kind in ("<u4", "<i8"))
    cases = {
        "bytes": (as_i8, "bytes", {"dtype": "int64"}, None),
        "packed": (as_i8, "bytes", {"dtype": "int64"}, zstd),
        "static": ([d + v for d, v in zip(dimension, as_u4, strict=True)], "ndarray:uint32", {}, None),
        "dynamic": ([b"\x20" + d + v for d, v in zip(dimension, as_u4, strict=True)], "ndarray", {}, None),
    }
    for name, (values, encoding, options, pack) in cases.items():
        mds(here / name, values, encoding, pack=pack)
        corpus, _ = prepare(tokenized(name, **options), folder=f"corpus_{name}")
        assert documents(corpus) == ordered and corpus.dtype == "uint16"
        corpus.verify()
    rows = [np.arange(number, number + 16, dtype="<u2").tobytes() for number in range(8)]
    mds(here / "rows", rows, "ndarray:uint16:16", sizes=(32,), shards=1)
    assert documents(prepare(tokenized("rows"), WITHOUT_EOS, "corpus_rows")[0]) == [
        list(range(n, n + 16)) for n in range(8)
    ]
    for options, word in (({}, "dtype"), ({"column": "text", "dtype": "int64"}, "'text'"), ({"dtype": "int64"}, None)):
        if word:
            with pytest.raises(UserError) as error:
                prepare(tokenized("bytes", **options), folder="refused")
            assert error.value.code == "unreadable_file" and word in str(error.value)
    (here / "bytes/shard.00001.mds").unlink()
    with pytest.raises(UserError) as error:
        prepare(tokenized("bytes", dtype="int64"), folder="gone")
    assert "shard.00001.mds" in str(error.value)


def test_an_id_that_the_tokenizer_does_not_have_is_refused(here):
    np.array([1, 2, 1000, 3], "<u2").tofile("a.bin")
    np.array([1, -2], "<i4").tofile("b.bin")
    for path, dtype, token in (("a.bin", None, "1000"), ("b.bin", "int32", "-2")):
        with pytest.raises(UserError) as error:
            prepare(tokenized(path, dtype=dtype), folder=path + ".corpus")
        assert error.value.code == "other_tokenizer" and token in str(error.value)


def test_first_documents_are_held_out_and_read(here, texts):
    for name, part in (("a.bin", texts[:20]), ("b.bin", texts[20:])):
        nanogpt(here / name, part)
    whole = after_eos(texts[:20]) + after_eos(texts[20:])
    train, validation = prepare(tokenized("."), eval_samples=25)
    assert documents(validation) == whole[:25] and documents(train) == whole[25:]
    some, _ = prepare(tokenized(".", max_documents=22), folder="some")
    assert documents(some) == whole[:22]
    assert train.boundaries(0, train.num_tokens).tolist() == train.spans(np.arange(1, 25))[0].tolist()
    with pytest.raises(UserError) as error:
        prepare(tokenized("."), folder="all", eval_samples=50)
    assert error.value.key == "data.eval_samples"
    with pytest.raises(UserError) as error:
        prepare_corpus("fraction", tokenized("."), TOKENIZER, 0.1)
    assert error.value.key == "data.validation_fraction" and "eval_samples" in error.value.hint


def test_splits_of_a_folder(here, texts):
    (here / "data").mkdir()
    nanogpt("data/train.bin", texts)
    nanogpt("data/val.bin", texts[:5])
    source = tokenized("data")
    assert source.splits() == ["train", "val"] and documents(prepare(source)[0]) == after_eos(texts)
    chosen = split_for_evaluation(source, "auto", 3)
    assert documents(prepare(chosen, folder="val")[0]) == after_eos(texts[:5])[:3]
    with pytest.raises(UserError) as error:
        tokenized("data", split="test")
    assert error.value.code == "no_such_split"


def test_a_changed_or_missing_file_is_found(here, texts):
    nanogpt("train.bin", texts)
    corpus, _ = prepare(tokenized("train.bin"))
    corpus.verify()
    content = bytearray((here / "train.bin").read_bytes())
    content[10] ^= 1
    (here / "train.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        open_corpus("corpus/train", TOKENIZER).verify()
    assert error.value.code == "corrupt_corpus" and "train.bin" in str(error.value)
    with pytest.raises(UserError) as error:
        prepare(tokenized("train.bin"))
    assert error.value.code == "other_corpus"
    (here / "train.bin").unlink()
    with pytest.raises(UserError) as error:
        open_corpus("corpus/train", TOKENIZER)
    assert error.value.code == "corrupt_corpus" and "train.bin" in str(error.value)


def test_there_is_no_text(here, texts):
    nanogpt("train.bin", texts)
    source = tokenized("train.bin")
    for use in (list, lambda source: open_stream(source, TOKENIZER, cache_dir="cache")):
        with pytest.raises(UserError) as error:
            use(source)
        assert error.value.code == "no_text"
    for options, key in (
        ({"format": "nanogtp"}, "format"),
        ({"dtype": "float32"}, "dtype"),
        ({"max_documents": 0}, "max_documents"),
    ):
        with pytest.raises(UserError) as error:
            tokenized("train.bin", **options)
        assert error.value.key == key
    for path in ("nowhere", "."):
        (here / "train.bin").unlink(missing_ok=True)
        with pytest.raises(UserError) as error:
            tokenized(path)
        assert error.value.code == "no_such_file"
