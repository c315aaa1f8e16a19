"""Models with mixtures of experts: their sizes, their folders, and what a checkpoint keeps of them."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import ranks
from torchrecipes import models
from torchrecipes.errors import UserError
from torchrecipes.models import active_parameters, load_hf, moe, olmoe, qwen3_moe, save_hf
from torchrecipes.models.hub import meta_model_from_hf
from torchrecipes.modules import MoEBlock

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
FREE = SIZES | {
    "moe_intermediate_size": 24,
    "router": "mlp",
    "scoring_func": "sigmoid",
    "router_bias": True,
    "shared_expert_intermediate_size": 8,
}


def on_meta(builder, *args, **keys):
    with torch.device("meta"):
        return builder(*args, **keys)


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        ("qwen3_moe tiny", 1_936_128, 1_346_304),
        ("olmoe tiny", 3_017_856, 2_428_032),
        ("moe 500m", 503_507_200, 277_014_784),
        ("qwen3_moe 1b", 1_021_235_200, 228_511_744),
        ("qwen3_moe 1.5b", 1_481_015_552, 324_960_512),
    ],
)
def test_named_sizes(name, parameters, active):
    family, size = name.split()
    model = on_meta(getattr(models, family), size)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert active_parameters(model) == active


def test_published_sizes():
    """OLMoE-1B-7B and Qwen3-30B-A3B, as their papers count them."""
    model = on_meta(olmoe)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_919_161_856
    assert round(active_parameters(model) / 1e9, 1) == 1.3
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    sizes |= {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False}
    model = on_meta(qwen3_moe, vocab_size=151_936, **sizes)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1) == 30.5
    assert round(active_parameters(model) / 1e9, 1) == 3.4  # the paper's 3.3 is this rounded down


def test_500m_by_its_definition():
    width, experts, inner, vocabulary = 768, 8, 1024, 50_257
    attention = width * (12 + 3 + 3) * 64 + width * width
    expert = 3 * width * inner
    router = 128 * width + 128 * experts
    dense = 3 * width * 2048
    rest = 32 * (attention + 2 * width) + 16 * (dense + router) + 2 * vocabulary * width + width
    assert rest + 16 * experts * expert == 503_507_200
    assert rest + 16 * 2 * expert == 277_014_784
    blocks = on_meta(moe, "500m").blocks
    assert [isinstance(block, MoEBlock) for block in blocks] == [False, True] * 16
    assert active_parameters(blocks) == 277_014_784 - 2 * vocabulary * width - width


def test_active_parameters_of_a_dense_model_are_all():
    model = on_meta(models.qwen3, "tiny")
    assert active_parameters(model) == sum(parameter.numel() for parameter in model.parameters())


def test_the_shared_expert_and_the_router_are_active():
    with_all = on_meta(moe, **(FREE | {"num_experts_per_tok": 4}))
    assert active_parameters(with_all) == sum(parameter.numel() for parameter in with_all.parameters())
    assert active_parameters(with_all) - active_parameters(on_meta(moe, **FREE)) == 2 * 2 * 3 * 16 * 24


def test_which_layers_have_experts():
    for changes, expected in (
        ({"decoder_sparse_step": 2}, "-e-e-e"),
        ({"decoder_sparse_step": 3}, "--e--e"),
        ({"mlp_only_layers": (0, 4)}, "-eee-e"),
        ({"decoder_sparse_step": 2, "mlp_only_layers": (3,)}, "-e---e"),
    ):
        model = on_meta(qwen3_moe, **(SIZES | {"num_hidden_layers": 6} | changes))
        assert "".join("e" if isinstance(block, MoEBlock) else "-" for block in model.blocks) == expected


def test_routing_and_its_loss_are_those_of_the_last_forward_pass():
    model = qwen3_moe(
        **SIZES, mlp_only_layers=[0], moe_intermediate_size=24, router_aux_loss_coef=0.5, router_z_loss_coef=0.25
    )
    ids = torch.arange(24).view(2, 12)
    model(ids[:, :5])
    model(ids)
    assert model.routing.tokens_per_expert.shape == (1, 4)
    assert model.routing.tokens_per_expert.sum() == 2 * 24
    expected = 24 * (0.5 * model.routing.aux_loss.mean() + 0.25 * model.routing.z_loss.mean())
    assert model.router_loss.item() == pytest.approx(expected.item())
    assert model.router_loss.requires_grad and not model.routing.aux_loss.requires_grad
    dense = qwen3_moe(**SIZES, mlp_only_layers=[0, 1])
    dense(ids)
    assert dense.routing is None and dense.router_loss == 0.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: 5"),
        ({"moe_intermediate_size": 20}, "moe_intermediate_size: 20"),
        ({"hidden_size": 12}, "hidden_size: 12"),
        ({"mlp_only_layers": [0, 2]}, "mlp_only_layers: [0, 2]"),
        ({"mlp_only_layers": (-1,)}, "mlp_only_layers: [-1]"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef: -0.1"),
        ({"router_z_loss_coef": math.nan}, "router_z_loss_coef: nan"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, named):
    with pytest.raises(UserError) as error:
        on_meta(qwen3_moe, **(SIZES | changes))
    assert error.value.code == "bad_size" and named in str(error.value)


# Folders.


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_keys_of_ours_are_written_where_they_say_something(tmp_path):
    for builder in (qwen3_moe, olmoe):
        for coefficient in (0.0, 0.5):
            model = builder(**SIZES, router_z_loss_coef=coefficient)
            save_hf(model, tmp_path)
            assert config_of(tmp_path).get("router_z_loss_coef", 0.0) == coefficient
            assert ("router_z_loss_coef" in config_of(tmp_path)) == bool(coefficient)
            assert load_hf(tmp_path, report=pytest.fail).config == model.config


def test_a_free_mixture_comes_back_whole_and_transformers_refuses_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = moe(**FREE, qk_norm=False, mlp_only_layers=[0], tie_word_embeddings=False).eval()
    model.blocks[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.5, -0.5, 0.25, -0.25]))
    save_hf(model, tmp_path)
    again = load_hf(tmp_path, report=pytest.fail).eval()
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(again(ids), model(ids))
    with pytest.raises(ValueError, match="torchrecipes_moe"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


COMMON = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02}
COMMON |= {"hidden_size": 2048, "num_experts_per_tok": 8, "output_router_logits": False, "rope_scaling": None}
COMMON |= {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True}
PUBLISHED = {
    "qwen3_moe": COMMON
    | {"decoder_sparse_step": 1, "head_dim": 128, "intermediate_size": 6144, "max_position_embeddings": 40_960}
    | {"max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True}
    | {"num_attention_heads": 32, "num_experts": 128, "num_hidden_layers": 48, "num_key_value_heads": 4}
    | {"rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "router_aux_loss_coef": 0.001, "sliding_window": None}
    | {"use_sliding_window": False, "vocab_size": 151_936, "bos_token_id": 151_643, "eos_token_id": 151_645},
    "olmoe": COMMON
    | {"clip_qkv": None, "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False}
    | {"num_attention_heads": 16, "num_experts": 64, "num_hidden_layers": 16, "num_key_value_heads": 16}
    | {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "router_aux_loss_coef": 0.01, "vocab_size": 50_304}
    | {"pad_token_id": 1, "eos_token_id": 50_279},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_configs_are_understood(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[family] | {"model_type": family}))
    config = meta_model_from_hf(tmp_path).config
    for key in set(PUBLISHED[family]) & set(vars(config)):
        value = getattr(config, key)
        assert (list(value) if isinstance(value, tuple) else value) == PUBLISHED[family][key], key


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"mlp_only_layers": 5}, "mlp_only_layers"),
        ({"mlp_only_layers": [0.5]}, "mlp_only_layers"),
        ({"num_local_experts": 3}, "model.layers.0.mlp.gate.weight"),
    ],
)
def test_keys_that_cannot_be_followed_are_refused(tmp_path, changes, key):
    save_hf(qwen3_moe(**SIZES), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path) | changes))
    with pytest.raises(UserError) as error:
        load_hf(tmp_path)
    assert key in [problem.key for problem in error.value.problems]


def test_keys_that_say_nothing_about_the_network_are_skipped(tmp_path):
    save_hf(qwen3_moe(**SIZES), tmp_path)
    changes = {"output_router_logits": True, "mlp_only_layers": None, "sliding_window": None, "max_window_layers": 28}
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path) | changes))
    load_hf(tmp_path, report=pytest.fail)


OF_EXPERTS = "model.layers.0.mlp.experts."


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"2.up_proj.weight": None}, "2.up_proj.weight"),
        ({"2.up_proj.weight": (8, 16)}, "2.up_proj.weight"),
        ({"1.down_proj.weight": (8, 16)}, "1.down_proj.weight"),
        ({"99999999999.gate_proj.weight": (24, 16)}, "4.gate_proj.weight"),
        ({"gate_up_proj": (4, 48, 16)}, "layers.0.mlp.experts"),
        ({f"3.{kind}_proj.weight": None for kind in ("gate", "up", "down")}, "(3, 48, 16)"),
    ],
)
def test_experts_that_do_not_make_a_stack_are_told(tmp_path, change, named):
    model = qwen3_moe(**SIZES, moe_intermediate_size=24)
    save_hf(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        for number, gate_up in enumerate(tensors.pop(f"{prefix}gate_up_proj")):
            for kind, tensor in zip(("gate", "up"), gate_up.chunk(2), strict=True):
                tensors[f"{prefix}{number}.{kind}_proj.weight"] = tensor.clone()
        for number, down in enumerate(tensors.pop(f"{prefix}down_proj")):
            tensors[f"{prefix}{number}.down_proj.weight"] = down.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    whole = load_hf(tmp_path, report=pytest.fail).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    for name, shape in change.items():
        if shape is None:
            del tensors[OF_EXPERTS + name]
        else:
            tensors[OF_EXPERTS + name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_hf(tmp_path)
    assert error.value.code == "weights_mismatch"
    assert str(tmp_path) in str(error.value) and named in str(error.value)


# Checkpoints: the biases of routers are no parameters, and are kept all the same.

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, ROOT)
import torch
from tests.models.test_moe_families import FREE
import torch.distributed as dist
from torchrecipes.models import moe
from torchrecipes.optim import adamw
from torchrecipes.distributed import collectives
from torchrecipes.error_file import hard_exit
from torchrecipes.checkpoint import Checkpointer
from torchrecipes.training.expert_load_balancing import ExpertBalance
from torchrecipes.distributed.fsdp import init_on_device, parallelize

what, folder, strategy = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()

with torch.device("meta"):
    model = moe(**(FREE | {"vocab_size": 62, "router_aux_loss_coef": 0.0}))
parallelize(model, strategy, torch.device("cpu"), torch.float32)
init_on_device(model, torch.device("cpu"), seed=3 if what == "save" else 9)
optimizer = adamw(model, lr=1e-2)
balance = ExpertBalance(model, update_rate=0.125)

def train(steps):
    for step in steps:
        ids = torch.arange(step, step + 48).view(4, 12) % 60
        ids = ids.chunk(world_size)[rank]  # both ranks and one process see the same tokens
        loss = model.head(model(ids)).square().sum() + model.router_loss
        (loss * world_size / 4000).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.add(model)
        balance.step()

def show(what):
    biases = [block.mlp.gate.e_score_correction_bias.tolist() for block in model.blocks]
    assert collectives.all_gather_object(biases) == [biases] * world_size
    full = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    print(biases, [round(full(tensor).double().abs().sum().item(), 3) for tensor in model.parameters()])

with Checkpointer(folder, model=model, optimizer=optimizer) as checkpointer:
    if what == "save":
        train(range(3))
        checkpointer.save(3)
        show("saved")
        train(range(3, 5))  # while it is written
    else:
        assert checkpointer.resume() == 3
        show("loaded")
        train(range(3, 5))
    show("after two steps more")
hard_exit(0)
""".replace("ROOT", repr(str(Path(__file__).parents[2])))


def test_the_biases_of_routers_are_resumed_by_any_number_of_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(world_size, *args):
        return [line for line in ranks.run(script, world_size, *args)[0].splitlines() if line.startswith("[[")]

    saved = run(2, "save", tmp_path / "run", "fsdp")
    assert all(abs(value) > 0.01 for row in json.loads(saved[0].split("] [")[0] + "]") for value in row)
    assert saved[0] != saved[1]
    assert run(2, "load", tmp_path / "run", "fsdp") == saved
    alone = run(1, "load", tmp_path / "run", "none")
    assert alone[0] == saved[0]
    assert alone[1].split("]]")[0] == saved[1].split("]]")[0]
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    model = load_hf(folder, report=pytest.fail)
    assert str([block.mlp.gate.e_score_correction_bias.tolist() for block in model.blocks]) in saved[0]
