import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.ranks import call
from torchrecipes.data.batching.examples import Examples
from torchrecipes.distributed import parallelize, set_grad_sync
from torchrecipes.losses import (
    BatchHardTriplet,
    CoSENT,
    CosineRegression,
    InfoNCE,
    KLDistillation,
    MarginMSE,
    Matryoshka,
    SupervisedContrastive,
    Triplet,
)
from torchrecipes.training import random_state, replay

LOSSES = {
    "info_nce": InfoNCE(bidirectional=True),
    "matryoshka": Matryoshka(InfoNCE(0.1), [6, 3]),
    "cosent": CoSENT(),
    "regression": CosineRegression(),
    "triplet": Triplet(0.7),
    "batch_hard": BatchHardTriplet(0.7),
    "semi_hard": BatchHardTriplet(0.7, mining="semi_hard"),
    "supervised": SupervisedContrastive(),
    "margin_mse": MarginMSE(),
    "kl": KLDistillation(),
}


class Encoder(nn.Module):
    """Stands for an encoder with dropout: texts are vectors."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.dropout = nn.Linear(8, 16), nn.Linear(16, 6), nn.Dropout(0.3)

    def forward(self, texts):
        return self.outer(self.dropout(self.inner(self.dropout(texts)).tanh()))


def make_batches(rank, count=3):
    """Micro-batches of unequal size: features of the texts, and examples of one query and 2 or 3 candidates."""
    generator = torch.Generator().manual_seed(rank)
    batches = []
    for size in range(2, 2 + count):
        texts = torch.randperm(4 * size, generator=generator).view(size, 4)
        texts[0, 3] = -1
        scores, labels = torch.rand(size, 3, generator=generator), torch.arange(size) % 2
        examples = Examples(texts, torch.randint(0, 2**62, (4 * size,), generator=generator), scores, labels)
        batches.append((torch.randn(4 * size, 8, generator=generator), examples))
    return batches


def plain_step(model, batches, loss):
    set_grad_sync(model, last=True)
    embeddings = torch.cat([model(texts) for texts, _ in batches])
    total, _ = loss(embeddings, Examples.join([examples for _, examples in batches]))
    total.backward()
    return total.item()


def cached_step(model, batches, loss):
    states, parts = [], []
    for texts, _ in batches:
        states.append(random_state("cpu"))
        with torch.no_grad():
            parts.append(model(texts))
    embeddings = torch.cat(parts).requires_grad_()
    total, _ = loss(embeddings, Examples.join([examples for _, examples in batches]))
    total.backward()
    gradients = embeddings.grad.split([len(part) for part in parts])
    for number, ((texts, _), state, gradient) in enumerate(zip(batches, states, gradients, strict=True), 1):
        set_grad_sync(model, last=number == len(batches))
        with replay(state):
            model(texts).backward(gradient)
    return total.item()


def run_step(step, name, strategy=None):
    """Loss and gradients of a step with dropout, and a number drawn after it."""
    torch.manual_seed(1)
    model = Encoder()
    rank = dist.get_rank() if strategy else 0
    if strategy:
        parallelize(model, strategy, torch.device("cpu"), torch.float32)
    torch.manual_seed(2 + rank)
    loss = step(model, make_batches(rank), LOSSES[name])
    gradients = [parameter.grad for parameter in model.parameters()]
    return loss, [gradient.full_tensor() if strategy else gradient for gradient in gradients], torch.rand(3)


def check_steps(name, strategy=None):
    loss, gradients, due = run_step(plain_step, name, strategy)
    cached_loss, cached_gradients, cached_due = run_step(cached_step, name, strategy)
    assert cached_loss == pytest.approx(loss, rel=1e-6)
    for cached, gradient in zip(cached_gradients, gradients, strict=True):
        scale = gradient.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(cached, gradient, rtol=1e-5, atol=1e-5 * scale)
    assert torch.equal(cached_due, due)  # the next step draws what it would have drawn


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_those_of_the_plain_step_with_dropout(name):
    check_steps(name)


def check_ranks(strategy):
    for name in LOSSES:
        check_steps(name, strategy)
    return len(LOSSES)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_of_two_ranks_equal_those_of_the_plain_step(strategy):
    assert call(check_ranks, strategy) == [len(LOSSES)] * 2


def test_two_ranks_equal_one_process():
    for name, (mean, other) in zip(LOSSES, zip(*call(without_dropout), strict=True), strict=True):
        assert mean == other
        reference = Encoder().eval()
        reference.load_state_dict(initial_state())
        plain_step(reference, make_batches(0) + make_batches(1), LOSSES[name])
        for parameter, gradient in zip(reference.parameters(), mean, strict=True):  # averaged over 2 ranks
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(2 * torch.tensor(gradient), parameter.grad, rtol=1e-5, atol=1e-5 * scale)


def initial_state():
    torch.manual_seed(1)
    return Encoder().state_dict()


def without_dropout():
    results = []
    for loss in LOSSES.values():
        model = Encoder().eval()
        model.load_state_dict(initial_state())
        parallelize(model, "ddp", torch.device("cpu"), torch.float32)
        cached_step(model, make_batches(dist.get_rank()), loss)
        results.append([parameter.grad.full_tensor().tolist() for parameter in model.parameters()])
    return results


def test_replay_returns_to_the_numbers_that_were_due():
    torch.manual_seed(0)
    state = random_state("cpu")
    first, second = torch.rand(4), torch.rand(4)
    torch.manual_seed(0)
    torch.rand(4)
    with replay(state):
        assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.rand(4), second)


def test_replay_restores_the_generator_after_an_error():
    torch.manual_seed(0)
    state = random_state("cpu")
    torch.rand(4)
    due = random_state("cpu")
    with pytest.raises(ZeroDivisionError), replay(state):
        torch.rand(2)
        raise ZeroDivisionError
    assert torch.equal(random_state("cpu").cpu, due.cpu)


@pytest.mark.gpu
def test_dropout_on_a_gpu_repeats():
    torch.cuda.manual_seed(0)
    dropout, ones = nn.Dropout(0.5), torch.ones(1000, device="cuda")
    state = random_state("cuda")
    first = dropout(ones)
    second = dropout(ones)
    with replay(state):
        assert torch.equal(dropout(ones), first)
    torch.cuda.manual_seed(0)
    dropout(ones)
    assert torch.equal(dropout(ones), second)
