import torch
from transformers.masking_utils import sliding_window_bidirectional_overlay, sliding_window_overlay

from torchrecipes.modules import choose_attention_backend


def seen(**arguments):
    backend = choose_attention_backend((1, 20), device=torch.device("cpu"), dtype=torch.float32, **arguments)
    return backend.mask[0, 0] == 0


def test_window_is_the_sliding_window_of_bidirectional_models():
    i, j = torch.arange(20)[:, None], torch.arange(20)[None]
    assert torch.equal(seen(window=4), sliding_window_bidirectional_overlay(4)(0, 0, i, j))


def test_causal_window_is_one_less_than_theirs():
    i, j = torch.arange(20)[:, None], torch.arange(20)[None]
    assert torch.equal(seen(window=4, causal=True), sliding_window_overlay(5)(0, 0, i, j) & (j <= i))
