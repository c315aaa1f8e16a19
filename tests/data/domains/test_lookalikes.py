"""Look-alikes against the definitions of their kinds; pairs of a collator and of an evaluation set."""

import unicodedata
from dataclasses import replace
from itertools import pairwise

import idna
import numpy as np
import pytest
import xxhash
from confusable_homoglyphs import confusables
from rapidfuzz.distance import OSA

from torchrecipes.data import ExampleRows
from torchrecipes.data.domains import LookalikeCollator, domain_texts, domain_tokenizer, lookalike_pairs, lookalikes
from torchrecipes.data.domains.lookalike_names import METHODS, WORDS, lookalike, neighbours
from torchrecipes.data.examples import prepare_examples
from torchrecipes.data.sources.records import Document, ReadStats, documents
from torchrecipes.errors import UserError
from torchrecipes.evaluation import Retrieval
from torchrecipes.models import LateInteraction

NAMES = {  # and their public suffixes
    "paypal.com": "com",
    "my-clinic.modernweb.co.uk": "co.uk",
    "xn--mnchen-3ya.de": "de",
    "xn--80aswg.xn--p1ai": "xn--p1ai",
    "a0x9zmw.io": "io",
    "a-b.org": "org",
}
TYPOS = ("omission", "repetition", "transposition", "replacement", "insertion", "hyphen")


def made(kind, count=150):
    for name, suffix in NAMES.items():
        for seed in range(count):
            found = lookalike(name, suffix, {kind: 1.0}, seed)
            if found is not None:
                yield name, suffix, found


def unicode(name):
    return idna.decode(name) if name else ""


def label(name, suffix):
    return unicode(name.removesuffix(f".{suffix}").rpartition(".")[2])


@pytest.mark.parametrize("kind", METHODS)
def test_a_lookalike_is_another_name_that_idna_allows(kind):
    methods = set()
    for name, _, found in made(kind):
        assert found.name != name and found.kind == kind
        assert found.name == found.name.lower() and found.name.isascii()
        assert idna.encode(unicode(found.name)).decode() == found.name  # valid, and encoded as IDNA encodes it
        methods.add(found.method)
    assert methods == {method.name for method in METHODS[kind]}


def test_typos_are_one_edit():
    for name, suffix, found in made("typo"):
        if found.method in TYPOS:
            assert found.name.removesuffix(suffix).endswith(".") and found.name.endswith(suffix)
            before, after = label(name, suffix), label(found.name, suffix)
            assert OSA.distance(before, after) == 1
            growth = {"omission": -1, "repetition": 1, "insertion": 1, "hyphen": 1}.get(found.method, 0)
            assert len(after) - len(before) == growth
            if found.method == "transposition":
                assert sorted(before) == sorted(after)
            if found.method == "hyphen":
                assert after.replace("-", "") == before.replace("-", "")
        elif found.method == "missing_dot":
            assert (
                found.name.replace(".", "") in (name.replace(".", ""), f"www{name}".replace(".", "")) or "xn--" in name
            )
        else:
            assert found.name.startswith(name.removesuffix(suffix)) and not found.name.endswith(f".{suffix}")


def test_neighbours_of_a_key():
    assert set(neighbours("qwerty")["g"]) == set("ftyhvb")
    assert set(neighbours("qwertz")["z"]) == set("67tuhg")
    assert set(neighbours("azerty")["a"]) == set("12zq")
    for keyboard in ("qwerty", "qwertz", "azerty"):
        near = neighbours(keyboard)
        assert all(key in near[other] for key, others in near.items() for other in others)


def skeleton(text):
    """The letters that a text seems to have: marks are dropped, and of letters that look alike there is one."""
    text = "".join(letter for letter in unicodedata.normalize("NFD", text) if not unicodedata.combining(letter))
    text = "".join(map(latin, text))
    for group in ("o0", "il1", "s5", "z2", "b8", "gq9", "e3", "a4", "t7"):
        for letter in group:
            text = text.replace(letter, group[0])
    for letter, pair in (("m", "rn"), ("w", "vv"), ("d", "ci")):
        text = text.replace(letter, pair)
    return text


def latin(letter):
    if letter.isascii():
        return letter
    found = [entry["c"] for entry in confusables.confusables_data.get(letter, ())]
    return next((c for c in found if c.isascii() and c.isalnum() and c.islower()), letter)


def test_homoglyphs_have_the_same_skeleton():
    for name, suffix, found in made("homoglyph"):
        assert skeleton(label(found.name, suffix)) == skeleton(label(name, suffix)), (name, found)


def test_letters_of_one_other_script_are_mixed_in():
    from confusable_homoglyphs.categories import alias

    for _, _, found in made("homoglyph", 60):
        if found.method == "unicode" and found.name.endswith(".io"):
            scripts = {alias(letter) for letter in label(found.name, "io") if not letter.isascii()}
            assert len(scripts) == 1


def test_combinations_contain_the_label_and_a_word():
    for name, suffix, found in made("combo"):
        text, lookalike_text = label(name, suffix), unicode(found.name)
        assert text in lookalike_text and any(word in lookalike_text.replace(text, "") for word in WORDS)


def test_a_lookalike_is_a_function_of_name_kinds_and_seed():
    assert lookalikes("paypal.com", seed=3, count=20) == lookalikes("paypal.com", seed=3, count=20)
    assert lookalikes("paypal.com", seed=3) != lookalikes("paypal.com", seed=4)
    found = lookalikes("paypal.com", {"typo": 1, "combo": 0}, count=30)
    assert len({one.name for one in found}) == 30 and {one.kind for one in found} == {"typo"}


@pytest.mark.parametrize("kinds", [{"typos": 1}, {"typo": -1}, {"typo": float("nan")}, {"typo": 0}, {}])
def test_weights_that_are_none_are_refused(kinds):
    with pytest.raises(UserError) as error:
        lookalikes("paypal.com", kinds)
    assert error.value.code == "invalid_value" and error.value.key.startswith("kinds")


def test_a_name_that_cannot_be_changed_has_no_lookalike():
    assert lookalike("--", "--", {"homoglyph": 1.0}, 0) is None
    assert lookalike("paypal.com", "com", {"combo": 1.0}, 0, max_length=11) is None
    assert lookalike("paypal.com", "com", {"combo": 1.0}, 0, max_length=15) is not None


class Names:
    name, num_bytes, fingerprint = "names", 0, "names"

    def __init__(self, names):
        self.names = names

    def __iter__(self):
        self.report = ReadStats()
        return documents((Document(name, f"names:{i}") for i, name in enumerate(self.names, 1)), self.report)


ALL = [f"{word}-{other}.{suffix}" for word in WORDS[:10] for other in WORDS[:10] for suffix in ("com", "org")]


@pytest.fixture(scope="module")
def tokenizer():
    return domain_tokenizer(Names([*ALL, *NAMES]))


@pytest.fixture(scope="module")
def rows(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    corpus, _ = prepare_examples(folder, domain_texts(Names([*ALL, *NAMES])), tokenizer, max_length=40)
    return ExampleRows(corpus, 40, tokenizer.pad_id)


def texts_of(tokenizer, batch):
    """The names of a batch, in its order."""
    ends = pairwise(batch.cu_seqlens.tolist())
    pieces = [batch.input_ids[0, start:end].tolist() for start, end in ends]
    letters = [[tokenizer.backend.id_to_token(token) for token in piece] for piece in pieces[: batch.num_texts]]
    assert all(piece[0] == "[CLS]" and piece[-1] == "[SEP]" for piece in letters)
    return ["".join(piece[1:-1]) for piece in letters]


def pairs_of(tokenizer, batch):
    texts = texts_of(tokenizer, batch)
    return [tuple(texts[place] for place in example) for example in batch.examples.texts.tolist()]


def test_a_batch_pairs_every_name_with_a_lookalike_of_its_key(tokenizer, rows):
    numbers, keys = np.array([3, 201, -1, 7, 203]), np.array([5, 6, 7, 8, 9], np.uint64)
    names = [[*ALL, *NAMES][number] for number in (3, 201, 7, 203)]
    collator = LookalikeCollator(tokenizer)
    batch = collator.batch(rows, numbers, keys)
    pairs = pairs_of(tokenizer, batch)
    assert [name for _, name in pairs] == names and batch.num_targets == 4
    expected = [lookalike(n, NAMES.get(n, n.rpartition(".")[2]), dict.fromkeys(METHODS, 1.0), k, max_length=38)
                for n, k in zip(names, (5, 6, 8, 9), strict=True)]  # fmt: skip
    assert [query for query, _ in pairs] == [one.name for one in expected]
    # Equal texts have equal hashes, and these are the hashes of the corpus.
    assert len(set(batch.examples.hashes.tolist())) == len({text for pair in pairs for text in pair})
    hashes = dict(zip(texts_of(tokenizer, batch), batch.examples.hashes.tolist(), strict=True))
    stored = rows.examples(np.array([3, 201, 7, 203])).text_hashes.tolist()
    assert [hashes[name] for name in names] == stored
    assert hashes[pairs[0][0]] == int(np.uint64(xxhash.xxh3_64_intdigest(pairs[0][0].encode())).view(np.int64))
    # Whatever else is in the batch, a key gives the same pair; another key, of another epoch, gives another one.
    assert pairs_of(tokenizer, collator.batch(rows, numbers[3:], keys[3:])) == pairs[2:]
    assert pairs_of(tokenizer, collator.batch(rows, numbers, keys + np.uint64(1))) != pairs


def test_lookalikes_are_no_longer_than_a_text_may_be(tokenizer, rows):
    collator, short = LookalikeCollator(tokenizer, {"combo": 1}), ExampleRows(rows.corpus, 32, tokenizer.pad_id)
    batch = collator.batch(short, np.arange(200), np.arange(200, dtype=np.uint64))
    lengths = [len(text) for text in texts_of(tokenizer, batch)]
    assert 25 < max(lengths) <= 30


def test_what_cannot_be_paired_is_refused(tokenizer, rows):
    with pytest.raises(UserError) as error:
        LookalikeCollator(replace(tokenizer, domain=None))
    assert error.value.code == "not_domain_names"
    with pytest.raises(UserError) as error:
        LookalikeCollator(tokenizer, late_interaction=LateInteraction())
    assert (error.value.key, error.value.code) == ("embedding.late_interaction", "domain_names")
    block = rows.examples(np.arange(4))
    two = block._replace(example_texts=np.array([[0, 1], [2, 3]]))
    prompted = block._replace(prompt_lengths=np.full(4, 3))
    for wrong, key, code in ((two, "data.source", "several_texts"), (prompted, "embedding.prompts", "prompt")):
        with pytest.raises(UserError) as error:
            LookalikeCollator(tokenizer).with_lookalikes(
                wrong, np.arange(len(wrong.example_texts), dtype=np.uint64), 40
            )
        assert (error.value.key, error.value.code) == (key, code)


def test_names_that_are_searched_for_are_not_trained_on():
    parts = {part: [e.texts[0] for e in domain_texts(Names(ALL), part, 0.2)] for part in ("train", "test", "all")}
    assert parts["all"] == ALL and sorted(parts["train"] + parts["test"]) == sorted(ALL)
    assert 20 < len(parts["test"]) < 60
    found = list(lookalike_pairs(Names(ALL), "typo", test_share=0.2))
    assert {example.texts[1] for example in found} <= set(parts["test"])
    assert sorted(text for example in found for text in example.texts[1:]) == sorted(ALL)  # the corpus is all names
    assert found == list(lookalike_pairs(Names(ALL), "typo", test_share=0.2))
    assert len(list(lookalike_pairs(Names(ALL), part="all", max_pairs=7))) == 7
    fingerprints = {lookalike_pairs(Names(ALL), seed=seed).fingerprint for seed in (0, 1)}
    assert len(fingerprints) == 2


def test_a_lookalike_that_is_a_name_itself_is_no_query():
    names = [f"{first}{second}.com" for first in "asdfg" for second in "asdfg"]
    found = list(lookalike_pairs(Names(names), "typo", part="all"))
    assert 0 < len(found) < len(names) and not {example.texts[0] for example in found} & set(names)


class Suffixless:
    """An encoder that counts the characters before the first dot."""

    def encode(self, texts, prompt=""):
        found = np.zeros((len(texts), 128), np.float32)
        for row, text in enumerate(texts):
            for letter in text.partition(".")[0]:
                found[row, ord(letter)] += 1
        return found


def test_pairs_are_a_retrieval_task():
    names = [name for name in ALL if name.endswith("com")]
    results = Retrieval(data=lookalike_pairs(Names(names), "typo", part="all"))(Suffixless())
    assert 0.5 < results["recall@10"] <= 1


@pytest.mark.parametrize(("options", "key"), [({"part": "dev"}, "part"), ({"test_share": 0}, "test_share")])
def test_parts_out_of_range_are_refused(options, key):
    with pytest.raises(UserError) as error:
        domain_texts(Names(ALL), **options)
    assert (error.value.key, error.value.code) == (key, "invalid_value")
