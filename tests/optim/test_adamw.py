import pytest
import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.optim import adamw, linear


def reference_step(parameter, gradient, state, step, lr, betas, eps, weight_decay):
    """One step of algorithm 2 of arXiv:1711.05101, in float64."""
    m, v = state
    m = betas[0] * m + (1 - betas[0]) * gradient
    v = betas[1] * v + (1 - betas[1]) * gradient**2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return parameter - lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * parameter), (m, v)


@pytest.mark.parametrize("fused", [True, False])
def test_steps_equal_a_hand_written_adamw(fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    settings = {"betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = adamw(model, lr=0.1, weight_decay=0.3, fused=fused, **settings)
    scheduler = linear(optimizer, 5, warmup_steps=2)
    decayed = {"1.weight", "3.weight"}
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    for step in range(1, 6):
        lr = optimizer.param_groups[0]["lr"]
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            decay = 0.3 if name in decayed else 0.0
            expected[name], state[name] = reference_step(
                expected[name],
                parameter.grad.double(),
                state[name],
                step,
                lr,
                **settings,
                weight_decay=decay,
            )
        optimizer.step()
        scheduler.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-5)


def test_defaults_and_what_groups_remember():
    optimizer = adamw(nn.Linear(3, 3), lr=2e-3, betas=[0.9, 0.95])  # a list, as YAML gives it
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([2e-3, 2e-3])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0]
    assert [g["param_names"] for g in optimizer.param_groups] == [["weight"], ["bias"]]
    assert all(g["fused"] and g["betas"] == (0.9, 0.95) and g["eps"] == 1e-8 for g in optimizer.param_groups)


def test_wrong_values_are_all_named():
    with pytest.raises(UserError) as error:
        adamw(nn.Linear(3, 3), lr=-1.0, betas=(0.9, 1.0), eps=-1e-8, weight_decay=float("nan"))
    assert sorted(problem.key for problem in error.value.problems) == ["betas", "eps", "lr", "weight_decay"]
    assert all(problem.code == "out_of_range" for problem in error.value.problems)


def test_one_wrong_value_is_one_mistake():
    with pytest.raises(UserError) as error:
        adamw(nn.Linear(3, 3), lr=-1.0)
    assert (error.value.key, error.value.code) == ("lr", "out_of_range")


def test_nothing_to_train():
    with pytest.raises(UserError) as error:
        adamw(nn.Linear(3, 3).requires_grad_(False))
    assert error.value.code == "nothing_to_train"
