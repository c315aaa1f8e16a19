"""The `config.json` of published models: read, and of the size that their pages say."""

import json

import pytest
import torch

from torchrecipes import models

BERT_KEYS = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1}
BERT_KEYS |= {"initializer_range": 0.02, "gradient_checkpointing": False, "position_embedding_type": "absolute"}
MODERNBERT = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "reference_compile": None,
    "sep_token_id": 50282,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0",
    "vocab_size": 50368,
}
ROBERTA = BERT_KEYS | {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "layer_norm_eps": 1e-05}
ROBERTA |= {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
ROBERTA |= {"max_position_embeddings": 514, "pad_token_id": 1, "type_vocab_size": 1, "vocab_size": 50265}
XLM = ROBERTA | {"model_type": "xlm-roberta", "output_past": True, "vocab_size": 250002}
XLM |= {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
DISTILBERT = {
    "activation": "gelu",
    "architectures": ["DistilBertForMaskedLM"],
    "attention_dropout": 0.1,
    "dim": 768,
    "dropout": 0.1,
    "hidden_dim": 3072,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "model_type": "distilbert",
    "n_heads": 12,
    "n_layers": 6,
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
    "transformers_version": "4.10.0.dev0",
    "vocab_size": 30522,
}
DECODER = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16"}
DECODER |= {"use_cache": True, "bos_token_id": 1, "eos_token_id": [2, 7]}
QWEN2 = DECODER | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896}
QWEN2 |= {"intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "rope_theta": 1000000.0}
QWEN2 |= {"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06}
QWEN2 |= {"sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False}
QWEN2 |= {"vocab_size": 151936}
MISTRAL = DECODER | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 4096}
MISTRAL |= {"intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32}
MISTRAL |= {"num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0}
MISTRAL |= {"sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000}
DROPOUT = {"hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"}


@pytest.mark.parametrize(
    ("config", "size", "parameters"),
    [
        (MODERNBERT, "modernbert base", 149_655_232),
        (ROBERTA, "roberta base", 124_697_433),
        (XLM, "roberta xlm-large", 560_142_482),
        (DISTILBERT, "distilbert base", 66_985_530),
        (QWEN2, "qwen2 0.5b", 494_032_768),
        (MISTRAL, "mistral 7b", 7_241_732_096),
        (MISTRAL | {"sliding_window": None}, None, 7_241_732_096),
    ],
)
def test_published_configs_are_the_named_sizes(tmp_path, config, size, parameters):
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = models.meta_model_from_hf(tmp_path, report=lambda line: None)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    if size:
        family, name = size.split()
        with torch.device("meta"):
            named = getattr(models, family)(name)
        found, expected = vars(model.config), vars(named.config)
        assert {k: v for k, v in found.items() if k not in DROPOUT} == {
            k: v for k, v in expected.items() if k not in DROPOUT
        }
    if config["model_type"] == "mistral":
        assert model.windows == ((None if config["sliding_window"] is None else 4095),) * 32


def test_counts_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for config in (MODERNBERT, ROBERTA, XLM, DISTILBERT, QWEN2):
        mapping = transformers.AutoModelForCausalLM if config is QWEN2 else transformers.AutoModelForMaskedLM
        keys = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
        with torch.device("meta"):
            theirs = mapping.from_config(transformers.AutoConfig.for_model(config["model_type"], **keys))
        counts = {149_655_232, 124_697_433, 560_142_482, 66_985_530, 494_032_768}
        assert sum(parameter.numel() for parameter in theirs.parameters()) in counts
