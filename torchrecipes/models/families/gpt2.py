"""GPT-2: a pre-norm decoder with learned positions, GELU and LayerNorm (Radford et al. 2019, "Language models are
unsupervised multitask learners").
"""

import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import ClassVar

from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models.builder import model_builder
from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import GeluMLP, LayerNorm, PreNormBlock, SelfAttention


@dataclass(frozen=True)
class GPT2Config:
    """Architecture of a GPT-2, under the names of the other families for sizes.

    In config.json they are n_embd, n_layer, n_head, n_inner and n_positions; `transformers` reads either.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: number of blocks.
        num_attention_heads: N.
        intermediate_size: I, inside the feed-forward layer. None: 4 D.
        max_position_embeddings: longest document, in tokens.
        embd_pdrop: dropout of the embeddings, in training. 0, not GPT-2's 0.1: training that sees its data about once
            gains nothing from it.
        attn_pdrop: dropout of attention weights; it rules out the fast kernels.
        resid_pdrop: dropout of what attention and feed-forward layers add.
        layer_norm_epsilon: epsilon of every LayerNorm.
        tie_word_embeddings: whether the head shares the embedding's weight.
        attention_bias: whether the projections of attention have biases. `transformers` always has them, and starts
            those that a folder lacks at 0, which is the same.
        lm_head_bias: whether the head has a bias. `transformers` loads such a model without it.
        initializer_range: standard deviation of initial weights; that of projections into the residual stream is
            divided by `sqrt(2 L)`.

    Raises:
        UserError: a size below 1, or a hidden size that the heads do not divide.
    """

    model_type: ClassVar[str] = "gpt2"

    vocab_size: int = 50_257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = True
    lm_head_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        if self.hidden_size % self.num_attention_heads:
            problem = f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
            raise UserError(f"{problem}({self.num_attention_heads})", key="hidden_size", code="bad_size")


SIZES = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "small": {},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "750m": {
        "vocab_size": 50_304,
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "lm_head_bias": True,
    },
    "large": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20},
    "xl": {"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25},
}
_KEYS = {  # of config.json -> ours
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
}


class Adapter(HFAdapter):
    """The layout of `GPT2LMHeadModel`, whose blocks have `Conv1D` layers: matrices [in, out]."""

    architecture = "GPT2LMHeadModel"
    config_class = GPT2Config
    tied = ("lm_head.weight", "transformer.wte.weight")
    defaults: ClassVar = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
    fixed: ClassVar = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    }
    # Of classes that summarize a text, the same number twice, and the order of the same operations.
    ignored = frozenset({"n_ctx", "reorder_and_upcast_attn"}) | {
        f"summary_{key}" for key in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")
    }

    @staticmethod
    def read_keys(raw: dict) -> dict:
        """config.json under our names."""
        return {_KEYS.get(key, key): value for key, value in raw.items()}

    def write_keys(self) -> dict:
        """The config.json; keys that `transformers` does not have are written where they are not the default."""
        hf = {ours: key for key, ours in _KEYS.items()}
        keys = {hf.get(key, key): value for key, value in asdict(self.config).items()}
        for key, usual in (("attention_bias", True), ("lm_head_bias", False)):
            if keys[key] is usual:
                del keys[key]
        return keys | {"activation_function": "gelu_new"}

    @cached_property
    def key_map(self) -> KeyMap:
        """Our parameter name -> the tensors that it stacks."""
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        key_map = {
            "embedding.weight": [("transformer.wte.weight", config.vocab_size)],
            "position_embedding.weight": [("transformer.wpe.weight", config.max_position_embeddings)],
        }
        names = {
            "input_layernorm": ("ln_1", hidden),
            "self_attn.qkv_proj": ("attn.c_attn", 3 * hidden),
            "self_attn.o_proj": ("attn.c_proj", hidden),
            "post_attention_layernorm": ("ln_2", hidden),
            "mlp.up_proj": ("mlp.c_fc", inner),
            "mlp.down_proj": ("mlp.c_proj", hidden),
        }
        for i in range(config.num_hidden_layers):
            for ours, (hf, rows) in names.items():
                for kind in ("weight", "bias"):
                    if kind == "weight" or config.attention_bias or not ours.startswith("self_attn"):
                        key_map[f"blocks.{i}.{ours}.{kind}"] = [(f"transformer.h.{i}.{hf}.{kind}", rows)]
        key_map |= {f"norm.{kind}": [(f"transformer.ln_f.{kind}", hidden)] for kind in ("weight", "bias")}
        if not config.tie_word_embeddings:
            key_map["head.decoder.weight"] = [("lm_head.weight", config.vocab_size)]
        if config.lm_head_bias:
            key_map["head.bias"] = [("lm_head.bias", config.vocab_size)]
        return key_map

    def normalize_name(self, name: str) -> str | None:
        """A stored tensor's name as `key_map` spells it; the causal masks of old folders are not used."""
        if name.startswith(("wte.", "wpe.", "h.", "ln_f.")):
            name = f"transformer.{name}"  # saved by GPT2Model, without a head
        return None if re.search(r"\.attn\.(masked_)?bias$", name) else name

    def transposed(self, name: str) -> bool:
        """Whether the tensor is stored with its two dimensions exchanged."""
        return bool(re.search(r"\.c_(attn|proj|fc)\.weight$", name))


def from_config(config: GPT2Config, seed: int = 0) -> Transformer:
    """A GPT-2 decoder; the defaults are GPT-2 small without dropout.

    The size 750m has an untied head with a bias, which `transformers` does not know: with `lm_head_bias: false` an
    export is exact there.
    """
    return Transformer(
        config,
        (_block(config) for _ in range(config.num_hidden_layers)),
        Adapter(config),
        causal=True,
        norm=LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
        rotary=False,
        position_embedding=nn.Embedding(config.max_position_embeddings, config.hidden_size),
        embedding_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        tied=config.tie_word_embeddings,
        head_bias=config.lm_head_bias,
        seed=seed,
    )


def _block(config: GPT2Config) -> PreNormBlock:
    return PreNormBlock(
        self_attn=SelfAttention(config.hidden_size, config.num_attention_heads, bias=config.attention_bias),
        mlp=GeluMLP(config.hidden_size, config.intermediate_size, approximate="tanh"),
        attention_norm=LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
        mlp_norm=LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
        dropout_p=config.resid_pdrop,
    )


gpt2 = model_builder("gpt2", GPT2Config, SIZES, from_config)
