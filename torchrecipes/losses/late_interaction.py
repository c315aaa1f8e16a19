"""MaxSim, the similarity of late interaction: texts are sets of vectors, one for each token.

The matrix of all products of tokens never exists. Documents of similar length are compared with all query tokens some
at a time, and only the place of each maximum is kept for the backward pass.

Letters of shapes: n queries of Q tokens in total, M documents of T tokens in total, D numbers in a vector.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchrecipes.errors import UserError
from torchrecipes.estimation import is_estimating

if TYPE_CHECKING:
    from torchrecipes.data import Examples

PRODUCTS_AT_ONCE = 1 << 24  # 64 MiB in fp32


def max_sim(queries: Tensor, query_lengths: Tensor, documents: Tensor, document_lengths: Tensor) -> Tensor:
    """For each query and document the sum over query tokens of the largest dot product with a token of the document.

    (Khattab and Zaharia, 2020, arXiv:2004.12832, equation 3.) Gradients flow to both sides.

    Args:
        queries: `[Q, D]` floating point, the vectors of the first query, of the second, and so on.
        query_lengths: `[n]` int64 on the CPU, vectors of each query.
        documents: `[T, D]`, likewise.
        document_lengths: `[M]` int64 on the CPU, at least 1.

    Returns:
        `[n, M]`.
    """
    return _MaxSim.apply(queries, documents, query_lengths, document_lengths)


class _MaxSim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, documents, query_lengths, document_lengths):
        device = queries.device
        scores_Mn = queries.new_empty(len(document_lengths), len(query_lengths))
        lengths_n = query_lengths.to(device)
        needs_gradient = any(ctx.needs_input_grad)
        best = []
        for numbers, rows in _chunks(document_lengths, len(documents), len(queries), device):
            products = (documents[rows.flatten()] @ queries.T).view(*rows.shape, -1)
            if needs_gradient:
                values, place = products.max(1)
                # A document shorter than the longest of its chunk is filled up with its last vector.
                last = document_lengths[numbers].to(device)[:, None] - 1
                best.append(torch.minimum(place, last).to(torch.int32))
            else:
                values = products.amax(1)
            sums = torch.segment_reduce(values.T.contiguous(), "sum", lengths=lengths_n, axis=0)
            scores_Mn[numbers.to(device)] = sums.T
        ctx.save_for_backward(queries, documents)
        ctx.lengths, ctx.best = (query_lengths, document_lengths), best
        return scores_Mn.T

    @staticmethod
    def backward(ctx, gradient_nM):
        queries, documents = ctx.saved_tensors
        query_lengths, document_lengths = ctx.lengths
        device = queries.device
        numbers_n = torch.arange(len(query_lengths))
        query_of_token = torch.repeat_interleave(numbers_n, query_lengths, output_size=len(queries)).to(device)
        gradient_queries, gradient_documents = torch.zeros_like(queries), torch.zeros_like(documents)
        chunks = _chunks(document_lengths, len(documents), len(queries), device)
        for (numbers, rows), place in zip(chunks, ctx.best, strict=True):
            weights = queries.new_zeros(*rows.shape, len(queries))
            gradient = gradient_nM.T[numbers.to(device)][:, query_of_token]
            weights.scatter_(1, place[:, None].long(), gradient[:, None])
            weights = weights.flatten(0, 1)
            gradient_queries += weights.T @ documents[rows.flatten()]
            gradient_documents.index_add_(0, rows.flatten(), weights @ queries)
        return gradient_queries, gradient_documents, None, None


def _chunks(
    lengths: Tensor, num_tokens: int, num_query_tokens: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Documents of similar length: their numbers `[c]`, on the CPU, and the rows `[c, L]` of their vectors."""
    starts = lengths.cumsum(0) - lengths
    order = lengths.argsort(stable=True)
    if is_estimating():  # there are no numbers: documents of equal length
        ascending = [num_tokens // len(lengths)] * len(lengths)
    else:
        ascending = lengths[order].tolist()
    end = len(ascending)
    while end > 0:
        size = max(1, PRODUCTS_AT_ONCE // max(1, ascending[end - 1] * num_query_tokens))
        numbers = order[max(0, end - size) : end]
        steps = torch.arange(ascending[end - 1])
        rows = starts[numbers, None] + torch.minimum(steps, lengths[numbers, None] - 1)
        yield numbers, rows.to(device)
        end -= size


def max_sim_of_texts(vectors: Tensor, lengths: Tensor, queries: Tensor, documents: Tensor) -> Tensor:
    """`max_sim` of some of the texts with some of them. On a GPU it waits for the numbers of the texts.

    Args:
        vectors: `[V, D]` of N texts, one text after the other.
        lengths: `[N]` int64 on the CPU, vectors of each text.
        queries: `[n]` int64, numbers of texts.
        documents: `[M]` int64, numbers of texts.

    Returns:
        `[n, M]`.
    """
    rows_Q, query_lengths = _vectors_of_texts(queries.cpu(), lengths, len(vectors))
    rows_T, document_lengths = _vectors_of_texts(documents.cpu(), lengths, len(vectors))
    device = vectors.device
    return max_sim(vectors[rows_Q.to(device)], query_lengths, vectors[rows_T.to(device)], document_lengths)


def require_one_vector(name: str, examples: "Examples") -> None:
    """Raises UserError (code `several_vectors`) if texts have several vectors, which the loss `name` cannot compare."""
    if examples.lengths is not None:
        raise UserError(
            f"{name} compares texts of one vector each, and this model gives several",
            key="loss",
            hint="Use InfoNCE, KLDistillation or MarginMSE for late interaction.",
            code="several_vectors",
        )


def _vectors_of_texts(texts: Tensor, lengths: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    starts, chosen = lengths.cumsum(0) - lengths, lengths[texts]
    if is_estimating():
        return torch.arange(len(texts) * (num_vectors // len(lengths))), chosen
    offsets = torch.repeat_interleave(starts[texts] - (chosen.cumsum(0) - chosen), chosen)
    return offsets + torch.arange(len(offsets)), chosen
