"""`Transformer`: the one network behind the families: embedding, blocks, final norm, head."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.models.encoder_adapter import EncoderAdapter
from torchrecipes.models.hf_adapter import HFAdapter
from torchrecipes.modules import (
    BertEmbedding,
    FactoredTypeEmbedding,
    KVCache,
    LMHead,
    choose_attention_backend,
    compute_dtype,
    init_weights,
    rope_cos_sin,
    to_residual_dtype,
)
from torchrecipes.modules.cpu.dropout import dropout

ENCODERS = ("neobert", "modernbert", "bert", "roberta", "distilbert", "domain_bert")


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head, with initial weights drawn from `seed`.

    Attributes:
        hf_adapter: the Hugging Face layout of the family.
        head: the output layer, an `LMHead`; None after `remove_head`.
        document_head: classifies documents by the state of their first token; None: there is none.
        routing: what the routers of the MoE blocks did in the last forward pass: a NamedTuple of tensors with a leading
            dimension for the MoE layers. None for a dense model.
        router_loss: what to add to the sum of the tokens' losses for the routers' sake, from the last forward pass:
            `(router_aux_loss_coef * aux + router_z_loss_coef * z) * tokens`, means over the MoE layers. 0.0 for a
            dense model.
        residual_dtype: of the residual stream under autocast; None: see `to_residual_dtype`.

    Args:
        config: the family's, with `vocab_size`, `hidden_size`, `num_hidden_layers` and `initializer_range`.
        blocks: called as `block(x_BSD, rotary, backend, cache)`; one that returns (x_BSD, routing) is an MoE block.
        hf_adapter: see above.
        causal: whether a token sees only the tokens before it. In such a decoder the projections into the residual
            stream start smaller by `sqrt(2 L)`, as in GPT-2.
        norm: applied to the last block's output.
        rotary: whether positions are rotations of queries and keys, by `config.rope_theta` and `config.rope_scaling`.
        windows: for every block, how far away from itself a token sees others (`attention`), or None: without bound.
            None: no block has a window.
        local_rope_theta: base of the rotary wavelengths of the blocks with a window. None: as in the others.
        embedding: of tokens; None: an `nn.Embedding`.
        position_embedding: added to it, or None.
        position_offset: rows of the table of positions before the one of position 0.
        embedding_dropout, attention_dropout: probabilities in training, of an element of the embeddings' sum and of an
            attention weight.
        tied: whether the head shares the token embedding's weight.
        head_bias, head_transform: see `LMHead`.
        document_head: see above.
        seed: of the initial weights.
    """

    def __init__(
        self,
        config: Any,
        blocks: Iterable[nn.Module],
        hf_adapter: HFAdapter,
        *,
        causal: bool,
        norm: nn.Module,
        rotary: bool = True,
        windows: Sequence[int | None] | None = None,
        local_rope_theta: float | None = None,
        embedding: BertEmbedding | None = None,
        position_embedding: nn.Embedding | None = None,
        position_offset: int = 0,
        embedding_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        tied: bool,
        head_bias: bool = False,
        head_transform: nn.Module | None = None,
        document_head: nn.Module | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.config, self.hf_adapter, self.causal, self.rotary = config, hf_adapter, causal, rotary
        self.embedding_dropout, self.attention_dropout = embedding_dropout, attention_dropout
        self.embedding = embedding or nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = position_embedding
        self.blocks = nn.ModuleList(blocks)
        self.windows = tuple(windows or [None] * len(self.blocks))
        self.local_rope_theta = local_rope_theta
        self.norm = norm
        words = self.embedding if embedding is None else embedding.word_embeddings
        self.head = LMHead(
            config.hidden_size,
            config.vocab_size,
            tie_to=words if tied else None,
            bias=head_bias,
            transform=head_transform,
        )
        self.document_head = document_head
        self.position_offset = position_offset
        self.routing, self.router_loss = None, 0.0
        self.residual_dtype: torch.dtype | None = None
        self.init_weights(seed)

    def remove_head(self) -> None:
        """Removes the heads: they become None, and the layout that of the encoder alone.

        Raises:
            UserError: the model is a decoder (code `not_an_encoder`).
        """
        if self.causal:
            name = self.config.model_type
            problem = f"{name} is a decoder: a token sees none of the later ones, so an encoder cannot be made of it"
            hint = f"Use one of {', '.join(ENCODERS)}"
            raise UserError(problem, key="model", hint=hint, code="not_an_encoder")
        self.head = self.document_head = None
        self.hf_adapter = EncoderAdapter(self.hf_adapter.for_encoder())
        self.config = self.hf_adapter.config
        types = getattr(self.embedding, "token_type_embeddings", None)
        if isinstance(types, FactoredTypeEmbedding):
            self.embedding.token_type_embeddings = types.to_embedding()

    def init_weights(self, seed: int) -> None:
        """Sets every parameter to its initial value; those on the meta device stay as they are."""
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers) if self.causal else None
        init_weights(self, seed=seed, std=std, residual_std=residual_std)

    def compile_ends(self, *, embedding: bool, backend: str = "inductor") -> None:
        """Compiles what is before and after the blocks: embedding (or not), final norm, transform of the head."""
        if embedding:
            self._embed = torch.compile(self._embed, backend=backend)
        for module in (self.norm, self.head and self.head.transform):
            if module is None:
                continue
            # Not `module.compile()`: all modules compiled so share one limit of recompilations.
            module.forward = torch.compile(module.forward, backend=backend)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states, as `model.head` takes them. A token sees its own document; if causal, up to itself.

        Args:
            input_ids: `[B, S]` integers.
            position_ids: `[B, S]` or `[1, S]`, each token's position in its document; below `max_position_embeddings`
                where positions are learned. None: 0 to S - 1 in every row.
            document_ids, cu_seqlens: the documents of the rows, see `choose_attention_backend`; one of the two is
                enough. None: every row is one document.
            max_seqlen: upper bound on a document's length. None: S.
            cache: decoders only: keys and values of earlier tokens, to which these are added at `position_ids`. Every
                row is one document then, without `document_ids` and `cu_seqlens`.
            token_type_ids: `[B, S]`, families of BERT only. None: type 0 everywhere.

        Returns:
            `[B, S, D]`.

        Raises:
            UserError: token types for a model that has none (code `no_token_types`).
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden_BSD = self._embed(input_ids, position_ids, token_type_ids)
        dtype = compute_dtype(hidden_BSD)
        if cache is not None and not self.causal:
            raise ValueError("an encoder has no cache: its tokens see later ones")
        backends, caches = {}, [None] * len(self.blocks)
        for window in set(self.windows):
            if cache is not None:
                backends[window], caches = cache.at(position_ids, dtype, window)
                continue
            backends[window] = choose_attention_backend(
                tuple(input_ids.shape),
                document_ids=document_ids,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                causal=self.causal,
                window=window,
                dropout_p=self.attention_dropout if self.training else 0.0,
                device=input_ids.device,
                dtype=dtype,
            )
        rotary = self._rotary(position_ids, dtype)
        routings = []
        for block, window, layer_cache in zip(self.blocks, self.windows, caches, strict=True):
            hidden_BSD = block(hidden_BSD, rotary[window], backends[window], layer_cache)
            if isinstance(hidden_BSD, tuple):
                hidden_BSD, routing = hidden_BSD
                routings.append(routing)
        if routings:
            self._collect(routings, input_ids.numel())
        return self.norm(hidden_BSD)

    def _rotary(self, position_ids: Tensor, dtype: torch.dtype) -> dict[int | None, tuple[Tensor, Tensor] | None]:
        """Window -> the rotation of the blocks that have it."""
        if not self.rotary:
            return dict.fromkeys(self.windows)
        size, theta = self.config.head_dim, self.config.rope_theta
        scaling = getattr(self.config, "rope_scaling", None)
        if self.local_rope_theta is None or set(self.windows) <= {None}:
            return dict.fromkeys(self.windows, rope_cos_sin(position_ids, size, theta, dtype, scaling))
        local = rope_cos_sin(position_ids, size, self.local_rope_theta, dtype)
        return dict.fromkeys(self.windows, local) | {None: rope_cos_sin(position_ids, size, theta, dtype, scaling)}

    def _embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        is_bert = isinstance(self.embedding, BertEmbedding)
        if token_type_ids is not None and not (is_bert and self.embedding.token_type_embeddings is not None):
            raise UserError(
                f"{self.config.model_type} has no token types, and the batch has some",
                key="model",
                hint="Use torchrecipes.models.bert or domain_bert, or a collator without token types.",
                code="no_token_types",
            )
        if is_bert:
            return self.embedding(input_ids, position_ids, token_type_ids)
        hidden_BSD = self.embedding(input_ids)
        if self.position_embedding is not None:
            hidden_BSD = hidden_BSD + self.position_embedding(position_ids)
        hidden_BSD = to_residual_dtype(hidden_BSD, self.residual_dtype)
        return dropout(hidden_BSD, self.embedding_dropout, self.training)

    def _collect(self, routings: list, tokens: int) -> None:
        routing = type(routings[0])(*(torch.stack(values) for values in zip(*routings, strict=True)))
        aux = self.config.router_aux_loss_coef * routing.aux_loss.mean()
        self.router_loss = (aux + self.config.router_z_loss_coef * routing.z_loss.mean()) * tokens
        self.routing = type(routing)(*(values.detach() for values in routing))
