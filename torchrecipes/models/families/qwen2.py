"""Qwen2 and Qwen2.5: LLaMA's decoder with biases of queries, keys and values (Yang et al. 2024, arXiv:2407.10671)."""

from dataclasses import dataclass
from typing import ClassVar

from torchrecipes.models.builder import model_builder
from torchrecipes.models.decoder import (
    DecoderAdapter,
    complete_attention_keys,
    decoder,
    decoder_block,
    without_sliding_window,
)
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import PreNormBlock, SwiGLU


@dataclass(frozen=True)
class Qwen2Config:
    """Architecture of a Qwen2, under the keys of `transformers`' Qwen2Config.

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
        attention_dropout: dropout of attention weights, in training.
        tie_word_embeddings: whether the head shares the embedding's weight.
        initializer_range: standard deviation of initial weights; that of projections into the residual stream is
            divided by `sqrt(2 L)`.

    Raises:
        UserError: sizes below 1, head counts and sizes that do not fit each other, or an unknown RoPE scaling.
    """

    model_type: ClassVar[str] = "qwen2"

    vocab_size: int = 151_936
    hidden_size: int = 896
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    intermediate_size: int = 4864
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32_768
    rope_theta: float = 1_000_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
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
        "rope_theta": 10_000.0,
    },
    "0.5b": {"num_key_value_heads": 2},
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "intermediate_size": 8960,
        "num_key_value_heads": 2,
    },
}


class Adapter(DecoderAdapter):
    """The layout of `Qwen2ForCausalLM`."""

    architecture = "Qwen2ForCausalLM"
    config_class = Qwen2Config
    qkv_bias = True
    defaults: ClassVar = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    }
    fixed: ClassVar = {"hidden_act": ("silu", "swish"), "use_sliding_window": (False,)}
    written: ClassVar = {"hidden_act": "silu", "use_sliding_window": False}
    ignored = frozenset({"use_mrope"})  # false in text models; a true one comes with a scaling, which is refused

    @staticmethod
    def read_keys(raw: dict) -> dict:
        """The keys without those that say that no layer has a sliding window."""
        return without_sliding_window(DecoderAdapter.read_keys(raw))


def from_config(config: Qwen2Config, seed: int = 0) -> Transformer:
    """A Qwen2 decoder; the defaults are those of Qwen2 0.5B with as many key-value heads as heads."""

    def block(_layer: int) -> PreNormBlock:
        return decoder_block(config, SwiGLU(config.hidden_size, config.intermediate_size), qkv_bias=True)

    return decoder(config, block, Adapter(config), seed)


qwen2 = model_builder("qwen2", Qwen2Config, SIZES, from_config)
