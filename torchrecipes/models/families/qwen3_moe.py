"""Qwen3-MoE: Qwen3's decoder with mixtures of experts as feed-forward layers (Yang et al. 2025, arXiv:2505.09388)."""

from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import nn

from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.decoder import (
    Decoder,
    complete_attention_keys,
    decoder_key_map,
    normalize_name,
    swiglu_key_map,
    write_rope_keys,
)
from torchrecipes.models.families.qwen3 import read_keys as read_qwen3_keys
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.moe_common import (
    check_experts,
    dense_block,
    experts_key_map,
    has_experts,
    moe_block,
    read_experts_keys,
    stack_experts,
)
from torchrecipes.modules import MoE, SelfAttention


@dataclass(frozen=True)
class Qwen3MoeConfig:
    """Architecture of a Qwen3-MoE, under the keys and with the defaults of `transformers`' Qwen3MoeConfig.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: blocks.
        num_attention_heads: N, query heads.
        intermediate_size: I of the layers without experts.
        num_key_value_heads: K, divides N. None becomes N.
        head_dim: H; N * H need not be D. None becomes D / N.
        moe_intermediate_size: I inside an expert.
        num_experts: E.
        num_experts_per_tok: experts that a token goes through.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
        decoder_sparse_step: every so many layers one has experts: 1, all; 2, the second, the fourth and so on.
        mlp_only_layers: layers, counted from 0, that have none all the same.
        router_aux_loss_coef: weight of `load_balancing_loss`, the mean over the layers; `transformers` takes that of
            the tokens of all layers together instead, which lets one layer's uneven load hide another's.
        router_z_loss_coef: weight of `router_z_loss`, the mean over the layers. `transformers` does not have it, and
            needs it for training only.
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

    model_type: ClassVar[str] = "qwen3_moe"

    vocab_size: int = 151_936
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    intermediate_size: int = 6144
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    max_position_embeddings: int = 32_768
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        check_sizes(self)
        complete_attention_keys(self)
        check_experts(self)


def _network(config: Qwen3MoeConfig, seed: int = 0) -> Decoder:
    blocks = (_block(config, layer) for layer in range(config.num_hidden_layers))
    return Decoder(config, blocks, seed=seed)


def _block(config: Qwen3MoeConfig, layer: int) -> nn.Module:
    attention = SelfAttention(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
        qk_norm="head",
        norm_eps=config.rms_norm_eps,
    )
    if not has_experts(config, layer):
        return dense_block(config, attention)
    sizes = (config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok)
    return moe_block(config, attention, MoE(*sizes, norm_topk_prob=config.norm_topk_prob))


def qwen3_moe(
    vocab_size: int,
    hidden_size: int = 1024,
    num_hidden_layers: int = 24,
    num_attention_heads: int = 16,
    intermediate_size: int = 3072,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    moe_intermediate_size: int = 768,
    num_experts: int = 16,
    num_experts_per_tok: int = 2,
    norm_topk_prob: bool = True,
    decoder_sparse_step: int = 1,
    mlp_only_layers: tuple[int, ...] = (),
    router_aux_loss_coef: float = 0.001,
    router_z_loss_coef: float = 0.0,
    max_position_embeddings: int = 32_768,
    rope_theta: float = 1_000_000.0,
    rope_scaling: dict | None = None,
    rms_norm_eps: float = 1e-6,
    attention_bias: bool = False,
    attention_dropout: float = 0.0,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> Decoder:
    """A Qwen3-MoE of any size; see `Qwen3MoeConfig` for the arguments."""
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        moe_intermediate_size=moe_intermediate_size,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=norm_topk_prob,
        decoder_sparse_step=decoder_sparse_step,
        mlp_only_layers=mlp_only_layers,
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


def moe_1b(
    vocab_size: int = 50_304,
    max_position_embeddings: int = 4096,
    router_aux_loss_coef: float = 0.001,
    router_z_loss_coef: float = 0.0,
    seed: int = 0,
) -> Decoder:
    """24 layers of 1024, each with 32 experts of 384, of which a token takes 4: 1,021,235,200
    parameters, 228,511,744 active.
    """
    return qwen3_moe(
        vocab_size,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        moe_intermediate_size=384,
        num_experts=32,
        num_experts_per_tok=4,
        router_aux_loss_coef=router_aux_loss_coef,
        router_z_loss_coef=router_z_loss_coef,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


def moe_1_5b(
    vocab_size: int = 50_304,
    max_position_embeddings: int = 4096,
    router_aux_loss_coef: float = 0.001,
    router_z_loss_coef: float = 0.0,
    seed: int = 0,
) -> Decoder:
    """24 layers of 1280, each with 32 experts of 448, of which a token takes 4: 1,481,015,552 parameters,
    324,960,512 active."""
    return qwen3_moe(
        vocab_size,
        hidden_size=1280,
        num_hidden_layers=24,
        num_attention_heads=20,
        num_key_value_heads=4,
        moe_intermediate_size=448,
        num_experts=32,
        num_experts_per_tok=4,
        router_aux_loss_coef=router_aux_loss_coef,
        router_z_loss_coef=router_z_loss_coef,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


def moe_tiny(vocab_size: int = 8192, max_position_embeddings: int = 512, seed: int = 0) -> Decoder:
    """2 layers of 128, each with 8 experts of 128, of which a token takes 2, for tests: 1,936,128
    parameters, 1,346,304 active."""
    return qwen3_moe(
        vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=max_position_embeddings,
        rope_theta=10_000.0,
        seed=seed,
    )


# The Hugging Face key_map.


def _read_keys(raw: dict) -> dict:
    return read_experts_keys(read_qwen3_keys(raw))


def _write_keys(config: Qwen3MoeConfig) -> dict:
    """The keys of config.json that describe the network."""
    keys = write_rope_keys(asdict(config)) | {"hidden_act": "silu", "use_sliding_window": False}
    keys["mlp_only_layers"] = list(config.mlp_only_layers)
    if not config.router_z_loss_coef:
        del keys["router_z_loss_coef"]
    return keys


def _key_map(config: Qwen3MoeConfig) -> KeyMap:
    def mlp(layer: int) -> KeyMap:
        if has_experts(config, layer):
            return experts_key_map(layer, config.num_experts)
        return swiglu_key_map(layer, config.hidden_size, config.intermediate_size)

    return decoder_key_map(config, mlp, attention_bias=config.attention_bias, qk_norm="head")


HF_ADAPTER = HFAdapter(
    architecture="Qwen3MoeForCausalLM",
    config_class=Qwen3MoeConfig,
    network=_network,
    key_map=_key_map,
    normalize_name=normalize_name,
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    read_keys=_read_keys,
    write_keys=_write_keys,
    fixed={"hidden_act": ("silu",), "use_sliding_window": (False,)},
    ignored=frozenset({"output_router_logits"}),
    head="language-model head",
    stack=stack_experts,
)
