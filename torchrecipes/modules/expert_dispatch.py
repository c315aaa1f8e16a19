"""Sorts the assignments of tokens to experts by expert, by counting."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # assignments that are compared with each other


class Dispatch(NamedTuple):
    """M = T k assignments, sorted by expert, and those of one expert by token.

    Attributes:
        token_M: int32, the token of each.
        place_Tk: int32, where a token's assignments are among them.
        ends_E: int32, where those of each expert end, as `grouped_mm` takes it.
    """

    token_M: Tensor
    place_Tk: Tensor
    ends_E: Tensor


def dispatch(expert_Tk: Tensor, num_experts: int) -> Dispatch:
    """Sorts by counting, without waiting for the device and in a few kernels once compiled.

    The place of an assignment is the number of those to earlier experts, plus those to its own expert in earlier
    blocks, plus those before it in its block. On a GPU, `sort` is many small kernels, and a cumulative sum over
    `[M, E]` one slow one: its columns are long and few.

    Args:
        expert_Tk: integers, at least one token.
        num_experts: E.
    """
    total, device = expert_Tk.numel(), expert_Tk.device
    expert_M = expert_Tk.flatten().int()
    numbers_M = torch.arange(total, dtype=torch.int32, device=device)
    numbers_E = torch.arange(num_experts, dtype=torch.int32, device=device)
    within = torch.arange(BLOCK, device=device)
    blocks = F.pad(expert_M, (0, -total % BLOCK), value=num_experts).view(-1, BLOCK)
    earlier = (blocks[:, :, None] == blocks[:, None]) & (within < within[:, None])
    rank_M = earlier.sum(-1, dtype=torch.int32).flatten()[:total]
    count_EN = (blocks == numbers_E[:, None, None]).sum(-1, dtype=torch.int32)  # N blocks
    end_EN = count_EN.flatten().cumsum(0, dtype=torch.int32).view_as(count_EN)
    place_M = (end_EN - count_EN)[expert_M, numbers_M // BLOCK] + rank_M
    token_M = torch.empty_like(place_M)
    token_M[place_M] = numbers_M // expert_Tk.shape[1]
    return Dispatch(token_M, place_M.view(expert_Tk.shape), end_EN[:, -1].contiguous())
