"""Shared parts of the families with RMSNorm, RoPE and SwiGLU: checks, blocks, and their Hugging Face layout.

The layout is that of LLaMA in `transformers`; NeoBERT, an encoder, has it as well.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar

from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import MoE, MoEBlock, PreNormBlock, RMSNorm, SelfAttention
from torchrecipes.modules.rotary import ROPE_SCALING_KEYS


def complete_attention_keys(config: Any) -> None:
    """Fills in the optional sizes of a family's frozen config, and checks what attention and RoPE need.

    Args:
        config: has `hidden_size`, `num_attention_heads`, `num_key_value_heads`, `head_dim`, and may have
            `rope_scaling`.

    Raises:
        UserError: sizes below 1, head counts and sizes that do not fit each other, or an unknown RoPE scaling.
    """
    check_sizes(config)
    heads = config.num_attention_heads
    if config.num_key_value_heads is None:
        object.__setattr__(config, "num_key_value_heads", heads)
    if config.head_dim is None:
        if config.hidden_size % heads:
            problem = f"hidden_size ({config.hidden_size}) is not a multiple of num_attention_heads ({heads})"
            raise UserError(problem, key="hidden_size", hint="Or give head_dim", code="bad_size")
        object.__setattr__(config, "head_dim", config.hidden_size // heads)
    if config.head_dim % 2:
        raise UserError(f"{config.head_dim} is odd, and RoPE rotates pairs", key="head_dim", code="bad_size")
    if heads % config.num_key_value_heads:
        problem = f"{config.num_key_value_heads} does not divide num_attention_heads ({heads})"
        raise UserError(problem, key="num_key_value_heads", code="bad_size")
    if getattr(config, "rope_scaling", None) is not None:
        check_rope_scaling(config.rope_scaling)


def check_rope_scaling(scaling: dict) -> None:
    """Checks the keys of a RoPE scaling.

    Raises:
        UserError: `bad_rope_scaling`.
    """
    kind = scaling.get("rope_type")
    if kind not in ROPE_SCALING_KEYS:
        hint = f"Supported are {', '.join(ROPE_SCALING_KEYS)}"
        raise UserError(f"rope_type {kind!r} is not supported", key="rope_scaling", hint=hint, code="bad_rope_scaling")
    required, optional = ROPE_SCALING_KEYS[kind]
    wrong = [f"{key} is missing" for key in required if key not in scaling]
    wrong += [f"{key} is unknown" for key in sorted(set(scaling) - {"rope_type", *required, *optional})]
    wrong += [
        f"{key}: {value!r} is not a number above 0"
        for key, value in scaling.items()
        if key in {*required, *optional} - {"truncate"} and (type(value) not in (int, float) or value <= 0)
    ]
    if type(scaling.get("truncate", True)) is not bool:
        wrong.append(f"truncate: {scaling['truncate']!r} is not true or false")
    if wrong:
        raise UserError(f"rope_type {kind}: {'; '.join(wrong)}", key="rope_scaling", code="bad_rope_scaling")


def decoder_block(config: Any, mlp: nn.Module, *, qk_norm: str | None = None, qkv_bias: bool = False) -> PreNormBlock:
    """A block with `SelfAttention` and RMSNorm by the config's keys.

    Args:
        config: of the family.
        mlp: the feed-forward part.
        qk_norm: as in `SelfAttention`.
        qkv_bias: queries, keys and values have biases, the output has none, whatever `config.attention_bias` is.
    """
    return (MoEBlock if isinstance(mlp, MoE) else PreNormBlock)(
        self_attn=SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=qkv_bias or getattr(config, "attention_bias", False),
            o_bias=False if qkv_bias else None,
            qk_norm=qk_norm,
            norm_eps=config.rms_norm_eps,
        ),
        mlp=mlp,
        attention_norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        mlp_norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
    )


def decoder(
    config: Any, block: Callable[[int], nn.Module], adapter: HFAdapter, seed: int, window: int | None = None
) -> Transformer:
    """A causal model of such blocks; `block(layer)` builds one, and `window` is that of all of them."""
    return Transformer(
        config,
        (block(layer) for layer in range(config.num_hidden_layers)),
        adapter,
        causal=True,
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        windows=[window] * config.num_hidden_layers,
        attention_dropout=config.attention_dropout,
        tied=config.tie_word_embeddings,
        head_bias=getattr(config, "lm_head_bias", False),
        seed=seed,
    )


def rope_scaling(stored: Any, max_positions: int | None) -> Any:
    """The scaling of RoPE in a config.json of any version of `transformers`, as `rope_cos_sin` takes it.

    Args:
        stored: its `rope_scaling`, or its `rope_parameters` without `rope_theta`.
        max_positions: its `max_position_embeddings`: the original length where the scaling does not name one.
    """
    if not isinstance(stored, dict):
        return stored
    scaling = {key: value for key, value in stored.items() if key != "rope_theta" and value is not None}
    if "type" in scaling:
        kind = scaling.pop("type")  # before transformers 4.43
        scaling.setdefault("rope_type", kind)
    if scaling in ({}, {"rope_type": "default"}):
        return None
    if scaling.get("rope_type") in ("yarn", "llama3") and max_positions is not None:
        scaling.setdefault("original_max_position_embeddings", max_positions)
    return scaling


def without_sliding_window(keys: dict) -> dict:
    """The keys of a config.json whose `use_sliding_window` is false, without the window's other settings."""
    if not keys.get("use_sliding_window", False):
        full = set(keys.get("layer_types") or ()) <= {"full_attention"}
        unused = {"sliding_window", "max_window_layers"} | ({"layer_types"} if full else set())
        keys = {key: value for key, value in keys.items() if key not in unused}
    return keys


class DecoderAdapter(HFAdapter):
    """The layout of LLaMA and the families like it, with SwiGLU layers; others override `mlp_key_map`."""

    tied = ("lm_head.weight", "model.embed_tokens.weight")
    written: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}  # keys of config.json that are always the same
    optional: ClassVar[frozenset[str]] = frozenset({"lm_head_bias", "router_z_loss_coef"})  # ours; written if set
    qk_norm: str | None = None
    qkv_bias: bool = False

    @staticmethod
    def read_keys(raw: dict) -> dict:
        """RoPE in one form, `rope_theta` and `rope_scaling`: transformers 5 has one key for both."""
        keys = dict(raw)
        rope = dict(keys.pop("rope_parameters", None) or {})
        if "rope_theta" in rope:
            keys["rope_theta"] = rope.pop("rope_theta")
        scaling = keys.pop("rope_scaling", None) or rope
        return keys | {"rope_scaling": rope_scaling(scaling, keys.get("max_position_embeddings"))}

    def write_keys(self) -> dict:
        """As transformers 5 writes it, with `rope_parameters`."""
        keys = {key: value for key, value in asdict(self.config).items() if value or key not in self.optional}
        rope = keys.pop("rope_scaling", None) or {"rope_type": "default"}
        keys["rope_parameters"] = rope | {"rope_theta": keys.pop("rope_theta")}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()} | self.written

    @cached_property
    def key_map(self) -> KeyMap:
        """Our parameter name -> the tensors that it stacks."""
        config = self.config
        hidden, size = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        key_map = {"embedding.weight": [("model.embed_tokens.weight", config.vocab_size)]}
        for layer in range(config.num_hidden_layers):
            ours, hf = f"blocks.{layer}", f"model.layers.{layer}"
            bias = getattr(config, "attention_bias", False)
            for kind in ("weight", "bias") if bias or self.qkv_bias else ("weight",):
                key_map[f"{ours}.self_attn.qkv_proj.{kind}"] = [
                    (f"{hf}.self_attn.q_proj.{kind}", queries),
                    (f"{hf}.self_attn.k_proj.{kind}", keys),
                    (f"{hf}.self_attn.v_proj.{kind}", keys),
                ]
                if kind == "weight" or bias:
                    key_map[f"{ours}.self_attn.o_proj.{kind}"] = [(f"{hf}.self_attn.o_proj.{kind}", hidden)]
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                key_map[f"{ours}.{name}"] = [(f"{hf}.{name}", hidden)]
            if self.qk_norm:
                widths = (queries, keys) if self.qk_norm == "all" else (size, size)
                for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
                    key_map[f"{ours}.self_attn.{name}.weight"] = [(f"{hf}.self_attn.{name}.weight", width)]
            key_map |= self.mlp_key_map(layer)
        key_map["norm.weight"] = [("model.norm.weight", hidden)]
        if not config.tie_word_embeddings:
            key_map["head.decoder.weight"] = [("lm_head.weight", config.vocab_size)]
        if getattr(config, "lm_head_bias", False):
            key_map["head.bias"] = [("lm_head.bias", config.vocab_size)]
        return key_map

    def mlp_key_map(self, layer: int) -> KeyMap:
        """The part of `key_map` for a layer's feed-forward part."""
        bias = getattr(self.config, "mlp_bias", False)
        return swiglu_key_map(f"layers.{layer}.mlp", self.config.hidden_size, self.config.intermediate_size, bias=bias)

    def normalize_name(self, name: str) -> str | None:
        """Adds the prefix that the class without a head leaves out; rotary frequencies can be computed."""
        if name.startswith(("embed_tokens.", "layers.", "norm.")):
            name = f"model.{name}"
        return None if name.endswith(".rotary_emb.inv_freq") else name


def swiglu_key_map(path: str, hidden: int, inner: int, *, bias: bool = False) -> KeyMap:
    """The layout of a `SwiGLU` at `path`, such as `layers.0.mlp`."""
    ours, hf = path.replace("layers.", "blocks.", 1), f"model.{path}"
    key_map = {}
    for kind in ("weight", "bias") if bias else ("weight",):
        key_map[f"{ours}.gate_up_proj.{kind}"] = [(f"{hf}.gate_proj.{kind}", inner), (f"{hf}.up_proj.{kind}", inner)]
        key_map[f"{ours}.down_proj.{kind}"] = [(f"{hf}.down_proj.{kind}", hidden)]
    return key_map
