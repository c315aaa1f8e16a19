"""How the loss depends on a token's position in its document."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from torchrecipes.devices import to_float64
from torchrecipes.distributed.collectives import all_reduce_sum_


def loss_by_position(
    token_loss: Tensor, position_ids: Tensor, edges: Sequence[int], labels: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums of the loss and numbers of targets for ranges of positions, without waiting for the device.

    A model that was made for 512 tokens has a loss that rises beyond position 511; after it has learned to use longer
    documents, the loss falls on.

    Args:
        token_loss: cross-entropy of each token, any shape.
        position_ids: of the same shape: each token's position in its document.
        edges: where the ranges begin, and the end of the last one: `[0, 512, 1024]` are 0 to 511 and 512 to 1023.
            Positions outside do not count.
        labels: of the same shape, -100 where there is nothing to predict. None: every token counts.

    Returns:
        For every range `loss/0-511` and `targets/0-511`, scalars in fp64. Add them up over batches and ranks; a sum
        divided by its targets is the mean.

    Raises:
        ValueError: edges that do not rise, or other shapes.
    """
    if len(edges) < 2 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"edges must be two or more rising numbers, not {list(edges)}")
    if token_loss.shape != position_ids.shape or (labels is not None and labels.shape != token_loss.shape):
        raise ValueError("loss_by_position: token_loss, position_ids and labels must have one shape")
    bounds = torch.tensor(edges, device=position_ids.device)
    # Bucket 0 is before the first edge, the last one after the last.
    buckets = torch.bucketize(position_ids.flatten(), bounds, right=True)
    counted = torch.ones_like(buckets, dtype=torch.bool) if labels is None else labels.flatten() != -100
    losses = to_float64(torch.where(counted, token_loss.detach().flatten(), 0))
    sums = torch.zeros(2, len(edges) + 1, dtype=torch.float64, device=losses.device)
    sums.index_add_(1, buckets.to(sums.device), torch.stack((losses, to_float64(counted))))
    result = {}
    for number, (first, end) in enumerate(itertools.pairwise(edges), start=1):
        result[f"loss/{first}-{end - 1}"], result[f"targets/{first}-{end - 1}"] = sums[:, number]
    return result


def position_edges(seq_len: int) -> list[int]:
    """Edges of ranges that double, down to 64 tokens: for 1,024 they are 0, 64, 128, 256, 512 and 1,024."""
    edges = [seq_len]
    while edges[0] > 64:
        edges.insert(0, edges[0] // 2)
    return [0, *edges]


def add_sums(total: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
    """Adds what `loss_by_position` returned for a batch to `total`, in place."""
    for name, value in sums.items():
        total[name] = total[name] + value if name in total else value


def means_by_position(sums: dict[str, Tensor]) -> dict[str, float]:
    """The mean loss of every range, `loss/0-511`, over all ranks; ranges without a target are left out.

    Args:
        sums: of `loss_by_position`, with the same edges on every rank.
    """
    if not sums:
        return {}
    totals = dict(zip(sums, all_reduce_sum_(torch.stack(list(sums.values()))).tolist(), strict=True))
    ranges = [name.removeprefix("loss/") for name in sums if name.startswith("loss/")]
    return {f"loss/{r}": totals[f"loss/{r}"] / totals[f"targets/{r}"] for r in ranges if totals[f"targets/{r}"]}
