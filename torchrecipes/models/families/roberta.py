"""RoBERTa: BERT with a byte-level vocabulary, one token type, and positions that begin after the id of padding (Liu et
al. 2019, arXiv:1907.11692), and its multilingual form XLM-RoBERTa (Conneau et al. 2020, arXiv:1911.02116).
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import ClassVar

from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models.builder import model_builder
from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.families.bert import encoder_key_map, post_norm_block
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import BertEmbedding, MLMTransform


@dataclass(frozen=True)
class RobertaConfig:
    """Architecture of a RoBERTa, under the keys of `transformers`' RobertaConfig.

    Attributes:
        model_type: `roberta` or `xlm-roberta`: the same network, which `transformers` has under two names.
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: number of blocks.
        num_attention_heads: N.
        intermediate_size: I, inside the feed-forward layer.
        hidden_dropout_prob: dropout of the embeddings and of what each layer adds, in training.
        attention_probs_dropout_prob: dropout of attention weights, in training; it rules out the fast kernels.
        max_position_embeddings: rows of the table of positions: the longest document has `pad_token_id + 1` tokens
            less.
        pad_token_id: position 0 has the row after this one.
        type_vocab_size: token types.
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of initial weights.

    Raises:
        UserError: a size below 1, a hidden size that the heads do not divide, or too few positions.
    """

    model_type: str = "roberta"
    vocab_size: int = 50_265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 514
    pad_token_id: int = 1
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self, may_be_zero=("pad_token_id",))
        if self.model_type not in ("roberta", "xlm-roberta"):
            raise UserError(f"{self.model_type!r} is not roberta or xlm-roberta", key="model_type", code="bad_size")
        if self.hidden_size % self.num_attention_heads:
            problem = f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
            raise UserError(f"{problem}({self.num_attention_heads})", key="hidden_size", code="bad_size")
        if self.max_position_embeddings <= self.pad_token_id + 1:
            problem = f"{self.max_position_embeddings} leaves no position after pad_token_id ({self.pad_token_id})"
            raise UserError(problem, key="max_position_embeddings", code="bad_size")


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
XLM = {"model_type": "xlm-roberta", "vocab_size": 250_002}
SIZES = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 512,
    },
    "base": {},
    "large": LARGE,
    "xlm-base": XLM,
    "xlm-large": XLM | LARGE,
}


class Adapter(HFAdapter):
    """The layout of `RobertaForMaskedLM` and `XLMRobertaForMaskedLM`."""

    config_class = RobertaConfig
    tied = ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight")
    defaults: ClassVar = {
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }
    required = frozenset({"vocab_size"})
    fixed: ClassVar = {
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "tie_word_embeddings": (True,),
    }
    keeps_pad_id = True
    encoder_prefix = "roberta."
    has_pooler = True

    @property
    def architecture(self) -> str:
        """The class of `transformers` that reads the folder."""
        return {"roberta": "RobertaForMaskedLM", "xlm-roberta": "XLMRobertaForMaskedLM"}[self.config.model_type]

    @property
    def encoder_architecture(self) -> str:
        """The class of `transformers` for the model without its head."""
        return {"roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}[self.config.model_type]

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
        key_map = encoder_key_map(self.config, "roberta")
        for kind in ("weight", "bias"):
            key_map[f"head.transform.dense.{kind}"] = [(f"lm_head.dense.{kind}", hidden)]
            key_map[f"head.transform.norm.{kind}"] = [(f"lm_head.layer_norm.{kind}", hidden)]
        return key_map | {"head.bias": [("lm_head.bias", self.config.vocab_size)]}

    def normalize_name(self, name: str) -> str | None:
        """A stored tensor's name as `key_map` spells it; the pooler is not used."""
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = f"roberta.{name}"  # saved by RobertaModel, without a head
        if name.startswith("roberta.pooler.") or name == "roberta.embeddings.position_ids":
            return None
        if name == "lm_head.decoder.bias":
            return "lm_head.bias"
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def from_config(config: RobertaConfig, seed: int = 0) -> Transformer:
    """A RoBERTa encoder; the defaults are RoBERTa base without dropout."""
    offset = config.pad_token_id + 1
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
            config.type_vocab_size,
            position_offset=offset,
            eps=config.layer_norm_eps,
            dropout_p=config.hidden_dropout_prob,
        ),
        position_offset=offset,
        attention_dropout=config.attention_probs_dropout_prob,
        tied=True,
        head_bias=True,
        head_transform=MLMTransform(config.hidden_size, eps=config.layer_norm_eps),
        seed=seed,
    )


roberta = model_builder("roberta", RobertaConfig, SIZES, from_config)
