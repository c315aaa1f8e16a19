import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models import gpt2, llama, qwen3
from torchrecipes.modules import SwiGLU
from torchrecipes.modules.moe import MoE
from torchrecipes.optim import adamw, cosine, describe_param_groups, muon
from torchrecipes.optim.newton_schulz import orthogonalize
from torchrecipes.training.guard import Guard, _skips_on_device


def names(optimizer):
    return [(group["kind"], set(group["param_names"])) for group in optimizer.param_groups]


def give_gradients(*models, seed):
    """The same random gradients to models alike."""
    torch.manual_seed(seed)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        gradient = torch.randn_like(parameters[0])
        for parameter in parameters:
            parameter.grad = gradient.clone()


@pytest.mark.parametrize("scale, theirs", [("spectral", "original"), ("match_rms_adamw", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_are_updated_as_by_torch(scale, theirs, nesterov):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((48, 48), (64, 32), (64, 32), (32, 64))))
    reference = copy.deepcopy(model)
    settings = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 4}
    ours = muon(model, **settings, ns_coefficients="quintic", scale=scale, ns_dtype="bf16")
    torchs = torch.optim.Muon(reference.parameters(), **settings, adjust_lr_fn=theirs)
    for step in range(5):
        give_gradients(model, reference, seed=step)
        ours.step()
        torchs.step()
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        # Products in bf16, ours in batches: where kernels add up in another order there is its rounding.
        torch.testing.assert_close(parameter, expected, rtol=0, atol=2e-3 * (1 if scale == "spectral" else 2))


def test_what_is_no_hidden_matrix_is_updated_as_by_adamw():
    torch.manual_seed(0)
    model = llama(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=False,
    )
    reference = copy.deepcopy(model)
    optimizer = muon(model, adamw_lr=3e-2, adamw_betas=(0.8, 0.9), adamw_eps=1e-6, adamw_weight_decay=0.2)
    expected = adamw(reference, lr=3e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    for step in range(3):
        give_gradients(model, reference, seed=step)
        optimizer.step()
        expected.step()
    others = {"embedding.weight", "norm.weight", "head.decoder.weight"}
    others |= {f"blocks.0.{name}_layernorm.weight" for name in ("input", "post_attention")}
    theirs = dict(reference.named_parameters())
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, theirs[name])}
    assert same == others


def test_what_goes_where():
    model = llama(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=False,
    )
    block = "blocks.0."
    assert names(muon(model)) == [
        ("muon", {f"{block}self_attn.{n}_proj.weight" for n in ("qkv", "o")}
         | {f"{block}mlp.{n}_proj.weight" for n in ("gate_up", "down")}),
        ("adamw", {"head.decoder.weight"}),
        ("adamw", {"embedding.weight", "norm.weight", f"{block}input_layernorm.weight",
                   f"{block}post_attention_layernorm.weight"}),
    ]  # fmt: skip
    tied = llama(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=True,
    )
    assert [kind for kind, _ in names(muon(tied))] == ["muon", "adamw"]

    mixture = MoE(16, 8, 4, 2, router="mlp", shared_intermediate_size=8)
    (_, hidden), (_, router) = names(muon(mixture))
    assert router == {"gate.weight", "gate.proj.weight"} and "experts.gate_up_proj" in hidden

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1d, self.conv2d = nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3)  # of 3 and 4 dimensions
            self.four = nn.Parameter(torch.zeros(2, 2, 2, 2))
            self.linear, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
            self.chosen, self.output = nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self):
            return self.output

    (_, hidden), (_, decayed), (_, others) = names(muon(Odd(), adamw_param_patterns=["chosen.*"]))
    assert hidden == {"linear.weight"}
    assert decayed == {"conv1d.weight", "conv2d.weight", "four", "chosen.weight", "output.weight"}
    assert others == {"conv1d.bias", "conv2d.bias", "linear.bias", "chosen.bias", "output.bias"}


BLOCK = {
    "gpt2": {"input_layernorm.bias", "post_attention_layernorm.bias", "self_attn.qkv_proj.bias",
             "self_attn.o_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"},
    "qwen3": {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [gpt2, qwen3])
def test_what_goes_where_in_other_families(family, tied):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    groups = names(muon(family(vocab_size=31, **sizes, tie_word_embeddings=tied)))
    assert [kind for kind, _ in groups] == ["muon", "adamw"] if tied else ["muon", "adamw", "adamw"]
    up = "up" if family is gpt2 else "gate_up"
    matrices = {"self_attn.qkv_proj.weight", "self_attn.o_proj.weight", f"mlp.{up}_proj.weight", "mlp.down_proj.weight"}
    assert groups[0][1] == {f"blocks.{i}.{name}" for i in range(2) for name in matrices}
    if not tied:
        assert groups[1][1] == {"head.decoder.weight"}
    others = {"input_layernorm.weight", "post_attention_layernorm.weight"} | BLOCK[family.__name__]
    others = {f"blocks.{i}.{name}" for i in range(2) for name in others} | {"embedding.weight", "norm.weight"}
    others |= {"norm.bias", "position_embedding.weight"} if family is gpt2 else set()
    assert groups[-1][1] == others


def test_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        tie_word_embeddings=False,
    )
    model = transformers.GPTNeoXForCausalLM(config)
    optimizer = muon(model)
    (_, hidden), *others = names(optimizer)
    assert hidden and all("layers.0" in name and name.endswith("weight") for name in hidden)
    assert {"lm_head.weight", "gpt_neox.embed_in.weight"} <= set().union(*(found for _, found in others))
    give_gradients(model, seed=0)
    optimizer.step()


def test_fused_matrices_are_made_orthogonal_part_by_part():
    torch.manual_seed(0)
    model = llama(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
    )
    optimizer = muon(model, lr=1.0, weight_decay=0.0, momentum=0.0, ns_dtype="fp32")
    before = copy.deepcopy(model.state_dict())
    give_gradients(model, seed=1)
    optimizer.step()
    for name, rows in (("self_attn.qkv_proj", (16, 8, 8)), ("mlp.gate_up_proj", (24, 24)), ("mlp.down_proj", (16,))):
        parameter = model.get_parameter(f"blocks.0.{name}.weight")
        change = before[f"blocks.0.{name}.weight"] - parameter
        for part, gradient in zip(change.split(rows), parameter.grad.split(rows), strict=True):
            expected = orthogonalize(gradient, dtype=torch.float32) * math.sqrt(max(1, part.shape[0] / part.shape[1]))
            torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-4)


def test_experts_are_made_orthogonal_one_by_one():
    mixture = MoE(16, 8, 3, 2)
    optimizer = muon(mixture, lr=1.0, weight_decay=0.0, scale="match_rms_adamw", ns_dtype="fp32")
    before = copy.deepcopy(mixture.state_dict())
    give_gradients(mixture, seed=1)
    optimizer.step()
    for name, parts in (("gate_up_proj", 2), ("down_proj", 1)):
        parameter = mixture.experts.get_parameter(name)
        for expert in range(3):
            change = (before[f"experts.{name}"] - parameter)[expert].chunk(parts)
            for part, gradient in zip(change, parameter.grad[expert].chunk(parts), strict=True):
                expected = orthogonalize(gradient, dtype=torch.float32) * 0.2 * math.sqrt(16)
                torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-4)


def test_scales():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False))
    for scale, expected in (("spectral", (2.0, 1.0)), ("match_rms_adamw", (0.2 * 8, 0.2 * 8))):
        one = copy.deepcopy(model)
        optimizer = muon(one, lr=1.0, weight_decay=0.0, scale=scale, ns_steps=9, ns_dtype="fp32")
        give_gradients(one, seed=1)
        optimizer.step()
        for parameter, before, norm in zip(one.parameters(), model.parameters(), expected, strict=True):
            change = parameter.detach() - before.detach()
            assert torch.linalg.matrix_norm(change, 2).item() == pytest.approx(norm, rel=1e-2)
            if scale == "match_rms_adamw":  # the size of AdamW's updates
                assert change.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-2)


def test_each_group_keeps_its_own_rate_under_a_schedule():
    model = llama(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False)
    optimizer = muon(model, lr=0.02, adamw_lr=3e-3, weight_decay=0.1)
    cosine(optimizer, 10, warmup_steps=2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 1.5e-3, 1.5e-3])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    table = describe_param_groups(optimizer)
    assert "group 1: muon, lr 0.02, weight_decay 0.1, 4 tensors" in table
    assert "group 2: adamw, lr 0.003, weight_decay 0.1, 1 tensors" in table


def test_rates_that_are_not_given():
    model = nn.Sequential(nn.Linear(3, 3))
    assert [group["lr"] for group in muon(model, lr=0.03).param_groups] == pytest.approx([0.03, 0.003])
    assert [group["lr"] for group in muon(model, lr=1e-3, scale="match_rms_adamw").param_groups] == [1e-3, 1e-3]


def test_a_state_goes_on_where_it_was():
    def train(model, optimizer, steps):
        for step in steps:
            give_gradients(model, seed=step)
            optimizer.step()
        return model.state_dict()

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Embedding(8, 6), SwiGLU(6, 8))
    first = copy.deepcopy(whole)
    expected = train(whole, muon(whole), range(4))
    optimizer = muon(first)
    train(first, optimizer, range(2))
    second = copy.deepcopy(first)
    resumed = muon(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, value in train(second, resumed, range(2, 4)).items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize(
    ("settings", "waits"),
    [({}, False), ({"qk_clip_tau": 1e-3}, False), ({"qk_clip_tau": 1e-3, "qk_clip_every": 2}, True)],
)
@pytest.mark.parametrize("bad", [[0], [2], [1, 2]])
def test_a_guard_skips_steps_without_waiting_for_the_device(settings, waits, bad):
    def train(steps, guard=None):
        torch.manual_seed(0)
        model = llama(
            vocab_size=31,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            attention_bias=True,
        )
        optimizer = muon(model, weight_decay=0.1, **settings)
        for step in steps:
            model(torch.arange(6)[None])
            give_gradients(model, seed=step)
            if guard is None:
                optimizer.step()
                continue
            if step in bad:
                for parameter in model.parameters():
                    parameter.grad.view(-1)[-1] = math.nan if step % 2 else math.inf
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            guard.step(optimizer, torch.tensor(1.0), norm)
        assert not hasattr(optimizer, "found_inf")
        return model.state_dict() | {
            f"{n} {k}": x for n, s in optimizer.state_dict()["state"].items() for k, x in s.items()
        }

    small = llama(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert _skips_on_device(muon(small, **settings)) is not waits
    expected = train(step for step in range(4) if step not in bad)
    for name, value in train(range(4), Guard()).items():
        assert torch.equal(value, expected[name]), name


def test_gradients_stay_and_what_has_none_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    optimizer = muon(model)
    model[0].weight.grad = torch.randn(4, 4)
    gradient = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[0].weight.grad, gradient)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight"} and len(optimizer.state) == 1


def test_wrong_values_are_all_named():
    with pytest.raises(UserError) as error:
        muon(
            nn.Linear(3, 3),
            lr=-1.0,
            momentum=1.0,
            weight_decay=math.nan,
            ns_steps=0,
            ns_coefficients="cubic",
            scale="none",
            adamw_lr=math.inf,
            adamw_betas=(0.9,),
            adamw_param_patterns=["nothing.*"],
            ns_dtype="fp8",
        )
    keys = [problem.key for problem in error.value.problems]
    numbers = ["lr", "weight_decay", "adamw_lr", "adamw_weight_decay", "momentum", "adamw_betas", "ns_steps"]
    assert sorted(keys) == sorted([*numbers, "ns_coefficients", "scale", "ns_dtype", "adamw_param_patterns"])
    assert {problem.code for problem in error.value.problems} == {"out_of_range", "unknown_name", "matches_nothing"}


def test_nothing_to_train():
    with pytest.raises(UserError) as error:
        muon(nn.Linear(3, 3).requires_grad_(False))
    assert error.value.code == "nothing_to_train"


def test_transposed_weights_are_refused_or_left_to_adamw():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(UserError) as error:
        muon(model)
    assert error.value.code == "transposed_weights" and "c_attn" in str(error.value)
    optimizer = muon(model, adamw_param_patterns=["*.c_*.weight"])
    assert {kind for kind, _ in names(optimizer)} == {"adamw"}


def test_the_page_shows_the_groups_of_its_example():
    page = (Path(__file__).parents[2] / "docs/optimizers.md").read_text(encoding="utf-8")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = llama(vocab_size=1024, **sizes, tie_word_embeddings=False)
    table = describe_param_groups(muon(model, lr=0.02, adamw_lr=3e-3, weight_decay=0.1))
    assert re.search(r"^```text\n(.*?)\n```", page, re.MULTILINE | re.DOTALL)[1] == table
