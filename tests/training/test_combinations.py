"""Every pair of strategy, checkpointing, compile, number formats and family has the gradients of plain fp32."""

import itertools
import json

import pytest

from tests import ranks

SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist
from torchrecipes.error_file import hard_exit
from torchrecipes.distributed.fsdp import init_on_device, parallelize
from torchrecipes.losses import causal_lm_loss
from torchrecipes.models import bert, gpt2, llama, moe, neobert, qwen3_moe
from torchrecipes.training import router_loss
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing
from torchrecipes.training.precision import autocast, set_residual_dtype
from torchrecipes.training.setup import compile_model

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "neobert": lambda: neobert(**SIZES, intermediate_size=64),
    "bert": lambda: bert(**SIZES, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "gpt2": lambda: gpt2(**SIZES, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0),
    "llama": lambda: llama(**SIZES, intermediate_size=64, tie_word_embeddings=False),
    "qwen3_moe": lambda: qwen3_moe(**SIZES, **EXPERTS, head_dim=8),
    "moe": lambda: moe(**SIZES, **EXPERTS),
}

def gradients(model, dtype, ranks, rank):
    ids = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0)).chunk(ranks)[rank]
    with autocast(CPU, dtype):
        loss = causal_lm_loss(model(ids[:, :-1]), model.head, ids[:, 1:])
    (loss * (ranks / 64)).backward()
    parts = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in parts.items()}

dist.init_process_group("gloo")
errors = []
for strategy, mode, compiled, (precision, residual), family in json.loads(sys.argv[1]):
    if strategy == "none" and dist.get_rank():
        continue
    dtype = getattr(torch, precision)
    torch.compiler.reset()
    with torch.device("meta"):
        model = FAMILIES[family]().train()
    set_residual_dtype(model, residual, dtype)
    apply_activation_checkpointing(model, mode)
    if compiled:
        compile_model(model, torch.device("cuda"), backend="aot_eager")  # the embedding, too
    if strategy != "none":
        parallelize(model, strategy, CPU, dtype)
    init_on_device(model, CPU, 1)
    found = gradients(model, dtype, *((1, 0) if strategy == "none" else (2, dist.get_rank())))
    plain = FAMILIES[family]().train()
    plain.init_weights(1)
    expected = gradients(plain, torch.float32, 1, 0)
    assert found.keys() == expected.keys()
    difference = sum((found[n] - expected[n]).square().sum() for n in expected).sqrt()
    errors.append((difference / sum(g.square().sum() for g in expected.values()).sqrt()).item())
print(json.dumps(errors))
dist.barrier()
hard_exit(0)
"""

CHOICES = (
    ("none", "ddp", "fsdp"),
    ("none", "full", "selective"),
    (False, True),
    (("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "bf16")),
    ("neobert", "bert", "gpt2", "llama", "qwen3_moe", "moe"),
)


def pairwise() -> list[tuple]:
    """Cases in which every two choices of different kinds occur together, greedily few."""
    cases = list(itertools.product(*CHOICES))
    missing = {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & set(itertools.combinations(enumerate(case), 2))))
        missing -= set(itertools.combinations(enumerate(best), 2))
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("family", CHOICES[-1])
def test_gradients_of_every_pair_of_choices(tmp_path, family):
    cases = [case for case in pairwise() if case[-1] == family]
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    out = ranks.run(tmp_path / "script.py", 2, json.dumps(cases))[0]
    for case, error in zip(cases, json.loads(out.splitlines()[-1]), strict=True):
        assert error < (1e-4 if case[3][0] == "float32" else 0.03), case
