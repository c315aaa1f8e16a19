"""Sampling of the next token from logits: temperature, top-k and top-p.

1. `filter_logits` applies `temperature`, `top_k` and `top_p` as `transformers` does, in the same order.
2. `sample` maps a random number from [0, 1) to the token at which the cumulative probability exceeds it. So the random
   numbers of a text can be made before the model runs, and no generator is shared.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from torchrecipes.errors import UserError


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Checks the settings of `filter_logits`.

    Raises:
        UserError: a setting is out of range.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it is 0 (the likeliest token, always) or more.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; it is 1 or more tokens to choose from, or None for all.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it is a probability, more than 0 and at most 1, or None for all tokens.")


def filter_logits(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Divides logits by the temperature, then sets those of excluded tokens to -inf.

    Args:
        logits_BV: fp32.
        temperature: more than 0.
        top_k: keep the k most probable tokens, and those that tie with the last of them. None: all.
        top_p: keep the most probable tokens until their probabilities sum to this (Holtzman et al., 2019,
            arXiv:1904.09751), including the token that reaches it. None: all.
    """
    logits_BV = logits_BV / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    if top_p is not None and top_p < 1:
        ascending, order = logits_BV.sort(descending=False)
        remove = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        remove[:, -1] = False
        logits_BV = logits_BV.masked_fill(remove.scatter(1, order, remove), float("-inf"))
    return logits_BV


def sample(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Samples tokens `[B]` from the softmax of each row, given uniform random numbers from [0, 1).

    The cumulative sum is in float64: in fp32 its error would exceed the probability of a rare token.
    """
    total_BV = logits_BV.double().softmax(-1).cumsum(-1)
    sum_B1 = total_BV[:, -1:]
    # Rounded up to the sum itself, a number would lie beyond the last token.
    number_B1 = (uniform_B[:, None] * sum_B1).minimum(sum_B1.nextafter(torch.zeros_like(sum_B1)))
    # With NaN logits no sum exceeds the number. An id out of range would be a device-side assert on a GPU.
    return torch.searchsorted(total_BV, number_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[-1] - 1)


def uniform_numbers(
    prompts: Sequence[Sequence[int]], count: int, seed: int, prompt_counts: Counter[tuple[int, ...]] | None = None
) -> Tensor:
    """Random numbers from [0, 1), `[prompts, count]` float64 on the CPU.

    A row depends on the seed and its own prompt only, so the rest of the batch does not matter. A repeated prompt gets
    different numbers.

    Args:
        prompts: token ids of each prompt.
        count: numbers per prompt.
        seed: determines the numbers.
        prompt_counts: how often each prompt occurred in earlier calls; updated here. None: this is the first call.
    """
    numbers = torch.empty(len(prompts), count, dtype=torch.float64)
    prompt_counts = Counter() if prompt_counts is None else prompt_counts
    for row, ids in zip(numbers, prompts, strict=True):
        prompt = tuple(map(int, ids))
        key = xxhash.xxh3_64_intdigest(f"{seed} {prompt_counts[prompt]} {prompt}".encode())
        prompt_counts[prompt] += 1
        row.uniform_(generator=torch.Generator().manual_seed(key))
    return numbers
