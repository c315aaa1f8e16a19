import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.losses import document_class_loss


def made_up(dtype):
    """A head, hidden states and a batch with an unused slot and a document that is classified right."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5)).to(dtype)
    hidden = torch.randn(2, 7, 6, dtype=dtype, requires_grad=True)
    positions = torch.tensor([0, 4, 9, 13])
    labels = torch.tensor([3, -100, 0, 2])
    labels[0] = head(hidden[0, 0]).argmax()
    batch = SimpleNamespace(
        class_positions=positions, class_labels=labels, class_weights=torch.tensor([2.5, 7.0, 0.5, 1.0])
    )
    return SimpleNamespace(document_head=head), hidden, batch


def test_loss_gradient_and_sums_are_those_of_a_loop():
    model, hidden, batch = made_up(torch.float64)
    loss, sums = document_class_loss(hidden, model, batch)
    loss.backward()
    parameters = [hidden, *model.document_head.parameters()]
    found = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    expected, unweighted, correct = 0.0, 0.0, 0
    for slot in (0, 2, 3):
        place, label = int(batch.class_positions[slot]), int(batch.class_labels[slot])
        logits = model.document_head(hidden[place // 7, place % 7])
        loss_of_slot = -(logits[label] - logits.exp().sum().log())
        expected = expected + loss_of_slot * float(batch.class_weights[slot])
        unweighted += float(loss_of_slot.detach())
        correct += int(logits.argmax()) == label
    expected.backward()
    assert loss.dtype == torch.float64
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-12)
    for gradient, parameter in zip(found, parameters, strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-10, atol=1e-14)
    assert math.isclose(sums["class_loss"].item(), unweighted, rel_tol=1e-12)
    assert 1 <= correct < 3
    assert sums["class_accuracy"] == correct
    assert sums["targets/class_loss"] == sums["targets/class_accuracy"] == 3
    assert not any(value.requires_grad for value in sums.values())


def test_bf16_states_give_an_fp32_loss():
    model, hidden, batch = made_up(torch.bfloat16)
    loss, _ = document_class_loss(hidden, model, batch)
    assert loss.dtype == torch.float32


def test_no_document_is_classified():
    model, hidden, batch = made_up(torch.float32)
    batch.class_labels.fill_(-100)
    loss, sums = document_class_loss(hidden, model, batch)
    loss.backward()
    assert loss.item() == sums["class_loss"].item() == sums["targets/class_loss"].item() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.document_head.parameters())


def test_a_batch_without_classes_adds_nothing():
    assert document_class_loss(torch.zeros(1, 2, 3), nn.Linear(1, 1), SimpleNamespace(class_positions=None)) == (
        0.0,
        {},
    )


def test_a_model_without_document_head_is_refused():
    _, hidden, batch = made_up(torch.float32)
    with pytest.raises(UserError) as error:
        document_class_loss(hidden, nn.Linear(1, 1), batch)
    assert (error.value.key, error.value.code) == ("model", "no_document_head")
