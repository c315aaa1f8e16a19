"""Mistral: LLaMA's decoder with fewer key-value heads and, in its first version, a sliding window (Jiang et al. 2023,
arXiv:2310.06825).
"""

from dataclasses import dataclass
from typing import ClassVar

from torchrecipes.models.builder import model_builder
from torchrecipes.models.decoder import DecoderAdapter, complete_attention_keys, decoder, decoder_block
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import PreNormBlock, SwiGLU


@dataclass(frozen=True)
class MistralConfig:
    """Architecture of a Mistral, under the keys of `transformers`' MistralConfig.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: number of blocks.
        num_attention_heads: N, query heads.
        intermediate_size: I, inside the feed-forward layer.
        num_key_value_heads: K, divides N. None: N.
        head_dim: H. None: D / N.
        max_position_embeddings: longest document that the model is made for; RoPE itself sets no limit.
        sliding_window: tokens that a token sees, itself included, in every layer. None: all before it.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they are stretched, see `rope_cos_sin`. None: not.
        rms_norm_eps: epsilon of every RMSNorm.
        attention_dropout: dropout of attention weights, in training.
        tie_word_embeddings: whether the head shares the embedding's weight.
        initializer_range: standard deviation of initial weights; that of projections into the residual stream is
            divided by `sqrt(2 L)`.

    Raises:
        UserError: sizes below 1, head counts and sizes that do not fit each other, or an unknown RoPE scaling.
    """

    model_type: ClassVar[str] = "mistral"

    vocab_size: int = 32_000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    intermediate_size: int = 14_336
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32_768
    sliding_window: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        complete_attention_keys(self)


SIZES = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 344,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "7b": {"num_key_value_heads": 8, "sliding_window": 4096},
}


class Adapter(DecoderAdapter):
    """The layout of `MistralForCausalLM`."""

    architecture = "MistralForCausalLM"
    config_class = MistralConfig
    defaults: ClassVar = {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
    }
    fixed: ClassVar = {"hidden_act": ("silu", "swish")}


def from_config(config: MistralConfig, seed: int = 0) -> Transformer:
    """A Mistral decoder; the defaults are those of the 7B with as many key-value heads as heads, without a window."""

    def block(_layer: int) -> PreNormBlock:
        return decoder_block(config, SwiGLU(config.hidden_size, config.intermediate_size))

    window = None if config.sliding_window is None else config.sliding_window - 1  # which does not count itself
    return decoder(config, block, Adapter(config), seed, window)


mistral = model_builder("mistral", MistralConfig, SIZES, from_config)
