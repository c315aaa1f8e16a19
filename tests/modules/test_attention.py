import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torchrecipes.data.batching.batch import document_fields
from torchrecipes.modules import (
    AttentionBackend,
    KVCache,
    SelfAttention,
    apply_rotary,
    attention,
    choose_attention_backend,
    rope_cos_sin,
)
from torchrecipes.modules.attention_backend import flex_backend, masked_backend, varlen_backend

HEADS, HEAD_DIM = 4, 16
CPU = torch.device("cpu")


def packing(rows, row_len, longest, *, seed, padding=0):
    """Boundaries of documents of random lengths; the last row ends in one document of `padding` tokens."""
    generator = torch.Generator().manual_seed(seed)
    bounds = [0]
    for row in range(rows):
        end = (row + 1) * row_len
        while bounds[-1] < end:
            left = end - bounds[-1]
            if row == rows - 1 and left <= padding:
                bounds.append(end)
                break
            length = int(torch.randint(1, longest + 1, (1,), generator=generator))
            limit = left - padding if row == rows - 1 else left
            bounds.append(bounds[-1] + min(length, limit or left))
    return torch.tensor(bounds + [bounds[-1]] * 5, dtype=torch.int32)


def inputs(rows, row_len, dtype, kv_heads=HEADS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, row_len, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def reference(q, k, v, bounds, causal, window):
    """A loop over documents and heads in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    out = []
    for start, end in itertools.pairwise(bounds.tolist()):
        position = torch.arange(end - start)
        distance = position[:, None] - position[None, :]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if window is not None:
            hidden |= distance.abs() > window
        heads = []
        for head in range(q.shape[2]):
            kv_head = head // (q.shape[2] // k.shape[2])
            scores = flat_q[start:end, head] @ flat_k[start:end, kv_head].T / HEAD_DIM**0.5
            heads.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ flat_v[start:end, kv_head])
        out.append(torch.stack(heads, 1))
    return torch.cat(out).view(q.shape)


def results(function, tensors):
    """Output and gradients of q, k, v, in float64."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [out.double(), *(g.double() for g in torch.autograd.grad(out, tensors, grad.to(out.dtype)))]


def assert_close(found, expected, tolerance):
    for name, a, b in zip(("out", "grad q", "grad k", "grad v"), found, expected, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        assert error < tolerance, f"{name}: {error}"


MASKING = [(False, None), (True, None), (False, 3), (True, 3)]


@pytest.mark.parametrize("kernel", ["sdpa", "math", "tiled"])
@pytest.mark.parametrize(("causal", "window"), MASKING)
@pytest.mark.parametrize("layout", ["dense", "rows", "regrouped"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
def test_every_kernel_and_layout_is_the_loop_over_documents(monkeypatch, kernel, causal, window, layout, kv_heads):
    if kernel == "tiled" and not causal:
        pytest.skip("tiles are for causal attention")
    if kernel == "sdpa":
        monkeypatch.setattr("torchrecipes.modules.attention_backend.TILED_LONGEST_ROW", 0)
    rows, row_len, longest = 2, 400, 40
    tensors = inputs(rows, row_len, torch.float32, kv_heads)
    bounds = packing(rows, row_len, longest if layout == "regrouped" else row_len, seed=len(layout), padding=30)
    backend = choose_attention_backend(
        (rows, row_len),
        cu_seqlens=None if layout == "dense" else bounds,
        max_seqlen=longest if layout == "regrouped" else None,
        causal=causal,
        window=window,
        # `math` needs causality in its mask, which a backend for it has.
        dropout_p=0.5 if kernel == "math" else 0.0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    narrow = window is not None and layout != "regrouped" and kernel != "math"
    assert (backend.gather is not None) == (layout == "regrouped")
    by_length = layout == "regrouped" and not causal
    assert (backend.groups is not None) == by_length
    if by_length:
        backend = backend._replace(name=kernel)  # both take documents of one length
    elif layout == "regrouped":
        assert backend.gather.shape[1] == 64
    assert backend.name == ("banded" if narrow else kernel)
    backend = backend._replace(dropout_p=0.0)
    if layout == "dense":
        bounds = torch.arange(0, rows * row_len + 1, row_len)
    found = results(lambda q, k, v: attention(q, k, v, backend=backend), tensors)
    assert_close(found, results(lambda q, k, v: reference(q, k, v, bounds, causal, window), tensors), 1e-5)


@pytest.mark.parametrize("longest", [None, 40])
@pytest.mark.parametrize(("causal", "window"), MASKING)
def test_bf16_on_the_cpu_is_close(longest, causal, window):
    tensors = inputs(2, 400, torch.bfloat16)
    bounds = packing(2, 400, 40, seed=1)
    arguments = {"cu_seqlens": bounds, "max_seqlen": longest, "causal": causal, "window": window}
    backend = choose_attention_backend(
        (2, 400),
        cu_seqlens=bounds,
        max_seqlen=longest,
        causal=causal,
        window=window,
        device=tensors[0].device,
        dtype=torch.bfloat16,
    )
    assert backend.name == ("tiled" if causal else "math")
    found = results(lambda q, k, v: attention(q, k, v, **arguments), tensors)
    assert_close(found, results(lambda q, k, v: reference(q, k, v, bounds, causal, window), tensors), 3e-2)


def test_long_rows_leave_scores_to_sdpa():
    for row_len, kernel, causal in ((1024, "math", False), (1025, "sdpa", False), (2048, "tiled", True)):
        backend = choose_attention_backend(
            (1, row_len), causal=causal, device=torch.device("cpu"), dtype=torch.bfloat16
        )
        assert backend.name == kernel
    backend = choose_attention_backend((1, 2049), causal=True, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (backend.name, backend.causal, backend.mask) == ("sdpa", True, None)


@pytest.mark.parametrize("length", [2, 127, 128, 129, 300])
def test_tiles_that_end_where_a_row_does_and_elsewhere(length):
    tensors = inputs(2, length, torch.float64, kv_heads=2)
    bounds = torch.tensor([0, length, 2 * length])
    found = results(lambda q, k, v: attention(q, k, v, causal=True), tensors)
    assert_close(found, results(lambda q, k, v: reference(q, k, v, bounds, True, None), tensors), 1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(131, 1), (256, 63), (300, 64), (385, 100), (700, 64)])
def test_bands_that_end_where_a_row_does_and_elsewhere(length, window, causal):
    tensors = inputs(2, length, torch.float64, kv_heads=2)
    for bounds in (torch.tensor([0, length, 2 * length]), packing(2, length, length, seed=length)):
        backend = choose_attention_backend(
            (2, length), cu_seqlens=bounds, causal=causal, window=window, device=CPU, dtype=torch.float64
        )
        assert (backend.name == "banded") == (length > 128 + window * (1 if causal else 2)) or len(bounds) > 3
        found = results(lambda q, k, v, backend=backend: attention(q, k, v, backend=backend), tensors)
        expected = results(lambda q, k, v, bounds=bounds: reference(q, k, v, bounds, causal, window), tensors)
        assert_close(found, expected, 1e-12)


def test_a_window_beyond_every_document_is_none():
    bounds = packing(2, 400, 40, seed=1)
    longest = int(bounds.diff().max())
    options = {"cu_seqlens": bounds, "device": CPU, "dtype": torch.float32}
    masks = [choose_attention_backend((2, 400), window=w, **options).mask for w in (longest - 1, longest - 2)]
    assert masks[0] is None and masks[1].shape == (1, 1, longest, longest)
    assert choose_attention_backend((2, 400), window=399, device=CPU, dtype=torch.float32).mask is None


@pytest.mark.parametrize("seed", range(5))
def test_random_packings(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = int(torch.randint(1, 5, (1,), generator=generator))
    row_len = int(torch.randint(1, 600, (1,), generator=generator))
    longest = int(torch.randint(1, row_len + 1, (1,), generator=generator))
    bounds = packing(rows, row_len, longest, seed=seed)
    tensors = inputs(rows, row_len, torch.float32, kv_heads=2, seed=seed)
    found = results(lambda q, k, v: attention(q, k, v, cu_seqlens=bounds, max_seqlen=longest), tensors)
    assert_close(found, results(lambda q, k, v: reference(q, k, v, bounds, False, None), tensors), 1e-5)


@pytest.mark.parametrize("longest", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_never_changes_another(longest, dtype):
    bounds = packing(2, 400, 40, seed=2)
    q, k, v = inputs(2, 400, dtype)
    start, end = bounds[5].item(), bounds[6].item()
    before = attention(q, k, v, cu_seqlens=bounds, max_seqlen=longest).flatten(0, 1)
    for x in (q, k, v):
        x.view(-1, HEADS, HEAD_DIM)[start:end] = 100.0
    after = attention(q, k, v, cu_seqlens=bounds, max_seqlen=longest).flatten(0, 1)
    assert not torch.equal(before[start:end], after[start:end])
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])


def test_short_documents_of_a_batch_are_regrouped_on_a_cpu():
    fields = document_fields(np.arange(0, 2 * 1024, 64), (2, 1024))
    documents = {name: fields[name] for name in ("document_ids", "cu_seqlens", "max_seqlen")}
    backend = choose_attention_backend((2, 1024), **documents, causal=True, device=CPU, dtype=torch.float32)
    assert backend.gather.shape == (32, 64)
    backend = choose_attention_backend((2, 1024), **documents, device=CPU, dtype=torch.float32)
    assert backend.groups.tolist() == [[32, 64]] and backend.gather is None and backend.mask is None


def test_regrouping_keeps_shapes_few():
    shapes = set()
    for seed in range(20):
        bounds = packing(4, 1024, 64, seed=seed)
        backend = choose_attention_backend(
            (4, 1024), cu_seqlens=bounds, max_seqlen=64, causal=True, device=CPU, dtype=torch.float32
        )
        shapes.add(tuple(backend.gather.shape))
    assert len(shapes) <= 2


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([2, 2, 2, 5, 9, 9, 30], [[15, 2], [5, 5], [10, 9], [5, 30]]),
        ([30, 9, 9, 2], [[5, 30], [10, 9], [5, 2]]),
        ([2, 5, 30, 5], [[5, 2], [5, 5], [5, 30], [5, 5]]),  # sorted, with padding at the end
        ([9, 2, 30, 2, 5, 2, 9], None),
    ],
)
def test_documents_of_one_length_are_rows_of_their_own(lengths, groups):
    bounds = torch.tensor(lengths).repeat_interleave(5).cumsum(0)
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), bounds))
    total = int(bounds[-1])
    backend = choose_attention_backend((1, total), cu_seqlens=bounds, device=CPU, dtype=torch.float64)
    assert backend.groups.tolist() == (groups or [[15, 2], [5, 5], [10, 9], [5, 30]])
    assert (backend.gather is None) == (groups is not None) == (backend.scatter is None)
    tensors = inputs(1, total, torch.float64, kv_heads=2)
    found = results(lambda q, k, v: attention(q, k, v, backend=backend), tensors)
    assert_close(found, results(lambda q, k, v: reference(q, k, v, bounds, False, None), tensors), 1e-12)


def test_which_documents_go_one_length_at_a_time_and_by_which_kernel():
    def chosen(lengths, dtype=torch.float32, **options):
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        return choose_attention_backend((1, sum(lengths)), cu_seqlens=bounds, device=CPU, dtype=dtype, **options)

    assert chosen([256] * 8).name == "math" and chosen([257] * 8).name == "sdpa"
    assert chosen([257] * 8, torch.bfloat16).name == "math" and chosen([257] * 8, dropout_p=0.1).name == "math"
    with torch.no_grad():
        assert chosen([20] * 8).name == chosen([20] * 8, torch.bfloat16).name == "sdpa"
    assert chosen([20] * 8).groups is not None and chosen([20] * 8, causal=True).groups is None
    assert chosen([500, 12]).groups is None  # a row is hardly more than its longest document
    assert chosen([300] * 8, window=100).groups is not None and chosen([400] * 8, window=100).name == "banded"


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("kv_heads", "window", "seed"), [(HEADS, None, 0), (1, 5, 1)])
def test_one_length_at_a_time_is_one_operation_to_a_compiler(kv_heads, window, seed, dropout_p):
    bounds = packing(2, 400, 40, seed=seed)
    options = {"cu_seqlens": bounds, "window": window, "dropout_p": dropout_p}
    backend = choose_attention_backend((2, 400), **options, device=CPU, dtype=torch.float64)
    tensors = inputs(2, 400, torch.float64, kv_heads)

    def attend(q, k, v):
        return attention(q, k, v, backend=backend)

    found = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        found.append(results(function, tensors))
    torch._dynamo.reset()
    assert_close(found[1], found[0], 1e-12)


def test_dropout_drops_and_keeps_the_mean():
    q, k, _ = inputs(2, 64, torch.float32)
    v = torch.ones(2, 64, HEADS, HEAD_DIM)
    torch.manual_seed(0)
    out = attention(q, k, v, dropout_p=0.5)
    assert out.std() > 0.1
    assert abs(out.mean().item() - 1.0) < 0.05


@pytest.mark.parametrize(
    ("bounds", "max_seqlen", "message"),
    [
        ([0, 4, 7], None, "from 0 to the number of tokens, 2 x 4; it goes from 0 to 7"),
        ([1, 4, 8], None, "it goes from 1 to 8"),
        ([0, 6, 4, 8], None, "cu_seqlens"),
        ([0, 3, 8], None, "row 0"),
        ([0, 4, 8], 3, "4.*max_seqlen.*3"),
    ],
)
def test_boundaries_that_do_not_describe_the_rows_are_refused(bounds, max_seqlen, message):
    q, k, v = inputs(2, 4, torch.float32)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, cu_seqlens=torch.tensor(bounds), max_seqlen=max_seqlen)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([[0, 0, 1], [0, 1, 1]], r"\[2, 3\].*\[2, 4\]"),
        ([0, 0, 1, 1, 0, 0, 0, 1], r"\[8\].*\[2, 4\]"),
        ([[0, 0, 1, 1], [0, 1, 0, 1]], "document_ids"),
    ],
)
def test_document_numbers_that_do_not_describe_the_rows_are_refused(numbers, message):
    q, k, v = inputs(2, 4, torch.float32)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, document_ids=torch.tensor(numbers, dtype=torch.int32))


def test_a_plan_and_its_arguments_are_not_mixed():
    q, k, v = inputs(1, 4, torch.float32)
    backend = choose_attention_backend((1, 4), device=q.device, dtype=q.dtype)
    with pytest.raises(ValueError, match="backend"):
        attention(q, k, v, causal=True, backend=backend)
    with pytest.raises(ValueError, match="window"):
        attention(q, k, v, window=-1)


def test_self_attention_is_its_three_projections():
    torch.manual_seed(0)
    layer = SelfAttention(32, 4, num_kv_heads=2, bias=True)
    x = torch.randn(2, 10, 32)
    rotary = rope_cos_sin(torch.arange(10)[None], 8, 100.0, torch.float32)
    backend = choose_attention_backend((2, 10), device=x.device, dtype=x.dtype)
    weights = layer.qkv_proj.weight.split([32, 16, 16])
    biases = layer.qkv_proj.bias.split([32, 16, 16])
    q, k, v = ((x @ w.T + b).view(2, 10, -1, 8) for w, b in zip(weights, biases, strict=True))
    cos, sin = (table.repeat(1, 1, 1, 2) for table in rotary)
    q, k = (y * cos + torch.cat((-y[..., 4:], y[..., :4]), -1) * sin for y in (q, k))
    expected = layer.o_proj(attention(q, k, v).flatten(2))
    torch.testing.assert_close(layer(x, rotary, backend), expected)


def test_self_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="3"):
        SelfAttention(32, 3)
    with pytest.raises(ValueError, match="3"):
        SelfAttention(32, 4, num_kv_heads=3)


def test_varlen_takes_what_the_plan_gives_it():
    """Arguments and shapes only, on the meta device: the kernel itself needs CUDA."""
    q, k, v = (x.to("meta") for x in inputs(2, 400, torch.bfloat16, kv_heads=1))
    bounds = packing(2, 400, 40, seed=0).to("meta")
    backend = AttentionBackend("varlen", cu_seqlens=bounds, max_seqlen=40, window_size=(3, 0))
    assert attention(q, k, v, backend=backend).shape == q.shape


@pytest.mark.parametrize("head_dim", [20, 16])
def test_varlen_gets_heads_of_a_size_that_it_takes(monkeypatch, head_dim):
    def kernel(q, k, v, bounds, bounds_k, longest, longest_k, *, scale, window_size):
        assert q.shape[-1] % 8 == 0 and torch.equal(bounds, bounds_k) and longest == longest_k == 40
        documents = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        scores = [(torch.einsum("snh,tnh->nst", q[a:b], k[a:b]) * scale, v[a:b]) for a, b in documents]
        return torch.cat([torch.einsum("nst,tnh->snh", weights.softmax(-1), values) for weights, values in scores])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    q, k, v = torch.randn(3, 2, 100, 4, head_dim, dtype=torch.float64)
    bounds = packing(2, 100, 40, seed=0)
    backend = AttentionBackend("varlen", cu_seqlens=bounds, max_seqlen=40, window_size=(-1, -1))
    torch.testing.assert_close(attention(q, k, v, backend=backend), attention(q, k, v, cu_seqlens=bounds))


def test_cuda_chooses_by_documents_dtype_and_installed_kernels(monkeypatch):
    """The choice itself, on the meta device: it needs no GPU, and reads no tensor."""
    monkeypatch.setattr("torchrecipes.modules.attention_backend._has_flash", lambda _: True)
    packed = torch.arange(0, 801, 100, dtype=torch.int32, device="meta")
    cuda = SimpleNamespace(type="cuda")

    def chosen(cu_seqlens=None, dtype=torch.bfloat16, **options):
        for name in ("flex_backend", "varlen_backend", "masked_backend"):
            monkeypatch.setattr(f"torchrecipes.modules.attention_backend.{name}", lambda *_, name=name, **__: name)
        return choose_attention_backend((2, 400), cu_seqlens=cu_seqlens, device=cuda, dtype=dtype, **options)

    assert chosen(packed) == chosen(packed, causal=True) == chosen(window=8) == "flex_backend"
    assert chosen(packed[:3]) == chosen() == "masked_backend"  # rows that are one document: no mask
    assert chosen(packed, dropout_p=0.1) == chosen(packed, torch.float32) == "masked_backend"
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: "FA4")
    assert chosen(packed) == chosen(window=8) == "varlen_backend"


@pytest.mark.gpu
@pytest.mark.parametrize(("causal", "window"), MASKING)
@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("kv_heads", [HEADS, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_is_the_loop_over_documents(dtype, kv_heads, layout, causal, window):
    tensors = inputs(2, 400, dtype, kv_heads)
    bounds = packing(2, 400, 40, seed=4, padding=30) if layout == "packed" else torch.tensor([0, 400, 800])
    arguments = {"causal": causal, "window": window}
    if layout == "packed":
        arguments |= {"cu_seqlens": bounds.cuda(), "max_seqlen": 40}

    def on_cuda(q, k, v):
        return attention(q.cuda(), k.cuda(), v.cuda(), **arguments).cpu()

    found = results(on_cuda, tensors)
    expected = results(lambda q, k, v: reference(q, k, v, bounds, causal, window), tensors)
    assert_close(found, expected, 3e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("causal", "window"), MASKING)
@pytest.mark.parametrize("kv_heads", [HEADS, 1])
@pytest.mark.parametrize("kernel", ["flex", "varlen", "sdpa"])
def test_every_kernel_on_cuda_is_the_loop_over_documents(kernel, kv_heads, causal, window):
    tensors, cuda = inputs(2, 400, torch.bfloat16, kv_heads), torch.device("cuda")
    bounds = packing(2, 400, 200, seed=4, padding=30).unique()
    options = {"causal": causal, "window": window, "device": cuda}
    if kernel == "flex":
        backend = flex_backend((2, 400), cu_seqlens=bounds.to(cuda), **options)
    elif kernel == "varlen":
        backend = varlen_backend((2, 400), bounds.to(cuda), 256, **options)
    else:
        backend = masked_backend((2, 400), None, bounds.to(cuda), dropout_p=0.0, dtype=torch.bfloat16, **options)
    found = results(lambda q, k, v: attention(q.cuda(), k.cuda(), v.cuda(), backend=backend).cpu(), tensors)
    assert_close(found, results(lambda q, k, v: reference(q, k, v, bounds, causal, window), tensors), 3e-2)


@pytest.mark.parametrize("qk_norm", ["head", "all"])
def test_queries_and_keys_are_normalized_before_the_rotation(qk_norm):
    torch.manual_seed(0)
    layer = SelfAttention(32, 4, num_kv_heads=2, qk_norm=qk_norm, norm_eps=0.1).double()
    for norm in (layer.q_norm, layer.k_norm):
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    rotary = rope_cos_sin(torch.arange(10)[None], 8, 100.0, torch.float64)
    backend = choose_attention_backend((2, 10), device=x.device, dtype=x.dtype)
    q, k, v = layer.qkv_proj(x).split([32, 16, 16], dim=-1)
    normed = []
    for y, norm in ((q, layer.q_norm), (k, layer.k_norm)):
        width = 8 if qk_norm == "head" else y.shape[-1]
        assert norm.weight.shape == (width,)
        y = y.unflatten(-1, (-1, width))
        y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 0.1) * norm.weight
        normed.append(apply_rotary(y.flatten(2).unflatten(-1, (-1, 8)), *rotary))
    expected = layer.o_proj(attention(*normed, v.unflatten(-1, (-1, 8))).flatten(2))
    found = layer(x, rotary, backend)
    torch.testing.assert_close(found, expected)
    parameters = list(layer.parameters())
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), parameters, retain_graph=True),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_an_unknown_qk_norm_is_refused():
    with pytest.raises(ValueError, match=r"qk_norm.*'heads'"):
        SelfAttention(32, 4, qk_norm="heads")


@pytest.mark.parametrize("window", [0, 4, 30])
def test_a_cache_with_a_window_is_the_whole_with_it(window):
    q, k, v = inputs(2, 20, torch.float64, kv_heads=2)
    cache = KVCache(1, 2, 24, 2, HEAD_DIM, torch.float64)
    found = []
    for start, end in ((0, 11), (11, 12), (12, 20)):
        backend, (layer,) = cache.at(torch.arange(start, end)[None], torch.float64, window)
        found.append(attention(q[:, start:end], *layer.update(k[:, start:end], v[:, start:end]), backend=backend))
    expected = reference(q, k, v, torch.tensor([0, 20, 40]), True, window)
    assert (torch.cat(found, 1) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_cache_is_attention_to_the_positions_up_to_ones_own(dtype, tokens):
    _, k, v = inputs(2, 20, dtype, kv_heads=2)
    cache = KVCache(1, 2, 24, 2, HEAD_DIM, dtype)
    _, (layer,) = cache.at(torch.arange(20)[None], dtype)
    # Row 0 goes on at position 5, row 1 at 20: what lies beyond in row 0 is written over or never seen.
    layer.update(k, v)
    positions = torch.tensor([[5], [20]]) + torch.arange(tokens)
    new_q, new_k, new_v = (x[:, :tokens] for x in inputs(2, tokens, dtype, kv_heads=2, seed=3))
    backend, (layer,) = cache.at(positions, dtype)
    found = attention(new_q, *layer.update(new_k, new_v), backend=backend)
    for row, start in enumerate((5, 20)):
        one = slice(row, row + 1)
        whole_k, whole_v = (torch.cat((x[one, :start], y[one]), 1) for x, y in ((k, new_k), (v, new_v)))
        end = start + tokens
        whole_q = torch.cat((torch.zeros(1, start, HEADS, HEAD_DIM, dtype=dtype), new_q[one]), 1)
        expected = reference(whole_q, whole_k, whole_v, torch.tensor([0, end]), True, None)[0, start:]
        error = (found[row] - expected).abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_cache_keeps_no_graph():
    layer = SelfAttention(32, 4)
    cache = KVCache(1, 2, 10, 4, 8)
    backend, (part,) = cache.at(torch.arange(6)[None], torch.float32)
    layer(torch.randn(2, 6, 32), None, backend, part)
    assert not part.keys.requires_grad
    assert part.keys[:, :6].abs().min() > 0
    assert part.keys[:, 6:].abs().max() == 0
