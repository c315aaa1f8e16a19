"""OLMoE: every feed-forward layer is a mixture of small experts (Muennighoff et al. 2024, arXiv:2409.02060)."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.decoder import (
    Decoder,
    complete_attention_keys,
    decoder_key_map,
    normalize_name,
    read_rope_keys,
    write_rope_keys,
)
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.moe_common import check_experts, experts_key_map, moe_block, read_experts_keys, stack_experts
from torchrecipes.modules import MoE, SelfAttention


@dataclass(frozen=True)
class OlmoeConfig:
    """Architecture of an OLMoE, under the keys and with the defaults of `transformers`' OlmoeConfig.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: blocks.
        num_attention_heads: N, query heads; queries and keys are normalized over all heads together.
        intermediate_size: I inside an expert.
        num_key_value_heads: K, divides N. None becomes N.
        num_experts: E.
        num_experts_per_tok: experts that a token goes through.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
        router_aux_loss_coef: weight of `load_balancing_loss`, the mean over the layers; `transformers` takes that of
            the tokens of all layers together instead, which lets one layer's uneven load hide another's.
        router_z_loss_coef: weight of `router_z_loss`, the mean over the layers; the paper's is 0.001. `transformers`
            does not have it, and needs it for training only.
        max_position_embeddings: longest document that the model is made for; RoPE itself sets no limit.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they are stretched, see `rope_cos_sin`. None: not.
        rms_norm_eps: of every RMSNorm.
        attention_bias: whether the projections of attention have biases.
        attention_dropout: of attention weights, in training.
        tie_word_embeddings: whether the head shares the embedding's weight.
        initializer_range: standard deviation of initial weights; that of projections into the residual stream is
            divided by the root of 2 L.

    Raises:
        UserError: sizes that are none or do not fit each other, or an unknown RoPE scaling.
    """

    model_type: ClassVar[str] = "olmoe"

    vocab_size: int = 50_304
    hidden_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    intermediate_size: int = 2048
    num_key_value_heads: int | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    head_dim: int | None = None

    def __post_init__(self):
        check_sizes(self)
        complete_attention_keys(self)
        check_experts(self, width="intermediate_size")


def _network(config: OlmoeConfig, seed: int = 0) -> Decoder:
    return Decoder(config, (_block(config) for _ in range(config.num_hidden_layers)), seed=seed)


def _block(config: OlmoeConfig) -> nn.Module:
    attention = SelfAttention(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        bias=config.attention_bias,
        qk_norm="all",
        norm_eps=config.rms_norm_eps,
    )
    sizes = (config.hidden_size, config.intermediate_size, config.num_experts, config.num_experts_per_tok)
    return moe_block(config, attention, MoE(*sizes, norm_topk_prob=config.norm_topk_prob))


def olmoe(
    vocab_size: int,
    hidden_size: int = 2048,
    num_hidden_layers: int = 16,
    num_attention_heads: int = 16,
    intermediate_size: int = 1024,
    num_key_value_heads: int | None = None,
    num_experts: int = 64,
    num_experts_per_tok: int = 8,
    norm_topk_prob: bool = False,
    router_aux_loss_coef: float = 0.01,
    router_z_loss_coef: float = 0.001,
    max_position_embeddings: int = 4096,
    rope_theta: float = 10_000.0,
    rope_scaling: dict | None = None,
    rms_norm_eps: float = 1e-5,
    attention_bias: bool = False,
    attention_dropout: float = 0.0,
    tie_word_embeddings: bool = False,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> Decoder:
    """An OLMoE of any size; the defaults are OLMoE-1B-7B. See `OlmoeConfig` for the arguments."""
    config = OlmoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        num_key_value_heads=num_key_value_heads,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=norm_topk_prob,
        router_aux_loss_coef=router_aux_loss_coef,
        router_z_loss_coef=router_z_loss_coef,
        max_position_embeddings=max_position_embeddings,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=rms_norm_eps,
        attention_bias=attention_bias,
        attention_dropout=attention_dropout,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
    )
    return _network(config, seed=seed)


def olmoe_tiny(vocab_size: int = 8192, max_position_embeddings: int = 512, seed: int = 0) -> Decoder:
    """2 layers of 128, each with 8 experts of 128, of which a token takes 2, for tests: 3,017,856
    parameters, 2,428,032 active."""
    return olmoe(
        vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


# The Hugging Face key_map.


def _read_keys(raw: dict) -> dict:
    return read_experts_keys(read_rope_keys(raw))


def _write_keys(config: OlmoeConfig) -> dict:
    """The keys of config.json that describe the network."""
    keys = write_rope_keys(asdict(config)) | {"hidden_act": "silu", "clip_qkv": None}
    del keys["head_dim"]
    if not config.router_z_loss_coef:
        del keys["router_z_loss_coef"]
    return keys


def _key_map(config: OlmoeConfig) -> KeyMap:
    mlp = partial(experts_key_map, experts=config.num_experts)
    return decoder_key_map(config, mlp, attention_bias=config.attention_bias, qk_norm="all")


HF_ADAPTER = HFAdapter(
    architecture="OlmoeForCausalLM",
    config_class=OlmoeConfig,
    network=_network,
    key_map=_key_map,
    normalize_name=normalize_name,
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    read_keys=_read_keys,
    write_keys=_write_keys,
    fixed={"hidden_act": ("silu",), "clip_qkv": (None,)},
    ignored=frozenset({"output_router_logits"}),
    head="language-model head",
    stack=stack_experts,
)
