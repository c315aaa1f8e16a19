"""BERT: a post-norm encoder with learned positions, GELU and LayerNorm (Devlin et al. 2018, arXiv:1810.04805).

Masked LM only, with the head tied to the token embedding: no next-sentence prediction, no pooler.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.hf_adapter import HFAdapter
from torchrecipes.modules import (
    BertEmbedding,
    GeluMLP,
    LayerNorm,
    LMHead,
    MLMTransform,
    PostNormBlock,
    SelfAttention,
    choose_attention_backend,
    compute_dtype,
    init_weights,
)


@dataclass(frozen=True)
class BertConfig:
    """Architecture of a BERT, under the keys and with the defaults of `transformers`' BertConfig.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: blocks.
        num_attention_heads: N.
        intermediate_size: I, inside the feed-forward layer.
        hidden_dropout_prob: of what each layer adds and of the embeddings, in training.
        attention_probs_dropout_prob: of attention weights, in training.
        max_position_embeddings: longest document, in tokens.
        type_vocab_size: token types (segments of a pair).
        layer_norm_eps: of every LayerNorm.
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
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )


class Bert(nn.Module):
    """The network of a `BertConfig`, with initial weights drawn from `seed`."""

    def __init__(self, config: BertConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = BertEmbedding(
            config.vocab_size,
            config.hidden_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            eps=config.layer_norm_eps,
            dropout_p=config.hidden_dropout_prob,
        )
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.num_hidden_layers))
        self.head = LMHead(
            config.hidden_size,
            config.vocab_size,
            tie_to=self.embedding.word_embeddings,
            bias=True,
            transform=MLMTransform(config.hidden_size, eps=config.layer_norm_eps),
        )
        self.init_weights(seed)

    def init_weights(self, seed: int) -> None:
        """Sets every parameter to its initial value; those on the meta device stay as they are."""
        init_weights(self, seed=seed, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states, as `model.head` takes them.

        Args:
            input_ids: `[B, S]` integers.
            position_ids: `[B, S]`, each token's position in its document, below `max_position_embeddings`.
                None: 0 to S - 1 in every row.
            cu_seqlens: `[documents + 1]`, document boundaries over the B * S flattened tokens; see
                `choose_attention_backend`.
                None: every row is one document.
            max_seqlen: upper bound on a document's length. None: S.
            token_type_ids: `[B, S]`. None: type 0 everywhere.

        Returns:
            `[B, S, D]`.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden_BSD = self.embedding(input_ids, position_ids, token_type_ids)
        backend = choose_attention_backend(
            cu_seqlens,
            tuple(input_ids.shape),
            max_seqlen=max_seqlen,
            dropout_p=self.config.attention_probs_dropout_prob if self.training else 0.0,
            device=input_ids.device,
            dtype=compute_dtype(hidden_BSD),
        )
        for block in self.blocks:
            hidden_BSD = block(hidden_BSD, None, backend)
        return hidden_BSD


def _block(config: BertConfig) -> PostNormBlock:
    return PostNormBlock(
        self_attn=SelfAttention(config.hidden_size, config.num_attention_heads, bias=True),
        mlp=GeluMLP(config.hidden_size, config.intermediate_size),
        attention_norm=LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
        mlp_norm=LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
        dropout_p=config.hidden_dropout_prob,
    )


def bert(
    vocab_size: int,
    hidden_size: int = 768,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    intermediate_size: int = 3072,
    hidden_dropout_prob: float = 0.0,
    attention_probs_dropout_prob: float = 0.0,
    max_position_embeddings: int = 512,
    type_vocab_size: int = 2,
    layer_norm_eps: float = 1e-12,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> Bert:
    """A BERT of any size; the defaults are BERT base. See `BertConfig` for the arguments.

    Both dropouts default to 0, not to the 0.1 of the paper: training that sees its data about once gains nothing from
    them (Geiping and Goldstein 2022, arXiv:2212.14034), and dropout on attention weights rules out the fast kernels.
    """
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        hidden_dropout_prob=hidden_dropout_prob,
        attention_probs_dropout_prob=attention_probs_dropout_prob,
        max_position_embeddings=max_position_embeddings,
        type_vocab_size=type_vocab_size,
        layer_norm_eps=layer_norm_eps,
        initializer_range=initializer_range,
    )
    return Bert(config, seed=seed)


def bert_base(
    vocab_size: int = 30_522,
    hidden_dropout_prob: float = 0.0,
    attention_probs_dropout_prob: float = 0.0,
    max_position_embeddings: int = 512,
    seed: int = 0,
) -> Bert:
    """12 layers of 768: 109,514,298 parameters at the default vocabulary."""
    return bert(
        vocab_size,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_dropout_prob=hidden_dropout_prob,
        attention_probs_dropout_prob=attention_probs_dropout_prob,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


def bert_small(
    vocab_size: int = 30_522,
    hidden_dropout_prob: float = 0.0,
    attention_probs_dropout_prob: float = 0.0,
    max_position_embeddings: int = 512,
    seed: int = 0,
) -> Bert:
    """4 layers of 512 (Turc et al. 2019, arXiv:1908.08962): 28,795,194 parameters at the default vocabulary."""
    return bert(
        vocab_size,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=2048,
        hidden_dropout_prob=hidden_dropout_prob,
        attention_probs_dropout_prob=attention_probs_dropout_prob,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


def bert_mini(
    vocab_size: int = 30_522,
    hidden_dropout_prob: float = 0.0,
    attention_probs_dropout_prob: float = 0.0,
    max_position_embeddings: int = 512,
    seed: int = 0,
) -> Bert:
    """4 layers of 256 (Turc et al. 2019, arXiv:1908.08962): 11,201,594 parameters at the default vocabulary."""
    return bert(
        vocab_size,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        hidden_dropout_prob=hidden_dropout_prob,
        attention_probs_dropout_prob=attention_probs_dropout_prob,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


def bert_tiny(
    vocab_size: int = 30_522,
    hidden_dropout_prob: float = 0.0,
    attention_probs_dropout_prob: float = 0.0,
    max_position_embeddings: int = 512,
    seed: int = 0,
) -> Bert:
    """2 layers of 128 (Turc et al. 2019, arXiv:1908.08962): 4,416,698 parameters at the default vocabulary."""
    return bert(
        vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        hidden_dropout_prob=hidden_dropout_prob,
        attention_probs_dropout_prob=attention_probs_dropout_prob,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


# The Hugging Face key_map.


def _write_keys(config: BertConfig) -> dict:
    """The keys of config.json that describe the network."""
    return asdict(config) | {"hidden_act": "gelu", "tie_word_embeddings": True}


def _key_map(config: BertConfig) -> dict[str, list[tuple[str, int]]]:
    """For every parameter of local the tensors of the Hugging Face key_map that it stacks: (name, rows) in order."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    key_map = {
        "embedding.word_embeddings.weight": [("bert.embeddings.word_embeddings.weight", vocab)],
        "embedding.position_embeddings.weight": [
            ("bert.embeddings.position_embeddings.weight", config.max_position_embeddings)
        ],
        "embedding.token_type_embeddings.weight": [
            ("bert.embeddings.token_type_embeddings.weight", config.type_vocab_size)
        ],
    }
    for kind in ("weight", "bias"):
        key_map[f"embedding.norm.{kind}"] = [(f"bert.embeddings.LayerNorm.{kind}", hidden)]
        for i in range(config.num_hidden_layers):
            local, hf = f"blocks.{i}", f"bert.encoder.layer.{i}"
            attention = f"{hf}.attention.self"
            key_map |= {
                f"{local}.self_attn.qkv_proj.{kind}": [
                    (f"{attention}.{part}.{kind}", hidden) for part in ("query", "key", "value")
                ],
                f"{local}.self_attn.o_proj.{kind}": [(f"{hf}.attention.output.dense.{kind}", hidden)],
                f"{local}.attention_norm.{kind}": [(f"{hf}.attention.output.LayerNorm.{kind}", hidden)],
                f"{local}.mlp.up_proj.{kind}": [(f"{hf}.intermediate.dense.{kind}", inner)],
                f"{local}.mlp.down_proj.{kind}": [(f"{hf}.output.dense.{kind}", hidden)],
                f"{local}.mlp_norm.{kind}": [(f"{hf}.output.LayerNorm.{kind}", hidden)],
            }
        key_map[f"head.transform.dense.{kind}"] = [(f"cls.predictions.transform.dense.{kind}", hidden)]
        key_map[f"head.transform.norm.{kind}"] = [(f"cls.predictions.transform.LayerNorm.{kind}", hidden)]
    key_map["head.bias"] = [("cls.predictions.bias", vocab)]
    return key_map


def _normalize_name(name: str) -> str | None:
    """A tensor's name as `_key_map` spells it, whatever class saved it; None for what the network has no use for."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"  # saved by BertModel, without a head
    if name.startswith(("bert.pooler.", "cls.seq_relationship.")) or name == "bert.embeddings.position_ids":
        return None
    if name == "cls.predictions.decoder.bias":
        return "cls.predictions.bias"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


HF_ADAPTER = HFAdapter(
    architecture="BertForMaskedLM",
    config_class=BertConfig,
    network=Bert,
    key_map=_key_map,
    normalize_name=_normalize_name,
    tied=("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    read_keys=dict,
    write_keys=_write_keys,
    fixed={"hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "tie_word_embeddings": (True,)},
    # How the first published models made their pooler.
    ignored=frozenset({"directionality"})
    | {f"pooler_{key}" for key in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")},
)
