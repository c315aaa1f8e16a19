"""The random state of a forward pass, saved and replayed: what a cached contrastive step needs besides autograd.

A contrastive loss over a large batch needs all embeddings at once, but not all activations (GradCache: Gao et al.,
2021, arXiv:2101.06983):

    1. embed every micro-batch without gradients, and keep the random state that dropout was drawn from;
    2. compute the loss from all embeddings, and its gradient with respect to them;
    3. embed every micro-batch again, with the same dropout, and continue the backward pass from that gradient.

Memory is that of one micro-batch and of the embeddings; gradients are those of the plain step.

    states, embeddings = [], []
    for batch in batches:
        states.append(random_state(device))
        with torch.no_grad():
            embeddings.append(model.embed(batch))
    cached = torch.cat(embeddings).requires_grad_()
    loss, sums = compute_loss(cached, Examples.join([batch.examples for batch in batches]))
    loss.backward()
    gradients = cached.grad.split([len(part) for part in embeddings])
    for batch, state, gradient in zip(batches, states, gradients):
        set_grad_sync(model, last=batch is batches[-1])
        with replay(state):
            model.embed(batch).backward(gradient)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from torchrecipes.devices import rng_state, set_rng_state


class RandomState(NamedTuple):
    """State of torch's generators: of the CPU, and of the device's own (None: it is the CPU)."""

    cpu: Tensor
    own: Tensor | None
    device: torch.device


def random_state(device: torch.device | str) -> RandomState:
    """The state of the generators that a forward pass on `device` draws from. It does not wait for a GPU."""
    device = torch.device(device)
    return RandomState(torch.get_rng_state(), rng_state(device), device)


@contextmanager
def replay(state: RandomState) -> Iterator[None]:
    """Draws the same random numbers in this context as after `random_state`; afterwards, those that were due before."""
    before = random_state(state.device)
    _set(state)
    try:
        yield
    finally:
        _set(before)


def _set(state: RandomState) -> None:
    torch.set_rng_state(state.cpu)
    set_rng_state(state.own, state.device)
