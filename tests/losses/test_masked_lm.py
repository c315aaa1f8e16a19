import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchrecipes.losses import masked_lm_loss


class Head(nn.Module):
    """As in BERT: a transform, then a linear layer; `tokens * 2` would do, a real layer shows its gradient too."""

    def __init__(self, size, vocab_size, bias):
        super().__init__()
        self.dense = nn.Linear(size, size)
        self.weight = nn.Parameter(torch.randn(vocab_size, size))
        self.bias = nn.Parameter(torch.randn(vocab_size)) if bias else None

    def transform(self, rows):
        return F.gelu(self.dense(rows))

    def forward(self, hidden):
        return F.linear(self.transform(hidden), self.weight, self.bias)


def make(num_masked, slots=10, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(3, 8, 6, dtype=dtype, requires_grad=True)
    positions = torch.zeros(slots, dtype=torch.int64)
    labels = torch.full((slots,), -100)
    # Position 0 is masked itself and is what the unused slots point to as well.
    positions[:num_masked] = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(23)])[:num_masked]
    labels[:num_masked] = torch.randint(0, 15, (num_masked,))
    return hidden, Head(6, 15, bias).to(dtype), positions, labels


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss / 7, [hidden, *head.parameters()])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_masked", [0, 1, 4, 10])
def test_equals_a_loop_over_full_logits(num_masked, bias):
    hidden, head, positions, labels = make(num_masked, bias=bias, dtype=torch.float64)
    log_probability = head(hidden).log_softmax(-1)
    expected = 0 * log_probability.sum()
    for position, label in zip(positions.tolist(), labels.tolist(), strict=True):
        if label >= 0:
            expected = expected - log_probability[position // 8, position % 8, label]
    expected_gradients = gradients(expected, hidden, head)
    for masked_logits_only in (True, False):
        loss = masked_lm_loss(hidden, head, positions, labels, masked_logits_only, chunk_size=3)
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(gradients(loss, hidden, head), expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_both_paths_agree_under_autocast():
    hidden, head, positions, labels = make(8)
    results = []
    for masked_logits_only in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = masked_lm_loss(hidden, head, positions, labels, masked_logits_only)
        assert loss.dtype == torch.float32
        results.append([loss, *gradients(loss, hidden, head)])
    for masked, full in zip(*results, strict=True):
        torch.testing.assert_close(masked, full, rtol=0.02, atol=0.02)


def test_a_linear_layer_serves_as_head():
    hidden, _, positions, labels = make(5)
    head = nn.Linear(6, 15)
    loss = masked_lm_loss(hidden, head, positions, labels)
    torch.testing.assert_close(loss, masked_lm_loss(hidden, head, positions, labels, masked_logits_only=False))


def test_only_masked_rows_reach_the_head():
    hidden, head, positions, labels = make(4)
    seen = []
    head.dense.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    masked_lm_loss(hidden, head, positions, labels)
    assert seen == [(10, 6)]


def test_shapes_that_do_not_fit_are_named():
    hidden, head, positions, labels = make(4)
    with pytest.raises(ValueError, match=r"\[10\].*\[9\]"):
        masked_lm_loss(hidden, head, positions, labels[:9])


@pytest.mark.parametrize("masked_logits_only", [True, False])
def test_losses_of_slots_are_those_of_their_tokens(masked_logits_only):
    hidden, head, positions, labels = make(4)
    loss, token_loss = masked_lm_loss(hidden, head, positions, labels, masked_logits_only, return_token_loss=True)
    log_probability = head(hidden).log_softmax(-1).flatten(0, 1)
    expected = [-log_probability[p, n].item() if n >= 0 else 0.0 for p, n in zip(positions, labels, strict=True)]
    assert token_loss.tolist() == pytest.approx(expected) and not token_loss.requires_grad
    torch.testing.assert_close(token_loss.sum(), loss.detach())
