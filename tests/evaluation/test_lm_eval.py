"""EleutherAI's harness on an exported folder, with a task of our own: no network."""

import json

import pytest

from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_bpe
from torchrecipes.evaluation.text_perplexity import encode_documents, perplexity
from torchrecipes.models import gpt2, save_hf

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

DOCUMENTS = ["the quick brown fox jumps over the lazy dog", "über 水 und Feuer", "a"]
TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
TEXTS = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["fox", "dog"]
doc_to_target: 1
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([Document(" ".join(DOCUMENTS), "a")], vocab_size=300, causal=True)
    model = gpt2(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        seed=1,
    )
    save_hf(model, folder, tokenizer)
    return folder, model, tokenizer


def evaluate(folder, tmp_path, monkeypatch, task, more=""):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (tmp_path / "task.yaml").write_text(TASK.format(file=tmp_path / "data.jsonl") + task)
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32{more}",
        tasks=["local_text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )


def test_its_perplexity_is_ours(folder, tmp_path, monkeypatch):
    folder, model, tokenizer = folder
    found = evaluate(folder, tmp_path, monkeypatch, TEXTS, ",add_bos_token=False")
    ours = perplexity(model, encode_documents(tokenizer, DOCUMENTS))
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(ours.bits_per_byte, rel=1e-5)
    for text, sample in zip(DOCUMENTS, found["samples"]["local_text"], strict=True):
        alone = perplexity(model, encode_documents(tokenizer, [text]))
        assert sample["resps"][0][0] == pytest.approx(-alone.nats, rel=1e-5)


def test_answers_follow_a_question_that_begins_as_a_document(folder, tmp_path, monkeypatch):
    folder, model, tokenizer = folder
    found = evaluate(folder, tmp_path, monkeypatch, CHOICES)
    for text, sample in zip(DOCUMENTS, found["samples"]["local_text"], strict=True):
        question = perplexity(model, encode_documents(tokenizer, [text])).nats
        both = [perplexity(model, encode_documents(tokenizer, [text + end])).nats for end in (" fox", " dog")]
        theirs = [answer[0][0] for answer in sample["resps"]]
        assert theirs == pytest.approx([question - nats for nats in both], rel=1e-4, abs=1e-4)
