"""Causal language modeling loss.

Names carry their shape: B rows, S tokens per row, D hidden size, V vocabulary.
"""

from torch import Tensor, nn

from torchrecipes.losses.chunked_cross_entropy import linear_cross_entropy


def causal_lm_loss(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    return_token_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of the next tokens. Logits exist for one chunk of tokens at a time.

    Labels are not shifted here: they are the next tokens already, so the loader can look beyond the end of a row and
    leave out what the end of a document must not predict. Divide the sum by the targets of the whole optimizer step
    before `backward`.

    Args:
        hidden: `[B, S, D]`, hidden states.
        head: the output layer, with `weight` `[V, D]`, `bias` `[V]` or None, and optionally `transform(hidden)`, which
            is applied first. An `nn.Linear` is one.
        labels: `[B, S]` int64: the next token, or -100 where there is nothing to predict.
        z_loss: coefficient of `logsumexp(logits) ** 2` (see `linear_cross_entropy`); 0 is off.
        label_smoothing: share of a target that is spread over the vocabulary, as in `F.cross_entropy`; 0 is off.
        chunk_size: tokens whose logits are held at once (see `linear_cross_entropy`); None chooses.
        return_token_loss: also return the plain cross-entropy of every token, at no cost: its sum is what to log as the
            loss, and `by_source` sums it for every source of a mixture.

    Returns:
        The loss, a scalar, fp32 (fp64 for fp64 inputs). With `return_token_loss` a pair of it and `[B, S]` of its
        dtype, which has no gradient and is 0 where there is no label. It sums to the loss if `z_loss` and
        `label_smoothing` are 0.

    Raises:
        ValueError: invalid shapes, dtypes or numbers.
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        shapes = f"{list(hidden.shape)} and {list(labels.shape)}"
        raise ValueError(f"causal_lm_loss: hidden must be [B, S, D] and labels [B, S], not {shapes}")
    transform = getattr(head, "transform", None)
    if transform is not None:
        hidden = transform(hidden)
    loss, token_loss = linear_cross_entropy(
        hidden.flatten(0, 1),
        head.weight,
        labels.flatten(),
        head.bias,
        chunk_size,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        return_token_loss=True,
    )
    return (loss, token_loss.view_as(labels)) if return_token_loss else loss
