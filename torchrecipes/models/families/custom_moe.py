"""A decoder with mixtures of experts that is free in its routers: what no family of `transformers` has.

Its folders have a `model_type` of their own, which `load_hf` reads and `transformers` refuses: better than to load it
as something that it is not. Where `qwen3_moe` has what you need, take that.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.decoder import (
    Decoder,
    complete_attention_keys,
    decoder_key_map,
    normalize_name,
    read_rope_keys,
    swiglu_key_map,
    write_rope_keys,
)
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.moe_common import (
    check_experts,
    dense_block,
    experts_key_map,
    has_experts,
    moe_block,
    read_experts_keys,
)
from torchrecipes.modules import MoE, SelfAttention
from torchrecipes.modules.moe import MLP_WIDTH, ROUTERS, SCORES


@dataclass(frozen=True)
class MoEConfig:
    """Architecture of such a decoder, under the keys of `transformers` as far as it has them.

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
        shared_expert_intermediate_size: I inside an expert that every token goes through. None: there is none.
        router: `linear`, or `mlp`: a layer of 128 before it.
        scoring_func: of the router, `softmax` or `sigmoid`.
        router_bias: whether the choice of experts has a bias, by which the load is balanced (`ExpertBalance`).
        qk_norm: whether the queries and keys of every head are normalized.
        router_aux_loss_coef: weight of `load_balancing_loss`, the mean over the layers.
        router_z_loss_coef: weight of `router_z_loss`, the mean over the layers.
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

    model_type: ClassVar[str] = "torchrecipes_moe"

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    shared_expert_intermediate_size: int | None = None
    router: str = "linear"
    scoring_func: str = "softmax"
    router_bias: bool = False
    qk_norm: bool = True
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        check_sizes(self)
        complete_attention_keys(self)
        check_experts(self)
        for name, known in (("router", ROUTERS), ("scoring_func", SCORES)):
            if getattr(self, name) not in known:
                raise UserError(f"model.{name}: {getattr(self, name)!r} is not one of {', '.join(known)}.")


def _network(config: MoEConfig, seed: int = 0) -> Decoder:
    blocks = (_block(config, layer) for layer in range(config.num_hidden_layers))
    return Decoder(config, blocks, seed=seed)


def _block(config: MoEConfig, layer: int) -> nn.Module:
    attention = SelfAttention(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
        qk_norm="head" if config.qk_norm else None,
        norm_eps=config.rms_norm_eps,
    )
    if not has_experts(config, layer):
        return dense_block(config, attention)
    sizes = (config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok)
    experts = MoE(
        *sizes,
        norm_topk_prob=config.norm_topk_prob,
        scoring_func=config.scoring_func,
        router=config.router,
        router_bias=config.router_bias,
        shared_intermediate_size=config.shared_expert_intermediate_size,
    )
    return moe_block(config, attention, experts)


def moe(
    vocab_size: int,
    hidden_size: int = 768,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    intermediate_size: int = 2048,
    moe_intermediate_size: int = 1024,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    norm_topk_prob: bool = True,
    decoder_sparse_step: int = 1,
    mlp_only_layers: tuple[int, ...] = (),
    shared_expert_intermediate_size: int | None = None,
    router: str = "linear",
    scoring_func: str = "softmax",
    router_bias: bool = False,
    qk_norm: bool = True,
    router_aux_loss_coef: float = 0.001,
    router_z_loss_coef: float = 0.0,
    max_position_embeddings: int = 4096,
    rope_theta: float = 10_000.0,
    rope_scaling: dict | None = None,
    rms_norm_eps: float = 1e-6,
    attention_bias: bool = False,
    attention_dropout: float = 0.0,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> Decoder:
    """A decoder with mixtures of experts of any form; see `MoEConfig` for the arguments."""
    config = MoEConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        moe_intermediate_size=moe_intermediate_size,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        norm_topk_prob=norm_topk_prob,
        decoder_sparse_step=decoder_sparse_step,
        mlp_only_layers=mlp_only_layers,
        shared_expert_intermediate_size=shared_expert_intermediate_size,
        router=router,
        scoring_func=scoring_func,
        router_bias=router_bias,
        qk_norm=qk_norm,
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


def moe_500m(
    vocab_size: int = 50_257,
    max_position_embeddings: int = 2048,
    router_aux_loss_coef: float = 0.01,
    router_z_loss_coef: float = 0.001,
    seed: int = 0,
) -> Decoder:
    """32 layers of 768, every second with 8 experts of 1024, of which a token takes 2: 503,507,200
    parameters, 277,014,784 active.

    Its routers are small networks, its head is not tied, and its queries and keys have no norm.
    """
    return moe(
        vocab_size,
        hidden_size=768,
        num_hidden_layers=32,
        num_attention_heads=12,
        num_key_value_heads=3,
        intermediate_size=2048,
        moe_intermediate_size=1024,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
        router="mlp",
        qk_norm=False,
        router_aux_loss_coef=router_aux_loss_coef,
        router_z_loss_coef=router_z_loss_coef,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        seed=seed,
    )


# The key_map of its folders: Hugging Face's, with names of our own where it has none.


def _read_keys(raw: dict) -> dict:
    return read_experts_keys(read_rope_keys(raw))


def _write_keys(config: MoEConfig) -> dict:
    """The keys of config.json that describe the network."""
    return write_rope_keys(asdict(config)) | {"mlp_only_layers": list(config.mlp_only_layers)}


def _key_map(config: MoEConfig) -> KeyMap:
    def mlp(layer: int) -> KeyMap:
        if not has_experts(config, layer):
            return swiglu_key_map(layer, config.hidden_size, config.intermediate_size)
        local, hf = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp"
        key_map = experts_key_map(layer, config.num_experts)
        names = {"gate.proj.weight": MLP_WIDTH} if config.router == "mlp" else {}
        names |= {"gate.e_score_correction_bias": config.num_experts} if config.router_bias else {}
        key_map |= {f"{local}.{name}": [(f"{hf}.{name}", rows)] for name, rows in names.items()}
        if config.shared_expert_intermediate_size:
            shared = swiglu_key_map(layer, config.hidden_size, config.shared_expert_intermediate_size)
            key_map |= {
                name.replace(".mlp.", ".mlp.shared_expert."): [
                    (stored.replace(".mlp.", ".mlp.shared_expert."), rows) for stored, rows in parts
                ]
                for name, parts in shared.items()
            }
        return key_map

    qk_norm = "head" if config.qk_norm else None
    return decoder_key_map(config, mlp, attention_bias=config.attention_bias, qk_norm=qk_norm)


HF_ADAPTER = HFAdapter(
    architecture="TorchrecipesMoEForCausalLM",
    config_class=MoEConfig,
    network=_network,
    key_map=_key_map,
    normalize_name=normalize_name,
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    read_keys=_read_keys,
    write_keys=_write_keys,
    fixed={},
    ignored=frozenset(),
    head="language-model head",
)
