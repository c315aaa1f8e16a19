"""NeoBERT: a pre-norm encoder with RoPE, SwiGLU and RMSNorm (Breton et al. 2025, arXiv:2502.19587).

In `transformers` it is an `eurobert`, the same network under another name, so exports load there without remote code.
Published NeoBERTs (`model_type: neobert`, code of their own) are read as well: their queries, keys and values lie head
by head, and their RoPE rotates neighbours. The bias of their output layer has a place in an `eurobert` with `mlp_bias`
only: exports of them have it, and zeros for the other biases.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from torchrecipes.models.builder import model_builder
from torchrecipes.models.decoder import DecoderAdapter, complete_attention_keys, decoder_block
from torchrecipes.models.stored_tensors import StoredTensor
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import RMSNorm, SwiGLU


@dataclass(frozen=True)
class NeoBertConfig:
    """Architecture of a NeoBERT, under the keys of `transformers`' EuroBertConfig.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: number of blocks.
        num_attention_heads: N, query heads.
        intermediate_size: I, inside the feed-forward layer.
        num_key_value_heads: K, divides N. None: N.
        head_dim: H. None: D / N.
        max_position_embeddings: longest document that the model is made for; RoPE itself sets no limit.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they are stretched, see `rope_cos_sin`. None: not.
        rms_norm_eps: epsilon of every RMSNorm.
        tie_word_embeddings: whether the head shares the embedding's weight.
        lm_head_bias: whether the head has a bias, as the published models have.
        initializer_range: standard deviation of initial weights.

    Raises:
        UserError: sizes below 1, or head counts and sizes that do not fit each other.
    """

    model_type: ClassVar[str] = "eurobert"

    vocab_size: int = 30_522
    hidden_size: int = 768
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    intermediate_size: int = 2048
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        complete_attention_keys(self)


SIZES = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 344,
        "max_position_embeddings": 512,
    },
    "100m": {"vocab_size": 32_000, "num_hidden_layers": 12},
    "base": {},
}


class Adapter(DecoderAdapter):
    """The layout of EuroBERT."""

    architecture = "EuroBertForMaskedLM"
    encoder_architecture = "EuroBertModel"
    encoder_prefix = "model."
    config_class = NeoBertConfig
    required = frozenset({"vocab_size"})
    defaults: ClassVar = {
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    fixed: ClassVar = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "attention_dropout": (0,),
        "hidden_dropout": (0,),
        "mlp_bias": (False,),
        "pretraining_tp": (1,),
        # Of a published `neobert`.
        "rms_norm": (True,),
        "rope": (True,),
        "ngpt": (False,),
        "dropout": (0,),
    }
    ignored = frozenset({"classifier_pooling", "clf_pooling"})
    written: ClassVar = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}

    @staticmethod
    def read_keys(raw: dict) -> dict:
        """The keys of an `eurobert`, or of a published `neobert` under the names of one."""
        if raw["model_type"] == "neobert":
            return _published_keys(raw)
        keys = DecoderAdapter.read_keys(raw)
        if keys.get("lm_head_bias"):
            del keys["mlp_bias"]  # the biases of the MLPs are zeros, see `split`
        return keys

    def write_keys(self) -> dict:
        """As transformers 5 writes it."""
        return super().write_keys() | {"mlp_bias": self.config.lm_head_bias}

    def encoder_config(self) -> NeoBertConfig:
        """Without the head there is no bias of it."""
        return replace(self.config, lm_head_bias=False)

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Beside the bias of the head, zeros for the biases that an `eurobert` with one has."""
        tensors = super().split(name, tensor)
        if name == "head.bias":
            config = self.config
            rows = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
            rows["down_proj"] = config.hidden_size
            for layer in range(config.num_hidden_layers):
                for part, size in rows.items():
                    tensors[f"model.layers.{layer}.mlp.{part}.bias"] = tensor.new_zeros(size)
        return tensors

    def is_constant(self, name: str) -> bool:
        """Whether it is one of the zeros of `split`."""
        return self.config.lm_head_bias and ".mlp." in name and name.endswith(".bias")

    def normalize_name(self, name: str) -> str | None:
        """A stored tensor's name as `key_map` spells it, or `prepare` for what a published model stacks."""
        if name.startswith(("encoder.", "transformer_encoder.", "layer_norm.")):
            name = f"model.{name}"  # a published model without its head
        if name.startswith(("model.encoder.", "model.transformer_encoder.", "model.layer_norm.", "decoder.")):
            for published, ours in _PUBLISHED_NAMES.items():
                name = name.replace(published, ours)
        return super().normalize_name(name)

    def prepare(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Takes the stacked projections of a published model apart."""
        prepared = {}
        for name, tensor in stored.items():
            if name.endswith(".self_attn.qkv.weight"):
                for part, kind in enumerate("qkv"):
                    prepared[name.replace("qkv", f"{kind}_proj")] = self._heads_of(tensor, part)
            elif name.endswith(".mlp.w12.weight"):
                rows, inner = tensor.shape[0] // 2, tensor.shape[1]
                for part, kind in enumerate(("gate_proj", "up_proj")):
                    read = partial(_rows, tensor.read, slice(part * rows, (part + 1) * rows))
                    prepared[name.replace("w12", kind)] = replace(tensor, shape=(rows, inner), read=read)
            else:
                prepared[name] = tensor
        return prepared

    def _heads_of(self, tensor: StoredTensor, part: int) -> StoredTensor:
        """Queries (part 0), keys or values of a published `qkv`, as `SelfAttention` has them."""
        heads = torch.arange(tensor.shape[0]).view(self.config.num_attention_heads, 3, -1)[:, part]
        if part < 2:  # pairs (2 i, 2 i + 1) become (i, i + H / 2)
            heads = torch.cat((heads[:, ::2], heads[:, 1::2]), dim=1)
        rows = heads.flatten()
        return replace(tensor, shape=(len(rows), tensor.shape[1]), read=partial(_rows, tensor.read, rows))


_PUBLISHED_NAMES = {
    "model.encoder.": "model.embed_tokens.",
    "model.transformer_encoder.": "model.layers.",
    "model.layer_norm.": "model.norm.",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    ".qkv.": ".self_attn.qkv.",
    ".wo.": ".self_attn.o_proj.",
    ".ffn.w3.": ".mlp.down_proj.",
    ".ffn.": ".mlp.",
    "decoder.": "lm_head.",
}
# What the network was started from, and what loaded it; its class never ties the output layer.
_PUBLISHED_IGNORED = frozenset(
    """
    kwargs dim_head embedding_init_range decoder_init_range encoder_init_range classifier_init_range
    pretrained_model_name_or_path trust_remote_code base_scale flash_attention tie_word_embeddings
    """.split()
)


def _published_keys(raw: dict) -> dict:
    """A config.json of `chandar-lab/NeoBERT` under the keys of an `eurobert`, with the defaults of its own class."""
    keys = {
        "model_type": "neobert",
        "vocab_size": 30_522,
        "hidden_size": 768,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_length": 1024,
        "norm_eps": 1e-6,
    }
    keys |= {key: value for key, value in raw.items() if key not in _PUBLISHED_IGNORED}
    if str(keys.get("hidden_act")).lower() == "swiglu":
        keys["hidden_act"] = "silu"  # of the gate
    keys["max_position_embeddings"] = keys.get("max_position_embeddings", keys["max_length"])
    keys["rms_norm_eps"] = keys.pop("norm_eps")
    if type(keys["intermediate_size"]) is int:  # of an MLP without gate; SwiGLU has as many weights with two thirds
        keys["intermediate_size"] = -(-(2 * keys["intermediate_size"] // 3) // 8) * 8
    return keys | {"tie_word_embeddings": False, "lm_head_bias": True}


def _rows(read: Callable[[], Tensor], rows: Tensor | slice) -> Tensor:
    return read()[rows]


def from_config(config: NeoBertConfig, seed: int = 0) -> Transformer:
    """A NeoBERT encoder; the defaults are NeoBERT base with a tied head, which the paper does not tie."""
    mlp = (SwiGLU(config.hidden_size, config.intermediate_size) for _ in range(config.num_hidden_layers))
    return Transformer(
        config,
        (decoder_block(config, layer) for layer in mlp),
        Adapter(config),
        causal=False,
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        tied=config.tie_word_embeddings,
        head_bias=config.lm_head_bias,
        seed=seed,
    )


neobert = model_builder("neobert", NeoBertConfig, SIZES, from_config)
