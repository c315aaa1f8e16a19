import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchrecipes.losses import linear_cross_entropy
from torchrecipes.losses.chunked_cross_entropy import default_chunk_size


def make(num_rows, vocab_size=37, size=12, share=0.6, bias=True, dtype=torch.float32, seed=0):
    """hidden, weight, bias (or None), labels with about `share` of targets."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) >= share] = -100
    return tensor(num_rows, size), tensor(vocab_size, size), tensor(vocab_size) if bias else None, labels


def reference(hidden, weight, bias, labels, scale=1.0):
    """Loss and gradients of `scale * loss`, row by row in float64: nothing of cross_entropy's own code."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    h, w, b = leaves
    loss = torch.zeros((), dtype=torch.float64) + 0 * (h.sum() + w.sum() + (0 if b is None else b.sum()))
    for row, label in zip(h, labels.tolist(), strict=True):
        if label != -100:
            logits = w @ row + (0 if b is None else b)
            loss = loss + torch.logsumexp(logits, 0) - logits[label]
    (scale * loss).backward()
    return loss.detach(), [None if t is None else t.grad for t in leaves]


def check(ours, hidden, weight, bias, labels, scale=1.0, **tolerance):
    loss, gradients = reference(hidden, weight, bias, labels, scale)
    torch.testing.assert_close(ours.detach().double(), loss, **tolerance)
    for tensor, expected in zip((hidden, weight, bias), gradients, strict=True):
        if tensor is not None:
            assert tensor.grad.dtype == tensor.dtype
            torch.testing.assert_close(tensor.grad.double(), expected, **tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 4, 5, 20, 1000, None])  # dividing 20 rows, not dividing, all, more
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_equals_full_logits_in_float64(chunk_size, bias, share):
    inputs = make(20, share=share, bias=bias)
    hidden, weight, b, labels = inputs
    loss = linear_cross_entropy(hidden, weight, labels, b, chunk_size)
    assert loss.dtype == torch.float32 and loss.shape == ()
    loss.backward()
    check(loss, *inputs, rtol=1e-5, atol=1e-5)


def test_equals_torch_cross_entropy():
    hidden, weight, bias, labels = make(50)
    ours = linear_cross_entropy(hidden, weight, labels, bias, chunk_size=7)
    torchs = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")
    torch.testing.assert_close(ours, torchs)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight, bias)) for loss in (ours, torchs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk_size", [1, 6, None])
def test_one_target(chunk_size):
    inputs = hidden, weight, bias, labels = make(20, share=0.0)
    labels[13] = 5
    loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_size)
    loss.backward()
    check(loss, *inputs, rtol=1e-5, atol=1e-5)
    assert not hidden.grad[torch.arange(20) != 13].any()


@pytest.mark.parametrize("num_rows", [0, 9])
def test_no_target_is_zero_with_zero_gradients(num_rows):
    hidden, weight, bias, labels = make(num_rows, share=0.0)
    loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_size=4)
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()
    for tensor in (hidden, weight, bias):
        assert tensor.grad.shape == tensor.shape and not tensor.grad.any()


def test_more_rows_than_one_tile_of_the_softmax():
    # A tile of 4 MiB is 16 rows of this vocabulary in fp64: each of the two chunks has tiles of 16, 16 and 3 rows.
    inputs = hidden, weight, bias, labels = make(70, vocab_size=1 << 15, size=4, dtype=torch.float64)
    loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_size=35)
    loss.backward()
    check(loss, *inputs, rtol=1e-10, atol=1e-10)


def test_extreme_logits():
    labels = torch.tensor([0, 1, 2, 0])
    hidden = torch.tensor([[1e4], [1e4], [-1e4], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=3)
    loss.backward()
    assert loss.item() == pytest.approx(0 + 2e4 + 1.5e4 + math.log(3))
    check(loss, hidden, weight, None, labels, rtol=1e-6, atol=1e-6)


def test_gradient_of_a_sure_prediction_keeps_its_precision_in_bf16():
    # p(label) is 1 - 3e-4, which bf16 rounds to 1: the gradient has to be formed before it is rounded.
    weight = torch.tensor([[8.0], [0.0]], requires_grad=True)
    hidden = torch.tensor([[1.0]], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    missing = 1 - torch.sigmoid(torch.tensor(8.0)).item()
    assert weight.grad.flatten().tolist() == pytest.approx([-missing, missing], rel=0.01)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])  # what a norm or a linear layer hands over
@pytest.mark.parametrize("chunk_size", [7, None])
def test_autocast(chunk_size, hidden_dtype, bias):
    hidden, weight, b, labels = make(40, bias=bias)
    with torch.no_grad():  # values that bf16 holds, so that only the arithmetic differs
        for tensor in (hidden, weight):
            tensor.copy_(tensor.bfloat16())
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, b, chunk_size)
    assert loss.dtype == torch.float32
    loss.backward()
    check(loss, hidden, weight, b, labels, rtol=0.02, atol=0.02)


def test_autocast_is_as_close_to_float64_as_full_logits_are():
    errors = {}
    for name in ("chunked", "full"):
        hidden, weight, _, labels = make(600, vocab_size=200, size=32, bias=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if name == "chunked":
                loss = linear_cross_entropy(hidden, weight, labels, chunk_size=10)
            else:
                loss = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
        loss.backward()
        expected = reference(hidden, weight, None, labels)[1]
        errors[name] = [(t.grad.double() - e).norm() for t, e in zip((hidden, weight), expected[:2], strict=True)]
    assert all(ours < 1.2 * theirs for ours, theirs in zip(errors["chunked"], errors["full"], strict=True))


def test_bf16_weight_sums_its_gradient_in_fp32():
    # 300 equal contributions, one per chunk: a bf16 sum would stop growing at 256 times the first of them.
    hidden = torch.ones(300, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(300, dtype=torch.int64), chunk_size=1).backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [-150, 150]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_without_autocast(dtype):
    inputs = hidden, weight, bias, labels = make(30, dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_size=8)
    assert loss.dtype == torch.float32
    loss.backward()
    check(loss, *inputs, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("chunk_size", [2, None])
@pytest.mark.parametrize("autocast", [False, True])  # autocast leaves fp64 alone
def test_gradcheck(chunk_size, autocast):
    hidden, weight, bias, labels = make(5, vocab_size=7, size=3, dtype=torch.float64)

    def loss(h, w, b):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return linear_cross_entropy(h, w, labels, b, chunk_size)

    assert loss(hidden, weight, bias).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_scaled_loss():
    inputs = hidden, weight, bias, labels = make(20)
    loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_size=6)
    (loss * 3 / 7).backward()
    check(loss, *inputs, scale=3 / 7, rtol=1e-5, atol=1e-5)


def test_accumulation_over_two_calls():
    hidden, weight, bias, labels = make(20)
    losses = []
    for rows in (slice(0, 11), slice(11, 20)):
        loss = linear_cross_entropy(hidden[rows], weight, labels[rows], bias, chunk_size=4)
        (loss / 20).backward()
        losses.append(loss.detach())
    check(sum(losses), hidden, weight, bias, labels, rtol=1e-5, atol=1e-5, scale=1 / 20)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_get_no_gradient(frozen):
    inputs = hidden, weight, bias, labels = make(20)
    inputs[frozen].requires_grad_(False)
    loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_size=6)
    assert loss.grad_fn.gradients[frozen] is None
    loss.backward()
    expected = reference(*inputs)[1]
    for i, tensor in enumerate(inputs[:3]):
        if i == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad.double(), expected[i], rtol=1e-5, atol=1e-5)


def test_no_grad_gives_the_loss_alone():
    hidden, weight, bias, labels = make(20)
    with_grad = linear_cross_entropy(hidden, weight, labels, bias, chunk_size=6)
    with torch.no_grad(), Watch() as watch:
        loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_size=6)
    assert not loss.requires_grad and torch.equal(loss, with_grad)
    assert not any("scatter" in name for name in watch.names)


def test_inputs_are_left_as_they_were():
    inputs = hidden, weight, bias, labels = make(20)
    before = [t.detach().clone() for t in inputs]
    linear_cross_entropy(hidden, weight, labels, bias).backward()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_second_backward_is_refused():
    hidden, weight, bias, labels = make(6)
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy"):
        loss.backward()


def test_second_derivative_is_refused():
    hidden, weight, bias, labels = make(6)
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    with pytest.raises(RuntimeError, match="linear_cross_entropy"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("label", [-1, 37, -101])
def test_label_out_of_range_is_not_silent_on_cpu(label):
    hidden, weight, bias, labels = make(6)
    labels[2] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels, bias)


def test_wrong_inputs_are_all_named():
    hidden, weight, bias, labels = make(6)
    with pytest.raises(ValueError, match=r"\[6, 11\].*\[37, 12\].*labels.*bias.*chunk_size"):
        linear_cross_entropy(hidden[:, :11], weight, labels.int(), bias[:5], chunk_size=0)
    with pytest.raises(ValueError, match=r"hidden.*torch.bfloat16.*weight.*torch.float32"):
        linear_cross_entropy(hidden.bfloat16(), weight, labels)


class Watch(TorchDispatchMode):
    """The operators that ran and the elements of the largest tensor that any of them gave."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(str(function))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


SYNCHRONISING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal.default")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk_size", [16, None])
def test_no_tensor_is_larger_than_a_chunk_and_nothing_synchronises(chunk_size, autocast):
    num_rows, vocab_size, size = 2048, 1024, 8
    hidden, weight, bias, labels = make(num_rows, vocab_size, size)
    rows = chunk_size or default_chunk_size(num_rows, vocab_size, torch.float32, hidden.device)
    with Watch() as watch:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_size)
        (loss / 3).backward()
    assert max(hidden.numel(), weight.numel(), rows * vocab_size) == watch.largest < num_rows * vocab_size / 3
    assert not [name for name in watch.names if any(word in name for word in SYNCHRONISING)]


def test_default_chunk_on_cuda_is_a_multiple_of_128_rows_and_at_most_512_mib():
    cuda = torch.device("cuda")
    assert default_chunk_size(16_384, 50_304, torch.bfloat16, cuda) == 4096
    assert default_chunk_size(8192, 131_072, torch.bfloat16, cuda) == 2048
    assert default_chunk_size(8192, 131_072, torch.float32, cuda) == 1024
    assert default_chunk_size(2049, 131_072, torch.bfloat16, cuda) == 1152  # two of about equal size
    assert default_chunk_size(5, 1 << 30, torch.bfloat16, cuda) == 128
    assert default_chunk_size(0, 50_304, torch.bfloat16, cuda) == 128


def test_default_chunk_on_a_cpu_fits_the_cache_in_equal_chunks():
    cpu = torch.device("cpu")
    assert default_chunk_size(832, 16_384, torch.bfloat16, cpu) == 416
    assert default_chunk_size(832, 1 << 30, torch.float64, cpu) == 1
    assert default_chunk_size(0, 16_384, torch.bfloat16, cpu) == 1
    assert default_chunk_size(768, 65, torch.bfloat16, cpu) == 768
    assert default_chunk_size(1 << 20, 64, torch.bfloat16, cpu) == 8192
