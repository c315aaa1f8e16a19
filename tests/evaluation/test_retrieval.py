"""`Retrieval`, against a float64 loop and trec_eval."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import ranks
from tests.evaluation.encoders import HashEncoder
from torchrecipes.data.examples import scored_pairs
from torchrecipes.errors import UserError
from torchrecipes.evaluation import Retrieval, retrieval, top_k
from torchrecipes.evaluation.top_k import TopK, add_dot_products, best_columns

METRICS = ["mrr@10", "ndcg@10", "recall@1", "recall@10", "recall@100"]


def write_beir(folder, queries=30, passages=300, seed=0):
    """A data set with grades, titles, and queries without a relevant passage."""
    random = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    corpus = {f"d{i}": {"title": "A title" if i % 3 else "", "text": f"passage {i}"} for i in range(passages)}
    asked = {f"q{i}": f"query {i}" for i in range(queries)}
    lines = [json.dumps({"_id": name, **record}) + "\n" for name, record in corpus.items()]
    (folder / "corpus.jsonl").write_text("".join(lines))
    lines = [json.dumps({"_id": name, "text": text}) + "\n" for name, text in asked.items()]
    (folder / "queries.jsonl").write_text("".join(lines))
    qrels = {name: {} for name in list(asked)[:-2]}
    for grades in qrels.values():
        for passage in random.choice(passages, size=random.integers(1, 6), replace=False):
            grades[f"d{passage}"] = int(random.integers(1, 4))
    rows = [f"{q}\t{d}\t{grade}\n" for q, grades in qrels.items() for d, grade in grades.items()]
    rows.append(f"{list(asked)[-1]}\td0\t0\n")  # not relevant
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    texts = {name: f"{record['title']} {record['text']}".strip() for name, record in corpus.items()}
    return asked, texts, qrels


def run_of(encoder, queries, passages, qrels, dim=None):
    """Scores in float64 of every passage for every query, by identity."""
    q = encoder.encode([queries[name] for name in qrels], "query")[:, :dim].astype(np.float64)
    d = encoder.encode(list(passages.values()), "passage")[:, :dim].astype(np.float64)
    scores = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (d / np.linalg.norm(d, axis=1, keepdims=True)).T
    return {
        name: dict(zip(passages, row, strict=True)) for name, row in zip(qrels, scores.round(12).tolist(), strict=True)
    }


def by_loop(run, qrels):
    totals = dict.fromkeys(METRICS, 0.0)
    for query, grades in qrels.items():
        order = sorted(run[query], key=lambda name: -run[query][name])
        first = next((rank for rank, name in enumerate(order[:10], 1) if name in grades), None)
        totals["mrr@10"] += 1 / first if first else 0
        dcg = sum(grades.get(name, 0) / math.log2(rank + 1) for rank, name in enumerate(order[:10], 1))
        best = sorted(grades.values(), reverse=True)[:10]
        totals["ndcg@10"] += dcg / sum(grade / math.log2(rank + 1) for rank, grade in enumerate(best, 1))
        for cutoff in (1, 10, 100):
            totals[f"recall@{cutoff}"] += len(grades.keys() & set(order[:cutoff])) / len(grades)
    return {name: total / len(qrels) for name, total in totals.items()}


PROMPTS = {"query": "q: ", "passage": "p: "}


def test_beir_equals_a_loop_and_trec_eval(tmp_path, monkeypatch):
    queries, passages, qrels = write_beir(tmp_path)
    encoder = HashEncoder(8, prompts=PROMPTS)
    monkeypatch.setattr(retrieval, "CHUNK", 70)
    monkeypatch.setattr(top_k, "SCORES_AT_ONCE", 70 * 9)
    results = Retrieval(str(tmp_path))(encoder, dims=(3,))
    assert encoder.calls[0] == ("query", 28) and encoder.calls[1:] == [("passage", 70)] * 4 + [("passage", 20)]
    assert list(results) == [f"{name}{suffix}" for suffix in ("", "_dim3") for name in METRICS]
    for suffix, dim in (("", None), ("_dim3", 3)):
        expected = by_loop(run_of(encoder, queries, passages, qrels, dim), qrels)
        assert {name: results[name + suffix] for name in METRICS} == pytest.approx(expected, abs=1e-12)
    pytrec_eval = pytest.importorskip("pytrec_eval")
    names = {"ndcg@10": "ndcg_cut_10", "recall@1": "recall_1", "recall@10": "recall_10", "recall@100": "recall_100"}
    judge = pytrec_eval.RelevanceEvaluator(qrels, set(names.values()))
    theirs = judge.evaluate(run_of(encoder, queries, passages, qrels)).values()
    for ours, name in names.items():
        assert results[ours] == pytest.approx(np.mean([row[name] for row in theirs]), abs=1e-9)


def test_compressed_files_and_trec_qrels(tmp_path):
    import gzip

    write_beir(tmp_path)
    expected = Retrieval(str(tmp_path))(HashEncoder())
    corpus = tmp_path / "corpus.jsonl"
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    corpus.unlink()
    labels = tmp_path / "qrels" / "test.tsv"
    rows = [line.split("\t") for line in labels.read_text().splitlines()[1:]]
    (tmp_path / "qrels" / "dev.tsv").write_text("".join(f"{q} 0 {d} {grade}\n" for q, d, grade in rows))
    assert Retrieval(str(tmp_path), split="dev")(HashEncoder()) == expected


def pair(query, *passages, label=None):
    return SimpleNamespace(texts=(query, *passages), values=(), label=label, source="x:1")


def test_pairs_equal_texts_are_one():
    data = [pair("a", "one"), pair("b", "one", "hard"), pair("a", "two"), pair("a", "one"), pair("c", "three")]
    task = Retrieval(data=data).task
    assert task.queries == ["a", "b", "c"] and list(task.passages) == ["one", "hard", "two", "three"]
    assert task.relevant == [{0: 1.0, 2: 1.0}, {0: 1.0}, {3: 1.0}]
    results = Retrieval(data=data)(HashEncoder())
    queries, passages = {t: t for t in "abc"}, {t: t for t in task.passages}
    qrels = {"a": {"one": 1, "two": 1}, "b": {"one": 1}, "c": {"three": 1}}
    assert results == pytest.approx(by_loop(run_of(HashEncoder(), queries, passages, qrels), qrels))


def test_passages_of_one_identity_are_relevant_together():
    data = [pair("a", "one", label=7), pair("b", "part of one", "hard", label="7"), pair("c", "two", label="8")]
    task = Retrieval(data=data, labels_are_ids=True).task
    assert list(task.passages) == ["one", "part of one", "hard", "two"]
    assert task.relevant == [{0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}, {3: 1.0}]


def test_by_dot_product(tmp_path):
    queries, passages, qrels = write_beir(tmp_path)
    results, encoder = Retrieval(str(tmp_path), similarity="dot")(HashEncoder(8), dims=(3,)), HashEncoder(8)
    for suffix, dim in (("", None), ("_dim3", 3)):
        q = encoder.encode([queries[name] for name in qrels])[:, :dim].astype(np.float64)
        scores = (q @ encoder.encode(list(passages.values()))[:, :dim].astype(np.float64).T).tolist()
        run = {name: dict(zip(passages, row, strict=True)) for name, row in zip(qrels, scores, strict=True)}
        assert {name: results[name + suffix] for name in METRICS} == pytest.approx(by_loop(run, qrels), abs=1e-12)


def test_the_choice_of_queries_is_fixed_and_keeps_what_is_relevant(tmp_path):
    queries, passages, qrels = write_beir(tmp_path)
    evaluator = Retrieval(str(tmp_path), max_queries=7, max_passages=60)
    chosen = [name for name in qrels if queries[name] in evaluator.task.queries]
    assert len(chosen) == 7 and chosen != list(qrels)[:7]
    texts = list(evaluator.task.passages)
    assert len(texts) == 60 and texts == [text for text in passages.values() if text in set(texts)]
    for name, grades in zip(chosen, evaluator.task.relevant, strict=True):
        assert {texts[number]: grade for number, grade in grades.items()} == {
            passages[passage]: grade for passage, grade in qrels[name].items()
        }
    results = evaluator(HashEncoder())
    assert results == Retrieval(str(tmp_path), max_queries=7, max_passages=60)(HashEncoder())
    kept = {name: text for name, text in passages.items() if text in set(texts)}
    fewer = {name: qrels[name] for name in chosen}
    assert results == pytest.approx(by_loop(run_of(HashEncoder(), queries, kept, fewer), fewer))
    # Asking for more queries adds to those.
    more = Retrieval(str(tmp_path), max_queries=9).task.queries
    assert set(evaluator.task.queries) < set(more)


def test_a_query_does_not_find_itself(tmp_path):
    (tmp_path / "qrels").mkdir()
    records = [{"_id": f"x{i}", "text": f"text {i}"} for i in range(20)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "queries.jsonl").write_text(json.dumps(records[3]) + "\n")
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nx3\tx5\t1\n")
    encoder = HashEncoder()
    vectors = encoder.encode([record["text"] for record in records]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    closer = int((vectors @ vectors[3] > vectors[5] @ vectors[3]).sum())  # itself among them
    assert Retrieval(str(tmp_path))(encoder)["mrr@10"] == pytest.approx(1 / (closer + 1) if closer < 10 else 0)
    ignoring = Retrieval(str(tmp_path), ignore_identical_ids=True)(encoder)["mrr@10"]
    assert ignoring == pytest.approx(1 / closer if closer <= 10 else 0)
    assert ignoring > 0


def on_ranks(folder):
    evaluator = Retrieval(folder, max_passages=100)
    return evaluator(HashEncoder(8), dims=(4,))


def test_ranks_share_the_queries(tmp_path):
    write_beir(tmp_path, queries=9)
    assert ranks.call(on_ranks, str(tmp_path), world_size=2) == [on_ranks(str(tmp_path))] * 2


@pytest.mark.parametrize("chunk", [1, 3, 7, 40, 100])
def test_top_k_is_exact_with_ties_in_any_chunks(chunk):
    random = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (11, 4), generator=random).float()
    passages = torch.randint(-1, 2, (60, 4), generator=random).float()
    top = TopK(11, 9)
    for first in range(0, 60, chunk):
        add_dot_products(top, queries, passages[first : first + chunk], first)
    scores = (queries @ passages.T).tolist()
    expected = [sorted(range(60), key=lambda number: (-row[number], number))[:9] for row in scores]
    assert top.numbers.tolist() == expected
    assert top.scores.tolist() == [
        [row[number] for number in order] for row, order in zip(scores, expected, strict=True)
    ]


def test_fewer_passages_than_k():
    top = TopK(2, 5)
    add_dot_products(top, torch.eye(2), torch.eye(2), 0)
    assert top.numbers.tolist() == [[0, 1, -1, -1, -1], [1, 0, -1, -1, -1]]
    values, columns = best_columns(torch.tensor([[1.0, 2.0]]), 2)
    assert columns.tolist() == [[1, 0]] and values.tolist() == [[2, 1]]


def test_products_are_full_precision():
    """A training run may have allowed bfloat16 in float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        seen = []
        with top_k.full_precision():
            seen.append(torch.get_float32_matmul_precision())
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_diverged_model_gives_nan(tmp_path):
    class Broken(HashEncoder):
        def encode(self, texts, prompt=""):
            vectors = super().encode(texts)
            vectors[0, 0] = np.nan if prompt == "passage" else vectors[0, 0]
            return vectors

    write_beir(tmp_path)
    assert all(math.isnan(value) for value in Retrieval(str(tmp_path))(Broken()).values())


def test_what_cannot_be_evaluated(tmp_path):
    def code_of(*args, **settings):
        with pytest.raises(UserError) as error:
            Retrieval(*args, **settings)(HashEncoder())
        return error.value.code

    assert code_of() == "path_or_data"
    assert code_of("x", max_queries=0) == "out_of_range"
    assert code_of(data=[]) == "no_examples"
    assert code_of(data=[pair("a")]) == "not_pairs"
    scored = tmp_path / "scored.csv"
    scored.write_text("sentence1,sentence2,score\na,b,0.1\n")
    assert code_of(data=scored_pairs(str(scored))) == "not_pairs"
    write_beir(tmp_path)
    folder = str(tmp_path)
    assert code_of(folder, split="dev") == "no_such_split"
    labels = tmp_path / "qrels" / "test.tsv"
    good = labels.read_text()
    labels.write_text(good + "q1\td999999\t1\n")
    assert code_of(folder) == "unknown_passage"
    labels.write_text(good + "nobody\td1\t1\n")
    assert code_of(folder) == "unknown_query"
    labels.write_text(good + "q1 d1\n")
    assert code_of(folder) == "bad_record"
    labels.write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    assert code_of(folder) == "no_examples"
    labels.write_text(good)
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "x"}\n')
    assert code_of(folder) == "bad_record"
    (tmp_path / "corpus.jsonl").unlink()
    assert code_of(folder) == "no_such_file"
