"""A decoder with mixtures of experts whose routers can be chosen, which no family of `transformers` has.

Its folders have a `model_type` of their own, which `load_hf` reads and `transformers` refuses: better than loading it
as another network. Use `qwen3_moe` where it has what you need.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models.builder import model_builder
from torchrecipes.models.decoder import decoder, decoder_block, swiglu_key_map
from torchrecipes.models.experts import ExpertsAdapter, complete_experts_keys, has_experts
from torchrecipes.models.hf_adapter import KeyMap
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import MoE, SwiGLU
from torchrecipes.modules.moe import MLP_WIDTH, ROUTERS, SCORES


@dataclass(frozen=True)
class MoEConfig:
    """Architecture of such a decoder, under the keys of `transformers` where it has them.

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
        shared_expert_intermediate_size: I inside an expert that every token goes through. None: there is none.
        router: `linear`, or `mlp`: with a layer of 128 before it.
        scoring_func: of the router, `softmax` or `sigmoid`.
        router_bias: whether the choice of experts has a bias, by which the load is balanced (`ExpertBalance`).
        qk_norm: whether the queries and keys of every head are normalized.
        router_aux_loss_coef: weight of `load_balancing_loss`, the mean over the layers.
        router_z_loss_coef: weight of `router_z_loss`, the mean over the layers.
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

    model_type: ClassVar[str] = "torchrecipes_moe"

    vocab_size: int = 50_257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 2048
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    moe_intermediate_size: int = 1024
    num_experts: int = 8
    num_experts_per_tok: int = 2
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
        complete_experts_keys(self)
        for name, known in (("router", ROUTERS), ("scoring_func", SCORES)):
            if getattr(self, name) not in known:
                problem = f"{getattr(self, name)!r} is not one of {', '.join(known)}"
                raise UserError(problem, key=name, code="bad_choice")


SIZES = {
    "500m": {
        "num_hidden_layers": 32,
        "num_key_value_heads": 3,
        "decoder_sparse_step": 2,
        "router": "mlp",
        "qk_norm": False,
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.001,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}


class Adapter(ExpertsAdapter):
    """A layout like that of Qwen3-MoE, with names of our own where it has none."""

    architecture = "TorchrecipesMoEForCausalLM"
    config_class = MoEConfig
    required = frozenset(
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size moe_intermediate_size "
        "num_experts num_experts_per_tok".split()
    )
    written: ClassVar = {}
    optional = frozenset()

    @property
    def qk_norm(self) -> str | None:
        """As in `SelfAttention`."""
        return "head" if self.config.qk_norm else None

    def mlp_key_map(self, layer: int) -> KeyMap:
        """As of the parent, with the parts of routers and the shared expert."""
        config, key_map = self.config, super().mlp_key_map(layer)
        if not has_experts(config, layer):
            return key_map
        names = {"gate.proj.weight": MLP_WIDTH} if config.router == "mlp" else {}
        names |= {"gate.e_score_correction_bias": config.num_experts} if config.router_bias else {}
        key_map |= {
            f"blocks.{layer}.mlp.{name}": [(f"model.layers.{layer}.mlp.{name}", n)] for name, n in names.items()
        }
        if config.shared_expert_intermediate_size:
            path = f"layers.{layer}.mlp.shared_expert"
            key_map |= swiglu_key_map(path, config.hidden_size, config.shared_expert_intermediate_size)
        return key_map

    def loading_hint(self, path: str) -> str:
        """How to load a folder that was saved with this adapter."""
        return f"load it: torchrecipes.models.load_hf({path!r})"


def from_config(config: MoEConfig, seed: int = 0) -> Transformer:
    """A decoder with mixtures of experts of any form, which `transformers` cannot load."""
    sizes = (config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok)

    def block(layer: int) -> nn.Module:
        if has_experts(config, layer):
            mlp = MoE(
                *sizes,
                norm_topk_prob=config.norm_topk_prob,
                scoring_func=config.scoring_func,
                router=config.router,
                router_bias=config.router_bias,
                shared_intermediate_size=config.shared_expert_intermediate_size,
            )
        else:
            mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        return decoder_block(config, mlp, qk_norm="head" if config.qk_norm else None)

    return decoder(config, block, Adapter(config), seed)


moe = model_builder("moe", MoEConfig, SIZES, from_config)
