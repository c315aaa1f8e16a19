import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torchrecipes.errors import UserError
from torchrecipes.losses import BinaryCrossEntropy, CrossEntropy, MeanSquaredError


def make(num_examples=7, classes=3, dtype=torch.float64):
    torch.manual_seed(0)
    logits = torch.randn(num_examples, classes, dtype=dtype, requires_grad=True)
    return logits, torch.randint(0, classes, (num_examples,))


def check(loss, logits, labels, expected):
    total = loss(logits, labels)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_cross_entropy_equals_torch(weights, smoothing):
    logits, labels = make()
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    expected = F.cross_entropy(logits, labels, weight, label_smoothing=smoothing, reduction="sum")
    check(CrossEntropy(weights, smoothing), logits, labels, expected)


def test_focal_loss_equals_its_formula():
    logits, labels = make()
    weights = [1.0, 2.0, 0.5]
    expected = 0
    for row, label in zip(logits.softmax(1), labels.tolist(), strict=True):
        expected = expected - weights[label] * (1 - row[label]) ** 2 * row[label].log()
    check(CrossEntropy(weights, focal_gamma=2.0), logits, labels, expected)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_a_certain_example_has_a_gradient_without_nan(gamma):
    logits = torch.tensor([[40.0, 0.0], [0.0, 0.0]], requires_grad=True)
    CrossEntropy(focal_gamma=gamma)(logits, torch.tensor([0, 1])).backward()
    assert logits.grad.isfinite().all() and logits.grad[1].abs().min() > 0


def test_balanced_weights_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    expected = sklearn.compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    loss = CrossEntropy("balanced", label_counts=labels.bincount().tolist())
    assert loss.class_weights.tolist() == pytest.approx(expected.tolist())
    logits = torch.zeros(10, 3)
    assert loss(logits, labels).item() == pytest.approx(10 * torch.tensor(3.0).log().item())


def test_binary_cross_entropy_equals_torch():
    logits, _ = make(classes=4)
    labels = torch.randint(0, 2, (7, 4)).float()
    check(BinaryCrossEntropy(), logits, labels, 7 * F.binary_cross_entropy_with_logits(logits, labels.double()))
    weights = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
    expected = 7 * F.binary_cross_entropy_with_logits(logits, labels.double(), pos_weight=weights)
    check(BinaryCrossEntropy(weights.tolist()), logits, labels, expected)


def test_balanced_positive_weights_even_out_a_label():
    loss = BinaryCrossEntropy("balanced", label_counts=[2, 5], num_examples=10)
    assert loss.pos_weight.tolist() == [4.0, 1.0]


def test_mean_squared_error_equals_torch():
    logits, _ = make(classes=1)
    labels = torch.randn(7, dtype=torch.float64)
    check(MeanSquaredError(), logits, labels, F.mse_loss(logits[:, 0], labels, reduction="sum"))


def test_sums_are_in_fp32():
    logits, labels = make(dtype=torch.bfloat16)
    assert CrossEntropy()(logits, labels).dtype == torch.float32
    assert BinaryCrossEntropy()(logits, F.one_hot(labels, 3)).dtype == torch.float32
    assert MeanSquaredError()(logits[:, :1], labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("make_loss", "key", "code"),
    [
        (lambda: CrossEntropy([1.0, -1.0]), "class_weights", "invalid_loss"),
        (lambda: CrossEntropy(label_smoothing=1.5), "label_smoothing", "invalid_loss"),
        (lambda: CrossEntropy(focal_gamma=-1.0), "focal_gamma", "invalid_loss"),
        (lambda: CrossEntropy("balanced", label_counts=[3, 0]), "class_weights", "empty_class"),
        (lambda: CrossEntropy("balanced"), "class_weights", "invalid_loss"),
        (lambda: BinaryCrossEntropy("balanced", label_counts=[0, 2], num_examples=4), "pos_weight", "empty_class"),
        (lambda: CrossEntropy([1.0, 2.0])(*make()), "loss.class_weights", "invalid_loss"),
        (lambda: CrossEntropy([1.0, math.inf]), "class_weights", "invalid_loss"),
        (lambda: CrossEntropy()(torch.zeros(2, 3), torch.ones(2, 3)), "loss", "wrong_labels"),
        (lambda: CrossEntropy()(torch.zeros(2, 1), torch.ones(2)), "loss", "wrong_labels"),
        (lambda: BinaryCrossEntropy()(torch.zeros(2, 3), torch.tensor([0, 1])), "loss", "wrong_labels"),
        (lambda: MeanSquaredError()(torch.zeros(2, 3), torch.tensor([0, 1])), "loss", "wrong_labels"),
    ],
)
def test_wrong_arguments(make_loss, key, code):
    with pytest.raises(UserError) as error:
        make_loss()
    assert error.value.key == key and error.value.code == code
