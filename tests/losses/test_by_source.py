import types

import pytest
import torch

from torchrecipes.losses import by_source

NAMES = ("general", "domain", "unseen")


def make(objective, seed=0):
    """(Losses of tokens, batch, the row and the label of each loss)."""
    generator = torch.Generator().manual_seed(seed)
    source_ids = torch.randint(0, 2, (5,), generator=generator)
    shape = (5, 7) if objective == "causal" else (12,)
    labels = torch.randint(0, 9, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.4] = -100
    token_loss = torch.where(labels == -100, 0, torch.rand(shape, generator=generator)).requires_grad_()
    batch = types.SimpleNamespace(input_ids=torch.zeros(5, 7), source_ids=source_ids, source_names=NAMES)
    batch.labels = batch.masked_positions = batch.masked_labels = None
    if objective == "causal":
        batch.labels = labels
        rows = torch.arange(5)[:, None].expand(5, 7).flatten()
    else:
        batch.masked_labels = labels
        batch.masked_positions = torch.randperm(35, generator=generator)[:12]
        rows = batch.masked_positions // 7
    return token_loss, batch, list(zip(rows.tolist(), labels.flatten().tolist(), strict=True))


def expected(token_loss, batch, tokens):
    sums = dict.fromkeys([f"{kind}/{name}" for kind in ("loss", "targets") for name in NAMES], 0.0)
    for value, (row, label) in zip(token_loss.flatten().tolist(), tokens, strict=True):
        if label != -100:
            name = NAMES[batch.source_ids[row]]
            sums[f"loss/{name}"] += value
            sums[f"targets/{name}"] += 1
    return sums


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_equals_a_loop_in_float64(objective):
    token_loss, batch, tokens = make(objective)
    found = by_source(token_loss, batch)
    assert not any(value.requires_grad for value in found.values())
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected(token_loss, batch, tokens))
    assert found["targets/unseen"] == 0 and found["targets/general"] > 0 < found["targets/domain"]


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_compiles_to_one_graph(objective):
    token_loss, batch, tokens = make(objective, seed=1)
    compiled = torch.compile(by_source, fullgraph=True, backend="eager")
    found = {name: value.item() for name, value in compiled(token_loss, batch).items()}
    assert found == pytest.approx(expected(token_loss, batch, tokens))


def test_one_source_has_nothing_to_tell():
    assert by_source(torch.zeros(2, 3), types.SimpleNamespace(source_ids=None, source_names=())) == {}
