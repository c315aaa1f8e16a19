import re

import pytest
import yaml

from torchrecipes.models import EmbeddingModel, bert, save_hf, write_model_card
from torchrecipes.models.classifier import SequenceClassifier

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def card(folder, model, **arguments):
    save_hf(model, folder)
    text = write_model_card(folder, name="my/model", **arguments).read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_an_embedding_model(tmp_path):
    model = EmbeddingModel(bert(**SIZES), projection=7, prompts={"query": "q: "}, max_length=20, similarity="dot")
    front, body = card(
        tmp_path,
        model,
        base_model="someone/encoder-base",
        training_data=["pairs.jsonl: 5,749 pairs"],
        figures={"before": {"stsb/spearman": 0.5}, "after": {"stsb/spearman": 0.75, "loss": 1.0}},
        settings="seed: 0\nlr: 1e-3\n",
    )
    assert front["library_name"] == "sentence-transformers" and front["pipeline_tag"] == "sentence-similarity"
    assert front["base_model"] == "someone/encoder-base"
    assert not {"language", "license"} & front.keys()
    for part in (
        "20 tokens",
        "7 dimensions",
        "dot product",
        '`query`: "q: "',
        "encode_query",
        "5,749 pairs",
        "lr: 1e-3",
    ):
        assert part in body, part
    assert "| stsb/spearman | 0.5000 | 0.7500 |\n| loss |  | 1.0000 |" in body
    assert [line[3:] for line in body.splitlines() if line.startswith("## ")] == [
        "How to use it",
        "Training data",
        "Figures",
        "Settings",
    ]
    for example in re.findall(r"```python\n(.*?)```", body, re.S):
        compile(example, "card", "exec")


def test_a_path_is_no_base_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "encoder").mkdir(parents=True)
    for path in ("runs/encoder", "/data/encoder", "encoder"):
        front, body = card(tmp_path / "model", EmbeddingModel(bert(**SIZES)), base_model=path)
        assert "base_model" not in front and f"`{path}`" in body
        assert "encode_query" not in body and "## Figures" not in body


@pytest.mark.parametrize(
    ("settings", "tag", "words"),
    [
        ({"label_names": ["neg", "pos"]}, "text-classification", "one label: `neg`, `pos`"),
        ({"label_names": ["a", "b", "c"], "task": "multi_label"}, "text-classification", "any of these labels"),
        ({"num_labels": 1, "task": "regression"}, "text-ranking", "CrossEncoder"),
        ({"num_labels": 2, "task": "regression"}, "text-classification", "2 numbers"),
    ],
)
def test_classifiers(tmp_path, settings, tag, words):
    front, body = card(tmp_path, SequenceClassifier(bert(**SIZES), **settings))
    assert front["pipeline_tag"] == tag and words in body


def test_the_hub_library_reads_the_metadata(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    card(tmp_path, EmbeddingModel(bert(**SIZES)), base_model="someone/encoder-base", figures={"after": {"a": 1.0}})
    data = hub.ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "sentence-transformers" and data.base_model == "someone/encoder-base"
