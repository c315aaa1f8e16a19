"""Vectors of all tokens of texts, for models with late interaction, and their similarity."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.late_interaction import LateInteractionTexts, with_vectors
from torchrecipes.data.batching.texts import pack_texts
from torchrecipes.data.progress import Progress
from torchrecipes.errors import UserError
from torchrecipes.evaluation.running import evaluation_mode
from torchrecipes.evaluation.top_k import full_precision
from torchrecipes.losses import max_sim

if TYPE_CHECKING:
    from torchrecipes.evaluation.text_encoder import TextEncoder


class TextVectors(NamedTuple):
    """Vectors of n texts, one text after the other.

    Attributes:
        vectors: `[V, E]` float32.
        lengths: `[n]` int64, vectors of each text.
    """

    vectors: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, texts: slice) -> "TextVectors":
        """Consecutive texts."""
        first, last, _ = texts.indices(len(self))
        ends = np.concatenate(([0], np.cumsum(self.lengths)))
        return TextVectors(self.vectors[ends[first] : ends[last]], self.lengths[first:last])


def encode_vectors(
    encoder: "TextEncoder", texts: Sequence[str], prompt: str | None, progress: Progress | None = None
) -> TextVectors:
    """The vectors of texts, in their order. Every rank encodes all of them.

    Args:
        encoder: of a model with late interaction.
        texts: of any number.
        prompt: `query` or `passage`.
        progress: counts what is done.

    Raises:
        UserError: another prompt (code `unknown_prompt`).
    """
    if prompt not in ("query", "passage"):
        raise UserError(
            "with late interaction a text is a query or a passage",
            key="prompt",
            hint="Evaluate with torchrecipes.evaluation.Retrieval.",
            code="unknown_prompt",
        )
    model, pad_id = encoder.model, encoder.tokenizer.pad_id or 0
    late, window = LateInteractionTexts(encoder.tokenizer, model.late_interaction), encoder.tokenize(texts, prompt)
    arranged = [
        late.arrange_text(ids, prompt == "query") for ids in np.split(window.tokens, window.starts[1:])[: len(texts)]
    ]
    empty = np.empty((0, model.embedding_size), np.float32)
    found = [empty] * len(arranged)
    lengths = np.array([len(tokens) for tokens, _ in arranged], np.int64)
    with torch.no_grad(), evaluation_mode(model), encoder.autocast():
        for places in _batches(lengths, encoder.tokens_per_batch):
            tokens, kept = (np.concatenate([arranged[place][part] for place in places]) for part in (0, 1))
            fields, packed = pack_texts(tokens, lengths[places], pad_id)
            batch = with_vectors(Batch(num_targets=len(places), **fields), lengths[places], kept)
            vectors = model.embed(batch.to(encoder.device)).cpu().numpy()
            order = places[np.argsort(packed)]  # of the texts in the batch
            counts = [arranged[place][1].sum() for place in order]
            for place, part in zip(order, np.split(vectors, np.cumsum(counts)[:-1]), strict=True):
                found[place] = part
            if progress is not None:
                num_bytes = sum(window.num_bytes[place] for place in places)
                progress.add(len(places), num_bytes, int(lengths[places].sum()))
    return TextVectors(np.concatenate([empty, *found]), np.array([len(part) for part in found], np.int64))


def _batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Places of texts of similar length, of about so many tokens."""
    order = np.argsort(-lengths, kind="stable")
    cuts = np.flatnonzero(np.diff(np.cumsum(lengths[order]) // tokens_per_batch)) + 1
    return np.split(order, cuts) if len(order) else []


def max_sim_scores(queries: TextVectors, passages: TextVectors, device: torch.device | str = "cpu") -> Tensor:
    """MaxSim of every query with every passage (see `torchrecipes.losses.max_sim`).

    Args:
        queries: Q texts.
        passages: P texts.
        device: to compute on.

    Returns:
        `[Q, P]` float32 on the device.
    """
    sides = [torch.from_numpy(side.vectors).to(device) for side in (queries, passages)]
    lengths = [torch.from_numpy(side.lengths) for side in (queries, passages)]
    with torch.no_grad(), full_precision():
        return max_sim(sides[0], lengths[0], sides[1], lengths[1])
