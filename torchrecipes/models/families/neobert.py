"""NeoBERT: a pre-norm encoder with RoPE, SwiGLU and RMSNorm (Breton et al. 2025, arXiv:2502.19587).

In `transformers` it is an `eurobert`, the same network under another name, so exports load there without remote code.
"""

from dataclasses import dataclass
from typing import ClassVar

from torchrecipes.models.builder import model_builder
from torchrecipes.models.decoder import DecoderAdapter, complete_attention_keys, decoder_block
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import RMSNorm, SwiGLU


@dataclass(frozen=True)
class NeoBertConfig:
    """Architecture of a NeoBERT, under the keys of `transformers`' EuroBertConfig.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: number of blocks.
        num_attention_heads: N, query heads.
        intermediate_size: I, inside the feed-forward layer.
        num_key_value_heads: K, divides N. None: N.
        head_dim: H. None: D / N.
        max_position_embeddings: longest document that the model is made for; RoPE itself sets no limit.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they are stretched, see `rope_cos_sin`. None: not.
        rms_norm_eps: epsilon of every RMSNorm.
        tie_word_embeddings: whether the head shares the embedding's weight.
        initializer_range: standard deviation of initial weights.

    Raises:
        UserError: sizes below 1, or head counts and sizes that do not fit each other.
    """

    model_type: ClassVar[str] = "eurobert"

    vocab_size: int = 30_522
    hidden_size: int = 768
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    intermediate_size: int = 2048
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        complete_attention_keys(self)


SIZES = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 344,
        "max_position_embeddings": 512,
    },
    "100m": {"vocab_size": 32_000, "num_hidden_layers": 12},
    "base": {},
}


class Adapter(DecoderAdapter):
    """The layout of EuroBERT."""

    architecture = "EuroBertForMaskedLM"
    config_class = NeoBertConfig
    required = frozenset({"vocab_size"})
    defaults: ClassVar = {
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    fixed: ClassVar = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "attention_dropout": (0,),
        "hidden_dropout": (0,),
        "mlp_bias": (False,),
        "pretraining_tp": (1,),
    }
    ignored = frozenset({"classifier_pooling", "clf_pooling"})
    written: ClassVar = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}


def from_config(config: NeoBertConfig, seed: int = 0) -> Transformer:
    """A NeoBERT encoder; the defaults are NeoBERT base with a tied head, which the paper does not tie."""
    mlp = (SwiGLU(config.hidden_size, config.intermediate_size) for _ in range(config.num_hidden_layers))
    return Transformer(
        config,
        (decoder_block(config, layer) for layer in mlp),
        Adapter(config),
        causal=False,
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        tied=config.tie_word_embeddings,
        seed=seed,
    )


neobert = model_builder("neobert", NeoBertConfig, SIZES, from_config)
