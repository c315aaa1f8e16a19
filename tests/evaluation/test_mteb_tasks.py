"""`MTEBTasks` with tasks of this file: nothing is downloaded."""

import sys

import numpy as np
import pytest

from tests.evaluation.encoders import HashEncoder
from torchrecipes.errors import UserError
from torchrecipes.evaluation import STS, MTEBTasks, Retrieval


@pytest.fixture(scope="module")
def mteb():
    return pytest.importorskip("mteb")


def metadata(mteb, name, kind, metric):
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name,
        description="A task of a test",
        type=kind,
        dataset={"path": "nowhere/nothing", "revision": "1"},
        eval_langs=["eng-Latn"],
        main_score=metric,
        reference=None,
        category="t2t",
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation="",
    )


RANDOM = np.random.default_rng(0)
SENTENCES = [(f"a {RANDOM.integers(20)}", f"b {RANDOM.integers(20)}", float(RANDOM.integers(6))) for _ in range(50)]
PASSAGES = {f"d{i}": f"passage {i}" for i in range(40)}
QUERIES = {f"q{i}": f"query {i}" for i in range(12)}
RELEVANT = {name: {f"d{number}": 1 for number in RANDOM.choice(40, 3, replace=False)} for name in QUERIES}


@pytest.fixture(scope="module")
def tasks(mteb):
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS

    class LocalSTS(AbsTaskSTS):
        metadata = metadata(mteb, "LocalSTS", "STS", "cosine_spearman")

        def load_data(self, **_):
            first, second, scores = zip(*SENTENCES, strict=True)
            columns = {"sentence1": list(first), "sentence2": list(second), "score": list(scores)}
            self.dataset, self.data_loaded = {"test": Dataset.from_dict(columns)}, True

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = metadata(mteb, "LocalRetrieval", "Retrieval", "ndcg_at_10")

        def load_data(self, **_):
            corpus = [{"id": name, "title": "", "text": text} for name, text in PASSAGES.items()]
            queries = [{"id": name, "text": text} for name, text in QUERIES.items()]
            split = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries)}
            split |= {"relevant_docs": RELEVANT, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return [LocalSTS(), LocalRetrieval()]


def write_beir(folder):
    import json

    (folder / "qrels").mkdir()
    for name, texts in (("corpus", PASSAGES), ("queries", QUERIES)):
        lines = [json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    lines = [f"{query}\t{passage}\t1\n" for query, grades in RELEVANT.items() for passage in grades]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return str(folder)


def test_its_scores_are_those_of_our_evaluators(tasks, tmp_path):
    from types import SimpleNamespace

    encoder = HashEncoder(16, prompts={"query": "q: ", "passage": "p: "})
    results = MTEBTasks(tasks)(encoder, dims=(6,))
    pairs = [SimpleNamespace(texts=(a, b), values=(s,), label=None, source="") for a, b, s in SENTENCES]
    sts, retrieval = STS(pairs)(encoder, dims=(6,)), Retrieval(write_beir(tmp_path))(encoder, dims=(6,))
    for suffix in ("", "_dim6"):
        assert results[f"LocalSTS{suffix}"] == pytest.approx(sts[f"spearman{suffix}"], abs=1e-5)
        assert results[f"LocalRetrieval{suffix}"] == pytest.approx(retrieval[f"ndcg@10{suffix}"], abs=1e-4)
        mean = (results[f"LocalSTS{suffix}"] + results[f"LocalRetrieval{suffix}"]) / 2
        assert results[f"mean{suffix}"] == pytest.approx(mean)
    assert len(results) == 6
    assert {prompt for prompt, _ in encoder.calls} == {"", "query", "passage"}


def test_mteb_evaluates_the_folder_of_a_model(mteb, tasks, tmp_path):
    """`mteb.get_model` knows names of the hub only; a folder comes through SentenceTransformer."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from torchrecipes.data.sources import files
    from torchrecipes.data.tokenizers import train_wordpiece
    from torchrecipes.evaluation import TextEncoder
    from torchrecipes.models import EmbeddingModel, bert, save_hf

    (tmp_path / "texts.txt").write_text("\n".join([*PASSAGES.values(), *QUERIES.values(), "a b 0 1 2 3 4 5 6 7 8 9"]))
    tokenizer = train_wordpiece(files(str(tmp_path / "texts.txt")), vocab_size=150)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = bert(vocab_size=tokenizer.vocab_size, max_position_embeddings=32, initializer_range=0.5, **size)
    model = EmbeddingModel(encoder, prompts={"query": "query 1 ", "passage": "passage "}).eval()
    save_hf(model, tmp_path / "model", tokenizer)
    theirs = mteb.evaluate(
        sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu"),
        tasks,
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )
    ours = MTEBTasks(tasks)(TextEncoder(model, tokenizer))
    for task in theirs.task_results:
        assert ours[task.task_name] == pytest.approx(task.get_score(), abs=1e-4)


def test_what_cannot_be_evaluated(mteb, tasks, monkeypatch):
    with pytest.raises(UserError) as error:
        MTEBTasks(["STSBenchmrk"])
    assert (error.value.key, error.value.code) == ("tasks", "unknown_task") and "STSBenchmark" in str(error.value)
    with pytest.raises(UserError) as error:
        MTEBTasks(tasks)(HashEncoder(4), dims=(5,))
    assert error.value.code == "out_of_range"
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(UserError) as error:
        MTEBTasks(tasks)
    assert error.value.code == "missing_package" and "torchrecipes[mteb]" in error.value.hint
