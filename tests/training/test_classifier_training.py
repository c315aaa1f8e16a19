"""A classifier in what prepares a model for training: sharding, compile, activation checkpointing, checkpoints."""

import json

import pytest
import torch
import torch.nn.functional as F

from tests import ranks
from torchrecipes.checkpoint import CheckpointConfig, Checkpointer
from torchrecipes.models import SequenceClassifier, bert, load_classifier
from torchrecipes.optim import adamw
from torchrecipes.training import set_trainable

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torchrecipes.error_file import hard_exit
from torchrecipes.distributed.fsdp import init_on_device, parallelize
from torchrecipes.models import SequenceClassifier, bert, modernbert, neobert
from torchrecipes.training import set_trainable
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing
from torchrecipes.training.precision import autocast
from torchrecipes.training.setup import compile_model

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
BUILDERS = {"bert": bert, "modernbert": modernbert, "neobert": neobert}
LENGTHS = [9, 4, 17, 6]

def build(family):
    return SequenceClassifier(BUILDERS[family](**SIZES), num_labels=3).train()

def gradients(model, dtype, ranks, rank, features):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(64, (n,), generator=generator) for n in LENGTHS]
    labels = torch.tensor([0, 1, 2, 1])
    mine = range(rank, 4, ranks)
    lengths = torch.tensor([len(texts[i]) for i in mine])
    ends = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    arguments = {
        "input_ids": torch.cat([texts[i] for i in mine])[None],
        "position_ids": torch.cat([torch.arange(len(texts[i])) for i in mine])[None],
        "cu_seqlens": ends,
        "max_seqlen": 128,
    }
    with autocast(CPU, dtype):
        if features:  # in two calls, as from a cache
            with torch.no_grad():
                arguments = {"features": model(**arguments, return_features=True)}
        logits = model(**arguments)
    loss = torch.nn.functional.cross_entropy(logits, labels[list(mine)], reduction="sum")
    (loss * (ranks / 4)).backward()
    parts = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in parts.items()}

dist.init_process_group("gloo")
errors = []
for strategy, mode, compiled, precision, family, trainable in json.loads(sys.argv[1]):
    dtype = getattr(torch, precision)
    torch.compiler.reset()
    with torch.device("meta"):
        model = build(family)
        set_trainable(model, trainable)
    apply_activation_checkpointing(model, mode)
    if compiled:
        compile_model(model, CPU, backend="aot_eager")
    if strategy != "none":
        parallelize(model, strategy, CPU, dtype)
    init_on_device(model, CPU, 1)
    place = (1, 0) if strategy == "none" else (2, dist.get_rank())
    found = gradients(model, dtype, *place, trainable == "classifier")
    plain = build(family)
    plain.init_weights(1)
    expected = gradients(plain, torch.float32, 1, 0, False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained, (found.keys(), trained)
    difference = sum((found[n] - expected[n]).square().sum() for n in found).sqrt()
    errors.append((difference / sum(expected[n].square().sum() for n in found).sqrt()).item())
print(json.dumps(errors))
dist.barrier()
hard_exit(0)
"""
CASES = [
    ("fsdp", "none", False, "float32", "bert", "all"),
    ("fsdp", "none", False, "float32", "modernbert", "last_2"),
    ("ddp", "none", False, "float32", "neobert", "last_3"),
    ("fsdp", "none", False, "float32", "neobert", "classifier"),
    ("ddp", "full", False, "float32", "bert", "classifier"),
    ("fsdp", "full", True, "float32", "bert", "last_2"),
    ("none", "selective", True, "float32", "modernbert", "last_3"),
    ("none", "none", True, "bfloat16", "neobert", "all"),
    ("fsdp", "none", False, "bfloat16", "bert", "last_3"),
]


def test_gradients_of_what_is_trained(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    out = ranks.run(tmp_path / "script.py", 2, json.dumps(CASES))[0]
    for case, error in zip(CASES, json.loads(out.splitlines()[-1]), strict=True):
        assert error < (1e-4 if case[3] == "float32" else 0.03), case


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


@pytest.mark.parametrize("trainable", ["classifier", "last_2", "all"])
def test_a_run_resumes_bit_for_bit(tmp_path, trainable):
    def start():
        torch.manual_seed(0)
        encoder = bert(**SIZES, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        model = SequenceClassifier(encoder, label_names=["a", "b", "c"])
        set_trainable(model, trainable)
        optimizer = adamw(model, lr=1e-2, layer_lr_decay=0.8)
        options = CheckpointConfig(async_save=False)
        return model, optimizer, Checkpointer(tmp_path, options, model=model.train(), optimizer=optimizer)

    def train(model, optimizer, steps):
        for step in steps:
            ids = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(step))
            F.cross_entropy(model(ids), ids[:, 3] % 3).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer, checkpointer = start()
    train(model, optimizer, range(3))
    folder = checkpointer.save(3)
    train(model, optimizer, range(3, 6))
    again, its_optimizer, checkpointer = start()
    assert checkpointer.resume() == 3
    train(again, its_optimizer, range(3, 6))
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    loaded = load_classifier(folder, report=pytest.fail)
    assert loaded.label_names == ("a", "b", "c")
