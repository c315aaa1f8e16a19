"""CUDA's path of `linear_cross_entropy`: on CPU tensors except for one product, and on a GPU where there is one."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from torchrecipes.losses import chunked_cross_entropy, fused_softmax, linear_cross_entropy
from torchrecipes.planning.fake_model import fake_tensors
from torchrecipes.planning.memory_estimate import _Live

EXTRAS = [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.3)]  # z_loss, label_smoothing


@pytest.fixture
def compiled_with(monkeypatch):
    """Takes CUDA's path on a CPU and compiles its kernel with the backend that is given."""

    def add_half_product(sum_VD, grad_VC, hidden_CD, beta):
        assert sum_VD.dtype == torch.float32 and grad_VC.dtype == hidden_CD.dtype
        sum_VD.copy_((sum_VD if beta else 0) + grad_VC.float() @ hidden_CD.float())

    def use(backend, **options):
        kernel = torch.compile(fused_softmax._softmax, fullgraph=True, dynamic=False, backend=backend, **options)
        monkeypatch.setattr(fused_softmax, "_kernel", lambda *_: kernel)

    torch._dynamo.reset()
    monkeypatch.setattr(fused_softmax, "_failure", None)
    monkeypatch.setattr(chunked_cross_entropy, "kernel_device", lambda device: "cuda")
    monkeypatch.setattr(chunked_cross_entropy, "_add_half_product", add_half_product)
    yield use
    torch._dynamo.reset()


def make(num_rows=300, vocab_size=37, size=16, dtype=torch.float32, bias=True, share=0.7, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) >= share] = -100
    return tensor(num_rows, size), tensor(vocab_size, size), tensor(vocab_size) if bias else None, labels.to(device)


def check(hidden, weight, bias, labels, z_loss=0.0, label_smoothing=0.0, chunk_size=None, autocast=False, **tolerance):
    """Compares losses and gradients with torch's own cross_entropy over full logits in float64."""
    leaves = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = F.linear(*doubles)
    expected_plain = F.cross_entropy(logits, labels, reduction="none")
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    expected = expected + z_loss * (logits.logsumexp(-1).square() * (labels != -100)).sum()
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=autocast):
        loss, token_loss = linear_cross_entropy(
            hidden, weight, labels, bias, chunk_size, z_loss, label_smoothing, return_token_loss=True
        )
    torch.testing.assert_close(loss.detach().double(), expected.detach(), **tolerance)
    torch.testing.assert_close(token_loss.double(), expected_plain.detach(), **tolerance)
    gradients = zip(
        leaves, torch.autograd.grad(loss / 7, leaves), torch.autograd.grad(expected / 7, doubles), strict=True
    )
    for leaf, gradient, expected_gradient in gradients:
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient.double(), expected_gradient, **tolerance)


@pytest.mark.parametrize("z_loss,label_smoothing", EXTRAS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_size", [128, 1, None])
def test_equals_torch_in_float64(compiled_with, z_loss, label_smoothing, bias, chunk_size):
    compiled_with("eager")
    rows = 5 if chunk_size == 1 else 300
    inputs = make(rows, dtype=torch.float64, bias=bias)
    check(*inputs, z_loss, label_smoothing, chunk_size, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_close_to_float64(compiled_with, dtype):
    compiled_with("eager")
    hidden, weight, bias, labels = make()
    with torch.no_grad():  # values that bf16 holds, so that only the arithmetic differs
        hidden, weight = hidden.bfloat16().to(dtype).requires_grad_(), weight.bfloat16().float().requires_grad_()
    check(hidden, weight, bias, labels, 1e-2, 0.1, 128, autocast=True, rtol=0.02, atol=0.02)


def test_inductor_computes_the_same(compiled_with):
    compiled_with("inductor")
    check(*make(dtype=torch.bfloat16), 1e-2, 0.1, 128, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("num_rows,share", [(0, 1.0), (300, 0.0)])
def test_no_target_is_zero_with_zero_gradients(compiled_with, num_rows, share):
    compiled_with("eager")
    hidden, weight, bias, labels = make(num_rows, share=share)
    with torch.no_grad():
        hidden[:1, 0] = 1e4  # what a row without a target holds does not matter
    loss = linear_cross_entropy(hidden, weight, labels, bias, 128, 1e-2, 0.1)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_the_weights_gradient_is_summed_in_fp32(compiled_with):
    compiled_with("eager")
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(600, dtype=torch.int64), chunk_size=2).backward()
    assert weight.grad.dtype == torch.bfloat16 and weight.grad.flatten().tolist() == [-300, 300]


def test_one_graph_serves_every_number_of_rows(compiled_with):
    counter = CompileCounter()
    compiled_with(counter)
    for num_rows in (300, 128, 386, 2, 0, 1000):
        hidden, weight, bias, labels = make(num_rows)
        linear_cross_entropy(hidden, weight, labels, bias, 128).backward()
    assert counter.frame_count == 1
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, bias, 128)
    assert counter.frame_count == 2  # without the gradient


def test_rows_of_logits_are_aligned(compiled_with, monkeypatch):
    strides = set()

    def kernel(logits, bias, at_label, label, count, *settings):
        strides.add(logits.stride())
        return fused_softmax._softmax(logits, bias, at_label, label, count, *settings)

    compiled_with("eager")
    monkeypatch.setattr(fused_softmax, "_kernel", lambda *_: kernel)
    check(*make(vocab_size=37, dtype=torch.float64), chunk_size=128)
    assert strides == {(40, 1)}


def test_a_label_out_of_range_is_an_error(compiled_with):
    compiled_with("eager")
    hidden, weight, bias, labels = make()
    labels[3] = 37
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels, bias)


def test_without_a_compiler_small_tiles_run(compiled_with):
    tried = []

    def no_compiler(graph, inputs):
        tried.append(graph)
        raise RuntimeError("Failed to find C compiler")

    compiled_with(no_compiler)
    inputs = make(dtype=torch.float64)
    for _ in range(2):
        with pytest.warns(UserWarning, match="Failed to find C compiler"):
            check(*inputs, 1e-2, 0.1, 128)
    assert len(tried) == 1


def test_a_compiled_caller_runs_the_same_kernel(compiled_with):
    counter = CompileCounter()
    compiled_with(counter)
    hidden, weight, bias, labels = make(dtype=torch.float64)

    @torch.compile(backend="eager")
    def caller(hidden, weight):
        return linear_cross_entropy(hidden * 2, weight, labels, bias, 128) / 3

    loss = caller(hidden, weight)
    logits = F.linear(hidden * 2, weight, bias)
    expected = F.cross_entropy(logits, labels, reduction="sum") / 3
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, (hidden, weight, bias)) for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1


def test_an_estimate_makes_the_logits_of_a_chunk_and_counts_three_products():
    rows, vocab_size, size, chunk_size = 4096, 1000, 64, 1024
    with fake_tensors("cuda"), _Live() as live:
        hidden = torch.empty(rows, size, requires_grad=True)
        weight = torch.empty(vocab_size, size, requires_grad=True)
        labels = torch.zeros(rows, dtype=torch.int64)
        before = live.total
        with FlopCounterMode(display=False) as flops, torch.autocast("cpu", dtype=torch.bfloat16):
            linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size).backward()
        assert flops.get_total_flops() == 3 * 2 * rows * vocab_size * size
        half = (hidden.nbytes + weight.nbytes) // 2
        expected = chunk_size * vocab_size * 2 + half + hidden.nbytes + weight.nbytes
        assert live.peak - before == pytest.approx(expected, rel=0.1)


def test_many_sizes_do_not_reach_the_limit_of_recompilations(compiled_with, monkeypatch):
    kernel = fused_softmax._kernel
    compiled_with("eager")
    monkeypatch.setattr(fused_softmax, "_kernel", kernel)
    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **kw: real_compile(f, backend="eager", **kw))
    kernel.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=2):
        for vocab_size in range(30, 36):
            check(*make(vocab_size=vocab_size, dtype=torch.float64))
    assert kernel.cache_info().currsize == 6
    kernel.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size,bias", [(1000, True), (30_011, False)])
@pytest.mark.parametrize("z_loss,label_smoothing", EXTRAS)
def test_on_a_gpu(z_loss, label_smoothing, vocab_size, bias):
    inputs = make(1000, vocab_size, bias=bias, device="cuda", dtype=torch.float64)
    check(*inputs, z_loss, label_smoothing, 384, rtol=1e-9, atol=1e-9)
    inputs = make(1000, vocab_size, size=64, bias=bias, device="cuda", dtype=torch.bfloat16)
    check(*inputs, z_loss, label_smoothing, 384, autocast=True, rtol=0.05, atol=0.05)


@pytest.mark.gpu
def test_on_a_gpu_nothing_synchronizes_and_no_second_chunk_is_allocated():
    hidden, weight, bias, labels = make(4096, 30_011, size=64, device="cuda")

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, labels, bias, 1024)
        return torch.autograd.grad(loss, (hidden, weight, bias))

    step()  # compiles
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradient_bytes = sum(gradient.nbytes for gradient in gradients)
    logits, halves = 1024 * 30_016 * 2, (hidden.nbytes + weight.nbytes) // 2
    assert torch.cuda.max_memory_allocated() - before < 1.1 * (logits + halves + gradient_bytes)
