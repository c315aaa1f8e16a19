"""Texts of a model that gives a vector for every token: markers, expanded queries, and which tokens are vectors.

They are the tokens that `pylate` makes, with `attend_to_expansion_tokens`.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import from_numpy

from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.texts import pack_texts
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

if TYPE_CHECKING:
    from torchrecipes.models import LateInteraction


class LateInteractionTexts:
    """Turns the tokens of texts into those that a late-interaction model takes.

    Args:
        tokenizer: has the markers and the mask token.
        settings: those of the model.

    Raises:
        UserError: a marker is not a token (code `unknown_token`); queries are expanded, and the tokenizer has no mask
            token (`no_mask_token`); it is one of domain names, whose public suffixes expanded queries do not have
            (`domain_names`).
    """

    def __init__(self, tokenizer: Tokenizer, settings: "LateInteraction"):
        if tokenizer.domain is not None:
            raise UserError(
                "late interaction is not for domain names",
                key="embedding.late_interaction",
                hint="Set it to null: a name has one embedding.",
                code="domain_names",
            )
        backend = tokenizer.backend
        self.expands = settings.expand_queries
        self.lengths = {True: settings.query_length, False: settings.document_length}
        self.markers = {}
        for name in ("document_marker", "query_marker"):
            token = getattr(settings, name)
            self.markers[name == "query_marker"] = None if token is None else backend.token_to_id(token)
            if token is not None and backend.token_to_id(token) is None:
                raise UserError(
                    f"the tokenizer has no token {token!r}",
                    key=f"embedding.late_interaction.{name}",
                    hint="Set it to null, or add the token: tune-style tokenizer extend.",
                    code="unknown_token",
                )
        if self.expands and tokenizer.mask_id is None:
            raise UserError(
                "the tokenizer has no mask token to expand queries with",
                key="embedding.late_interaction.expand_queries",
                hint="Set it to false.",
                code="no_mask_token",
            )
        self.mask_id = tokenizer.mask_id
        # As in pylate, a character that is no token means the unknown one.
        skipped = {backend.token_to_id(character) for character in settings.skip}
        skipped = {tokenizer.unk_id if token is None else token for token in skipped} - {None}
        self.skipped = np.array(sorted(skipped), np.int64)

    def arrange(
        self, tokens: np.ndarray, lengths: np.ndarray, is_query: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The model's tokens: cut, with markers, queries expanded.

        Args:
            tokens: integers, 1-D: the texts with their special tokens, one text after the other.
            lengths: `[N]`, of the texts.
            is_query: `[N]` bool.

        Returns:
            Tokens and lengths likewise, and for every token whether its vector counts.
        """
        texts = np.split(tokens, np.cumsum(lengths)[:-1])
        pieces = [self.arrange_text(text, query) for text, query in zip(texts, is_query, strict=True)]
        arranged, kept = zip(*pieces, strict=True)
        return np.concatenate(arranged), np.array([len(text) for text in arranged]), np.concatenate(kept)

    def arrange_text(self, tokens: np.ndarray, is_query: bool) -> tuple[np.ndarray, np.ndarray]:
        """The same for one text: its tokens, and for each of them whether its vector counts."""
        marker = self.markers[bool(is_query)]
        room = self.lengths[bool(is_query)] - (marker is not None)
        tokens = tokens.astype(np.int64)
        if len(tokens) > room:
            tokens = np.concatenate((tokens[: room - 1], tokens[-1:]))
        if marker is not None:
            tokens = np.concatenate((tokens[:1], [marker], tokens[1:]))
        if not is_query:
            return tokens, ~np.isin(tokens, self.skipped)
        if self.expands:
            tokens = np.pad(tokens, (0, self.lengths[True] - len(tokens)), constant_values=self.mask_id)
        return tokens, np.ones(len(tokens), bool)


def with_vectors(batch: Batch, lengths: np.ndarray, kept: np.ndarray) -> Batch:
    """A batch that knows which of its tokens are vectors.

    Args:
        batch: packed by `pack_texts`.
        lengths: `[N]`, of its texts as they were given to `pack_texts`.
        kept: bool, for every token of the texts whether its vector counts; one of each text's at least.
    """
    flags, places = pack_texts(kept.astype(np.int64), lengths, 0)
    counts = np.empty(len(lengths), np.int64)
    counts[places] = np.add.reduceat(kept.astype(np.int64), np.cumsum(lengths) - lengths)
    examples = batch.examples and replace(batch.examples, lengths=from_numpy(counts))
    return replace(batch, vector_positions=flags["input_ids"][0].nonzero()[:, 0], examples=examples)
