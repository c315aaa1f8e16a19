"""BERT: a post-norm encoder with learned positions, GELU and LayerNorm (Devlin et al. 2018, arXiv:1810.04805).

Masked LM only, with the head tied to the token embedding: no next-sentence prediction, no pooler.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models.builder import model_builder
from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import BertEmbedding, GeluMLP, LayerNorm, MLMTransform, PostNormBlock, SelfAttention


@dataclass(frozen=True)
class BertConfig:
    """Architecture of a BERT, under the keys of `transformers`' BertConfig.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: number of blocks.
        num_attention_heads: N.
        intermediate_size: I, inside the feed-forward layer.
        hidden_dropout_prob: dropout of the embeddings and of what each layer adds, in training. 0, not the paper's
            0.1: training that sees its data about once gains nothing from it (Geiping and Goldstein 2022,
            arXiv:2212.14034).
        attention_probs_dropout_prob: dropout of attention weights, in training; it rules out the fast kernels.
        max_position_embeddings: longest document, in tokens.
        type_vocab_size: token types (segments of a pair).
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of initial weights.

    Raises:
        UserError: a size below 1, or a hidden size that the heads do not divide.
    """

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30_522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        if self.hidden_size % self.num_attention_heads:
            problem = f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
            raise UserError(f"{problem}({self.num_attention_heads})", key="hidden_size", code="bad_size")


# Beside base and large, the sizes of Turc et al. 2019, arXiv:1908.08962; minilm-l6 is that of all-MiniLM-L6-v2.
SIZES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "small": {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048},
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
}
# The learners' ladder (docs/ladder.md). One token type, the fewest that `transformers` takes.
SIZES |= {
    f"ladder-{version}": {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": positions,
        "type_vocab_size": 1,
    }
    for version, layers, hidden, heads, vocabulary, positions in (
        ("v0", 2, 4, 2, 10_005, 128),
        ("v2", 4, 8, 4, 10_005, 128),
        ("v3", 6, 16, 8, 10_005, 128),
        ("v4", 8, 256, 8, 25_005, 256),
    )
}


class Adapter(HFAdapter):
    """The layout of `BertForMaskedLM`."""

    architecture = "BertForMaskedLM"
    encoder_architecture = "BertModel"
    encoder_prefix = "bert."
    has_pooler = True
    config_class = BertConfig
    tied = ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")
    defaults: ClassVar = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    fixed: ClassVar = {
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "tie_word_embeddings": (True,),
    }
    # How the first published models made their pooler, and how `domain_bert` made its token types.
    ignored = frozenset({"directionality", "num_suffixes", "suffix_embedding_size"}) | {
        f"pooler_{key}" for key in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")
    }

    @property
    def token_types(self) -> bool:
        """Whether the tokenizer should give `token_type_ids`."""
        return self.config.type_vocab_size > 1

    def write_keys(self) -> dict:
        """The config.json, without token ids and dtype."""
        return asdict(self.config) | {"hidden_act": "gelu", "tie_word_embeddings": True}

    @cached_property
    def key_map(self) -> KeyMap:
        """Our parameter name -> the tensors that it stacks."""
        hidden = self.config.hidden_size
        key_map = encoder_key_map(self.config, "bert")
        for kind in ("weight", "bias"):
            key_map[f"head.transform.dense.{kind}"] = [(f"cls.predictions.transform.dense.{kind}", hidden)]
            key_map[f"head.transform.norm.{kind}"] = [(f"cls.predictions.transform.LayerNorm.{kind}", hidden)]
        return key_map | {"head.bias": [("cls.predictions.bias", self.config.vocab_size)]}

    def normalize_name(self, name: str) -> str | None:
        """A stored tensor's name as `key_map` spells it; pooler and next-sentence head are not used."""
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = f"bert.{name}"  # saved by BertModel, without a head
        if name.startswith(("bert.pooler.", "cls.seq_relationship.")) or name == "bert.embeddings.position_ids":
            return None
        if name == "cls.predictions.decoder.bias":
            return "cls.predictions.bias"
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def encoder_key_map(config: Any, prefix: str) -> KeyMap:
    """The layout of everything but the head, under `prefix`: also RoBERTa's."""
    hidden, inner = config.hidden_size, config.intermediate_size
    tables = {
        "word_embeddings": config.vocab_size,
        "position_embeddings": config.max_position_embeddings,
        "token_type_embeddings": config.type_vocab_size,
    }
    key_map = {
        f"embedding.{name}.weight": [(f"{prefix}.embeddings.{name}.weight", rows)] for name, rows in tables.items()
    }
    for kind in ("weight", "bias"):
        key_map[f"embedding.norm.{kind}"] = [(f"{prefix}.embeddings.LayerNorm.{kind}", hidden)]
        for i in range(config.num_hidden_layers):
            ours, hf = f"blocks.{i}", f"{prefix}.encoder.layer.{i}"
            key_map |= {
                f"{ours}.self_attn.qkv_proj.{kind}": [
                    (f"{hf}.attention.self.{part}.{kind}", hidden) for part in ("query", "key", "value")
                ],
                f"{ours}.self_attn.o_proj.{kind}": [(f"{hf}.attention.output.dense.{kind}", hidden)],
                f"{ours}.attention_norm.{kind}": [(f"{hf}.attention.output.LayerNorm.{kind}", hidden)],
                f"{ours}.mlp.up_proj.{kind}": [(f"{hf}.intermediate.dense.{kind}", inner)],
                f"{ours}.mlp.down_proj.{kind}": [(f"{hf}.output.dense.{kind}", hidden)],
                f"{ours}.mlp_norm.{kind}": [(f"{hf}.output.LayerNorm.{kind}", hidden)],
            }
    return key_map


def from_config(config: BertConfig, seed: int = 0) -> Transformer:
    """A BERT encoder; the defaults are BERT base without dropout."""
    sizes = (config.vocab_size, config.hidden_size, config.max_position_embeddings, config.type_vocab_size)
    return Transformer(
        config,
        (post_norm_block(config) for _ in range(config.num_hidden_layers)),
        Adapter(config),
        causal=False,
        norm=nn.Identity(),
        rotary=False,
        embedding=BertEmbedding(*sizes, eps=config.layer_norm_eps, dropout_p=config.hidden_dropout_prob),
        attention_dropout=config.attention_probs_dropout_prob,
        tied=True,
        head_bias=True,
        head_transform=MLMTransform(config.hidden_size, eps=config.layer_norm_eps),
        seed=seed,
    )


def post_norm_block(config: Any) -> PostNormBlock:
    """A block by the config's keys: also RoBERTa's."""
    return PostNormBlock(
        self_attn=SelfAttention(config.hidden_size, config.num_attention_heads, bias=True),
        mlp=GeluMLP(config.hidden_size, config.intermediate_size),
        attention_norm=LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
        mlp_norm=LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
        dropout_p=config.hidden_dropout_prob,
    )


bert = model_builder("bert", BertConfig, SIZES, from_config)
