"""LLaMA: a pre-norm decoder with RoPE, SwiGLU and RMSNorm (Touvron et al. 2023, arXiv:2302.13971)."""

from dataclasses import dataclass
from typing import ClassVar

from torchrecipes.models.builder import model_builder
from torchrecipes.models.decoder import DecoderAdapter, complete_attention_keys, decoder, decoder_block
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import PreNormBlock, SwiGLU


@dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a LLaMA, under the keys and with the defaults of `transformers`' LlamaConfig.

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
        attention_bias: whether the projections of attention have biases.
        mlp_bias: whether those of the feed-forward layer have.
        attention_dropout: dropout of attention weights, in training.
        tie_word_embeddings: whether the head shares the embedding's weight.
        lm_head_bias: whether the head has a bias. `transformers` loads such a model without it.
        initializer_range: standard deviation of initial weights; that of projections into the residual stream is
            divided by `sqrt(2 L)`.

    Raises:
        UserError: sizes below 1, head counts and sizes that do not fit each other, or an unknown RoPE scaling.
    """

    model_type: ClassVar[str] = "llama"

    vocab_size: int = 32_000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    intermediate_size: int = 11_008
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
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
    "700m": {
        "vocab_size": 50_304,
        "hidden_size": 1280,
        "num_attention_heads": 20,
        "intermediate_size": 3456,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "lm_head_bias": True,
    },
    "7b": {},
}


class Adapter(DecoderAdapter):
    """The layout of `LlamaForCausalLM`."""

    architecture = "LlamaForCausalLM"
    config_class = LlamaConfig
    fixed: ClassVar = {"hidden_act": ("silu", "swish")}
    ignored = frozenset({"pretraining_tp"})  # how to split a product, not what it is


def from_config(config: LlamaConfig, seed: int = 0) -> Transformer:
    """A LLaMA decoder; the defaults are those of the 7B.

    The size 700m is the modern form of GPT-2 750m. Its head has a bias, which `transformers` does not know: with
    `lm_head_bias: false` an export is exact there.
    """

    def block(_layer: int) -> PreNormBlock:
        return decoder_block(config, SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias))

    return decoder(config, block, Adapter(config), seed)


llama = model_builder("llama", LlamaConfig, SIZES, from_config)
