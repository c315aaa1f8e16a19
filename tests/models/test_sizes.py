import importlib
import inspect
import pkgutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import torchrecipes
from torchrecipes import models
from torchrecipes.cli.ls import models_table
from torchrecipes.errors import UserError


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("neobert base", {}, 221_665_536),
        ("neobert base", {"tie_word_embeddings": False}, 245_106_432),
        ("neobert base", {"vocab_size": 32_000}, 222_800_640),
        ("neobert 100m", {}, 109_529_856),
        ("neobert tiny", {}, 1_444_480),
        ("bert base", {}, 109_514_298),
        ("bert small", {}, 28_795_194),
        ("bert mini", {}, 11_201_594),
        ("bert tiny", {}, 4_416_698),
        ("bert large", {}, 335_174_458),
        ("bert minilm-l6", {}, 22_744_506),
        ("modernbert base", {}, 149_655_232),
        ("modernbert large", {}, 395_881_664),
        ("modernbert tiny", {}, 1_631_488),
        ("roberta base", {}, 124_697_433),
        ("roberta large", {}, 355_412_057),
        ("roberta xlm-base", {}, 278_295_186),
        ("roberta xlm-large", {}, 560_142_482),
        ("roberta tiny", {}, 1_536_256),
        ("distilbert base", {}, 66_985_530),
        ("distilbert tiny", {}, 4_416_442),
        ("domain_bert base", {}, 86_801_260),
        ("domain_bert tiny", {}, 551_660),
        ("mistral 7b", {}, 7_241_732_096),
        ("mistral tiny", {}, 1_411_712),
        ("qwen2 0.5b", {}, 494_032_768),
        ("qwen2 1.5b", {}, 1_543_714_304),
        ("qwen2 tiny", {}, 1_412_224),
        ("gpt2 small", {}, 124_439_808),
        ("gpt2 medium", {}, 354_823_168),
        ("gpt2 large", {}, 774_030_080),
        ("gpt2 xl", {}, 1_557_611_200),
        ("gpt2 tiny", {}, 1_510_912),
        ("gpt2 750m", {}, 759_656_064),
        ("gpt2 750m", {"tie_word_embeddings": True}, 695_266_944),
        ("gpt2 750m", {"lm_head_bias": False}, 759_605_760),
        ("llama 700m", {}, 698_911_104),
        ("llama 700m", {"lm_head_bias": False}, 698_860_800),
        ("llama 7b", {"vocab_size": 32_000}, 6_738_415_616),
        ("llama tiny", {}, 1_411_712),
        ("qwen3 0.6b", {}, 596_049_920),
        ("qwen3 0.6b", {"tie_word_embeddings": False}, 751_632_384),
        ("qwen3 tiny", {}, 1_411_840),
    ],
)
def test_named_sizes(name, arguments, parameters):
    family, size = name.split()
    with torch.device("meta"):
        model = getattr(models, family)(size, **arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.config.vocab_size == model.head.weight.shape[0]


def test_the_documented_table_is_what_ls_prints():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert models_table() in page


def test_unknown_sizes_and_keys_are_refused():
    with pytest.raises(UserError) as error:
        models.neobert("huge")
    assert (error.value.code, error.value.key) == ("unknown_size", "size")
    with pytest.raises(TypeError):
        models.neobert("tiny", hidden=3)
    with pytest.raises(TypeError):
        models.neobert("tiny", 64)


def test_help_shows_the_defaults_and_what_each_key_means():
    for builder in models.FAMILY_BUILDERS:
        with torch.device("meta"):
            model = builder()
        for name, parameter in list(inspect.signature(builder).parameters.items())[1:-1]:
            assert f"\n    {name}: " in builder.__doc__, (builder, name)
            value = getattr(model.config, name)
            assert value == parameter.default or parameter.default is None, (builder, name)


def test_builders_pass_every_argument_on():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    neobert = {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 99, "rope_theta": 7.0}
    neobert |= {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "lm_head_bias": True}
    neobert |= {"head_dim": 6, "rms_norm_eps": 0.5, "tie_word_embeddings": False, "initializer_range": 0.3}
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
    modernbert = {"intermediate_size": 24, "max_position_embeddings": 99, "global_attn_every_n_layers": 2}
    modernbert |= {"local_attention": 6, "rope_theta": 7.0, "local_rope_theta": 5.0, "norm_eps": 0.5, "norm_bias": True}
    modernbert |= {"attention_bias": True, "mlp_bias": True, "classifier_bias": True, "decoder_bias": False}
    modernbert |= {"tie_word_embeddings": False, "initializer_range": 0.3, "rope_scaling": rope["rope_scaling"]}
    distilbert = {"intermediate_size": 24, "dropout": 0.2, "attention_dropout": 0.3, "max_position_embeddings": 99}
    plain = {key: value for key, value in (common | rope).items() if key != "attention_bias"}
    families += [
        (models.modernbert, modernbert),
        (models.roberta, bert | {"model_type": "xlm-roberta", "pad_token_id": 5}),
        (models.distilbert, distilbert | {"initializer_range": 0.3}),
        (models.mistral, plain | {"sliding_window": 5}),
        (models.qwen2, plain),
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
        assert set(inspect.signature(builder).parameters) - {"seed", "size"} == set(arguments), builder
        model = builder(**arguments, seed=3)
        assert {key: getattr(model.config, key) for key in arguments} == arguments
        again = builder(**arguments, seed=3)
        other = builder(**arguments, seed=4)
        assert torch.equal(model.head.weight, again.head.weight)
        assert not torch.equal(model.head.weight, other.head.weight)
        assert abs(model.head.weight.std().item() - 0.3) < 0.02


@pytest.mark.parametrize("builder", models.FAMILY_BUILDERS)
def test_a_model_that_does_not_fit_the_rows_or_the_tokenizer_is_refused(builder):
    with torch.device("meta"):
        model = builder(next(iter(builder.sizes)), vocab_size=100, max_position_embeddings=32)
    longest = models.max_positions(model)
    assert longest == (30 if builder is models.roberta else 32)
    models.check_tokenizer_compatibility(model, SimpleNamespace(vocab_size=100), longest)
    for vocab_size, seq_len, code in ((101, longest, "vocab_too_large"), (100, longest + 1, "seq_len_too_long")):
        if builder is models.domain_bert and vocab_size == 100:  # its rows hold many names
            models.check_tokenizer_compatibility(model, SimpleNamespace(vocab_size=vocab_size), seq_len)
            continue
        with pytest.raises(UserError) as error:
            models.check_tokenizer_compatibility(model, SimpleNamespace(vocab_size=vocab_size), seq_len)
        assert error.value.code == code
    causal = builder not in (
        models.neobert,
        models.bert,
        models.modernbert,
        models.roberta,
        models.distilbert,
        models.domain_bert,
    )
    models.check_causal(model, causal)
    with pytest.raises(UserError) as error:
        models.check_causal(model, not causal)
    assert error.value.code == "wrong_direction"


def test_a_foreign_module_passes_every_check():
    module = nn.Linear(2, 2)
    models.check_tokenizer_compatibility(module, SimpleNamespace(vocab_size=100), 32)
    for causal in (False, True):
        models.check_causal(module, causal)


def test_no_attribute_hides_a_module_of_its_package():
    hidden = []
    for found in pkgutil.walk_packages(torchrecipes.__path__, "torchrecipes."):
        package, _, name = found.name.rpartition(".")
        importlib.import_module(found.name)
        if not inspect.ismodule(getattr(importlib.import_module(package), name)):
            hidden.append(found.name)
    assert hidden == []


@pytest.mark.parametrize("wrap", [lambda encoder: encoder, models.EmbeddingModel])
def test_positions_that_begin_after_the_padding_need_the_padding_of_the_tokenizer(wrap):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = wrap(models.roberta(vocab_size=100, **sizes, pad_token_id=1))
    models.check_tokenizer_compatibility(model, SimpleNamespace(vocab_size=100, pad_id=1), 32)
    with pytest.raises(UserError) as error:
        models.check_tokenizer_compatibility(model, SimpleNamespace(vocab_size=100, pad_id=0), 32)
    assert (error.value.key, error.value.code) == ("model.pad_token_id", "other_padding")
    bert = wrap(models.bert(vocab_size=100, **sizes))
    models.check_tokenizer_compatibility(bert, SimpleNamespace(vocab_size=100, pad_id=3), 32)
