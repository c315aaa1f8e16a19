"""NeoBERT: a pre-norm encoder with RoPE, SwiGLU and RMSNorm (Breton et al. 2025, arXiv:2502.19587).

To `transformers` it is an `eurobert`, the same network under another name, so exports load there without remote code.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.hf_adapter import HFAdapter
from torchrecipes.modules import (
    LMHead,
    PreNormBlock,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    choose_attention_backend,
    compute_dtype,
    init_weights,
    rope_cos_sin,
    to_residual_dtype,
)


@dataclass(frozen=True)
class NeoBertConfig:
    """Architecture of a NeoBERT, under the keys and with the defaults of `transformers`' EuroBertConfig.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: blocks.
        num_attention_heads: N, query heads.
        intermediate_size: I, inside the feed-forward layer.
        num_key_value_heads: K, divides N. None becomes N.
        head_dim: H. None becomes D / N.
        max_position_embeddings: longest document that the model is made for; RoPE itself sets no limit.
        rope_theta: base of the rotary wavelengths.
        rms_norm_eps: of every RMSNorm.
        tie_word_embeddings: whether the head shares the embedding's weight.
        initializer_range: standard deviation of initial weights.

    Raises:
        UserError: sizes below 1, or head counts and sizes that do not fit each other.
    """

    model_type: ClassVar[str] = "eurobert"

    vocab_size: int
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 8192
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise UserError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}), and the size of a head ({self.head_dim}) even, for RoPE"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )


class NeoBert(nn.Module):
    """The network of a `NeoBertConfig`, with initial weights drawn from `seed`."""

    def __init__(self, config: NeoBertConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tie_to = self.embedding if config.tie_word_embeddings else None
        self.head = LMHead(config.hidden_size, config.vocab_size, tie_to=tie_to)
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
    ) -> Tensor:
        """Final hidden states, normalized, as `model.head` takes them.

        Args:
            input_ids: `[B, S]` integers.
            position_ids: `[B, S]`, each token's position in its document. None: 0 to S - 1 in every row.
            cu_seqlens: `[documents + 1]`, document boundaries over the B * S flattened tokens; see
                `choose_attention_backend`.
                None: every row is one document.
            max_seqlen: upper bound on a document's length. None: S.

        Returns:
            `[B, S, D]`.
        """
        hidden_BSD = to_residual_dtype(self.embedding(input_ids))
        dtype = compute_dtype(hidden_BSD)
        backend = choose_attention_backend(
            cu_seqlens, tuple(input_ids.shape), max_seqlen=max_seqlen, device=input_ids.device, dtype=dtype
        )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotary = rope_cos_sin(position_ids, self.config.head_dim, self.config.rope_theta, dtype)
        for block in self.blocks:
            hidden_BSD = block(hidden_BSD, rotary, backend)
        return self.norm(hidden_BSD)


def _block(config: NeoBertConfig) -> PreNormBlock:
    return PreNormBlock(
        self_attn=SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        ),
        mlp=SwiGLU(config.hidden_size, config.intermediate_size),
        attention_norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        mlp_norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
    )


def neobert(
    vocab_size: int,
    hidden_size: int = 768,
    num_hidden_layers: int = 28,
    num_attention_heads: int = 12,
    intermediate_size: int = 2048,
    num_key_value_heads: int | None = None,
    max_position_embeddings: int = 4096,
    rope_theta: float = 10_000.0,
    rms_norm_eps: float = 1e-5,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> NeoBert:
    """A NeoBERT of any size; the defaults are NeoBERT base with a tied head. See `NeoBertConfig` for the arguments."""
    config = NeoBertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max_position_embeddings,
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
    )
    return NeoBert(config, seed=seed)


def neobert_base(
    vocab_size: int = 30_522, max_position_embeddings: int = 4096, tie_word_embeddings: bool = True, seed: int = 0
) -> NeoBert:
    """28 layers of 768: 221,665,536 parameters at the default vocabulary, 245,106,432 untied as in the paper."""
    return neobert(
        vocab_size,
        hidden_size=768,
        num_hidden_layers=28,
        num_attention_heads=12,
        intermediate_size=2048,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        seed=seed,
    )


def neobert_100m(
    vocab_size: int = 32_000, max_position_embeddings: int = 4096, tie_word_embeddings: bool = True, seed: int = 0
) -> NeoBert:
    """12 layers of 768: 109,529,856 parameters at the default vocabulary."""
    return neobert(
        vocab_size,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=2048,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        seed=seed,
    )


def neobert_tiny(
    vocab_size: int = 8192, max_position_embeddings: int = 512, tie_word_embeddings: bool = True, seed: int = 0
) -> NeoBert:
    """2 layers of 128, for tests and first looks: 1,444,480 parameters at the default vocabulary."""
    return neobert(
        vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=344,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        seed=seed,
    )


# The Hugging Face key_map.


def _read_keys(raw: dict) -> dict:
    """The keys of a config.json with `rope_parameters` (transformers 5) spread out, so that each can be checked."""
    keys = dict(raw)
    for key, value in (keys.pop("rope_parameters", None) or {}).items():
        keys[key if key in ("rope_theta", "rope_type") else f"rope_parameters.{key}"] = value
    return keys


def _write_keys(config: NeoBertConfig) -> dict:
    """The keys of config.json that describe the network."""
    keys = asdict(config)
    keys["rope_parameters"] = {"rope_type": "default", "rope_theta": keys.pop("rope_theta")}
    return keys | {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}


def _key_map(config: NeoBertConfig) -> dict[str, list[tuple[str, int]]]:
    """For every parameter of local the tensors of the Hugging Face key_map that it stacks: (name, rows) in order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    key_map = {"embedding.weight": [("model.embed_tokens.weight", config.vocab_size)]}
    for i in range(config.num_hidden_layers):
        local, hf = f"blocks.{i}", f"model.layers.{i}"
        key_map |= {
            f"{local}.input_layernorm.weight": [(f"{hf}.input_layernorm.weight", hidden)],
            f"{local}.self_attn.qkv_proj.weight": [
                (f"{hf}.self_attn.q_proj.weight", queries),
                (f"{hf}.self_attn.k_proj.weight", keys),
                (f"{hf}.self_attn.v_proj.weight", keys),
            ],
            f"{local}.self_attn.o_proj.weight": [(f"{hf}.self_attn.o_proj.weight", hidden)],
            f"{local}.post_attention_layernorm.weight": [(f"{hf}.post_attention_layernorm.weight", hidden)],
            f"{local}.mlp.gate_up_proj.weight": [
                (f"{hf}.mlp.gate_proj.weight", inner),
                (f"{hf}.mlp.up_proj.weight", inner),
            ],
            f"{local}.mlp.down_proj.weight": [(f"{hf}.mlp.down_proj.weight", hidden)],
        }
    key_map["norm.weight"] = [("model.norm.weight", hidden)]
    if not config.tie_word_embeddings:
        key_map["head.decoder.weight"] = [("lm_head.weight", config.vocab_size)]
    return key_map


def _normalize_name(name: str) -> str:
    """A tensor's name as `_key_map` spells it, whatever class saved it."""
    if name.startswith(("embed_tokens.", "layers.", "norm.")):
        return f"model.{name}"  # saved by EuroBertModel, without a head
    return name


HF_ADAPTER = HFAdapter(
    architecture="EuroBertForMaskedLM",
    config_class=NeoBertConfig,
    network=NeoBert,
    key_map=_key_map,
    normalize_name=_normalize_name,
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    read_keys=_read_keys,
    write_keys=_write_keys,
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attention_dropout": (0,),
        "hidden_dropout": (0,),
        "mlp_bias": (False,),
        "rope_type": ("default",),
        "rope_scaling": (None,),
        "pretraining_tp": (1,),
    },
    # Special tokens as text, how to classify, and the code that EuroBERT needed before transformers 5.
    ignored=frozenset(
        {"bos_token", "eos_token", "pad_token", "mask_token", "classifier_pooling", "clf_pooling", "auto_map"}
    ),
)
