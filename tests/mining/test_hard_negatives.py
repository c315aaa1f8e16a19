"""`mine_hard_negatives`, against a float64 loop and sentence-transformers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation.encoders import HashEncoder
from torchrecipes.errors import UserError
from torchrecipes.mining import NegativeRules, hard_negatives, mine_hard_negatives, vector_index
from torchrecipes.mining.text_store import TextStore


def pair(query, *passages, label=None):
    return SimpleNamespace(texts=(query, *passages), values=(), label=label, source="x:1")


def data(count=60):
    """Queries with several positives, passages of several queries, and passages that are queries."""
    random = np.random.default_rng(0)
    pairs = [pair(f"query {random.integers(40)}", f"passage {random.integers(50)}") for _ in range(count)]
    return [*pairs, pair("passage 3", "passage 7"), pair("query 1", "Passage  7", "only a negative")]


CORPUS = [(f"d{i}", f"more {i}") for i in range(45)] + [("d1", "the end of more 1"), (None, "MORE 2")]
KINDS = {"cosine": True, "dot": False}


def words(text):
    return " ".join(text.lower().split())


def by_loop(encoder, pairs, corpus, rules, similarity="cosine", ids=False):
    """Lines of the output."""
    identities = {}
    for identity, text in [*corpus, *((p.label if ids else None, p.texts[1]) for p in pairs)]:
        identities.setdefault(text, set()).add(identity)
    for p in pairs:
        for text in p.texts[2:]:
            identities.setdefault(text, set())
    passages = list(identities)

    def vectors(texts, prompt):
        found = encoder.encode(texts, prompt).astype(np.float64)
        return found / np.linalg.norm(found, axis=1, keepdims=True) if similarity == "cosine" else found

    all_scores = vectors([p.texts[0] for p in pairs], "query") @ vectors(passages, "passage").T
    lines = []
    for p, row in zip(pairs, all_scores, strict=True):
        query, positive = p.texts[:2]
        own = row[passages.index(positive)]
        positives = {other.texts[1] for other in pairs if other.texts[0] == query}
        forbidden = {words(text) for text in positives} | {words(query)}
        known = set().union(*(identities[text] for text in positives)) - {None}
        ranked = [
            (row[i], passages[i])
            for i in sorted(range(len(passages)), key=lambda i: -row[i])
            if words(passages[i]) not in forbidden and not identities[passages[i]] & known
        ]
        kept = [
            (score, text)
            for score, text in ranked[slice(*rules.range)]
            if (rules.absolute_margin is None or score <= own - rules.absolute_margin)
            and (rules.relative_margin is None or score <= own - rules.relative_margin * abs(own))
            and (rules.max_score is None or score <= rules.max_score)
            and (rules.min_score is None or score >= rules.min_score)
        ][: rules.num_negatives]
        if kept:
            scores = [own, *(score for score, _ in kept)]
            lines.append((query, positive, [text for _, text in kept], scores))
    return lines


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def same(lines, expected):
    assert [(line["query"], line["positive"], line["negatives"]) for line in lines] == [row[:3] for row in expected]
    for line, row in zip(lines, expected, strict=True):
        assert line["scores"] == pytest.approx(row[3], abs=2e-6)


SETTINGS = [
    {"range": (0, 20), "num_negatives": 3},
    {"range": (5, 30), "relative_margin": 0.05},
    {"range": (0, 200), "absolute_margin": 0.2, "num_negatives": 200},
    {"range": (0, 40), "max_score": 0.2, "min_score": -0.1},
]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_equals_a_loop(tmp_path, monkeypatch, settings, similarity):
    monkeypatch.setattr(hard_negatives, "CHUNK", 17)
    monkeypatch.setattr(hard_negatives, "ROWS", 13)
    monkeypatch.setattr(vector_index, "CHUNK", 19)
    encoder, rules = HashEncoder(8, prompts={"query": "q ", "passage": "p "}), NegativeRules(**settings)
    output = tmp_path / "mined.jsonl"
    stats = mine_hard_negatives(encoder, data(), output, corpus=CORPUS, rules=rules, similarity=similarity)
    lines, expected = read(output), by_loop(encoder, data(), CORPUS, rules, similarity)
    same(lines, expected)
    assert stats.pairs == 62 and stats.written == len(lines) and stats.without == 62 - len(lines)
    assert stats.negatives == sum(len(line["negatives"]) for line in lines)
    assert stats.incomplete == sum(len(line["negatives"]) < rules.num_negatives for line in lines)
    assert stats.positive_score == pytest.approx(np.mean([row[3][0] for row in expected]), abs=1e-6)
    assert stats.negative_score == pytest.approx(np.mean([s for row in expected for s in row[3][1:]]), abs=1e-6)
    assert stats.above_positive == sum(s > row[3][0] for row in expected for s in row[3][1:])
    assert list(tmp_path.iterdir()) == [output]


def test_texts_of_one_document_are_no_negatives(tmp_path):
    """By identity, by words, in any pair of the query; and never the query itself."""
    pairs = [pair("a", "one", label="d1"), pair("a", "Two", label="d9"), pair("b", "three", label=3)]
    corpus = [("d1", "another part of one"), ("d2", "TWO "), ("d2", "linked to two"), ("3", "of three"), (None, "A")]
    corpus += [(None, "free 1"), (None, "free 2")]
    rules, output = NegativeRules(range=(0, 20), num_negatives=20), tmp_path / "mined.jsonl"
    stats = mine_hard_negatives(HashEncoder(), pairs, output, corpus=corpus, rules=rules, labels_are_ids=True)
    first, second, third = (set(line["negatives"]) for line in read(output))
    assert first == second == {"three", "of three", "free 1", "free 2"}
    assert third == {"one", "another part of one", "Two", "TWO ", "linked to two", "A", "free 1", "free 2"}
    assert stats.removed["query"] == 2 and stats.removed["positive"] == 5 + 5 + 2


def test_negative_scores_keep_their_margin(tmp_path):
    class Opposite:
        """Every passage points away from the queries; the scores are those in the texts."""

        def encode(self, texts, prompt=""):
            return np.array([[1.0, 0.0] if t[0] == "q" else [float(t), 0] for t in texts], np.float32)

    pairs = [pair("q", "-0.2")]
    corpus = [(None, text) for text in ("-0.1", "-0.195", "-0.205", "-0.3", "-0.4")]
    rules, output = NegativeRules(range=(0, 10), num_negatives=9, relative_margin=0.05), tmp_path / "mined.jsonl"
    mine_hard_negatives(Opposite(), pairs, output, corpus=corpus, rules=rules, similarity="dot")
    assert read(output)[0]["negatives"] == ["-0.3", "-0.4"]


def test_it_equals_sentence_transformers(tmp_path):
    """One positive per query; with several, they take the lowest of the positives' scores for a margin."""
    mine = pytest.importorskip("sentence_transformers.util").mine_hard_negatives
    datasets = pytest.importorskip("datasets")
    torch = pytest.importorskip("torch")
    encoder = HashEncoder(8)

    class Theirs:
        device = "cpu"
        similarity = staticmethod(lambda a, b: torch.as_tensor(a) @ torch.as_tensor(b).T)
        similarity_pairwise = staticmethod(lambda a, b: (torch.as_tensor(a) * torch.as_tensor(b)).sum(1))

        def encode_query(self, texts, **_):
            vectors = encoder.encode(texts)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        encode_document = encode_query

    rows = [(f"query {i}", f"passage {i % 25}") for i in range(40)]
    texts = [f"more {i}" for i in range(30)]
    table = datasets.Dataset.from_dict({"query": [q for q, _ in rows], "positive": [p for _, p in rows]})
    settings = {"range_min": 0, "range_max": 50, "num_negatives": 4, "relative_margin": 0.05, "min_score": -0.2}
    theirs = mine(table, Theirs(), corpus=texts, output_format="n-tuple", output_scores=True, verbose=False, **settings)
    rules = NegativeRules(range=(0, 50), num_negatives=4, relative_margin=0.05, min_score=-0.2)
    output = tmp_path / "mined.jsonl"
    corpus = [(None, text) for text in texts]
    pairs = [pair(*row) for row in rows]
    mine_hard_negatives(encoder, pairs, output, corpus=corpus, rules=rules, min_negatives=4)
    ours = read(output)
    assert len(ours) == len(theirs) > 10
    for line, row in zip(ours, theirs, strict=True):
        assert (line["query"], line["positive"]) == (row["query"], row["positive"])
        assert line["negatives"] == [row[f"negative_{i}"] for i in range(1, 5)]
        assert line["scores"] == pytest.approx(row["scores"], abs=1e-5)


def test_a_cross_encoder_judges(tmp_path):
    def rescore(asked):
        return np.array([-len(query) + float(passage[-1]) for query, passage in asked], np.float32)

    pairs, corpus = [pair("ab", "p 5"), pair("abc", "p 7")], [(None, f"p {i}") for i in range(10)]
    rules, output = NegativeRules(range=(2, 10), num_negatives=8, absolute_margin=1.0), tmp_path / "mined.jsonl"
    encoder = HashEncoder()
    mine_hard_negatives(encoder, pairs, output, corpus=corpus, rules=rules, rescore=rescore)
    queries, passages = encoder.encode(["ab", "abc"]), encoder.encode([text for _, text in corpus])
    passages = passages / np.linalg.norm(passages, axis=1, keepdims=True)
    for line, query, own in zip(read(output), queries, (5, 7), strict=True):
        order = [number for number in np.argsort(-(passages @ query)).tolist() if number != own][2:10]
        expected = sorted((number for number in order if number <= own - 1), reverse=True)
        assert line["negatives"] == [f"p {number}" for number in expected]
        base = -len(line["query"])
        assert line["scores"] == [base + own, *(base + number for number in expected)]


class Interrupted(Exception):
    pass


class StopsAfter(HashEncoder):
    """Fails after some calls."""

    def __init__(self, calls):
        super().__init__(8)
        self.left = calls

    def encode(self, texts, prompt=""):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return super().encode(texts, prompt)


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(hard_negatives, "CHUNK", 10)
    monkeypatch.setattr(hard_negatives, "ROWS", 9)
    rules, straight = NegativeRules(range=(0, 20), strategy="random"), tmp_path / "straight.jsonl"
    expected = mine_hard_negatives(HashEncoder(8), data(), straight, corpus=CORPUS, rules=rules)
    output, calls = tmp_path / "mined.jsonl", []
    for after in (3, 4, 100):
        encoder = StopsAfter(after)
        try:
            mine_hard_negatives(encoder, data(), output, corpus=CORPUS, rules=rules, identity="a")
        except Interrupted:
            assert not output.exists()
        calls.append(len(encoder.calls))
    total = -(-expected.queries // 10) + -(-expected.passages // 10)
    assert calls == [3, 4, total - 7]
    assert output.read_bytes() == straight.read_bytes()


def test_lines_that_are_written_are_not_searched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(hard_negatives, "ROWS", 9)
    rules, straight, output = NegativeRules(range=(0, 20)), tmp_path / "straight.jsonl", tmp_path / "mined.jsonl"
    expected = mine_hard_negatives(HashEncoder(8), data(), straight, corpus=CORPUS, rules=rules)
    searched = []
    real = vector_index.ExactIndex.search

    def search(self, queries, k):
        searched.append(len(queries))
        if len(searched) == 3:
            raise Interrupted
        return real(self, queries, k)

    monkeypatch.setattr(vector_index.ExactIndex, "search", search)
    with pytest.raises(Interrupted):
        mine_hard_negatives(HashEncoder(8), data(), output, corpus=CORPUS, rules=rules, identity="a")
    with (tmp_path / "mined.jsonl.work" / "negatives.jsonl").open("a") as file:
        file.write('{"query": "cut o')  # as after a crash
    encoder = HashEncoder(8)
    assert mine_hard_negatives(encoder, data(), output, corpus=CORPUS, rules=rules, identity="a") == expected
    assert output.read_bytes() == straight.read_bytes()
    assert len(searched) == 3 + 5 and encoder.calls == []


def test_another_model_starts_anew_and_other_rules_use_its_embeddings_again(tmp_path):
    work, encoder = tmp_path / "work", HashEncoder(8)
    run = {"corpus": CORPUS, "work_folder": work, "identity": "a"}
    mine_hard_negatives(encoder, data(), tmp_path / "1", rules=NegativeRules(range=(0, 20)), **run)
    calls = len(encoder.calls)
    rules = NegativeRules(range=(0, 20), max_score=0.3)
    mine_hard_negatives(encoder, data(), tmp_path / "2", rules=rules, **run)
    assert len(encoder.calls) == calls and work.is_dir()
    same(read(tmp_path / "2"), by_loop(encoder, data(), CORPUS, rules))
    other, run["identity"] = HashEncoder(12), "b"
    mine_hard_negatives(other, data(), tmp_path / "3", rules=rules, **run)
    same(read(tmp_path / "3"), by_loop(other, data(), CORPUS, rules))


def test_what_cannot_be_mined(tmp_path):
    def code_of(pairs, output="out", encoder=None, **settings):
        with pytest.raises(UserError) as error:
            mine_hard_negatives(encoder or HashEncoder(), pairs, tmp_path / output, **settings)
        return error.value.code

    assert code_of([]) == "no_examples"
    assert code_of([pair("a")]) == "not_pairs"
    assert code_of([pair("a", "one")]) == "no_negatives"
    assert code_of(data(), rules=NegativeRules(range=(0, 10), max_score=-1.0)) == "no_negatives"
    (tmp_path / "there").touch()
    assert code_of(data(), "there") == "exists"

    class Broken(HashEncoder):
        def encode(self, texts, prompt=""):
            return super().encode(texts) * np.nan

    assert code_of(data(), encoder=Broken()) == "not_finite"


def test_texts_are_stored_once(tmp_path):
    store = TextStore(tmp_path / "texts")
    texts = ["one", "Zwölf 漢字\ud800", "", "One", "two", "one"]
    assert [store.add(text) for text in texts] == [0, 1, 2, 3, 4, 0]
    assert store.add("three", "x") == 5 and store.add("four", "x") == 6 and store.add("one", "x") == 0
    assert store.read([4, 1, 0]) == ["two", "Zwölf 漢字\ud800", "one"] and len(store) == 7
    assert store.documents().tolist() == [0, 1, 2, 0, 4, 0, 0]
    assert store.find(" ONE\n") == 0 and store.find("nothing") == -1
    store.close()
    assert not (tmp_path / "texts").exists()
