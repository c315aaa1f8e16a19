import math
from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from torchrecipes.errors import UserError
from torchrecipes.evaluation.sampling import check_sampling, filter_logits, sample, uniform_numbers

LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3


def transformers_warp(logits, temperature, top_k, top_p):
    logits = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p is not None:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 40, 1000])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.9, 1.0])
def test_logits_are_those_of_transformers(temperature, top_k, top_p):
    before = LOGITS.clone()
    expected = transformers_warp(LOGITS, temperature, top_k, top_p)
    assert torch.equal(filter_logits(LOGITS, temperature, top_k, top_p), expected)
    assert torch.equal(LOGITS, before)


def test_tokens_as_likely_as_the_last_of_top_k_are_kept():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    kept = filter_logits(logits, 1.0, 2, None) > float("-inf")
    assert kept.tolist() == [[True, False, True, True, False]]
    assert torch.equal(kept, transformers_warp(logits, 1.0, 2, None) > float("-inf"))


def test_top_p_counts_what_top_k_has_left():
    # Of the two that are left, the first has 0.73: enough for 0.7, although it is less than half of all.
    logits = torch.tensor([[1.0, 0.0, -0.1, -0.2, -0.3, -0.4]])
    assert (filter_logits(logits, 1.0, 2, 0.7) > float("-inf")).sum() == 1
    assert (filter_logits(logits, 1.0, None, 0.7) > float("-inf")).sum() == 4


def test_tokens_come_as_often_as_their_probabilities_say():
    draws, vocab_size = 20_000, 6
    logits = filter_logits(LOGITS[:1, :vocab_size], 2.0, 5, None)
    uniform = uniform_numbers([[1, 2]], draws, seed=3)[0]
    counts = sample(logits.expand(draws, -1), uniform).bincount(minlength=vocab_size).double()
    expected = logits[0].double().softmax(-1) * draws
    possible = expected > 0
    assert possible.sum() == 5 and counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 18.47  # of 4 degrees of freedom: passed once in a thousand seeds


def test_the_ends_of_the_unit_interval_are_tokens_that_may_follow():
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]]).expand(3, -1)
    nearly_one = 1 - 2**-53
    assert sample(logits, torch.tensor([0.0, nearly_one, 0.1], dtype=torch.float64)).tolist() == [1, 2, 1]
    many = torch.zeros(1, 50_000)
    assert sample(many, torch.tensor([nearly_one], dtype=torch.float64)).item() == 49_999


def test_numbers_that_are_none_give_an_id_that_exists():
    logits = torch.tensor([[0.0, float("nan"), 1.0], [float("inf"), 0.0, 0.0]])
    assert sample(logits, torch.tensor([0.5, 0.5], dtype=torch.float64)).max() < 3


def test_rare_tokens_behind_a_likely_one_are_drawn():
    # A thousand tokens of 1e-9 each; a number lies in the middle of its token's share.
    logits = torch.zeros(1, 1001)
    logits[0, 0] = math.log(1e9)
    probability = logits[0].double().softmax(-1)
    for token in (1, 2, 500, 1000):
        uniform = probability[:token].sum() + probability[token] / 2
        assert sample(logits, uniform[None]).item() == token


def test_numbers_depend_on_seed_and_prompt_alone():
    prompts = [[1, 2, 3], [4], [1, 2, 3]]
    torch.manual_seed(1)
    numbers = uniform_numbers(prompts, 50, seed=7)
    torch.manual_seed(2)
    assert torch.equal(numbers, uniform_numbers(prompts, 50, seed=7))
    assert torch.equal(numbers[[1, 0, 2]], uniform_numbers([[4], [1, 2, 3], [1, 2, 3]], 50, seed=7))
    assert torch.equal(numbers[1:2, :20], uniform_numbers([[4]], 20, seed=7))
    assert len(numbers.unique()) == numbers.numel()
    assert not torch.equal(numbers, uniform_numbers(prompts, 50, seed=8))
    assert numbers.min() >= 0 and numbers.max() < 1


def test_a_prompt_that_comes_again_is_known_from_earlier_calls():
    prompts = [[1, 2], [4], [1, 2], [1, 2]]
    together, prompt_counts = uniform_numbers(prompts, 9, seed=7), Counter()
    apart = [
        uniform_numbers(some, 9, seed=7, prompt_counts=prompt_counts)
        for some in (prompts[:2], prompts[2:3], prompts[3:])
    ]
    assert torch.equal(torch.cat(apart), together)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ((-0.1, None, None), "temperature"),
        ((float("nan"), None, None), "temperature"),
        ((1.0, 0, None), "top_k"),
        ((1.0, None, 0.0), "top_p"),
        ((1.0, None, 1.5), "top_p"),
    ],
)
def test_settings_out_of_range_are_named(settings, key):
    with pytest.raises(UserError) as error:
        check_sampling(*settings)
    assert (error.value.key, error.value.code) == (key, "out_of_range")


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 5e-324])
def test_a_tiny_temperature_samples_the_most_probable_token(temperature):
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 5
    filtered = filter_logits(logits, temperature, None, None)
    assert not filtered.isnan().any()
    assert torch.equal(sample(filtered, torch.rand(20, dtype=torch.float64)), logits.argmax(-1))
