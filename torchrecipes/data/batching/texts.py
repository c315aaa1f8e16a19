"""From examples to a batch: their texts as one row, without padding between them."""

from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from torchrecipes.data.batching.batch import Batch, dense_fields, document_fields
from torchrecipes.data.batching.examples import Examples
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.data.tokenizers.tokenizer import Tokenizer

MULTIPLE = 64  # of which a row's length is one, at least


def row_length(num_tokens: int) -> int:
    """The length of the row for so many tokens: few values, because kernels are compiled for it.

    It is a multiple of 64, and from 4,096 tokens on of 1/32 to 1/64 of the row, so that at most 3 % are padding.
    """
    multiple = max(MULTIPLE, 1 << max(0, num_tokens - 1).bit_length() >> 6)
    return max(1, -(-num_tokens // multiple)) * multiple


def pack_texts(
    tokens: np.ndarray,
    lengths: np.ndarray,
    pad_id: int,
    *,
    token_type_ids: np.ndarray | None = None,
    pool_from: np.ndarray | None = None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Packs texts into one row, the shortest first: attention is fastest where neighbours are of one length.

    Args:
        tokens: integers, 1-D: the tokens of N texts, one text after the other.
        lengths: `[N]` int64, of the texts, at least 1.
        pad_id: the padding token. What fills up the row is one more document.
        token_type_ids: int64, of the tokens, for a model with token types.
        pool_from: `[N]`, tokens at the start of each text that pooling leaves out; at least one is left.

    Returns:
        The fields of a `Batch` but `num_targets`, and the place of each text in it, `[N]` int64.
    """
    num_texts, total = len(lengths), int(lengths.sum())
    order = np.argsort(lengths, kind="stable")
    places = np.empty(num_texts, dtype=np.int64)
    places[order] = np.arange(num_texts)
    packed_lengths = lengths[order]
    starts = np.cumsum(packed_lengths) - packed_lengths
    source = (np.cumsum(lengths) - lengths)[order] - starts
    source = np.arange(total) + np.repeat(source, packed_lengths)
    input_ids = np.full((1, row_length(total)), pad_id, dtype=np.int64)
    input_ids[0, :total] = tokens[source]
    fields: dict[str, Any] = {"input_ids": from_numpy(input_ids), "num_texts": num_texts}
    fields |= document_fields(np.append(starts, total) if total < input_ids.size else starts, input_ids.shape)
    fields["position_ids"][0, total:] = 0  # padding may be longer than the table of positions
    if pool_from is not None and pool_from.any():
        fields["pool_from"] = from_numpy(np.minimum(pool_from, lengths - 1)[order].astype(np.int32))
    if token_type_ids is not None:
        types = np.zeros_like(input_ids)
        types[0, :total] = token_type_ids[source]
        fields["token_type_ids"] = from_numpy(types)
    return fields, places


def batch_of_examples(
    rows: Any, block: ExampleBlock, tokenizer: Tokenizer, *, token_types: bool, include_prompt: bool
) -> Batch:
    """The batch of some examples.

    Args:
        rows: what they come from, for the names of its sources.
        block: the examples.
        tokenizer: has the padding token, and gives the token types.
        token_types: whether the batch has `token_type_ids`.
        include_prompt: False: pooling leaves out the tokens of a text's prompt.
    """
    types = tokenizer.token_type_ids(block.tokens, block.text_lengths, block.second_starts) if token_types else None
    fields, places = pack_texts(
        block.tokens,
        block.text_lengths,
        tokenizer.pad_id or 0,
        token_type_ids=types,
        pool_from=None if include_prompt else block.prompt_lengths,
    )
    hashes = np.empty_like(block.text_hashes)
    hashes[places] = block.text_hashes
    texts = block.example_texts
    if len(places):
        texts = np.where(texts < 0, -1, places[texts])
    examples = Examples(from_numpy(texts), from_numpy(hashes), _tensor(block.values), _tensor(block.labels))
    sources = {"source_ids": _tensor(block.source_ids), "source_names": rows.source_names}
    return Batch(num_targets=len(examples), examples=examples, **fields, **sources)


def made_up_batch(num_examples: int, num_texts: int, seq_len: int, token: int, *, token_types: bool) -> Batch:
    """A batch of texts of `seq_len` equal tokens, every text a row: for estimates and trial steps.

    Args:
        num_examples: n.
        num_texts: k, of each example.
        seq_len: tokens of a text.
        token: the token.
        token_types: whether the batch has `token_type_ids`.
    """
    shape, count = (num_examples * num_texts, seq_len), num_examples * num_texts
    documents = dense_fields(shape) | {"cu_seqlens": from_numpy(np.arange(0, count * seq_len + 1, seq_len, np.int32))}
    return Batch(
        input_ids=from_numpy(np.full(shape, token, dtype=np.int64)),
        num_targets=num_examples,
        num_texts=count,
        token_type_ids=from_numpy(np.zeros(shape, dtype=np.int64)) if token_types else None,
        examples=Examples(
            texts=from_numpy(np.arange(count).reshape(num_examples, num_texts)), hashes=from_numpy(np.arange(count))
        ),
        **documents,
    )


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else from_numpy(array)
