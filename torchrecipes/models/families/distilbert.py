"""DistilBERT: a BERT of half the depth without token types (Sanh et al. 2019, arXiv:1910.01108)."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import ClassVar

from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models.builder import model_builder
from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import BertEmbedding, GeluMLP, LayerNorm, MLMTransform, PostNormBlock, SelfAttention

EPS = 1e-12  # of every LayerNorm; config.json has no key for it


@dataclass(frozen=True)
class DistilBertConfig:
    """Architecture of a DistilBERT, under the names of the other families for sizes.

    In config.json they are dim, n_layers, n_heads and hidden_dim.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: number of blocks.
        num_attention_heads: N.
        intermediate_size: I, inside the feed-forward layer.
        dropout: dropout of the embeddings and of the feed-forward layers, in training.
        attention_dropout: dropout of attention weights, in training; it rules out the fast kernels.
        max_position_embeddings: longest document, in tokens.
        initializer_range: standard deviation of initial weights.

    Raises:
        UserError: a size below 1, or a hidden size that the heads do not divide.
    """

    model_type: ClassVar[str] = "distilbert"

    vocab_size: int = 30_522
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    dropout: float = 0.0
    attention_dropout: float = 0.0
    max_position_embeddings: int = 512
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        if self.hidden_size % self.num_attention_heads:
            problem = f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
            raise UserError(f"{problem}({self.num_attention_heads})", key="hidden_size", code="bad_size")


SIZES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "base": {},
}
_KEYS = {  # of config.json -> ours
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
}


class Adapter(HFAdapter):
    """The layout of `DistilBertForMaskedLM`."""

    architecture = "DistilBertForMaskedLM"
    encoder_architecture = "DistilBertModel"
    encoder_prefix = "distilbert."
    config_class = DistilBertConfig
    tied = ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight")
    defaults: ClassVar = {"dropout": 0.1, "attention_dropout": 0.1}
    fixed: ClassVar = {
        "activation": ("gelu",),
        "sinusoidal_pos_embds": (False,),
        "tie_weights_": (True,),
        "tie_word_embeddings": (True,),
    }
    ignored = frozenset({"qa_dropout", "seq_classif_dropout"})

    @staticmethod
    def read_keys(raw: dict) -> dict:
        """config.json under our names."""
        return {_KEYS.get(key, key): value for key, value in raw.items()}

    def write_keys(self) -> dict:
        """The config.json, without token ids and dtype."""
        hf = {ours: key for key, ours in _KEYS.items()}
        keys = {hf.get(key, key): value for key, value in asdict(self.config).items()}
        return keys | {"activation": "gelu", "sinusoidal_pos_embds": False, "tie_word_embeddings": True}

    @cached_property
    def key_map(self) -> KeyMap:
        """Our parameter name -> the tensors that it stacks."""
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        key_map = {
            f"embedding.{name}.weight": [(f"distilbert.embeddings.{name}.weight", rows)]
            for name, rows in (
                ("word_embeddings", config.vocab_size),
                ("position_embeddings", config.max_position_embeddings),
            )
        }
        for kind in ("weight", "bias"):
            key_map[f"embedding.norm.{kind}"] = [(f"distilbert.embeddings.LayerNorm.{kind}", hidden)]
            for i in range(config.num_hidden_layers):
                ours, hf = f"blocks.{i}", f"distilbert.transformer.layer.{i}"
                key_map |= {
                    f"{ours}.self_attn.qkv_proj.{kind}": [
                        (f"{hf}.attention.{part}_lin.{kind}", hidden) for part in ("q", "k", "v")
                    ],
                    f"{ours}.self_attn.o_proj.{kind}": [(f"{hf}.attention.out_lin.{kind}", hidden)],
                    f"{ours}.attention_norm.{kind}": [(f"{hf}.sa_layer_norm.{kind}", hidden)],
                    f"{ours}.mlp.up_proj.{kind}": [(f"{hf}.ffn.lin1.{kind}", inner)],
                    f"{ours}.mlp.down_proj.{kind}": [(f"{hf}.ffn.lin2.{kind}", hidden)],
                    f"{ours}.mlp_norm.{kind}": [(f"{hf}.output_layer_norm.{kind}", hidden)],
                }
            key_map[f"head.transform.dense.{kind}"] = [(f"vocab_transform.{kind}", hidden)]
            key_map[f"head.transform.norm.{kind}"] = [(f"vocab_layer_norm.{kind}", hidden)]
        return key_map | {"head.bias": [("vocab_projector.bias", config.vocab_size)]}

    def normalize_name(self, name: str) -> str | None:
        """Adds the prefix that DistilBertModel, which has no head, leaves out."""
        return f"distilbert.{name}" if name.startswith(("embeddings.", "transformer.")) else name


def from_config(config: DistilBertConfig, seed: int = 0) -> Transformer:
    """A DistilBERT encoder; the defaults are DistilBERT base without dropout."""
    sizes = (config.vocab_size, config.hidden_size, config.max_position_embeddings, None)
    return Transformer(
        config,
        (_block(config) for _ in range(config.num_hidden_layers)),
        Adapter(config),
        causal=False,
        norm=nn.Identity(),
        rotary=False,
        embedding=BertEmbedding(*sizes, eps=EPS, dropout_p=config.dropout),
        attention_dropout=config.attention_dropout,
        tied=True,
        head_bias=True,
        head_transform=MLMTransform(config.hidden_size, eps=EPS),
        seed=seed,
    )


def _block(config: DistilBertConfig) -> PostNormBlock:
    return PostNormBlock(
        self_attn=SelfAttention(config.hidden_size, config.num_attention_heads, bias=True),
        mlp=GeluMLP(config.hidden_size, config.intermediate_size),
        attention_norm=LayerNorm(config.hidden_size, eps=EPS),
        mlp_norm=LayerNorm(config.hidden_size, eps=EPS),
        dropout_p=config.dropout,
        drop_attention=False,  # BERT has it, DistilBERT not
    )


distilbert = model_builder("distilbert", DistilBertConfig, SIZES, from_config)
