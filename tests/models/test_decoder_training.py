"""What training asks of a decoder: compiled blocks, recomputed activations, ranks that share it, equal starts."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests import ranks
from torchrecipes.models import gpt2, llama, moe, olmoe, qwen3, qwen3_moe
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.2}
FREE = {"moe_intermediate_size": 24, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 16}
FREE |= {"router": "mlp", "scoring_func": "sigmoid", "router_bias": True}
DENSE = {"gpt2": gpt2, "llama": llama, "qwen3": qwen3}
FAMILIES = DENSE | {
    "qwen3_moe": partial(qwen3_moe, moe_intermediate_size=24, **EXPERTS),
    "olmoe": partial(olmoe, **EXPERTS),
    "moe": partial(moe, **EXPERTS, **FREE),
}

SCRIPT = """
import sys
sys.path.insert(0, ROOT)
import torch
from safetensors.torch import save_file
from tests.models.test_decoder_training import FAMILIES, SIZES, loss_of
from torchrecipes.modules import KVCache
from torchrecipes.error_file import hard_exit
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing
from torchrecipes.distributed.fsdp import init_on_device, parallelize, set_grad_sync
from torchrecipes.training.run import Run

folder, family, strategy, mode = sys.argv[1:5]
torch.distributed.init_process_group("gloo")
run = Run(folder, torch.device("cpu"), rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())
with torch.device("meta"):
    model = FAMILIES[family](**SIZES)
apply_activation_checkpointing(model, mode)
parallelize(model, strategy, run.device, torch.float32)
init_on_device(model, run.device, 3)
for row in range(4):
    if row % run.world_size == run.rank:
        set_grad_sync(model, last=row >= 4 - run.world_size)
        ids = (torch.arange(24).view(2, 12) + 7 * row) % 50
        (loss_of(model, ids) * run.world_size / 4).backward()
tensors = {name: parameter.grad.full_tensor().contiguous() for name, parameter in model.named_parameters()}
with torch.no_grad():
    ids = torch.arange(24).view(2, 12)
    attention = model.blocks[0].self_attn
    cache = KVCache(2, 2, 12, attention.num_kv_heads, attention.head_dim)
    pieces = [model(ids[:, :5], cache=cache)]
    pieces += [model(ids[:, i : i + 1], torch.tensor([[i]]), cache=cache) for i in range(5, 12)]
    tensors["hidden"] = torch.cat(pieces, 1)
if run.rank == 0:
    save_file(tensors, f"{folder}/gradients.safetensors")
torch.distributed.barrier()
hard_exit(0)
""".replace("ROOT", repr(str(Path(__file__).parents[2])))


def loss_of(model, ids):
    loss = F.cross_entropy(model.head(model(ids)).flatten(0, 1), (ids.flatten() + 1) % 50)
    return loss + model.router_loss / ids.numel()


def gradients(model, ids):
    model.zero_grad()
    loss_of(model, ids).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "strategy", "mode"),
    [
        ("llama", "fsdp", "selective"),
        ("gpt2", "ddp", "full"),
        ("qwen3", "fsdp", "none"),
        ("qwen3_moe", "fsdp", "selective"),
        ("moe", "fsdp", "full"),
    ],
)
def test_two_ranks_have_the_gradients_of_one_process(tmp_path, family, strategy, mode):
    from safetensors.torch import load_file

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ranks.run(script, 2, tmp_path, family, strategy, mode)
    found = load_file(tmp_path / "gradients.safetensors")
    model = FAMILIES[family](**SIZES, seed=3)
    hidden = found.pop("hidden")
    assert (hidden - model(torch.arange(24).view(2, 12))).abs().max() <= 1e-5
    if family in DENSE:  # grouped products know no float64
        model = model.double()
    for row in range(4):
        (loss_of(model, (torch.arange(24).view(2, 12) + 7 * row) % 50) / 4).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].double(), gradient.double(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_activations_change_no_bit(family, mode, bf16):
    ids = torch.arange(300).view(2, 150) % 50
    arguments = {"resid_pdrop": 0.2, "attn_pdrop": 0.2} if family == "gpt2" else {"attention_dropout": 0.2}
    found = []
    for how in ("none", mode):
        model = FAMILIES[family](**SIZES, **arguments)
        apply_activation_checkpointing(model, how)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found.append(gradients(model, ids))
            model.eval()
            found[-1] |= {f"{name} without dropout": grad for name, grad in gradients(model, ids).items()}
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("family", ["qwen3_moe", "moe"])
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks_of_experts_have_the_same_gradients_on_a_cpu(family, mode):
    torch.compiler.reset()
    model = FAMILIES[family](**SIZES)
    ids = torch.arange(300).view(2, 150) % 50
    expected = gradients(model, ids)
    apply_activation_checkpointing(model, mode)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_blocks_have_the_same_gradients_and_one_graph(family, mode):
    torch.compiler.reset()
    model = FAMILIES[family](**SIZES)
    steps = [(torch.arange(300).view(2, 150) * step) % 50 for step in (1, 2, 3)]
    expected = [gradients(model, ids) for ids in steps]
    apply_activation_checkpointing(model, mode)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids, wanted in zip(steps, expected, strict=True):
            for name, gradient in gradients(model, ids).items():
                torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_into_the_residual_stream_starts_smaller_with_depth(family):
    layers = 8
    sizes = SIZES | {"hidden_size": 64, "num_hidden_layers": layers, "intermediate_size": 128}
    model = FAMILIES[family](**sizes, initializer_range=0.1)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            into = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
            expected = 0.1 / math.sqrt(2 * layers) if into else 0.1
            assert parameter.std().item() == pytest.approx(
                expected, rel=max(0.05, 4 / math.sqrt(2 * parameter.numel()))
            ), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float(not name.endswith("bias")))), name
    again = dict(FAMILIES[family](**sizes, initializer_range=0.1).named_parameters())
    assert all(torch.equal(parameter, again[name]) for name, parameter in model.named_parameters())
