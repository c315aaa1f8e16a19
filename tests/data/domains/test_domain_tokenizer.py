"""The tokenizer of domain names against `transformers`, `publicsuffixlist` and a loop over characters."""

import json
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest

from torchrecipes.data.corpus import prepare_corpus
from torchrecipes.data.domains import domain_tokenizer, encoding
from torchrecipes.data.domains.suffix_keys import KeyTable
from torchrecipes.data.sources.records import Document, ReadStats, documents
from torchrecipes.data.tokenizers.load import load_tokenizer
from torchrecipes.errors import UserError

publicsuffixlist = pytest.importorskip("publicsuffixlist")

NAMES = [
    *("example.com", "example.co.uk", "a.b.example.co.uk", "www.example.com", "xn--mnchen-3ya.de", "x1.xn--p1ai"),
    *("foo.github.io", "deep.sub.foo.github.io", "city.kobe.jp", "foo.bar.kobe.jp", "www.ck", "a.b.ck", "unknown.tld9"),
    *("my-site.unknown", "123.com", "a.com", "b.com", "c.de", f"{'x' * 63}.org"),
]


class Names(list):
    name, num_bytes = "names", 0

    def __init__(self, items=NAMES):
        super().__init__(Document(item, f"names:{i}") for i, item in enumerate(items, 1))
        self.fingerprint = "-".join(items)

    def __iter__(self):
        self.report = ReadStats()
        return documents(super().__iter__(), self.report)


@pytest.fixture(scope="module")
def tokenizer():
    return domain_tokenizer(Names(), num_suffixes=6)


@pytest.fixture(scope="module")
def psl():
    return publicsuffixlist.PublicSuffixList()


def parsed(names, psl):
    starts = [len(name) - len(psl.publicsuffix(name)) for name in names]
    return SimpleNamespace(
        characters=np.frombuffer("".join(names).encode(), np.uint8),
        lengths=np.array([len(name) for name in names]),
        suffix_starts=np.array(starts),
    )


def types_of(name: str, suffix: str, suffixes: list[str]) -> list[int]:
    """Token types of `[CLS] name [SEP]`, a character at a time."""
    rest = name.removesuffix(suffix).removesuffix(".")
    label = rest.rpartition(".")[2]
    kinds = [3 if c == "." else 1 for c in rest.removesuffix(label)] + [0] * len(label)
    kinds += [3] * (len(name) - len(rest) - len(suffix)) + [2] * len(suffix)
    number = suffixes.index(suffix) + 1 if suffix in suffixes else 0
    return [4 * number + kind for kind in (0, *kinds, 0)]


def test_43_tokens(tokenizer):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = tokenizer.backend.get_vocab()
    assert sorted(vocabulary, key=vocabulary.get) == [*special, *"abcdefghijklmnopqrstuvwxyz0123456789-."]
    assert sorted(vocabulary.values()) == list(range(43)) and tokenizer.vocab_size == 43
    roles = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert roles == (0, 1, 2, 3, 4) and tokenizer.special_ids == [0, 1, 2, 3, 4]


def test_the_most_frequent_suffixes_have_ids(tokenizer, psl):
    counts = {}
    for name in NAMES:
        counts[psl.publicsuffix(name)] = counts.get(psl.publicsuffix(name), 0) + 1
    assert tokenizer.domain.suffixes == sorted(counts, key=lambda suffix: (-counts[suffix], suffix))[:6]


def test_ids_are_those_of_auto_tokenizer(tokenizer, psl, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    tokens, lengths, columns = tokenizer.domain.encode(parsed(NAMES, psl))
    ends = np.cumsum(lengths)
    found = [tokens[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]
    assert found == other(NAMES)["input_ids"] == tokenizer.encode_batch(NAMES)
    assert columns["suffix_ids"].dtype == np.uint16 and columns["suffix_starts"].dtype == np.uint8
    for name, ids, number, start in zip(NAMES, found, *columns.values(), strict=True):
        suffix = tokenizer.decode(ids[start:-1])
        assert suffix == psl.publicsuffix(name)
        assert number == (tokenizer.domain.suffixes.index(suffix) + 1 if suffix in tokenizer.domain.suffixes else 0)
    text = ["ExAmple.COM", "a_b.com", "bücher.de", "a b", "[MASK].com"]
    assert other(text)["input_ids"][:4] == tokenizer.encode_batch(text)[:4]
    assert tokenizer.encode("ExAmple.COM") == tokenizer.encode("example.com")
    assert [tokenizer.encode(one).count(1) for one in text] == [0, 1, 1, 1, 2]
    assert tokenizer.encode_prompt("[MASK].com")[1] == 4


@pytest.mark.parametrize("again", ["load", "pickle", "transformers"])
def test_suffixes_and_rules_are_part_of_it(tokenizer, tmp_path, again):
    if again == "pickle":
        other = pickle.loads(pickle.dumps(tokenizer))
    else:
        tokenizer.save(tmp_path)
        if again == "transformers":
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "other")
        other = load_tokenizer(tmp_path / "other" if again == "transformers" else tmp_path)
    assert other.domain.suffixes == tokenizer.domain.suffixes and other.domain.config == tokenizer.domain.config
    assert other.vocab_size == 43
    if again != "transformers":  # which writes tokenizer.json in its own way
        assert other.fingerprint == tokenizer.fingerprint
    ids = tokenizer.encode("foo.github.io")
    assert other.token_type_ids(np.array(ids), np.array([len(ids)])).tolist() == types_of(
        "foo.github.io", "github.io", tokenizer.domain.suffixes
    )


def test_the_fingerprint_covers_suffixes_and_rules(tokenizer, tmp_path):
    rules = tmp_path / "rules.dat"
    rules.write_text("com\nuk\n")
    from torchrecipes.data.domains import PublicSuffixList

    again = PublicSuffixList(text=PublicSuffixList().text)
    assert again.rules == PublicSuffixList().rules and again.fingerprint == PublicSuffixList().fingerprint
    others = [
        domain_tokenizer(Names(), num_suffixes=5),
        domain_tokenizer(Names(), num_suffixes=6, only_icann=True),
        domain_tokenizer(Names(), num_suffixes=6, public_suffix_list=rules),
    ]
    assert len({one.fingerprint for one in (tokenizer, *others)}) == 4
    assert domain_tokenizer(Names(), num_suffixes=6).fingerprint == tokenizer.fingerprint


def test_it_is_kept_in_a_folder(tmp_path):
    first = domain_tokenizer(Names(), tmp_path, num_suffixes=6)

    class Unreadable(Names):
        def __iter__(self):
            raise AssertionError("read")

    assert domain_tokenizer(Unreadable(), tmp_path, num_suffixes=6).fingerprint == first.fingerprint
    with pytest.raises(UserError) as caught:
        domain_tokenizer(Names(), tmp_path, num_suffixes=5)
    assert caught.value.code == "other_tokenizer"
    with pytest.raises(UserError) as caught:
        domain_tokenizer(Names(), causal=True)
    assert caught.value.code == "unsupported_tokenizer"
    assert json.loads((tmp_path / "training.json").read_text())["type"] == "domain"


def test_token_types(tokenizer, psl):
    suffixes = tokenizer.domain.suffixes
    texts = [tokenizer.encode(name) for name in NAMES]
    found = tokenizer.token_type_ids(np.concatenate(texts), np.array([len(one) for one in texts]))
    expected = [types_of(name, psl.publicsuffix(name), suffixes) for name in NAMES]
    assert found.dtype == np.int64 and found.tolist() == [number for one in expected for number in one]
    # A pair has the suffixes of both names; padding has the type of the special tokens.
    (one, other), pad = texts[:2], [0, 0]
    pair = [*one, *other[1:], *pad]
    found = tokenizer.token_type_ids(np.array([*pair, *one]), np.array([len(pair), len(one)]), np.array([len(one)] * 2))
    numbers = [4 * (1 + suffixes.index(suffix)) for suffix in ("com", "co.uk")]
    assert found.tolist() == [*expected[0], *expected[1][1:], numbers[1], numbers[1], *expected[0]]


def test_a_hidden_suffix_is_unknown(tokenizer):
    masked = tokenizer.encode_prompt("a.b" + ".[MASK][MASK][MASK]")
    assert tokenizer.token_type_ids(np.array(masked), np.array([len(masked)])).tolist() == [0, 1, 3, 0, 3, 2, 2, 2, 0]
    masked = tokenizer.encode_prompt("a[MASK].com")
    assert set(tokenizer.token_type_ids(np.array(masked), np.array([len(masked)])) // 4) == {1}
    nothing = tokenizer.encode("")
    assert tokenizer.token_type_ids(np.array(nothing * 2), np.array([2, 2])).tolist() == [0] * 4


def test_token_types_of_text_are_the_sentences():
    from torchrecipes.data.tokenizers.train import train_char

    tokenizer = train_char(Names())
    tokens, lengths = np.arange(7), np.array([4, 3])
    assert tokenizer.token_type_ids(tokens, lengths).tolist() == [0] * 7
    assert tokenizer.token_type_ids(tokens, lengths, np.array([2, 3])).tolist() == [0, 0, 1, 1, 0, 0, 0]


def test_a_corpus_holds_suffixes_of_documents_that_are_read_one_by_one(tokenizer, psl, tmp_path):
    train, _ = prepare_corpus(tmp_path, Names([*NAMES, "a_b.com"]), tokenizer, 0)
    tokens, lengths, columns = tokenizer.domain.encode(parsed(NAMES, psl))
    (shard,) = train.shards
    assert json.loads((tmp_path / "train" / "corpus.json").read_text())["format"] == "torchrecipes-corpus-3"
    assert shard.tokens.dtype == np.uint8 and shard.tokens[: len(tokens)].tolist() == tokens.tolist()
    for name, values in columns.items():
        assert shard.columns[name].dtype == values.dtype and shard.columns[name][:-1].tolist() == values.tolist()
    assert shard.columns["suffix_ids"][-1] == 1 and shard.columns["suffix_starts"][-1] == 5
    assert train.statistics.unknown == 1 and np.diff(shard.document_offsets)[:-1].tolist() == lengths.tolist()


@pytest.mark.parametrize("characters", ["ab-.9_Z [", "aÅ\u212aİẞΣΟς日\U0001f642.é"], ids=["ascii", "other"])
def test_any_texts_at_once_are_the_tokens_of_each(tokenizer, characters):
    draw = random.Random(0)
    texts = ["".join(draw.choices(characters, k=draw.randrange(12))) for _ in range(300)]
    texts += [*NAMES, "[MASK].com", "[CLS]", "<|inert_0|>", "", "ΟΣ", "line\nend\r\n\ttab"]
    tokens, lengths, sizes = tokenizer.domain.encode_texts(texts, 1000)
    ends = np.cumsum(lengths)
    found = [tokens[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]
    assert found == tokenizer.encode_batch(texts) and sizes.tolist() == (lengths - 2).tolist()
    tokens, lengths, sizes = tokenizer.domain.encode_texts(texts, 7)
    expected = [[2, *one[1:-1][:5], 3] for one in found]
    assert tokens.tolist() == [token for one in expected for token in one]
    assert lengths.tolist() == [len(one) for one in expected] and sizes.tolist() == [len(one) - 2 for one in found]
    assert [len(part) for part in tokenizer.domain.encode_texts([], 7)] == [0, 0, 0]


@pytest.mark.parametrize("at_a_time", [1, 7, 10_000])
def test_random_names_however_many_at_a_time(tokenizer, psl, monkeypatch, at_a_time):
    monkeypatch.setattr(encoding, "NAMES_AT_A_TIME", at_a_time)
    draw = random.Random(1)
    label = lambda most: "".join(draw.choices("abcxyz0189", k=draw.randrange(1, most)))  # noqa: E731
    suffixes = [*tokenizer.domain.suffixes, "xn--p1ai", "s3-website.us-east-2.amazonaws.com", "9characte", "eightcha"]
    names = [f"{label(20)}.{draw.choice([*suffixes, label(63) + 'z'])}" for _ in range(200)]
    names += [f"{label(63)}.{label(63)}.{label(60)}.com" for _ in range(20)]
    tokens, lengths, columns = tokenizer.domain.encode(parsed(names, psl))
    assert tokens.tolist() == [token for one in tokenizer.encode_batch(names) for token in one]
    assert lengths.tolist() == [len(name) + 2 for name in names]
    ids = {suffix: i for i, suffix in enumerate(tokenizer.domain.suffixes, 1)}
    assert columns["suffix_ids"].tolist() == [ids.get(psl.publicsuffix(name), 0) for name in names]
    assert columns["suffix_starts"].tolist() == [len(name) - len(psl.publicsuffix(name)) + 1 for name in names]


def test_keys_are_found_where_they_are():
    draw = np.random.default_rng(0)
    keys = np.unique(draw.integers(0, 1 << 63, 5000, dtype=np.uint64))
    draw.shuffle(keys)
    for count in (0, 1, 4000):  # of so many, some share a slot
        places = {key: i for i, key in enumerate(keys[:count].tolist())}
        found = KeyTable(keys[:count]).find(keys)
        assert found.tolist() == [places.get(key, -1) for key in keys.tolist()]
