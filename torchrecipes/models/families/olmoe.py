"""OLMoE: every feed-forward layer is a mixture of small experts (Muennighoff et al. 2024, arXiv:2409.02060)."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from torchrecipes.models.builder import model_builder
from torchrecipes.models.decoder import decoder, decoder_block
from torchrecipes.models.experts import ExpertsAdapter, complete_experts_keys
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import MoE


@dataclass(frozen=True)
class OlmoeConfig:
    """Architecture of an OLMoE, under the keys of `transformers`' OlmoeConfig.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: number of blocks.
        num_attention_heads: N, query heads; queries and keys are normalized over all heads together.
        intermediate_size: I inside an expert.
        num_key_value_heads: K, divides N. None: N.
        num_experts: E.
        num_experts_per_tok: experts that a token goes through.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
        router_aux_loss_coef: weight of `load_balancing_loss`, the mean over the layers; `transformers` takes that of
            the tokens of all layers together instead, which lets one layer's uneven load hide another's.
        router_z_loss_coef: weight of `router_z_loss`, the mean over the layers. `transformers` does not have it, and
            needs it for training only.
        max_position_embeddings: longest document that the model is made for; RoPE itself sets no limit.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they are stretched, see `rope_cos_sin`. None: not.
        rms_norm_eps: epsilon of every RMSNorm.
        attention_bias: whether the projections of attention have biases.
        attention_dropout: dropout of attention weights, in training.
        tie_word_embeddings: whether the head shares the embedding's weight.
        initializer_range: standard deviation of initial weights; that of projections into the residual stream is
            divided by `sqrt(2 L)`.

    Raises:
        UserError: sizes below 1 or that do not fit each other, or an unknown RoPE scaling.
    """

    model_type: ClassVar[str] = "olmoe"

    vocab_size: int = 50_304
    hidden_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    intermediate_size: int = 1024
    num_key_value_heads: int | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    head_dim: int | None = field(default=None, init=False)

    def __post_init__(self):
        complete_experts_keys(self, width="intermediate_size")


SIZES = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
    },
    "1b-7b": {},
}


class Adapter(ExpertsAdapter):
    """The layout of `OlmoeForCausalLM`."""

    architecture = "OlmoeForCausalLM"
    config_class = OlmoeConfig
    qk_norm = "all"
    defaults: ClassVar = {"intermediate_size": 2048, "router_z_loss_coef": 0.0}
    fixed: ClassVar = {"hidden_act": ("silu", "swish"), "clip_qkv": (None,)}
    written: ClassVar = {"hidden_act": "silu", "clip_qkv": None}

    def write_keys(self) -> dict:
        """As of the parent, without the size of a head, which cannot be chosen."""
        return {key: value for key, value in super().write_keys().items() if key != "head_dim"}


def from_config(config: OlmoeConfig, seed: int = 0) -> Transformer:
    """An OLMoE decoder; the defaults are OLMoE-1B-7B."""
    sizes = (config.hidden_size, config.intermediate_size, config.num_experts, config.num_experts_per_tok)

    def block(_layer: int) -> nn.Module:
        return decoder_block(config, MoE(*sizes, norm_topk_prob=config.norm_topk_prob), qk_norm="all")

    return decoder(config, block, Adapter(config), seed)


olmoe = model_builder("olmoe", OlmoeConfig, SIZES, from_config)
