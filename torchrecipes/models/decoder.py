"""The decoder of LLaMA and its kin: RMSNorm pre-norm, RoPE, grouped-query attention (Touvron et al. 2023,
arXiv:2302.13971), and what their Hugging Face layouts have in common. A family says what its blocks are.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.models.hf_adapter import KeyMap
from torchrecipes.modules import (
    KVCache,
    LMHead,
    RMSNorm,
    choose_attention_backend,
    compute_dtype,
    init_weights,
    rope_cos_sin,
    to_residual_dtype,
)
from torchrecipes.modules.rotary import ROPE_SCALING_KEYS


class Decoder(nn.Module):
    """Embedding, blocks, last norm and head of a causal language model, with initial weights drawn from `seed`.

    Attributes:
        routing: of the last forward pass, what the MoE blocks' routers did: a NamedTuple of tensors with a leading
            dimension for the MoE layers. None for a dense model.
        router_loss: of the last forward pass, what to add to the sum of the tokens' losses for the routers' sake:
            `(router_aux_loss_coef * aux + router_z_loss_coef * z) * tokens`, means over the MoE layers. 0.0 for a
            dense model.

    Args:
        config: has the keys of `LlamaConfig`.
        blocks: called as `block(x_BSD, rotary, backend, cache)`; one that returns (x_BSD, routing) is an MoE block.
        seed: of the initial weights.
    """

    def __init__(self, config: Any, blocks: Iterable[nn.Module], *, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tie_to = self.embedding if config.tie_word_embeddings else None
        bias = getattr(config, "lm_head_bias", False)
        self.head = LMHead(config.hidden_size, config.vocab_size, tie_to=tie_to, bias=bias)
        self.routing, self.router_loss = None, 0.0
        self.init_weights(seed)

    def init_weights(self, seed: int) -> None:
        """Sets every parameter to its initial value; those on the meta device stay as they are."""
        std = self.config.initializer_range
        init_weights(self, seed=seed, std=std, residual_std=std / math.sqrt(2 * self.config.num_hidden_layers))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final hidden states, normalized, as `model.head` takes them. A token sees those before it in its document.

        Args:
            input_ids: `[B, S]` integers.
            position_ids: `[B, S]` or `[1, S]`, each token's position in its document. None: 0 to S - 1 in every row.
            cu_seqlens: `[documents + 1]`, document boundaries over the B * S flattened tokens; see
                `choose_attention_backend`.
                None: every row is one document.
            max_seqlen: upper bound on a document's length. None: S.
            cache: keys and values of the tokens before these, which are added to it at `position_ids`: every row is
                one document then, and no `cu_seqlens` are taken.

        Returns:
            `[B, S, D]`.
        """
        hidden_BSD = to_residual_dtype(self.embedding(input_ids))
        dtype = compute_dtype(hidden_BSD)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if cache is None:
            layers = [None] * len(self.blocks)
            backend = choose_attention_backend(
                cu_seqlens,
                tuple(input_ids.shape),
                max_seqlen=max_seqlen,
                causal=True,
                dropout_p=self.config.attention_dropout if self.training else 0.0,
                device=input_ids.device,
                dtype=dtype,
            )
        else:
            backend, layers = cache.at(position_ids, dtype)
        rotary = rope_cos_sin(
            position_ids, self.config.head_dim, self.config.rope_theta, dtype, self.config.rope_scaling
        )
        routings = []
        for block, layer in zip(self.blocks, layers, strict=True):
            hidden_BSD = block(hidden_BSD, rotary, backend, layer)
            if isinstance(hidden_BSD, tuple):
                hidden_BSD, routing = hidden_BSD
                routings.append(routing)
        if routings:
            self._collect(routings, input_ids.numel())
        return self.norm(hidden_BSD)

    def _collect(self, routings: list, tokens: int) -> None:
        routing = type(routings[0])(*(torch.stack(values) for values in zip(*routings, strict=True)))
        aux = self.config.router_aux_loss_coef * routing.aux_loss.mean()
        self.router_loss = (aux + self.config.router_z_loss_coef * routing.z_loss.mean()) * tokens
        self.routing = type(routing)(*(values.detach() for values in routing))


def complete_attention_keys(config: Any) -> None:
    """Fills in the optional sizes of a family's frozen config, and checks what attention and RoPE need.

    Args:
        config: has `hidden_size`, `num_attention_heads`, `num_key_value_heads`, `head_dim` and `rope_scaling`.

    Raises:
        UserError: head counts and sizes that do not fit each other, or a RoPE scaling that is not known here.
    """
    if config.num_key_value_heads is None:
        object.__setattr__(config, "num_key_value_heads", config.num_attention_heads)
    if config.head_dim is None:
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads "
                f"({config.num_attention_heads}), or head_dim be given"
            )
        object.__setattr__(config, "head_dim", config.hidden_size // config.num_attention_heads)
    if config.head_dim % 2:
        raise UserError(f"the size of a head, head_dim ({config.head_dim}), must be even, for RoPE")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"num_key_value_heads ({config.num_key_value_heads}) must divide "
            f"num_attention_heads ({config.num_attention_heads})"
        )
    if config.rope_scaling is not None:
        _check_rope_scaling(config.rope_scaling)


def _check_rope_scaling(scaling: dict) -> None:
    kind = scaling.get("rope_type")
    if kind not in ROPE_SCALING_KEYS:
        raise UserError(f"rope_scaling: rope_type {kind!r} is not supported; {', '.join(ROPE_SCALING_KEYS)} are")
    wanted = {"rope_type", *ROPE_SCALING_KEYS[kind]}
    wrong = [f"{key} is missing" for key in sorted(wanted - set(scaling))]
    wrong += [f"{key} is not known here" for key in sorted(set(scaling) - wanted)]
    values = {key: value for key, value in scaling.items() if key in wanted - {"rope_type"}}
    wrong += [
        f"{key}: {value!r} is not a number above 0"
        for key, value in values.items()
        if type(value) not in (int, float) or value <= 0
    ]
    if wrong:
        raise UserError(f"rope_scaling of rope_type {kind}: {'; '.join(wrong)}")


# The Hugging Face key_map.


def read_rope_keys(raw: dict) -> dict:
    """config.json with RoPE in one form, `rope_theta` and `rope_scaling`: transformers 5 has one key for both."""
    keys = dict(raw)
    rope = dict(keys.pop("rope_parameters", None) or {})
    if "rope_theta" in rope:
        keys["rope_theta"] = rope.pop("rope_theta")
    scaling = keys.pop("rope_scaling", None) or rope
    if isinstance(scaling, dict):
        scaling = dict(scaling)
        if "type" in scaling:
            scaling.setdefault("rope_type", scaling.pop("type"))  # before transformers 4.43
        scaling.pop("rope_theta", None)
        if scaling in ({}, {"rope_type": "default"}):
            scaling = None
    return keys | {"rope_scaling": scaling}


def write_rope_keys(keys: dict) -> dict:
    """The inverse: `rope_parameters`, as transformers 5 writes it."""
    keys = dict(keys)
    scaling = keys.pop("rope_scaling") or {"rope_type": "default"}
    return keys | {"rope_parameters": scaling | {"rope_theta": keys.pop("rope_theta")}}


def decoder_key_map(
    config: Any, mlp: Callable[[int], KeyMap], *, attention_bias: bool = False, qk_norm: str | None = None
) -> KeyMap:
    """The key_map of a family, see `HFAdapter.key_map`.

    Args:
        config: has the keys of `LlamaConfig`.
        mlp: layer -> the key_map of its feed-forward part.
        attention_bias: whether attention has biases.
        qk_norm: as in `SelfAttention`.
    """
    hidden = config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    key_map = {"embedding.weight": [("model.embed_tokens.weight", config.vocab_size)]}
    for i in range(config.num_hidden_layers):
        local, hf = f"blocks.{i}", f"model.layers.{i}"
        for kind in ("weight", "bias") if attention_bias else ("weight",):
            key_map[f"{local}.self_attn.qkv_proj.{kind}"] = [
                (f"{hf}.self_attn.q_proj.{kind}", queries),
                (f"{hf}.self_attn.k_proj.{kind}", keys),
                (f"{hf}.self_attn.v_proj.{kind}", keys),
            ]
            key_map[f"{local}.self_attn.o_proj.{kind}"] = [(f"{hf}.self_attn.o_proj.{kind}", hidden)]
        same = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        key_map |= {f"{local}.{name}": [(f"{hf}.{name}", hidden)] for name in same}
        if qk_norm:
            widths = (queries, keys) if qk_norm == "all" else (config.head_dim, config.head_dim)
            for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
                key_map[f"{local}.self_attn.{name}.weight"] = [(f"{hf}.self_attn.{name}.weight", width)]
        key_map |= mlp(i)
    key_map["norm.weight"] = [("model.norm.weight", hidden)]
    if not config.tie_word_embeddings:
        key_map["head.decoder.weight"] = [("lm_head.weight", config.vocab_size)]
    if getattr(config, "lm_head_bias", False):
        key_map["head.bias"] = [("lm_head.bias", config.vocab_size)]
    return key_map


def swiglu_key_map(layer: int, hidden: int, inner: int, *, bias: bool = False) -> KeyMap:
    """The key_map of a layer whose feed-forward part is a `SwiGLU` of that size."""
    local, hf = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp"
    key_map = {}
    for kind in ("weight", "bias") if bias else ("weight",):
        key_map[f"{local}.gate_up_proj.{kind}"] = [
            (f"{hf}.gate_proj.{kind}", inner),
            (f"{hf}.up_proj.{kind}", inner),
        ]
        key_map[f"{local}.down_proj.{kind}"] = [(f"{hf}.down_proj.{kind}", hidden)]
    return key_map


def normalize_name(name: str) -> str | None:
    """A tensor's name as `decoder_key_map` spells it, whatever class saved it; None for what can be computed."""
    if name.startswith(("embed_tokens.", "layers.", "norm.")):
        name = f"model.{name}"  # saved by the class without a head
    return None if name.endswith(".rotary_emb.inv_freq") else name
