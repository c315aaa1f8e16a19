"""Sampling: from logits to the next token.

1. `filter_logits` is what `transformers` does with `temperature`, `top_k` and `top_p`, in its order.
2. `sample` inverts the cumulative distribution: a number from [0, 1) becomes the token at which the sum of the
   probabilities passes it. So the random numbers can be drawn before the model runs, a sequence of them for every text,
   and no generator is shared.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from torchrecipes.devices import to_float64
from torchrecipes.errors import UserError


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Checks the settings of `filter_logits`.

    Raises:
        UserError: one is out of range (code `out_of_range`).
    """
    if not 0 <= temperature < float("inf"):
        wanted = "0 (always the most probable token) or more"
        raise UserError(f"{temperature} must be {wanted}", key="temperature", code="out_of_range")
    if top_k is not None and top_k < 1:
        raise UserError(f"{top_k} must be 1 token or more, or None for all", key="top_k", code="out_of_range")
    if top_p is not None and not 0 < top_p <= 1:
        wanted = "a probability above 0 and at most 1, or None for all tokens"
        raise UserError(f"{top_p} must be {wanted}", key="top_p", code="out_of_range")


def filter_logits(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits to sample from: divided by the temperature, and -inf for tokens that `top_k` and `top_p` exclude.

    Args:
        logits_BV: fp32.
        temperature: more than 0.
        top_k: keep the k most probable tokens, and those as probable as the last of them. None: all.
        top_p: keep the most probable tokens whose probabilities sum to this (Holtzman et al., 2019, arXiv:1904.09751),
            the token that passes it included. None: all.
    """
    if temperature < 1e-6:  # the quotient could overflow; the largest logit becomes 0 and stays finite
        logits_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
        temperature = max(temperature, torch.finfo(torch.float32).tiny)
    logits_BV = logits_BV / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    if top_p is not None and top_p < 1:
        ascending, order = logits_BV.sort(descending=False)
        remove = _cumsum(ascending.softmax(-1)) <= 1 - top_p
        remove[:, -1] = False
        logits_BV = logits_BV.masked_fill(remove.scatter(1, order, remove), float("-inf"))
    return logits_BV


def sample(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Tokens `[B]`, distributed as the softmax of their rows where `uniform_B` is uniform on [0, 1).

    The sum is in float64: in fp32 its error would be larger than the probability of a rare token. On a device without
    float64 it is on the CPU, where `uniform_B` is, too.
    """
    total_BV = _cumsum(to_float64(logits_BV).softmax(-1))
    sum_B1 = total_BV[:, -1:]
    # A number that rounding makes equal to the sum would be past the last token.
    number_B1 = (uniform_B[:, None] * sum_B1).minimum(sum_B1.nextafter(torch.zeros_like(sum_B1)))
    # With NaN no sum passes the number, and an id that does not exist would end a GPU's process.
    ids_B = torch.searchsorted(total_BV, number_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[-1] - 1)
    return ids_B.to(logits_BV.device)


def _cumsum(x_BV: Tensor) -> Tensor:
    """The cumulative sum; on the CPU where an algorithm for the GPU must be deterministic, which `cumsum` has not."""
    if x_BV.is_cuda and torch.are_deterministic_algorithms_enabled():
        return x_BV.cpu().cumsum(-1).to(x_BV.device)
    return x_BV.cumsum(-1)


def uniform_numbers(
    prompts: Sequence[Sequence[int]], count: int, seed: int, prompt_counts: Counter[tuple[int, ...]] | None = None
) -> Tensor:
    """Random numbers from [0, 1), `[prompts, count]` float64 on the CPU.

    A row depends on the seed and its own prompt alone, so a completion does not depend on the other prompts in the
    batch. A repeated prompt gets other numbers: a second sample.

    Args:
        prompts: ids of each.
        count: numbers for each.
        seed: chooses the numbers.
        prompt_counts: how often each prompt occurred in earlier calls; updated. None: this call is the first.
    """
    numbers = torch.empty(len(prompts), count, dtype=torch.float64)
    prompt_counts = Counter() if prompt_counts is None else prompt_counts
    for row, ids in zip(numbers, prompts, strict=True):
        prompt = tuple(map(int, ids))
        key = xxhash.xxh3_64_intdigest(f"{seed} {prompt_counts[prompt]} {prompt}".encode())
        prompt_counts[prompt] += 1
        row.uniform_(generator=torch.Generator().manual_seed(key))
    return numbers
