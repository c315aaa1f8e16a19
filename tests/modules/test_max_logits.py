import pytest
import torch

import torchrecipes.modules.max_logits as module
from torchrecipes.modules import choose_attention_backend
from torchrecipes.modules.attention_backend import AttentionBackend
from torchrecipes.modules.cache import KVCache
from torchrecipes.modules.max_logits import max_logits, record_max_logits

CPU = torch.device("cpu")


def tensors(rows, length, heads=4, key_heads=2, size=8, dtype=torch.float32):
    torch.manual_seed(length)
    return (torch.randn(rows, length, n, size, dtype=dtype) for n in (heads, key_heads))


def reference(q, k, cu_seqlens=None, causal=True, window=None):
    """Every score in float64."""
    rows, length, heads, size = q.shape
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    scores = torch.einsum("bsnh,btnh->bnst", q.double(), k.double()) / size**0.5
    at = torch.arange(length)
    seen = torch.ones(rows, length, length, dtype=torch.bool)
    if causal:
        seen &= at[:, None] >= at[None, :]
    if window is not None:
        seen &= (at[:, None] - at[None, :]).abs() <= window
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, torch.arange(rows * length), right=True).view(rows, length)
        seen &= document[:, :, None] == document[:, None, :]
    return scores.masked_fill(~seen[:, None], float("-inf")).amax(dim=(0, 2, 3))


PACKED = torch.tensor([0, 3, 20, 20, 50, 100, 131, 150, 150])


@pytest.mark.parametrize("few_at_a_time", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_largest_score_that_is_seen(monkeypatch, few_at_a_time, causal, window, packed, dropout_p):
    if few_at_a_time:
        monkeypatch.setattr(module, "_SCORES", 3 * 4 * 50 * 7)  # seven queries at a time
    q, k = tensors(3, 50)
    cu_seqlens = PACKED if packed else None
    backend = choose_attention_backend(
        (3, 50), cu_seqlens=cu_seqlens, causal=causal, window=window, dropout_p=dropout_p, device=CPU, dtype=q.dtype
    )
    expected = reference(q, k, cu_seqlens, causal, window)
    torch.testing.assert_close(max_logits(q, k, backend).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4, 30])
@pytest.mark.parametrize(
    "max_seqlen, cu_seqlens", [(50, PACKED), (20, torch.tensor([0, 20, 39, 50, 69, 80, 100, 119, 130, 150]))]
)
def test_the_plan_of_a_gpu(monkeypatch, causal, window, max_seqlen, cu_seqlens):
    monkeypatch.setattr(module, "_SCORES", 3 * 4 * 50 * 7)  # seven queries at a time
    q, k = tensors(3, 50)
    left = -1 if window is None else window
    backend = AttentionBackend(
        "varlen", cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, window_size=(left, 0 if causal else left)
    )
    expected = reference(q, k, cu_seqlens, causal, window)
    torch.testing.assert_close(max_logits(q, k, backend).double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_longer_than_a_tile_and_regrouped_documents():
    q, k = tensors(1, 300)
    backend = choose_attention_backend((1, 300), causal=True, device=CPU, dtype=q.dtype)
    assert backend.name == "tiled" and backend.mask.shape[-1] < 300
    torch.testing.assert_close(max_logits(q, k, backend).double(), reference(q, k), rtol=1e-5, atol=1e-5)
    q, k = tensors(1, 512)
    cu_seqlens = torch.arange(0, 513, 32)
    backend = choose_attention_backend(
        (1, 512), cu_seqlens=cu_seqlens, max_seqlen=32, causal=True, device=CPU, dtype=q.dtype
    )
    assert backend.gather is not None
    torch.testing.assert_close(max_logits(q, k, backend).double(), reference(q, k, cu_seqlens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_documents_one_length_at_a_time(window):
    q, k = tensors(2, 300)
    cu_seqlens = torch.tensor([0, 10, 30, 60, 100, 125, 225, 300, 310, 330, 350, 370, 390, 440, 500, 550, 600])
    backend = choose_attention_backend((2, 300), cu_seqlens=cu_seqlens, window=window, device=CPU, dtype=q.dtype)
    assert backend.groups is not None and backend.gather is not None
    expected = reference(q, k, cu_seqlens, False, window)
    torch.testing.assert_close(max_logits(q, k, backend).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_bands(causal):
    q, k = tensors(1, 300)
    for cu_seqlens in (None, torch.tensor([0, 120, 300])):
        backend = choose_attention_backend(
            (1, 300), cu_seqlens=cu_seqlens, causal=causal, window=20, device=CPU, dtype=q.dtype
        )
        assert backend.name == "banded"
        expected = reference(q, k, cu_seqlens, causal, 20)
        torch.testing.assert_close(max_logits(q, k, backend).double(), expected, rtol=1e-5, atol=1e-5)


def test_bf16_to_the_precision_of_its_products():
    q, k = tensors(2, 40, dtype=torch.bfloat16)
    backend = choose_attention_backend((2, 40), causal=True, device=CPU, dtype=q.dtype)
    found = max_logits(q, k, backend)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference(q, k), rtol=2**-7, atol=0)


def test_records_the_maximum_of_calls_and_ignores_what_is_not_finite():
    backend = choose_attention_backend((2, 20), causal=True, device=CPU, dtype=torch.float32)
    largest = torch.full((4,), float("-inf"))
    expected = torch.full((4,), float("-inf"), dtype=torch.float64)
    for scale in (1.0, 3.0, 0.5):
        q, k = tensors(2, 20)
        record_max_logits(largest, (q * scale).requires_grad_(), k, backend)
        expected = torch.maximum(expected, reference(q * scale, k))
    torch.testing.assert_close(largest.double(), expected, rtol=1e-5, atol=1e-5)
    before = largest.clone()
    q, k = tensors(2, 20)
    q[0, 3, 1], q[1, 2, 2] = float("nan"), float("inf")
    record_max_logits(largest, q * 100, k, backend)
    assert torch.equal(largest[1:3], before[1:3]) and (largest[[0, 3]] > before[[0, 3]]).all()


def test_a_cache_of_keys():
    q, k = tensors(2, 5)
    cache = KVCache(1, 2, 9, 2, 8, torch.float32, CPU)
    backend, (layer,) = cache.at(torch.arange(5).expand(2, 5), torch.float32)
    keys, _ = layer.update(k, k)
    torch.testing.assert_close(max_logits(q, keys, backend).double(), reference(q, k), rtol=1e-5, atol=1e-5)


def test_torch_accepts_the_operation():
    q, k = tensors(2, 20)
    arguments = (torch.full((4,), float("-inf")), q, k, None, None, None, -1, 0, False)
    torch.library.opcheck(module._record, arguments)
