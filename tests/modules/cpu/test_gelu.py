import pytest
import torch
import torch.nn.functional as F

from torchrecipes.modules.cpu import gelu
from torchrecipes.modules.cpu.gelu import gelu_tanh


def make(dtype, size=3000, scale=3.0):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)) * scale
    return torch.cat([x, torch.tensor([0.0, -0.0, 9.0, -9.0, 1e4, -1e4])]).to(dtype).requires_grad_()


def with_gradient(function, x):
    out = function(x)
    grad = torch.linspace(-1, 1, x.numel()).bfloat16().to(x.dtype).view(x.shape)  # exact in every dtype
    (gradient,) = torch.autograd.grad(out, x, grad)
    return out.detach(), gradient


@pytest.mark.parametrize("tile", [1 << 17, 1000])  # at once, and in four parts
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2**-7)]
)
def test_equals_torch_in_float64(monkeypatch, dtype, tolerance, compiled, tile):
    monkeypatch.setattr(gelu, "TILE", tile)
    x = make(dtype)
    function = torch.compile(gelu_tanh, backend="aot_eager") if compiled else gelu_tanh
    ours = with_gradient(function, x)
    theirs = with_gradient(lambda y: F.gelu(y, approximate="tanh"), x.detach().double().requires_grad_())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        alone = gelu_tanh(x)
    assert torch.equal(alone, with_gradient(gelu_tanh, x)[0])


def test_in_bf16_about_as_close_to_float64_as_torch():
    x = make(torch.bfloat16, scale=1.0)
    exact = with_gradient(lambda y: F.gelu(y, approximate="tanh"), x.detach().double().requires_grad_())
    ours, theirs = (with_gradient(f, x) for f in (gelu_tanh, lambda y: F.gelu(y, approximate="tanh")))
    for a, b, c, times in zip(ours, theirs, exact, (1.01, 2.0), strict=True):  # the derivative is rounded, too
        assert (a.double() - c).norm() <= times * (b.double() - c).norm()


def test_gradcheck():
    x = make(torch.float64, size=40)[:-2].detach().requires_grad_()
    assert torch.autograd.gradcheck(gelu_tanh, x)


def test_any_strides(monkeypatch):
    monkeypatch.setattr(gelu, "TILE", 100)
    x = make(torch.float32)[:3000].detach().view(60, 50).t().requires_grad_()
    ours, theirs = (with_gradient(f, x) for f in (gelu_tanh, lambda y: F.gelu(y, approximate="tanh")))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_input_is_left_as_it_was():
    x = make(torch.float32)
    before = x.detach().clone()
    with_gradient(gelu_tanh, x)
    assert torch.equal(x, before)
