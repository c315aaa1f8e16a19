"""Qwen3-MoE: Qwen3's decoder with mixtures of experts as feed-forward layers (Yang et al. 2025, arXiv:2505.09388)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from torchrecipes.models.builder import model_builder
from torchrecipes.models.decoder import decoder, decoder_block, without_sliding_window
from torchrecipes.models.experts import ExpertsAdapter, complete_experts_keys, has_experts
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import MoE, SwiGLU


@dataclass(frozen=True)
class Qwen3MoeConfig:
    """Architecture of a Qwen3-MoE, under the keys of `transformers`' Qwen3MoeConfig.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: number of blocks.
        num_attention_heads: N, query heads.
        intermediate_size: I of the layers without experts.
        num_key_value_heads: K, divides N. None: N.
        head_dim: H; N * H need not be D. None: D / N.
        moe_intermediate_size: I inside an expert.
        num_experts: E.
        num_experts_per_tok: experts that a token goes through.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
        decoder_sparse_step: every n-th layer has experts: 1, all; 2, the second, the fourth and so on.
        mlp_only_layers: layers, counted from 0, that have none nevertheless.
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

    model_type: ClassVar[str] = "qwen3_moe"

    vocab_size: int = 50_304
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 3072
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    moe_intermediate_size: int = 768
    num_experts: int = 16
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    max_position_embeddings: int = 32_768
    rope_theta: float = 1_000_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        complete_experts_keys(self)


_LARGE = {"num_key_value_heads": 4, "num_experts": 32, "num_experts_per_tok": 4, "max_position_embeddings": 4096}
SIZES = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "max_position_embeddings": 512,
        "rope_theta": 10_000.0,
    },
    "1b": {"moe_intermediate_size": 384} | _LARGE,
    "1.5b": {"hidden_size": 1280, "num_attention_heads": 20, "moe_intermediate_size": 448} | _LARGE,
}


class Adapter(ExpertsAdapter):
    """The layout of `Qwen3MoeForCausalLM`."""

    architecture = "Qwen3MoeForCausalLM"
    config_class = Qwen3MoeConfig
    qk_norm = "head"
    defaults: ClassVar = {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    }
    fixed: ClassVar = {"hidden_act": ("silu", "swish"), "use_sliding_window": (False,)}
    written: ClassVar = {"hidden_act": "silu", "use_sliding_window": False}

    @staticmethod
    def read_keys(raw: dict) -> dict:
        """As of both parents."""
        return without_sliding_window(ExpertsAdapter.read_keys(raw))


def from_config(config: Qwen3MoeConfig, seed: int = 0) -> Transformer:
    """A Qwen3-MoE decoder."""
    sizes = (config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok)

    def block(layer: int) -> nn.Module:
        if has_experts(config, layer):
            mlp = MoE(*sizes, norm_topk_prob=config.norm_topk_prob)
        else:
            mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        return decoder_block(config, mlp, qk_norm="head")

    return decoder(config, block, Adapter(config), seed)


qwen3_moe = model_builder("qwen3_moe", Qwen3MoeConfig, SIZES, from_config)
