import pytest
import torch

from torchrecipes.evaluation import loss_by_position, position_edges


def test_sums_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(4, 50, generator=generator)
    positions = torch.randint(0, 40, (4, 50), generator=generator)
    labels = torch.randint(0, 9, (4, 50), generator=generator).masked_fill(torch.rand(4, 50) < 0.3, -100)
    loss[labels == -100] = float("nan")  # what is not a target is not read
    found = loss_by_position(loss, positions, [4, 10, 11, 32], labels)
    assert set(found) == {f"{kind}/{name}" for kind in ("loss", "targets") for name in ("4-9", "10-10", "11-31")}
    for first, last in ((4, 9), (10, 10), (11, 31)):
        chosen = [
            value.item()
            for value, position, label in zip(loss.flatten(), positions.flatten(), labels.flatten(), strict=True)
            if first <= position <= last and label != -100
        ]
        assert found[f"targets/{first}-{last}"] == len(chosen)
        assert found[f"loss/{first}-{last}"].item() == pytest.approx(sum(chosen))
    everything = loss_by_position(torch.ones(3), torch.tensor([0, 1, 5]), [0, 2, 6])
    assert [value.item() for value in everything.values()] == [2, 2, 1, 1]


@pytest.mark.parametrize("edges", [[0], [0, 0], [4, 2]])
def test_edges_must_rise(edges):
    with pytest.raises(ValueError, match="edges"):
        loss_by_position(torch.ones(3), torch.arange(3), edges)


def test_default_edges_double():
    assert position_edges(1024) == [0, 64, 128, 256, 512, 1024]
    assert position_edges(40) == [0, 40]
    assert position_edges(300) == [0, 37, 75, 150, 300]
