"""ModernBERT: a pre-norm encoder whose layers look at a window of tokens, and every third at the whole document (Warner
et al. 2024, arXiv:2412.13663).
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import ClassVar

from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models.builder import model_builder
from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.decoder import check_rope_scaling, rope_scaling
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import BertEmbedding, GeGLU, LayerNorm, MLMTransform, PreNormBlock, SelfAttention

GLOBAL, LOCAL = "full_attention", "sliding_attention"


def _layer_types(period: int, layers: int) -> list[str]:
    return [LOCAL if layer % period else GLOBAL for layer in range(layers)]


@dataclass(frozen=True)
class ModernBertConfig:
    """Architecture of a ModernBERT, under the keys of `transformers`' ModernBertConfig where it has them.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: number of blocks.
        num_attention_heads: N.
        intermediate_size: I, inside the feed-forward layer.
        max_position_embeddings: longest document that the model is made for; RoPE itself sets no limit.
        global_attn_every_n_layers: layers 0, n, 2 n, ... see the whole document, the others a window.
        local_attention: width of the window: a token sees half as many tokens to either side.
        rope_theta: base of the rotary wavelengths of global layers (`global_rope_theta` in published folders).
        rope_scaling: how they are stretched, see `rope_cos_sin`. None: not.
        local_rope_theta: base of the rotary wavelengths of local layers.
        norm_eps: epsilon of every LayerNorm.
        norm_bias: whether LayerNorms have biases.
        attention_bias: whether the projections of attention have.
        mlp_bias: whether those of the feed-forward layer have.
        classifier_bias: whether the dense layer of the head has.
        decoder_bias: whether the output layer has.
        tie_word_embeddings: whether the output layer shares the embedding's weight.
        initializer_range: standard deviation of initial weights.

    Raises:
        UserError: a size below 1, a hidden size that the heads do not divide, or an unknown RoPE scaling.
    """

    model_type: ClassVar[str] = "modernbert"

    vocab_size: int = 50_368
    hidden_size: int = 768
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    intermediate_size: int = 1152
    max_position_embeddings: int = 8192
    global_attn_every_n_layers: int = 3
    local_attention: int = 128
    rope_theta: float = 160_000.0
    rope_scaling: dict | None = None
    local_rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    classifier_bias: bool = False
    decoder_bias: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads):
            problem = f"hidden_size ({self.hidden_size}) is not an even multiple of num_attention_heads ({heads})"
            raise UserError(problem, key="hidden_size", code="bad_size")
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling)

    @property
    def head_dim(self) -> int:
        """H, size of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """What each layer sees, by `transformers`' names."""
        return _layer_types(self.global_attn_every_n_layers, self.num_hidden_layers)


SIZES = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 192,
        "max_position_embeddings": 512,
        "local_attention": 64,
    },
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 2624},
}


class Adapter(HFAdapter):
    """The layout of `ModernBertForMaskedLM`."""

    architecture = "ModernBertForMaskedLM"
    encoder_architecture = "ModernBertModel"
    encoder_prefix = "model."
    config_class = ModernBertConfig
    tied = ("decoder.weight", "model.embeddings.tok_embeddings.weight")
    fixed: ClassVar = {
        "hidden_activation": ("gelu",),
        "classifier_activation": ("gelu",),
        "attention_dropout": (0,),
        "embedding_dropout": (0,),
        "mlp_dropout": (0,),
        "position_embedding_type": ("absolute",),  # in published folders, where it means nothing
    }
    # Initial values, classifiers, which kernels and which logits `transformers` computes.
    ignored = frozenset(
        """
        initializer_cutoff_factor classifier_pooling deterministic_flash_attn sparse_prediction
        sparse_pred_ignore_index reference_compile repad_logits_with_grad layer_norm_eps
        """.split()
    )

    @staticmethod
    def read_keys(raw: dict) -> dict:
        """Published folders have two thetas and a period, those of transformers 5 a dict and a list by layer."""
        keys = dict(raw)
        ropes = {kind: dict(rope) for kind, rope in (keys.pop("rope_parameters", None) or {}).items() if rope}
        for kind, ours, published in (
            (GLOBAL, "rope_theta", "global_rope_theta"),
            (LOCAL, "local_rope_theta", "local_rope_theta"),
        ):
            theta = keys.pop(published, None)
            theta = ropes.get(kind, {}).pop("rope_theta", theta)
            if theta is not None:
                keys[ours] = theta
        scaling = keys.pop("rope_scaling", None)
        keys["rope_scaling"] = rope_scaling(scaling or ropes.get(GLOBAL), keys.get("max_position_embeddings"))
        if local := rope_scaling(scaling or ropes.get(LOCAL), None):
            keys["rope_parameters.sliding_attention"] = local  # refused: local layers have no scaling here
        if types := keys.pop("layer_types", None):
            period = types.index(GLOBAL, 1) if GLOBAL in types[1:] else len(types)
            period = keys.setdefault("global_attn_every_n_layers", period)
            if types != _layer_types(period, keys.get("num_hidden_layers", len(types))):
                keys["layer_types"] = types  # refused: no period
        return keys

    def write_keys(self) -> dict:
        """As transformers 5 writes it."""
        keys = asdict(self.config)
        scaling = keys.pop("rope_scaling") or {"rope_type": "default"}
        ropes = {
            GLOBAL: scaling | {"rope_theta": keys.pop("rope_theta")},
            LOCAL: {"rope_type": "default", "rope_theta": keys.pop("local_rope_theta")},
        }
        acts = {"hidden_activation": "gelu", "classifier_activation": "gelu"}
        drops = {"attention_dropout": 0.0, "embedding_dropout": 0.0, "mlp_dropout": 0.0}
        return keys | {"layer_types": self.config.layer_types, "rope_parameters": ropes} | acts | drops

    @cached_property
    def key_map(self) -> KeyMap:
        """Our parameter name -> the tensors that it stacks."""
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        modules = [  # ours, theirs, rows, whether it has a bias
            ("embedding.norm", "model.embeddings.norm", hidden, config.norm_bias),
            ("norm", "model.final_norm", hidden, config.norm_bias),
            ("head.transform.dense", "head.dense", hidden, config.classifier_bias),
            ("head.transform.norm", "head.norm", hidden, config.norm_bias),
        ]
        for i in range(config.num_hidden_layers):
            ours, hf = f"blocks.{i}", f"model.layers.{i}"
            modules += [
                (f"{ours}.input_layernorm", f"{hf}.attn_norm", hidden, config.norm_bias),
                (f"{ours}.self_attn.qkv_proj", f"{hf}.attn.Wqkv", 3 * hidden, config.attention_bias),
                (f"{ours}.self_attn.o_proj", f"{hf}.attn.Wo", hidden, config.attention_bias),
                (f"{ours}.post_attention_layernorm", f"{hf}.mlp_norm", hidden, config.norm_bias),
                (f"{ours}.mlp.gate_up_proj", f"{hf}.mlp.Wi", 2 * inner, config.mlp_bias),
                (f"{ours}.mlp.down_proj", f"{hf}.mlp.Wo", hidden, config.mlp_bias),
            ][i == 0 :]  # the embedding's norm is that of the first layer
        key_map = {"embedding.word_embeddings.weight": [("model.embeddings.tok_embeddings.weight", config.vocab_size)]}
        for ours, hf, rows, bias in modules:
            for kind in ("weight", "bias") if bias else ("weight",):
                key_map[f"{ours}.{kind}"] = [(f"{hf}.{kind}", rows)]
        if not config.tie_word_embeddings:
            key_map["head.decoder.weight"] = [("decoder.weight", config.vocab_size)]
        if config.decoder_bias:
            key_map["head.bias"] = [("decoder.bias", config.vocab_size)]
        return key_map

    def normalize_name(self, name: str) -> str | None:
        """Adds the prefix that ModernBertModel, which has no head, leaves out."""
        return f"model.{name}" if name.startswith(("embeddings.", "layers.", "final_norm.")) else name


def from_config(config: ModernBertConfig, seed: int = 0) -> Transformer:
    """A ModernBERT encoder; the defaults are ModernBERT base. There is no dropout, as in the published models."""
    norm = {"eps": config.norm_eps, "bias": config.norm_bias}
    return Transformer(
        config,
        (_block(config, layer) for layer in range(config.num_hidden_layers)),
        Adapter(config),
        causal=False,
        norm=LayerNorm(config.hidden_size, **norm),
        windows=[config.local_attention // 2 if kind == LOCAL else None for kind in config.layer_types],
        local_rope_theta=config.local_rope_theta,
        embedding=BertEmbedding(
            config.vocab_size, config.hidden_size, None, None, eps=config.norm_eps, norm_bias=config.norm_bias
        ),
        tied=config.tie_word_embeddings,
        head_bias=config.decoder_bias,
        head_transform=MLMTransform(
            config.hidden_size, eps=config.norm_eps, bias=config.classifier_bias, norm_bias=config.norm_bias
        ),
        seed=seed,
    )


def _block(config: ModernBertConfig, layer: int) -> PreNormBlock:
    norm = {"eps": config.norm_eps, "bias": config.norm_bias}
    return PreNormBlock(
        self_attn=SelfAttention(config.hidden_size, config.num_attention_heads, bias=config.attention_bias),
        mlp=GeGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias),
        attention_norm=LayerNorm(config.hidden_size, **norm) if layer else nn.Identity(),
        mlp_norm=LayerNorm(config.hidden_size, **norm),
    )


modernbert = model_builder("modernbert", ModernBertConfig, SIZES, from_config)
