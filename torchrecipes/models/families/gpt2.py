"""GPT-2: a pre-norm decoder with learned positions, GELU and LayerNorm (Radford et al. 2019, "Language models are
unsupervised multitask learners").
"""

import math
import re
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.models.compatibility import check_sizes
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.modules import (
    GeluMLP,
    KVCache,
    LayerNorm,
    LMHead,
    PreNormBlock,
    SelfAttention,
    choose_attention_backend,
    compute_dtype,
    init_weights,
    to_residual_dtype,
)


@dataclass(frozen=True)
class GPT2Config:
    """Architecture of a GPT-2, with the defaults of `transformers`' GPT2Config and the sizes' names of other families.

    In config.json they are n_embd, n_layer, n_head, n_inner and n_positions, and transformers takes either.

    Attributes:
        vocab_size: V, rows of the token embedding.
        hidden_size: D.
        num_hidden_layers: blocks.
        num_attention_heads: N.
        intermediate_size: I, inside the feed-forward layer. None becomes 4 D.
        max_position_embeddings: longest document, in tokens.
        embd_pdrop: dropout of the embeddings, in training.
        attn_pdrop: of attention weights.
        resid_pdrop: of what attention and feed-forward layers add.
        layer_norm_epsilon: of every LayerNorm.
        tie_word_embeddings: whether the head shares the embedding's weight.
        attention_bias: whether the projections of attention have biases. A key of local: `transformers` always has
            them, and starts those that a folder does not have at 0, which is the same.
        lm_head_bias: whether the head has a bias. A key of local: `transformers` loads such a model without its bias.
        initializer_range: standard deviation of initial weights; that of projections into the residual stream is
            divided by the root of 2 L.

    Raises:
        UserError: a size below 1, or a hidden size that the heads do not divide.
    """

    model_type: ClassVar[str] = "gpt2"

    vocab_size: int = 50_257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = True
    lm_head_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )


class GPT2(nn.Module):
    """The network of a `GPT2Config`, with initial weights drawn from `seed`.

    Attributes:
        routing, router_loss: None and 0.0, as of every dense decoder.
    """

    def __init__(self, config: GPT2Config, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.num_hidden_layers))
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        tie_to = self.embedding if config.tie_word_embeddings else None
        self.head = LMHead(config.hidden_size, config.vocab_size, tie_to=tie_to, bias=config.lm_head_bias)
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
            position_ids: `[B, S]` or `[1, S]`, each token's position in its document, below `max_position_embeddings`.
                None: 0 to S - 1 in every row.
            cu_seqlens: `[documents + 1]`, document boundaries over the B * S flattened tokens; see
                `choose_attention_backend`.
                None: every row is one document.
            max_seqlen: upper bound on a document's length. None: S.
            cache: keys and values of the tokens before these, which are added to it at `position_ids`: every row is
                one document then, and no `cu_seqlens` are taken.

        Returns:
            `[B, S, D]`.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden_BSD = to_residual_dtype(self.embedding(input_ids) + self.position_embedding(position_ids))
        hidden_BSD = F.dropout(hidden_BSD, self.config.embd_pdrop, self.training)
        dtype = compute_dtype(hidden_BSD)
        if cache is None:
            layers = [None] * len(self.blocks)
            backend = choose_attention_backend(
                cu_seqlens,
                tuple(input_ids.shape),
                max_seqlen=max_seqlen,
                causal=True,
                dropout_p=self.config.attn_pdrop if self.training else 0.0,
                device=input_ids.device,
                dtype=dtype,
            )
        else:
            backend, layers = cache.at(position_ids, dtype)
        for block, layer in zip(self.blocks, layers, strict=True):
            hidden_BSD = block(hidden_BSD, None, backend, layer)
        return self.norm(hidden_BSD)


def _block(config: GPT2Config) -> PreNormBlock:
    return PreNormBlock(
        self_attn=SelfAttention(config.hidden_size, config.num_attention_heads, bias=config.attention_bias),
        mlp=GeluMLP(config.hidden_size, config.intermediate_size, approximate="tanh"),
        attention_norm=LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
        mlp_norm=LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
        dropout_p=config.resid_pdrop,
    )


def gpt2(
    vocab_size: int,
    hidden_size: int = 768,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 1024,
    embd_pdrop: float = 0.0,
    attn_pdrop: float = 0.0,
    resid_pdrop: float = 0.0,
    layer_norm_epsilon: float = 1e-5,
    tie_word_embeddings: bool = True,
    attention_bias: bool = True,
    lm_head_bias: bool = False,
    initializer_range: float = 0.02,
    seed: int = 0,
) -> GPT2:
    """A GPT-2 of any size; the defaults are those of the small one. See `GPT2Config` for the arguments.

    The dropouts default to 0, not to GPT-2's 0.1: training that sees its data about once gains nothing from them, and
    dropout on attention weights rules out the fast kernels.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        embd_pdrop=embd_pdrop,
        attn_pdrop=attn_pdrop,
        resid_pdrop=resid_pdrop,
        layer_norm_epsilon=layer_norm_epsilon,
        tie_word_embeddings=tie_word_embeddings,
        attention_bias=attention_bias,
        lm_head_bias=lm_head_bias,
        initializer_range=initializer_range,
    )
    return GPT2(config, seed=seed)


def gpt2_small(
    vocab_size: int = 50_257,
    embd_pdrop: float = 0.0,
    attn_pdrop: float = 0.0,
    resid_pdrop: float = 0.0,
    max_position_embeddings: int = 1024,
    seed: int = 0,
) -> GPT2:
    """12 layers of 768: 124,439,808 parameters at the default vocabulary."""
    return gpt2(
        vocab_size,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        embd_pdrop=embd_pdrop,
        attn_pdrop=attn_pdrop,
        resid_pdrop=resid_pdrop,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


def gpt2_medium(
    vocab_size: int = 50_257,
    embd_pdrop: float = 0.0,
    attn_pdrop: float = 0.0,
    resid_pdrop: float = 0.0,
    max_position_embeddings: int = 1024,
    seed: int = 0,
) -> GPT2:
    """24 layers of 1024: 354,823,168 parameters at the default vocabulary."""
    return gpt2(
        vocab_size,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        embd_pdrop=embd_pdrop,
        attn_pdrop=attn_pdrop,
        resid_pdrop=resid_pdrop,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


def gpt2_large(
    vocab_size: int = 50_257,
    embd_pdrop: float = 0.0,
    attn_pdrop: float = 0.0,
    resid_pdrop: float = 0.0,
    max_position_embeddings: int = 1024,
    seed: int = 0,
) -> GPT2:
    """36 layers of 1280: 774,030,080 parameters at the default vocabulary."""
    return gpt2(
        vocab_size,
        hidden_size=1280,
        num_hidden_layers=36,
        num_attention_heads=20,
        embd_pdrop=embd_pdrop,
        attn_pdrop=attn_pdrop,
        resid_pdrop=resid_pdrop,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


def gpt2_xl(
    vocab_size: int = 50_257,
    embd_pdrop: float = 0.0,
    attn_pdrop: float = 0.0,
    resid_pdrop: float = 0.0,
    max_position_embeddings: int = 1024,
    seed: int = 0,
) -> GPT2:
    """48 layers of 1600: 1,557,611,200 parameters at the default vocabulary."""
    return gpt2(
        vocab_size,
        hidden_size=1600,
        num_hidden_layers=48,
        num_attention_heads=25,
        embd_pdrop=embd_pdrop,
        attn_pdrop=attn_pdrop,
        resid_pdrop=resid_pdrop,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


def gpt2_tiny(
    vocab_size: int = 8192,
    embd_pdrop: float = 0.0,
    attn_pdrop: float = 0.0,
    resid_pdrop: float = 0.0,
    max_position_embeddings: int = 512,
    seed: int = 0,
) -> GPT2:
    """2 layers of 128, for tests and first looks: 1,510,912 parameters at the default vocabulary."""
    return gpt2(
        vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        embd_pdrop=embd_pdrop,
        attn_pdrop=attn_pdrop,
        resid_pdrop=resid_pdrop,
        max_position_embeddings=max_position_embeddings,
        seed=seed,
    )


def gpt_750m(
    vocab_size: int = 50_304,
    embd_pdrop: float = 0.0,
    attn_pdrop: float = 0.0,
    resid_pdrop: float = 0.0,
    max_position_embeddings: int = 1024,
    tie_word_embeddings: bool = False,
    lm_head_bias: bool = True,
    seed: int = 0,
) -> GPT2:
    """32 layers of 1280, attention without biases: 759,656,064 parameters at the default vocabulary.

    50,304 of them are the head's bias, which `transformers` does not know: without it an export is exact there.
    """
    return gpt2(
        vocab_size,
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        embd_pdrop=embd_pdrop,
        attn_pdrop=attn_pdrop,
        resid_pdrop=resid_pdrop,
        max_position_embeddings=max_position_embeddings,
        attention_bias=False,
        tie_word_embeddings=tie_word_embeddings,
        lm_head_bias=lm_head_bias,
        seed=seed,
    )


# The Hugging Face key_map.

_KEYS = {  # hf -> local
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
}


def _read_keys(raw: dict) -> dict:
    return {_KEYS.get(key, key): value for key, value in raw.items()}


def _write_keys(config: GPT2Config) -> dict:
    """The keys of config.json that describe the network; those of local only where they say something."""
    hf = {local: key for key, local in _KEYS.items()}
    keys = {hf.get(key, key): value for key, value in asdict(config).items()}
    for key, usual in (("attention_bias", True), ("lm_head_bias", False)):
        if keys[key] is usual:
            del keys[key]
    return keys | {"activation_function": "gelu_new"}


def _key_map(config: GPT2Config) -> KeyMap:
    hidden, inner = config.hidden_size, config.intermediate_size
    key_map = {
        "embedding.weight": [("transformer.wte.weight", config.vocab_size)],
        "position_embedding.weight": [("transformer.wpe.weight", config.max_position_embeddings)],
    }
    names = {
        "input_layernorm": ("ln_1", hidden),
        "self_attn.qkv_proj": ("attn.c_attn", 3 * hidden),
        "self_attn.o_proj": ("attn.c_proj", hidden),
        "post_attention_layernorm": ("ln_2", hidden),
        "mlp.up_proj": ("mlp.c_fc", inner),
        "mlp.down_proj": ("mlp.c_proj", hidden),
    }
    for i in range(config.num_hidden_layers):
        for local, (hf, rows) in names.items():
            for kind in ("weight", "bias"):
                if kind == "weight" or config.attention_bias or not local.startswith("self_attn"):
                    key_map[f"blocks.{i}.{local}.{kind}"] = [(f"transformer.h.{i}.{hf}.{kind}", rows)]
    key_map |= {f"norm.{kind}": [(f"transformer.ln_f.{kind}", hidden)] for kind in ("weight", "bias")}
    if not config.tie_word_embeddings:
        key_map["head.decoder.weight"] = [("lm_head.weight", config.vocab_size)]
    if config.lm_head_bias:
        key_map["head.bias"] = [("lm_head.bias", config.vocab_size)]
    return key_map


def _normalize_name(name: str) -> str | None:
    """A tensor's name as `_key_map` spells it, whatever class saved it; None for the causal masks of old ones."""
    if name.startswith(("wte.", "wpe.", "h.", "ln_f.")):
        name = f"transformer.{name}"  # saved by GPT2Model, without a head
    return None if re.search(r"\.attn\.(masked_)?bias$", name) else name


def _transposed(name: str) -> bool:
    """The matrices of the blocks are `Conv1D`s there: [in, out]."""
    return bool(re.search(r"\.c_(attn|proj|fc)\.weight$", name))


HF_ADAPTER = HFAdapter(
    architecture="GPT2LMHeadModel",
    config_class=GPT2Config,
    network=GPT2,
    key_map=_key_map,
    normalize_name=_normalize_name,
    tied=("lm_head.weight", "transformer.wte.weight"),
    read_keys=_read_keys,
    write_keys=_write_keys,
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    # Of classes that summarize a text, the same number twice, and the order of the same operations.
    ignored=frozenset({"n_ctx", "reorder_and_upcast_attn"})
    | {f"summary_{key}" for key in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")},
    transposed=_transposed,
    head="language-model head",
)
