"""Masked language modeling loss at the masked positions.

Names carry their shape: B rows, S tokens per row, D hidden size, M masked positions, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.losses.chunked_cross_entropy import IGNORED, linear_cross_entropy


def masked_lm_loss(
    hidden: Tensor,
    head: nn.Module,
    masked_positions: Tensor,
    masked_labels: Tensor,
    masked_logits_only: bool = True,
    chunk_size: int | None = None,
    return_token_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of the masked tokens (Devlin et al., 2018, arXiv:1810.04805, section 3.1).

    Logits are computed at the masked positions only, one chunk at a time: with 20% of the tokens masked, a fifth of the
    work of the output layer. Divide the sum by the targets of the whole optimizer step before `backward`.

    Args:
        hidden: `[B, S, D]`, hidden states.
        head: the output layer, with `weight` `[V, D]`, `bias` `[V]` or None, and optionally `transform(rows)`, which is
            applied first. `head(hidden)` returns logits. An `nn.Linear` is one.
        masked_positions: `[M]` int64, indices into the `B * S` flattened tokens. Entries whose label is -100 are unused
            slots and may point anywhere; the others are distinct. On a GPU the backward pass is fastest if all are.
        masked_labels: `[M]` int64: the original token, or -100 in an unused slot.
        masked_logits_only: False computes the logits `[B * S, V]` of every token: the same loss, with a multiple of the
            time and memory, to measure the difference.
        chunk_size: rows whose logits are held at once (see `linear_cross_entropy`); None chooses.
        return_token_loss: also return the cross-entropy of every slot, at no cost: `by_source` sums it for every source
            of a mixture.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs). With `return_token_loss` a pair of it and `[M]` of its dtype, which has
        no gradient, is 0 in unused slots, and sums to the loss.

    Raises:
        ValueError: invalid shapes or dtypes.
    """
    if masked_positions.shape != masked_labels.shape or masked_positions.ndim != 1:
        shapes = f"{list(masked_positions.shape)} and {list(masked_labels.shape)}"
        raise ValueError(f"masked_lm_loss: masked_positions and masked_labels must be [M] each, not {shapes}")
    tokens = hidden.flatten(0, 1)
    if not masked_logits_only:
        loss, token_loss = _full_logits_loss(tokens, head, masked_positions, masked_labels)
        return (loss, token_loss) if return_token_loss else loss
    rows = tokens.index_select(0, masked_positions)
    transform = getattr(head, "transform", None)
    if transform is not None:
        rows = transform(rows)
    return linear_cross_entropy(
        rows, head.weight, masked_labels, head.bias, chunk_size, return_token_loss=return_token_loss
    )


def _full_logits_loss(tokens, head, masked_positions, masked_labels):
    # An unused slot may point at a token that another slot masks: the larger label wins, and -100 never does.
    labels = torch.full((len(tokens),), IGNORED, dtype=torch.int64, device=tokens.device)
    labels.scatter_reduce_(0, masked_positions, masked_labels, "amax")
    logits = head(tokens)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    return losses.sum(), torch.where(masked_labels == IGNORED, 0, losses.detach()[masked_positions])
