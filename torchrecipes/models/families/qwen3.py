"""Qwen3: LLaMA's decoder with a norm on the queries and keys of every head (Yang et al. 2025, arXiv:2505.09388)."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.decoder import (
    Decoder,
    complete_attention_keys,
    decoder_key_map,
    normalize_name,
    read_rope_keys,
    swiglu_key_map,
    write_rope_keys,
)
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.modules import PreNormBlock, RMSNorm, SelfAttention, SwiGLU


@dataclass(frozen=True)
class Qwen3Config:
    """Architecture of a Qwen3, under the keys and with the defaults of `transformers`' Qwen3Config.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: blocks.
        num_attention_heads: N, query heads.
        intermediate_size: I, inside the feed-forward layer.
        num_key_value_heads: K, divides N. None becomes N.
        head_dim: H; N * H need not be D. None becomes D / N.
        max_position_embeddings: longest document that the model is made for; RoPE itself sets no limit.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they are stretched, see `rope_cos_sin`. None: not.
        rms_norm_eps: of every RMSNorm.
        attention_bias: whether the projections of attention have biases.
        attention_dropout: of attention weights, in training.
        tie_word_embeddings: whether the head shares the embedding's weight.
        initializer_range: standard deviation of initial weights; that of projections into the residual stream is
            divided by the root of 2 L.

    Raises:
        UserError: sizes below 1, head counts and sizes that do not fit each other, or an unknown RoPE scaling.
    """

    model_type: ClassVar[str] = "qwen3"

    vocab_size: int = 151_936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    intermediate_size: int = 22_016
    num_key_value_heads: int | None = 32
    head_dim: int | None = 128
    max_position_embeddings: int = 32_768
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        complete_attention_keys(self)


def _network(config: Qwen3Config, seed: int = 0) -> Decoder:
    return Decoder(config, (_block(config) for _ in range(config.num_hidden_layers)), seed=seed)


def _block(config: Qwen3Config) -> PreNormBlock:
    return PreNormBlock(
        self_attn=SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            qk_norm="head",
            norm_eps=config.rms_norm_eps,
        ),
        mlp=SwiGLU(config.hidden_size, config.intermediate_size),
        attention_norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        mlp_norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
    )


def qwen3(
    vocab_size: int,
    hidden_size: int = 1024,
    num_hidden_layers: int = 28,
    num_attention_heads: int = 16,
    intermediate_size: int = 3072,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    max_position_embeddings: int = 32_768,
    rope_theta: float = 1_000_000.0,
    rope_scaling: dict | None = None,
    rms_norm_eps: float = 1e-6,
    attention_bias: bool = False,
    attention_dropout: float = 0.0,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> Decoder:
    """A Qwen3 of any size; see `Qwen3Config` for the arguments."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=rms_norm_eps,
        attention_bias=attention_bias,
        attention_dropout=attention_dropout,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
    )
    return _network(config, seed=seed)


def qwen3_0_6b(
    vocab_size: int = 151_936, max_position_embeddings: int = 40_960, tie_word_embeddings: bool = True, seed: int = 0
) -> Decoder:
    """28 layers of 1024: 596,049,920 parameters at the default vocabulary, 751,632,384 untied."""
    return qwen3(
        vocab_size,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=3072,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        seed=seed,
    )


def qwen3_tiny(
    vocab_size: int = 8192, max_position_embeddings: int = 512, tie_word_embeddings: bool = True, seed: int = 0
) -> Decoder:
    """2 layers of 128, for tests and first looks: 1,411,840 parameters at the default vocabulary."""
    return qwen3(
        vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=344,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        rope_theta=10_000.0,
        tie_word_embeddings=tie_word_embeddings,
        seed=seed,
    )


# The Hugging Face key_map.


def read_keys(raw: dict) -> dict:
    """The keys of config.json without those that say that no layer has a sliding window."""
    keys = read_rope_keys(raw)
    if not keys.get("use_sliding_window", False):
        keys.pop("sliding_window", None)
        keys.pop("max_window_layers", None)
        if set(keys.get("layer_types") or ()) <= {"full_attention"}:
            keys.pop("layer_types", None)
    return keys


def _write_keys(config: Qwen3Config) -> dict:
    """The keys of config.json that describe the network."""
    return write_rope_keys(asdict(config)) | {"hidden_act": "silu", "use_sliding_window": False}


def _key_map(config: Qwen3Config) -> KeyMap:
    mlp = partial(swiglu_key_map, hidden=config.hidden_size, inner=config.intermediate_size)
    return decoder_key_map(config, mlp, attention_bias=config.attention_bias, qk_norm="head")


HF_ADAPTER = HFAdapter(
    architecture="Qwen3ForCausalLM",
    config_class=Qwen3Config,
    network=_network,
    key_map=_key_map,
    normalize_name=normalize_name,
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    read_keys=read_keys,
    write_keys=_write_keys,
    fixed={"hidden_act": ("silu",), "use_sliding_window": (False,)},
    ignored=frozenset(),
    head="language-model head",
)
