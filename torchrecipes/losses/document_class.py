"""Classification loss of documents, beside the loss of their tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.losses.chunked_cross_entropy import IGNORED


def document_class_loss(hidden: Tensor, model: nn.Module, batch: Any) -> tuple[Tensor | float, dict[str, Tensor]]:
    """Weighted sum of the cross-entropies of the documents' classes, from the state of a token of each.

    Add it to the loss of the tokens. The weights are the collator's, in units of the tokens' loss.

    Args:
        hidden: `[B, S, D]`, hidden states.
        model: has `document_head(rows [N, D])`, which returns logits `[N, C]`.
        batch: a `Batch`. Where it has no `class_positions`, nothing is computed.

    Returns:
        The loss, a scalar, fp32 (fp64 for fp64 inputs), and sums to log: `class_loss` (without weights) and
        `class_accuracy` with the number of documents that they are over, as `targets/<name>`, scalars without gradient.
        0.0 and {} for a batch without classes.

    Raises:
        UserError: the batch has classes, and the model no `document_head` (code `no_document_head`).
    """
    if batch.class_positions is None:
        return 0.0, {}
    head = getattr(model, "document_head", None)
    if head is None:
        raise UserError(
            f"the collator asks for classes of documents, and {type(model).__name__} has no document_head",
            key="model",
            hint="Use a model with one, such as torchrecipes.models.domain_bert, or a collator without classes.",
            code="no_document_head",
        )
    logits = head(hidden.flatten(0, 1).index_select(0, batch.class_positions))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, batch.class_labels, reduction="none", ignore_index=IGNORED)
    used = batch.class_labels != IGNORED
    count = used.sum().to(losses.dtype)
    correct = (used & (logits.detach().argmax(1) == batch.class_labels)).sum().to(losses.dtype)
    sums = {"class_loss": losses.detach().sum(), "class_accuracy": correct}
    return (losses * batch.class_weights).sum(), sums | {f"targets/{name}": count for name in sums}
