import pytest
import torch

from torchrecipes.optim.newton_schulz import COEFFICIENTS, fast_dtype, orthogonalize, polynomials


def matrices(*shape, smallest=0.01, seed=0):
    """With singular values between `smallest` and 1, in float64."""
    torch.manual_seed(seed)
    u, s, vh = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, torch.tensor(smallest).log10().item(), s.shape[-1], dtype=torch.float64)
    return u * s @ vh, u @ vh


@pytest.mark.parametrize("shape", [(4, 24, 24), (3, 40, 16), (16, 40), (2, 3, 8, 20)])
@pytest.mark.parametrize("coefficients, low, high", [("quintic", 0.65, 1.25), ("polar_express", 0.85, 1.15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_near_1(shape, coefficients, low, high, dtype):
    given, _ = matrices(*shape)
    found = orthogonalize(7 * given.float(), 5, coefficients, dtype)
    assert found.dtype == dtype and found.shape == given.shape
    values = torch.linalg.svdvals(found.double())
    assert low < values.min() and values.max() < high


@pytest.mark.parametrize("shape", [(4, 24, 24), (3, 40, 16), (16, 40)])
def test_the_polar_factor_of_the_svd(shape):
    given, expected = matrices(*shape)
    for scale in (1e-4, 1.0, 1e4):
        found = orthogonalize(scale * given.float(), 10, "polar_express", torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 48)])
def test_polar_express_comes_closer_in_the_same_five_steps(shape):
    given, expected = matrices(*shape)
    far = {}
    for coefficients in COEFFICIENTS:
        found = orthogonalize(given.float(), 5, coefficients, torch.float32).double()
        far[coefficients] = torch.linalg.matrix_norm(found - expected, 2).item()
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.68 and values.max() < 1.203  # the polynomial's maximum between 0 and 1
    assert far["polar_express"] < 0.5 * far["quintic"]


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_one_step_is_the_polynomial_of_the_singular_values(coefficients):
    given = torch.tensor([[0.6, 0.0], [0.0, 0.8]], dtype=torch.float64)  # its Frobenius norm is 1
    (a, b, c), *_ = polynomials(coefficients, 1)
    divided = given.diagonal() / (1.01 if coefficients == "polar_express" else 1)
    expected = a * divided + b * divided**3 + c * divided**5
    found = orthogonalize(given, 1, coefficients, torch.float64)
    torch.testing.assert_close(found, expected.diag(), rtol=1e-6, atol=1e-9)


def test_published_coefficients():
    assert polynomials("quintic", 3) == [(3.4445, -4.7750, 2.0315)] * 3
    steps = polynomials("polar_express", 10)
    assert steps[0] == (8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5)
    assert steps[7:] == [(1.875, -1.25, 0.375)] * 3  # the fixed point, where no safety is needed


def test_batches_do_not_change_a_matrix(monkeypatch):
    given, _ = matrices(5, 12, 20)
    whole = orthogonalize(given.float(), dtype=torch.float32)
    for one, expected in zip(given.float(), whole, strict=True):
        torch.testing.assert_close(orthogonalize(one, dtype=torch.float32), expected)
    monkeypatch.setattr("torchrecipes.optim.newton_schulz._BATCH_ON_CPU", 12 * 20 * 2)
    torch.testing.assert_close(orthogonalize(given.float(), dtype=torch.float32), whole)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_zero_stays_zero(coefficients):
    assert not orthogonalize(torch.zeros(2, 3, 4), 5, coefficients).any()


def test_the_dtype_follows_the_device(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert fast_dtype(cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert fast_dtype(cpu) == torch.float32
    assert orthogonalize(torch.ones(2, 2)).dtype == torch.float32
