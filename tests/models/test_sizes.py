import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from torchrecipes import models
from torchrecipes.errors import UserError


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("neobert_base", {}, 221_665_536),
        ("neobert_base", {"tie_word_embeddings": False}, 245_106_432),
        ("neobert_base", {"vocab_size": 32_000}, 222_800_640),
        ("neobert_100m", {}, 109_529_856),
        ("neobert_tiny", {}, 1_444_480),
        ("bert_base", {}, 109_514_298),
        ("bert_small", {}, 28_795_194),
        ("bert_mini", {}, 11_201_594),
        ("bert_tiny", {}, 4_416_698),
        ("gpt2_small", {}, 124_439_808),
        ("gpt2_medium", {}, 354_823_168),
        ("gpt2_large", {}, 774_030_080),
        ("gpt2_xl", {}, 1_557_611_200),
        ("gpt2_tiny", {}, 1_510_912),
        ("gpt_750m", {}, 759_656_064),
        ("gpt_750m", {"tie_word_embeddings": True}, 695_266_944),
        ("gpt_750m", {"lm_head_bias": False}, 759_605_760),
        ("llama_700m", {}, 698_911_104),
        ("llama_700m", {"lm_head_bias": False}, 698_860_800),
        ("llama", {"vocab_size": 32_000}, 6_738_415_616),
        ("llama_tiny", {}, 1_411_712),
        ("qwen3_0_6b", {}, 596_049_920),
        ("qwen3_0_6b", {"tie_word_embeddings": False}, 751_632_384),
        ("qwen3_tiny", {}, 1_411_840),
    ],
)
def test_named_sizes(name, arguments, parameters):
    builder = getattr(models, name)
    with torch.device("meta"):
        model = builder(**arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.config.vocab_size == model.head.weight.shape[0]
    if not arguments:
        assert f"{parameters:,}" in builder.__doc__


def test_the_documented_table_is_what_the_builders_make():
    page = Path(__file__).parents[2] / "docs" / "models.md"
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) x ([\d,]+) \|(.*)\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    mixtures = [(name, others.split("|")) for name, _, _, others in rows if others.count("|") == 2]
    rows = [row for row in rows if row[3].count("|") == 3]
    assert len(rows) >= 10 and len(mixtures) >= 4
    for name, (_, parameters, active) in mixtures:
        with torch.device("meta"):
            model = getattr(models, name)()
        counted = sum(parameter.numel() for parameter in model.parameters()), models.active_parameters(model)
        assert counted == (int(parameters.replace(",", "")), int(active.replace(",", ""))), name
    for name, layers, width, others in rows:
        heads, positions, vocabulary, parameters = (cell.strip() for cell in others.split("|"))
        with torch.device("meta"):
            model = getattr(models, name)()
        config = model.config
        found = [config.num_hidden_layers, config.hidden_size, config.max_position_embeddings, config.vocab_size]
        found.append(sum(parameter.numel() for parameter in model.parameters()))
        told = [int(cell.replace(",", "")) for cell in (layers, width, positions, vocabulary, parameters)]
        assert told == found, name
        attention = model.blocks[0].self_attn
        expected = f"{attention.num_heads}"
        if attention.num_kv_heads != attention.num_heads:
            expected += f", {attention.num_kv_heads}"
        if attention.head_dim * attention.num_heads != config.hidden_size:
            expected += f" of {attention.head_dim}"
        assert heads == expected, name


def test_builders_pass_every_argument_on():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    neobert = {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 99, "rope_theta": 7.0}
    neobert |= {"rms_norm_eps": 0.5, "tie_word_embeddings": False, "initializer_range": 0.3}
    bert = {"intermediate_size": 24, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    bert |= {"max_position_embeddings": 99, "type_vocab_size": 3, "layer_norm_eps": 0.5, "initializer_range": 0.3}
    common = {"intermediate_size": 24, "max_position_embeddings": 99, "tie_word_embeddings": False}
    common |= {"initializer_range": 0.3, "attention_bias": True}
    gpt2 = {"embd_pdrop": 0.2, "attn_pdrop": 0.3, "resid_pdrop": 0.4, "layer_norm_epsilon": 0.5, "lm_head_bias": True}
    rope = {"num_key_value_heads": 1, "head_dim": 6, "rope_theta": 7.0, "rms_norm_eps": 0.5, "attention_dropout": 0.2}
    rope["rope_scaling"] = {"rope_type": "linear", "factor": 3.0}
    families = [
        (models.neobert, neobert),
        (models.bert, bert),
        (models.gpt2, common | gpt2 | {"attention_bias": False}),
    ]
    families += [
        (models.qwen3, common | rope),
        (models.llama, common | rope | {"mlp_bias": True, "lm_head_bias": True}),
    ]
    routers = {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": False}
    routers |= {"router_aux_loss_coef": 0.7, "router_z_loss_coef": 0.6}
    layers = {"moe_intermediate_size": 16, "decoder_sparse_step": 2, "mlp_only_layers": (0,)}
    free = {"router": "mlp", "scoring_func": "sigmoid", "router_bias": True, "qk_norm": False}
    free["shared_expert_intermediate_size"] = 8
    families += [
        (models.qwen3_moe, common | rope | routers | layers),
        (models.moe, common | rope | routers | layers | free),
        (models.olmoe, {key: value for key, value in (common | rope | routers).items() if key != "head_dim"}),
    ]
    for builder, keys in families:
        arguments = sizes | keys
        assert set(inspect.signature(builder).parameters) - {"seed"} == set(arguments), builder
        model = builder(**arguments, seed=3)
        assert {key: getattr(model.config, key) for key in arguments} == arguments
        again = builder(**arguments, seed=3)
        other = builder(**arguments, seed=4)
        assert torch.equal(model.head.weight, again.head.weight)
        assert not torch.equal(model.head.weight, other.head.weight)
        assert abs(model.head.weight.std().item() - 0.3) < 0.02


@pytest.mark.parametrize("family", ["bert", "neobert", "gpt2", "llama", "qwen3", "moe", "olmoe"])
def test_a_model_that_does_not_go_with_rows_or_tokenizer_is_refused(family):
    with torch.device("meta"):
        model = getattr(models, f"{family}_tiny")(vocab_size=100, max_position_embeddings=32)
    models.check_tokenizer_compatibility(model, SimpleNamespace(vocab_size=100), 32)
    with pytest.raises(UserError, match="the tokenizer has 101 tokens and the model 100 rows"):
        models.check_tokenizer_compatibility(model, SimpleNamespace(vocab_size=101), 32)
    with pytest.raises(UserError, match="seq_len=33 is more than the model's max_position_embeddings=32"):
        models.check_tokenizer_compatibility(model, SimpleNamespace(vocab_size=100), 33)
