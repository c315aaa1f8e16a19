import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchrecipes.losses import causal_lm_loss, linear_cross_entropy

B, S, D, V = 3, 8, 6, 15
EXTRAS = [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.3), (0.5, 1.0)]  # z_loss, label_smoothing


def make(dtype=torch.float32, bias=True, share=0.7):
    torch.manual_seed(0)
    hidden = torch.randn(B, S, D).to(dtype).requires_grad_()
    head = nn.Linear(D, V, bias=bias).to(dtype)
    labels = torch.randint(0, V, (B, S))
    labels[torch.rand(B, S) >= share] = -100
    return hidden, head, labels


def reference(hidden, head, labels, z_loss, label_smoothing):
    """Loss, plain loss and gradients by torch's own cross_entropy over full logits in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, *head.parameters())]
    logits = F.linear(leaves[0], *leaves[1:]).flatten(0, 1)
    targets = labels.flatten()
    plain = F.cross_entropy(logits, targets, reduction="none").view_as(labels)
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    loss = loss + z_loss * (logits.logsumexp(-1).square() * (targets != -100)).sum()
    return loss.detach(), plain.detach(), torch.autograd.grad(loss / 7, leaves)


def check(hidden, head, labels, z_loss, label_smoothing, autocast=False, chunk_size=5, **tolerance):
    expected, expected_plain, expected_gradients = reference(hidden, head, labels, z_loss, label_smoothing)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, token_loss = causal_lm_loss(
            hidden, head, labels, z_loss, label_smoothing, chunk_size=chunk_size, return_token_loss=True
        )
    assert loss.dtype == torch.promote_types(hidden.dtype, torch.float32) and not token_loss.requires_grad
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    torch.testing.assert_close(token_loss.double(), expected_plain, **tolerance)
    gradients = torch.autograd.grad(loss / 7, [hidden, *head.parameters()])
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


@pytest.mark.parametrize("z_loss,label_smoothing", EXTRAS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_equals_torch_in_float64(z_loss, label_smoothing, bias, chunk_size):
    hidden, head, labels = make(torch.float64, bias)
    check(hidden, head, labels, z_loss, label_smoothing, chunk_size=chunk_size, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("z_loss,label_smoothing", EXTRAS)
def test_fp32_is_close_to_float64(z_loss, label_smoothing):
    check(*make(), z_loss, label_smoothing, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("z_loss,label_smoothing", EXTRAS)
def test_autocast_is_close_to_float64(z_loss, label_smoothing):
    check(*make(), z_loss, label_smoothing, autocast=True, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("z_loss,label_smoothing", EXTRAS)
def test_gradcheck(z_loss, label_smoothing):
    hidden, head, labels = make(torch.float64)

    def loss(hidden, weight, bias):
        rows, targets = hidden.flatten(0, 1), labels.flatten()
        return linear_cross_entropy(rows, weight, targets, bias, 5, z_loss=z_loss, label_smoothing=label_smoothing)

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_without_extras_the_losses_of_tokens_sum_to_the_loss():
    hidden, head, labels = make()
    loss, token_loss = causal_lm_loss(hidden, head, labels, return_token_loss=True)
    assert torch.equal(loss, token_loss.sum()) and torch.equal(loss, causal_lm_loss(hidden, head, labels))
    with torch.no_grad():
        alone = causal_lm_loss(hidden, head, labels, z_loss=0.1, return_token_loss=True)
    assert alone[0] > alone[1].sum() and torch.equal(alone[1], token_loss)


@pytest.mark.parametrize("z_loss,label_smoothing", EXTRAS)
def test_no_target_is_zero_with_zero_gradients(z_loss, label_smoothing):
    hidden, head, labels = make(share=0.0)
    with torch.no_grad():
        hidden[0, 0, 0] = 1e4  # what a row without a target holds does not matter
    loss = causal_lm_loss(hidden, head, labels, z_loss, label_smoothing)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, [hidden, *head.parameters()]))


def test_large_logits_keep_their_logsumexp():
    hidden = torch.tensor([[[300.0], [-300.0]]], requires_grad=True)
    head = nn.Linear(1, 2, bias=False)
    nn.init.constant_(head.weight, 1.0)
    loss = causal_lm_loss(hidden, head, torch.tensor([[0, -100]]), z_loss=1e-3)
    logsumexp = torch.tensor(300.0) + torch.tensor(2.0).log()
    torch.testing.assert_close(loss, torch.tensor(2.0).log() + 1e-3 * logsumexp**2)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], torch.tensor([[[2e-3 * logsumexp.item()], [0.0]]]))


def test_the_heads_transform_is_applied():
    hidden, head, labels = make()
    head.transform = nn.LayerNorm(D)
    nn.init.normal_(head.transform.weight)
    expected = causal_lm_loss(head.transform(hidden), _plain(head), labels)
    torch.testing.assert_close(causal_lm_loss(hidden, head, labels), expected)


def _plain(head):
    copy = nn.Linear(D, V)
    copy.load_state_dict({"weight": head.weight, "bias": head.bias})
    return copy


def test_wrong_inputs_are_named():
    hidden, head, labels = make()
    with pytest.raises(ValueError, match=r"\[3, 8, 6\].*\[3, 7\]"):
        causal_lm_loss(hidden, head, labels[:, 1:])
    with pytest.raises(ValueError, match=r"z_loss.*-1.*label_smoothing.*2"):
        causal_lm_loss(hidden, head, labels, z_loss=-1, label_smoothing=2)
