import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchrecipes.modules import (
    BertEmbedding,
    GeluMLP,
    LMHead,
    MLMTransform,
    PostNormBlock,
    PreNormBlock,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    apply_rotary,
    choose_attention_backend,
    compute_dtype,
    rope_cos_sin,
)
from torchrecipes.modules.rotary import _rotary_without_cat


def both_rms_norms(monkeypatch, norm, x, grad):
    """Result and gradients of the hand-written path and of the one that torch.compile sees."""
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        y = norm(x)
        results.append([y, *torch.autograd.grad(y, (x, norm.weight), grad)])
    return results


def test_rms_norm_in_float64_has_the_right_gradient(monkeypatch):
    norm = RMSNorm(8, eps=0.1).double()
    torch.manual_seed(0)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    expected = x / torch.sqrt((x * x).sum(-1, keepdim=True) / 8 + 0.1) * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert torch.autograd.gradcheck(lambda x, _: norm(x), (x, norm.weight))
    eager, compiled = both_rms_norms(monkeypatch, norm, x, torch.randn(3, 8, dtype=torch.float64))
    torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_keeps_the_dtype_and_computes_in_fp32(monkeypatch, dtype, weight_dtype):
    torch.manual_seed(0)
    norm = RMSNorm(64).to(weight_dtype)
    x = (100 * torch.randn(5, 7, 64)).to(dtype).requires_grad_()
    eager, compiled = both_rms_norms(monkeypatch, norm, x, torch.randn(5, 7, 64).to(dtype))
    assert eager[0].dtype == eager[1].dtype == dtype
    assert eager[2].dtype == weight_dtype
    torch.testing.assert_close(eager, compiled)
    torch.testing.assert_close(eager[0], F.rms_norm(x.float(), (64,), norm.weight.float(), 1e-5).to(dtype))


@pytest.mark.parametrize("rotate", [apply_rotary, _rotary_without_cat])
def test_rotary_turns_pairs_as_complex_numbers(rotate):
    torch.manual_seed(0)
    position = torch.tensor([[0, 1, 2, 0, 1, 70_000]])
    x = torch.randn(1, 6, 3, 8)
    cos, sin = rope_cos_sin(position, 8, 10_000.0, torch.float32)
    assert cos.shape == sin.shape == (1, 6, 1, 4)
    frequency = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), position[..., None, None] * frequency)
    turned = torch.complex(x[..., :4].double(), x[..., 4:].double()) * turn
    expected = torch.cat((turned.real, turned.imag), -1)
    found = rotate(x, cos, sin)
    torch.testing.assert_close(found[:, :5], expected[:, :5].float())
    # fp32 angles: 70,000 radians are known to about 0.004.
    torch.testing.assert_close(found[:, 5], expected[:, 5].float(), atol=2e-2, rtol=0)


def test_rotary_scaling_lowers_frequencies():
    """`linear` all of them, `llama3` those that turn fewer than low_freq_factor times, and some between."""
    position = torch.tensor([[96]])
    plain = 1 / 1000.0 ** (torch.arange(0, 32, 2) / 32)

    def frequencies(**scaling):
        _, sin = rope_cos_sin(torch.tensor([[1]]), 32, 1000.0, torch.float64, scaling)
        return sin.flatten().asin().float()

    torch.testing.assert_close(frequencies(rope_type="default"), plain)
    torch.testing.assert_close(frequencies(rope_type="linear", factor=4.0), plain / 4)
    stretched = rope_cos_sin(position, 32, 1000.0, torch.float32, {"rope_type": "linear", "factor": 4.0})
    torch.testing.assert_close(stretched, rope_cos_sin(position // 4, 32, 1000.0, torch.float32))
    keys = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    found = frequencies(rope_type="llama3", **keys)
    turns = 64 * plain / (2 * torch.pi)
    assert 0 < (turns > 4).sum() < (turns > 1).sum() < 16
    torch.testing.assert_close(found[turns > 4], plain[turns > 4])
    torch.testing.assert_close(found[turns < 1], plain[turns < 1] / 8, atol=2e-4, rtol=1e-3)
    between = (turns > 1) & (turns < 4)
    assert (found[between] < plain[between]).all()
    assert (found[between] > plain[between] / 8).all()


def test_rotary_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).double()

    def score(i, j):
        q_i, k_j = (
            apply_rotary(x, *rope_cos_sin(torch.tensor([[p]]), 16, 100.0, torch.float64)) for x, p in ((q, i), (k, j))
        )
        return (q_i * k_j).sum()

    torch.testing.assert_close(score(3, 7), score(103, 107), atol=1e-4, rtol=0)
    assert (score(3, 7) - score(7, 3)).abs() > 1e-2


def test_feed_forward_layers():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    layer = SwiGLU(8, 5)
    gate, up = layer.gate_up_proj.weight.split(5)
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected)
    layer = GeluMLP(8, 5)
    inner = layer.up_proj(x)
    expected = layer.down_proj(inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
    torch.testing.assert_close(layer(x), expected)


def test_bert_embedding_adds_three_tables():
    torch.manual_seed(0)
    layer = BertEmbedding(11, 8, 6, 2, eps=1e-12)
    ids, position, types = torch.tensor([[1, 10, 3]]), torch.tensor([[0, 1, 0]]), torch.tensor([[0, 0, 1]])
    tables = [table.weight for table in (layer.word_embeddings, layer.position_embeddings, layer.token_type_embeddings)]
    total = tables[0][ids] + tables[1][position] + tables[2][types]
    torch.testing.assert_close(layer(ids, position, types), layer.norm(total))
    torch.testing.assert_close(layer(ids, position), layer(ids, position, torch.zeros_like(types)))


def blocks(dropout_p=0.0):
    parts = {"self_attn": SelfAttention(16, 2), "mlp": SwiGLU(16, 24)}
    pre = PreNormBlock(**parts, attention_norm=RMSNorm(16), mlp_norm=RMSNorm(16))
    norms = {"attention_norm": nn.LayerNorm(16), "mlp_norm": nn.LayerNorm(16)}
    return pre, PostNormBlock(**parts, **norms, dropout_p=dropout_p)


def test_blocks_add_and_normalize_in_their_order():
    torch.manual_seed(0)
    pre, post = blocks()
    x = torch.randn(1, 4, 16)
    backend = choose_attention_backend((1, 4), device=x.device, dtype=x.dtype)
    y = x + pre.self_attn(pre.input_layernorm(x), None, backend)
    torch.testing.assert_close(pre(x, None, backend), y + pre.mlp(pre.post_attention_layernorm(y)))
    y = post.attention_norm(x + post.self_attn(x, None, backend))
    torch.testing.assert_close(post(x, None, backend), post.mlp_norm(y + post.mlp(y)))


def test_post_norm_block_drops_in_training_only():
    torch.manual_seed(0)
    _, post = blocks(dropout_p=0.5)
    x = torch.randn(1, 4, 16)
    backend = choose_attention_backend((1, 4), device=x.device, dtype=x.dtype)
    assert not torch.equal(post(x, None, backend), post(x, None, backend))
    post.eval()
    assert torch.equal(post(x, None, backend), post(x, None, backend))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_blocks_compile_without_graph_breaks(packed, autocast):
    torch.manual_seed(0)
    torch.compiler.reset()
    x = torch.randn(2, 8, 16)
    bounds = torch.tensor([0, 3, 8, 16], dtype=torch.int32) if packed else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dtype = compute_dtype(x)
        assert dtype == (torch.bfloat16 if autocast else torch.float32)
        backend = choose_attention_backend((2, 8), cu_seqlens=bounds, device=x.device, dtype=dtype)
        rotary = rope_cos_sin(torch.arange(8)[None], 8, 100.0, dtype)
        for block in blocks():
            expected = block(x, rotary, backend)
            block.compile(fullgraph=True, backend="eager")
            torch.testing.assert_close(block(x, rotary, backend), expected, atol=2e-2 if autocast else 1e-5, rtol=0)


def test_head_parts_are_what_a_chunked_loss_needs():
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 8)
    x = torch.randn(3, 8)
    for head in (
        LMHead(8, 11),
        LMHead(8, 11, tie_to=embedding),
        LMHead(8, 11, tie_to=embedding, bias=True, transform=MLMTransform(8, eps=1e-12)),
    ):
        logits = F.linear(head.transform(x), head.weight, head.bias)
        torch.testing.assert_close(head(x), logits)
    assert set(dict(head.named_parameters())) == {
        "bias",
        "transform.dense.weight",
        "transform.dense.bias",
        "transform.norm.weight",
        "transform.norm.bias",
    }


def test_a_tie_outlives_what_replaces_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.head = LMHead(8, 11, tie_to=self.embedding)

    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    assert model.head.weight is model.embedding.weight
    assert list(model.state_dict()) == ["embedding.weight"]
    model.load_state_dict({"embedding.weight": torch.ones(11, 8)}, assign=True)
    assert model.head.weight is model.embedding.weight
    model.head(torch.ones(2, 8)).sum().backward()
    assert model.embedding.weight.grad is not None
