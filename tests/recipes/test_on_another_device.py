"""Recipes on a device that is neither a CPU nor CUDA: what can be tested of `mps` without a Mac."""

import json
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration as backend

from tests import ranks

SCRIPT = Path(ranks.__file__).with_name("fake_gpu.py")
SETTINGS = """
max_steps: 2
seq_len: 32
global_batch_size: 4
micro_batch_size: 2
eval_every: 1
log: {log_every: 1}
checkpoint: {save_every: 1, keep_last: 4}
"""
CAUSAL = """
tokenizer: {_component_: torchrecipes.data.tokenizers.train_bpe, vocab_size: 300}
data:
  source: {_component_: torchrecipes.data.sources.files, path: texts.jsonl}
  validation_fraction: 0.1
  tokenizer_threads: 0
model:
  _component_: torchrecipes.models.moe
  hidden_size: 16
  num_hidden_layers: 2
  num_attention_heads: 2
  num_key_value_heads: 1
  moe_intermediate_size: 8
  num_experts: 4
  num_experts_per_tok: 2
  max_position_embeddings: 64
sample_every: 2
sample_tokens: 4
"""
CONTRASTIVE = """
tokenizer: {_component_: torchrecipes.data.tokenizers.train_wordpiece, vocab_size: 100}
data:
  source: {_component_: torchrecipes.data.examples.pairs, path: pairs.jsonl}
model:
  _component_: torchrecipes.models.bert
  hidden_size: 16
  num_hidden_layers: 1
  num_attention_heads: 2
  intermediate_size: 16
  max_position_embeddings: 64
evaluators:
  held_out:
    _component_: torchrecipes.evaluation.Retrieval
    data: {_component_: torchrecipes.data.examples.pairs, path: pairs.jsonl}
"""


@pytest.mark.parametrize("recipe, config", [("causal_pretrain", CAUSAL), ("contrastive_finetune", CONTRASTIVE)])
def test_a_recipe_trains_evaluates_saves_and_resumes(tmp_path, monkeypatch, recipe, config):
    if not hasattr(backend, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} has no backends in Python")
    monkeypatch.chdir(tmp_path)
    pairs = [{"query": f"the {a} in the {b}", "positive": f"{b} {a}"} for a in "cat dog fox".split() for b in "abcdef"]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    texts = [json.dumps({"text": f"{a['query']} sees {b['query']}"}) for a in pairs for b in pairs[:3]]
    Path("texts.jsonl").write_text("\n".join(texts))
    Path("config.yaml").write_text(config + SETTINGS)
    (out,) = ranks.run(SCRIPT, 1, recipe, "config.yaml")
    assert "resuming from run/checkpoints/step-00000001" in out
