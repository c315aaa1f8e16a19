"""A recipe on a device that is neither a CPU nor CUDA: what can be tested of `mps` without a Mac."""

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


def test_a_recipe_trains_evaluates_samples_saves_and_resumes(tmp_path, monkeypatch):
    if not hasattr(backend, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} has no backends in Python")
    monkeypatch.chdir(tmp_path)
    words = "cat dog fox owl".split()
    texts = [f"the {a} sees the {b} and the {c}" for a in words for b in words for c in words[:2]]
    Path("texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    Path("config.yaml").write_text(SETTINGS)
    (out,) = ranks.run(SCRIPT, 1, "causal_pretrain", "config.yaml")
    assert "resuming from run/checkpoints/step-00000001" in out
