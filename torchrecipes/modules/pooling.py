"""`Pooling`: from hidden states of tokens to one vector per text."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from torchrecipes.errors import UserError

PoolingMode = Literal["mean", "cls", "last", "weighted_mean", "max"]


class Pooling(nn.Module):
    """One vector of each text, in fp32, as `sentence_transformers` pools.

    - `mean`: of the states of its tokens (Reimers and Gurevych 2019, arXiv:1908.10084).
    - `cls`, `last`: the state of its first or last token.
    - `weighted_mean`: the mean with the weights 1, 2, 3, ... (Muennighoff 2022, arXiv:2202.08904).
    - `max`: the largest value of every dimension.

    Args:
        mode: see above.

    Raises:
        UserError: an unknown mode (code `unknown_pooling`).
    """

    def __init__(self, mode: PoolingMode = "mean"):
        super().__init__()
        if mode not in get_args(PoolingMode):
            hint = f"Choose from {', '.join(get_args(PoolingMode))}"
            raise UserError(f"{mode!r} is not a pooling", key="pooling", hint=hint, code="unknown_pooling")
        self.mode = mode

    def forward(
        self,
        hidden_BSD: Tensor,
        num_texts: int | None = None,
        cu_seqlens: Tensor | None = None,
        pool_from: Tensor | None = None,
    ) -> Tensor:
        """Pools the first `num_texts` documents of packed rows.

        Args:
            hidden_BSD: of any floating-point dtype.
            num_texts: N; documents after these are padding. None: all of them.
            cu_seqlens: `[documents + 1]`, 0, then the end of every document in the B * S flattened tokens. None: every
                row is one document.
            pool_from: `[N]` integers, the tokens at the start of each text that are left out, such as a prompt. At
                least one token stays. None: all are pooled.

        Returns:
            `[N, D]` fp32.
        """
        tokens_TD, device = hidden_BSD.flatten(0, 1), hidden_BSD.device
        rows, row_len = hidden_BSD.shape[:2]
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, rows * row_len + 1, row_len, device=device)
        offsets = cu_seqlens.long()
        num_documents = len(offsets) - 1
        num_texts = num_documents if num_texts is None else num_texts
        starts, ends = offsets[:num_texts], offsets[1 : num_texts + 1]
        if self.mode == "last":
            return tokens_TD[ends - 1].float()
        first = starts if pool_from is None else torch.minimum(starts + pool_from, ends - 1)
        if self.mode == "cls":
            return tokens_TD[first].float()

        tokens_TD, weights_T = tokens_TD.float(), None
        if pool_from is not None or self.mode == "weighted_mean":
            lengths = offsets.diff()
            document_T = torch.arange(num_documents, device=device).repeat_interleave(
                lengths, output_size=rows * row_len
            )
            place_T = torch.arange(rows * row_len, device=device)
            first = torch.cat((first, offsets[num_texts:-1]))
            kept_T = place_T >= first[document_T]
            if self.mode == "max":
                tokens_TD = tokens_TD.masked_fill(~kept_T[:, None], float("-inf"))
            else:
                weights_T = kept_T.float()
        if self.mode == "max":
            return torch.segment_reduce(tokens_TD, "max", offsets=offsets, unsafe=True)[:num_texts]
        if self.mode == "weighted_mean":
            weights_T = weights_T * (place_T - offsets[document_T] + 1)
        if weights_T is None:
            total_N = (ends - starts).float()
        else:
            tokens_TD = tokens_TD * weights_T[:, None]
            total_N = torch.segment_reduce(weights_T, "sum", offsets=offsets, unsafe=True)[:num_texts]
        # Unlike `index_add`, the same bits every time on a GPU.
        sums_ND = torch.segment_reduce(tokens_TD, "sum", offsets=offsets, unsafe=True)[:num_texts]
        return sums_ND / total_N[:, None]
