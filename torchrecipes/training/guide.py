"""A guide: an embedding model that finds the passages of a step that are no true negatives (GISTEmbed).

Solatorio 2024, arXiv:2402.16829. It reads the same tokens as the model that is trained.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from torchrecipes.data.tokenizers.load import load_model_tokenizer
from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder
from torchrecipes.models import EmbeddingModel, load_embedding_model


def load_guide(path: str, tokenizer: Any, device: torch.device) -> EmbeddingModel:
    """Loads an embedding model whose tokenizer is that of the run, for evaluation.

    Args:
        path: its folder, a checkpoint, or a run's folder.
        tokenizer: the run's.
        device: where it computes.

    Raises:
        UserError: it has another tokenizer (code `other_tokenizer`), or cannot be loaded.
    """
    if load_model_tokenizer(resolve_model_folder(path)).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{path} has another tokenizer than the model that is trained, and reads the same tokens",
            key="guide",
            hint="Choose a guide that was made from the same pretrained encoder, or one of its family.",
            code="other_tokenizer",
        )
    return load_embedding_model(path).requires_grad_(False).to(device)


@torch.no_grad()
def embed_all(
    model: nn.Module, batches: Sequence[Any], autocast: Callable[[], AbstractContextManager] = nullcontext
) -> Tensor:
    """Embeddings of the texts of some batches, one batch after the other, without gradients.

    Args:
        model: has `embed(batch)`.
        batches: on its device.
        autocast: the context for forward passes.

    Returns:
        `[texts, D]` fp32.
    """
    with autocast():
        return torch.cat([model.embed(batch) for batch in batches])
