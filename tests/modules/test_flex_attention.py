"""What CUDA computes with `flex_attention`, on the CPU: its masks, numbers and gradients, and how often it compiles."""

import numpy as np
import pytest
import torch
import torch._dynamo
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.attention.flex_attention import create_block_mask

from torchrecipes.data.batching.batch import document_fields
from torchrecipes.models import neobert, qwen3
from torchrecipes.modules import SelfAttention, attention
from torchrecipes.modules.attention_backend import flex_backend, masked_backend
from torchrecipes.modules.block_mask import document_block_mask
from torchrecipes.modules.max_logits import max_logits
from torchrecipes.modules.self_attention import _compiled
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing

CPU = torch.device("cpu")


@pytest.fixture
def gradients_on_the_cpu(monkeypatch):
    """PyTorch refuses gradients on a CPU, although the uncompiled kernel has them."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def documents(rows, row_len, mean, seed):
    """The fields of a batch whose documents have about `mean` tokens."""
    starts = np.random.default_rng(seed).random(rows * row_len) < 1 / mean
    starts[::row_len] = True
    return document_fields(starts.nonzero()[0], (rows, row_len))


@pytest.mark.parametrize("row_len", [64, 128, 300, 1000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 0, 5, 130, 200])
def test_block_masks_equal_those_from_all_pairs_of_tokens(row_len, causal, window):
    for document_ids in (None, *(documents(2, row_len, mean, seed=row_len)["document_ids"] for mean in (3, 60, 250))):
        found = document_block_mask(document_ids, row_len, causal=causal, window=window, device=CPU)
        rows = 1 if document_ids is None else 2
        position = torch.arange(row_len)
        distance = position[:, None] - position
        seen = torch.ones(rows, row_len, row_len, dtype=torch.bool)
        if causal:
            seen &= distance >= 0
        if window is not None:
            seen &= distance.abs() <= window
        if document_ids is not None:
            seen &= document_ids[:, :, None] == document_ids[:, None, :]
        expected = create_block_mask(lambda b, h, q, k, seen=seen: seen[b, q, k], rows, 1, row_len, row_len, "cpu")
        for blocks in ("kv", "full_kv", "q", "full_q"):
            counts = getattr(expected, f"{blocks}_num_blocks")
            assert torch.equal(getattr(found, f"{blocks}_num_blocks"), counts)
            used = torch.arange(counts.shape[-1]) < counts[..., None]
            indices, expected_indices = (getattr(mask, f"{blocks}_indices") for mask in (found, expected))
            assert torch.equal(indices[used], expected_indices[used])
        at = torch.arange(row_len)
        pairs = found.mask_mod(torch.arange(rows)[:, None, None], None, at[:, None], at)
        assert torch.equal(pairs.expand_as(seen), seen)


@pytest.mark.usefixtures("gradients_on_the_cpu")
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 3), (True, 3)])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(4, 16), (2, 16), (1, 6)])
def test_outputs_and_gradients_equal_a_masked_softmax(causal, window, kv_heads, head_dim):
    torch.manual_seed(0)
    fields = documents(2, 200, 30, seed=0)
    q, k, v = (
        torch.randn(2, 200, n, head_dim, dtype=torch.float64, requires_grad=True) for n in (4, kv_heads, kv_heads)
    )
    options = {"causal": causal, "window": window, "device": CPU}
    backend = flex_backend((2, 200), fields["document_ids"], **options)
    expected = attention(q, k, v, cu_seqlens=fields["cu_seqlens"], causal=causal, window=window)
    found = attention(q, k, v, backend=backend)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_scan_that_would_not_see_the_block_mask_is_refused():
    q = torch.randn(1, 128, 2, 16)
    with pytest.raises(ValueError, match="max_logits"):
        max_logits(q, q, flex_backend((1, 128), documents(1, 128, 10, seed=0)["document_ids"], device=CPU))


def test_boundaries_and_document_numbers_say_the_same():
    fields = documents(3, 300, 40, seed=1)
    masks = [
        flex_backend((3, 300), **given, device=CPU).block_mask
        for given in ({"document_ids": fields["document_ids"]}, {"cu_seqlens": fields["cu_seqlens"]})
    ]
    assert torch.equal(masks[0].kv_num_blocks, masks[1].kv_num_blocks)
    assert torch.equal(masks[0].full_kv_num_blocks, masks[1].full_kv_num_blocks)


@pytest.mark.usefixtures("gradients_on_the_cpu")
@pytest.mark.parametrize("family", [neobert, qwen3])
@pytest.mark.parametrize("kernels", ["cuda", "cpu"])
def test_a_compiled_model_is_not_compiled_again_for_other_documents(monkeypatch, family, kernels):
    def as_on_cuda(shape, *, document_ids, cu_seqlens, causal, device, **_):
        return flex_backend(shape, document_ids, cu_seqlens, causal=causal, device=device)

    if kernels == "cuda":
        monkeypatch.setattr("torchrecipes.models.transformer.choose_attention_backend", as_on_cuda)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    net = family(vocab_size=50, max_position_embeddings=384, seed=0, **sizes)
    torch._dynamo.reset()
    compilations = CompileCounter()
    net.blocks[0].compile(backend=compilations)
    for seed in range(50):
        fields = documents(1, 384, (5, 40, 400)[seed % 3], seed)
        net(torch.randint(0, 50, (1, 384)), **fields).sum().backward()
    # The CPU has rows as they are, regrouped ones, and those of one document, each with its own shapes.
    assert compilations.frame_count == 1 if kernels == "cuda" else compilations.frame_count <= 5
    torch._dynamo.reset()


def test_outside_of_compiled_blocks_the_kernel_stays_compiled_whatever_the_number_of_masks(monkeypatch):
    compilations, compile_function = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_function(function, backend=compilations))
    function = _compiled.__wrapped__(lambda x, mask: x + len(mask))
    for kind in range(12):
        function(torch.ones(2), "x" * kind)
    torch._dynamo.reset()
    assert compilations.frame_count == 12


@pytest.mark.usefixtures("gradients_on_the_cpu")
def test_selective_checkpointing_keeps_what_the_kernel_computed(monkeypatch):
    def as_on_cuda(shape, *, document_ids, device, **_):
        return flex_backend(shape, document_ids, device=device)

    monkeypatch.setattr("torchrecipes.models.transformer.choose_attention_backend", as_on_cuda)
    net = neobert(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    apply_activation_checkpointing(net, "selective")
    graphs = []

    def record(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    net.blocks[0].compile(backend=backend)
    net(torch.randint(0, 50, (1, 128)), document_ids=documents(1, 128, 30, 0)["document_ids"]).sum().backward()
    torch._dynamo.reset()
    forward, backward = graphs
    assert "flex_attention" in forward
    assert "flex_attention_backward" in backward and "flex_attention" not in backward


@pytest.mark.gpu
def test_the_kernel_reports_the_largest_scores():
    torch.manual_seed(0)
    cuda = torch.device("cuda")
    layer = SelfAttention(64, 4, num_kv_heads=2).to(cuda, torch.bfloat16)
    fields = documents(2, 200, 30, seed=0)
    document_ids, x = fields["document_ids"].to(cuda), torch.randn(2, 200, 64, device=cuda, dtype=torch.bfloat16)
    found = []
    for backend in (
        masked_backend((2, 200), document_ids, None, True, None, 0.0, cuda, torch.bfloat16),
        flex_backend((2, 200), document_ids, causal=True, device=cuda),
    ):
        layer.max_logits = torch.full((4,), float("-inf"), device=cuda)
        layer(x, None, backend)
        found.append(layer.max_logits)
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)
