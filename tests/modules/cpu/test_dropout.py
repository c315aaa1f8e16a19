import pytest
import torch
import torch.nn.functional as F

from torchrecipes.modules.cpu.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_the_share_and_the_mean_are_those_asked_for(dtype, p):
    torch.manual_seed(0)
    x = torch.ones(1000, 401, dtype=dtype)
    out = dropout(x, p)
    kept = out != 0
    assert out.dtype == dtype and abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    assert torch.allclose(out[kept].double(), torch.tensor(1 / (1 - p), dtype=torch.float64), rtol=1e-2)
    assert abs(out.double().mean() - 1) < 5 * (p / (1 - p) / x.numel()) ** 0.5 + 0.005


def test_elements_are_independent():
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(200_000), 0.1) == 0).double() - 0.1
    for distance in (1, 2, 3, 4, 5, 8, 16, 64):  # four neighbours come from one draw
        assert abs((dropped[distance:] * dropped[:-distance]).mean() / 0.09) < 5 / 200_000**0.5
    lanes = (dropped.view(-1, 4) > 0).double().mean(0)
    assert (lanes - 0.1).abs().max() < 5 * (0.09 / 50_000) ** 0.5


def test_it_follows_the_generator_and_gradients_have_the_same_mask():
    x = torch.randn(7, 33, requires_grad=True)
    torch.manual_seed(3)
    out = dropout(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.3), out) and not torch.equal(dropout(x, 0.3), out)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad * x, out)
    transposed = x.t()
    torch.manual_seed(3)
    assert dropout(transposed, 0.3).shape == (33, 7)


def test_nothing_and_everything_may_be_dropped():
    x = torch.randn(100)
    assert dropout(x, 0.0) is x and dropout(x, 0.5, training=False) is x and dropout(x[:0], 0.5).shape == (0,)
    assert not dropout(x, 1.0).any()
    torch.manual_seed(0)
    assert (dropout(torch.ones(10_000), 1e-9) == 0).sum() <= 2


def test_a_compiler_gets_the_operation_of_pytorch():
    x = torch.randn(1000)
    compiled = torch.compile(dropout, backend="eager", fullgraph=True)
    torch.manual_seed(1)
    expected = F.dropout(x, 0.25)
    torch.manual_seed(1)
    assert torch.equal(compiled(x, 0.25), expected)
