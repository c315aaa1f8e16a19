"""DomainBERT: a BERT of the characters of domain names, with an embedding and a classifier of the public suffix.

A token's type is `4 * suffix + kind`; its embedding is the kind's plus the suffix's, projected from few dimensions. In
`transformers` it is a `bert` whose table of token types has a row for each of these pairs, and whose pooler is the
classifier's. What that does not have, the factors of the table and the rest of the classifier, lies beside it in the
folder `domain_bert`.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.models.builder import model_builder
from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.families.bert import Adapter as BertAdapter
from torchrecipes.models.families.bert import BertConfig, post_norm_block
from torchrecipes.models.hf_adapter import KeyMap
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import (
    BertEmbedding,
    ClassificationHead,
    FactoredTypeEmbedding,
    MLMTransform,
    factored_type_table,
)

_TYPES = "embedding.token_type_embeddings"
_FACTORS = ("types.weight", "groups.weight", "projection.weight", "projection.bias")
_TABLE = "bert.embeddings.token_type_embeddings.weight"


@dataclass(frozen=True)
class DomainBertConfig:
    """Architecture of a DomainBERT: the keys of `transformers`' BertConfig, and two for suffixes.

    Attributes:
        vocab_size: V, rows of the embedding of characters.
        hidden_size: D.
        num_hidden_layers: number of blocks.
        num_attention_heads: N.
        intermediate_size: I, inside the feed-forward layer.
        hidden_dropout_prob: dropout of the embeddings and of what each layer adds, in training.
        attention_probs_dropout_prob: dropout of attention weights, in training; it rules out the fast kernels.
        max_position_embeddings: longest name, in tokens. In pretraining, what is beyond has the last position: of
            130,602 popular names three have more than 62 characters.
        type_vocab_size: kinds of characters. `transformers` sees this times `num_suffixes`.
        num_suffixes: rows of the embedding of suffixes and classes of the classifier; suffix 0 is unknown.
        suffix_embedding_size: dimensions of a suffix's embedding, before it is projected to D.
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of initial weights.

    Raises:
        UserError: a size below 1, or a hidden size that the heads do not divide.
    """

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 43
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 64
    type_vocab_size: int = 4
    num_suffixes: int = 513
    suffix_embedding_size: int = 64
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        if self.hidden_size % self.num_attention_heads:
            problem = f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
            raise UserError(f"{problem}({self.num_attention_heads})", key="hidden_size", code="bad_size")


SIZES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "small": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {},
}


class Adapter(BertAdapter):
    """The layout of `BertForMaskedLM`, with a pooler, and of the folder `domain_bert` beside it."""

    config_class = DomainBertConfig
    combined = tuple(
        f"{_TYPES}.{name}" for name in ("types.weight", "groups.weight", "projection.weight", "projection.bias")
    )

    @staticmethod
    def read_keys(raw: dict) -> dict:
        """config.json with the kinds of characters in the place of the rows of the table of token types."""
        return raw | {"type_vocab_size": raw["type_vocab_size"] // raw["num_suffixes"]}

    def write_keys(self) -> dict:
        """The config.json, without token ids and dtype."""
        return super().write_keys() | {"type_vocab_size": self.config.type_vocab_size * self.config.num_suffixes}

    def for_encoder(self) -> BertAdapter:
        """That of a BERT with the table of token types."""
        names = {field.name for field in fields(BertConfig)}
        keys = {name: value for name, value in self.write_keys().items() if name in names}
        adapter = BertAdapter(BertConfig(**keys))
        adapter.companions, adapter.stop_ids = self.companions, self.stop_ids
        return adapter

    @cached_property
    def key_map(self) -> KeyMap:
        """Our parameter name -> the tensors that it stacks."""
        config = self.config
        rows = {"types.weight": config.type_vocab_size, "groups.weight": config.num_suffixes}
        rows |= dict.fromkeys(("projection.weight", "projection.bias"), config.hidden_size)
        key_map = {name: parts for name, parts in super().key_map.items() if name != f"{_TYPES}.weight"}
        key_map |= {
            f"{_TYPES}.{name}": [(f"domain_bert/token_type_embeddings.{name}", size)] for name, size in rows.items()
        }
        for kind in ("weight", "bias"):
            key_map[f"document_head.dense.{kind}"] = [(f"bert.pooler.dense.{kind}", config.hidden_size)]
            key_map[f"document_head.out_proj.{kind}"] = [(f"domain_bert/suffix_classifier.{kind}", config.num_suffixes)]
        return key_map

    def normalize_name(self, name: str) -> str | None:
        """A stored tensor's name as `key_map` spells it; the pooler is used."""
        is_ours = name.startswith("bert.pooler.") or "/" in name
        return name if is_ours else super().normalize_name(name)

    def is_constant(self, name: str) -> bool:
        """Whether it is the table that `combine` computes."""
        return name == _TABLE

    def combine(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The table of token types."""
        return {_TABLE: factored_type_table(*(tensors[name] for name in self.combined))}


def from_config(config: DomainBertConfig, seed: int = 0) -> Transformer:
    """A BERT of the characters of domain names; the defaults are DomainBERT base without dropout."""
    types = (config.type_vocab_size, config.num_suffixes, config.suffix_embedding_size, config.hidden_size)
    return Transformer(
        config,
        (post_norm_block(config) for _ in range(config.num_hidden_layers)),
        Adapter(config),
        causal=False,
        norm=nn.Identity(),
        rotary=False,
        embedding=BertEmbedding(
            config.vocab_size,
            config.hidden_size,
            config.max_position_embeddings,
            None,
            type_embedding=FactoredTypeEmbedding(*types),
            repeat_last_position=True,
            eps=config.layer_norm_eps,
            dropout_p=config.hidden_dropout_prob,
        ),
        attention_dropout=config.attention_probs_dropout_prob,
        tied=True,
        head_bias=True,
        head_transform=MLMTransform(config.hidden_size, eps=config.layer_norm_eps),
        document_head=ClassificationHead(config.hidden_size, config.num_suffixes, activation="tanh"),
        seed=seed,
    )


domain_bert = model_builder("domain_bert", DomainBertConfig, SIZES, from_config)
