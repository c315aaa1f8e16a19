"""LLaMA: a pre-norm decoder with RoPE, SwiGLU and RMSNorm (Touvron et al. 2023, arXiv:2302.13971)."""

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
class LlamaConfig:
    """Architecture of a LLaMA, under the keys and with the defaults of `transformers`' LlamaConfig.

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
        rope_scaling: how they are stretched, see `rope_cos_sin`. None: not.
        rms_norm_eps: of every RMSNorm.
        attention_bias: whether the projections of attention have biases.
        mlp_bias: whether those of the feed-forward layer have.
        attention_dropout: of attention weights, in training.
        tie_word_embeddings: whether the head shares the embedding's weight.
        lm_head_bias: whether the head has a bias. A key of local: `transformers` loads such a model without its bias.
        initializer_range: standard deviation of initial weights; that of projections into the residual stream is
            divided by the root of 2 L.

    Raises:
        UserError: sizes below 1, head counts and sizes that do not fit each other, or an unknown RoPE scaling.
    """

    model_type: ClassVar[str] = "llama"

    vocab_size: int = 32_000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    intermediate_size: int = 11_008
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        complete_attention_keys(self)


def _network(config: LlamaConfig, seed: int = 0) -> Decoder:
    return Decoder(config, (_block(config) for _ in range(config.num_hidden_layers)), seed=seed)


def _block(config: LlamaConfig) -> PreNormBlock:
    return PreNormBlock(
        self_attn=SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
        ),
        mlp=SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias),
        attention_norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        mlp_norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
    )


def llama(
    vocab_size: int,
    hidden_size: int = 4096,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
    intermediate_size: int = 11_008,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    max_position_embeddings: int = 2048,
    rope_theta: float = 10_000.0,
    rope_scaling: dict | None = None,
    rms_norm_eps: float = 1e-6,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    attention_dropout: float = 0.0,
    tie_word_embeddings: bool = False,
    lm_head_bias: bool = False,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> Decoder:
    """A LLaMA of any size; the defaults are those of the 7B. See `LlamaConfig` for the arguments."""
    config = LlamaConfig(
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
        mlp_bias=mlp_bias,
        attention_dropout=attention_dropout,
        tie_word_embeddings=tie_word_embeddings,
        lm_head_bias=lm_head_bias,
        initializer_range=initializer_range,
    )
    return _network(config, seed=seed)


def llama_700m(
    vocab_size: int = 50_304,
    max_position_embeddings: int = 1024,
    tie_word_embeddings: bool = True,
    lm_head_bias: bool = True,
    seed: int = 0,
) -> Decoder:
    """32 layers of 1280, `gpt_750m` in modern form: 698,911,104 parameters at the default vocabulary.

    50,304 of them are the head's bias, which `transformers` does not know: without it an export is exact there.
    """
    return llama(
        vocab_size,
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        intermediate_size=3456,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        lm_head_bias=lm_head_bias,
        seed=seed,
    )


def llama_tiny(
    vocab_size: int = 8192, max_position_embeddings: int = 512, tie_word_embeddings: bool = True, seed: int = 0
) -> Decoder:
    """2 layers of 128, for tests and first looks: 1,411,712 parameters at the default vocabulary."""
    return llama(
        vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=344,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        seed=seed,
    )


# The Hugging Face key_map.


def _write_keys(config: LlamaConfig) -> dict:
    """The keys of config.json that describe the network."""
    keys = write_rope_keys(asdict(config))
    if not config.lm_head_bias:
        del keys["lm_head_bias"]
    return keys | {"hidden_act": "silu"}


def _key_map(config: LlamaConfig) -> KeyMap:
    mlp = partial(swiglu_key_map, hidden=config.hidden_size, inner=config.intermediate_size, bias=config.mlp_bias)
    return decoder_key_map(config, mlp, attention_bias=config.attention_bias)


HF_ADAPTER = HFAdapter(
    architecture="LlamaForCausalLM",
    config_class=LlamaConfig,
    network=_network,
    key_map=_key_map,
    normalize_name=normalize_name,
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    read_keys=read_rope_keys,
    write_keys=_write_keys,
    fixed={"hidden_act": ("silu",)},
    ignored=frozenset({"pretraining_tp"}),  # how to split a product, not what it is
    head="language-model head",
)
