"""A packed batch is its documents, each alone: hidden states and gradients; and a cache is the whole, in pieces."""

import itertools

import pytest
import torch

from torchrecipes.models import (
    bert,
    distilbert,
    gpt2,
    llama,
    mistral,
    modernbert,
    moe,
    neobert,
    olmoe,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
)
from torchrecipes.modules import KVCache
from torchrecipes.modules.attention_backend import flex_backend, masked_backend

ROW_LEN = 256
# Rows of 256 of different documents, then one with padding at its end; the last entries repeat.
FAMILIES = {"neobert": neobert, "bert": bert, "gpt2": gpt2, "llama": llama, "qwen3": qwen3}
FAMILIES |= {"modernbert": modernbert, "roberta": roberta, "distilbert": distilbert, "mistral": mistral, "qwen2": qwen2}
FAMILIES |= {"qwen3_moe": qwen3_moe, "olmoe": olmoe, "moe": moe}
ROTARY_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmoe", "moe")
MORE = {
    "modernbert": {"local_attention": 20, "global_attn_every_n_layers": 2},
    "mistral": {"sliding_window": 12},
    "roberta": {"max_position_embeddings": ROW_LEN + 2},
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "moe": {"moe_intermediate_size": 24, "num_experts": 4, "decoder_sparse_step": 2, "router": "mlp"}
    | {"scoring_func": "sigmoid", "router_bias": True, "shared_expert_intermediate_size": 16},
}
DECODERS = ("gpt2", *ROTARY_DECODERS)
LENGTHS = [100, 1, 90, 65, 256, 37, 64, 100, 55]


def packed():
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 67, (3, ROW_LEN), generator=generator)
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)] + [3 * ROW_LEN] * 3, dtype=torch.int32)
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS]).view(3, ROW_LEN)
    weights = torch.randn(3 * ROW_LEN, 32, generator=generator)
    return input_ids, position_ids, bounds, weights


def model_of(family):
    sizes = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40}
    sizes["num_attention_heads"] = 4 if family in ROTARY_DECODERS else 2
    more = {"num_key_value_heads": 2} if family in ROTARY_DECODERS else {}
    more |= MORE.get(family, {})
    sizes |= {"max_position_embeddings": ROW_LEN, "initializer_range": 0.1}
    model = FAMILIES[family](**sizes | more)
    # The last document stands for padding: nothing is asked of it.
    return model, len(LENGTHS) - 1


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row_len", [ROW_LEN, 3 * ROW_LEN])
def test_packed_is_one_by_one(family, row_len):
    model, documents = model_of(family)
    input_ids, position_ids, bounds, weights = packed()
    spans = list(itertools.pairwise(bounds.tolist()))[:documents]
    alone = [model(input_ids.view(1, -1)[:, start:end])[0] for start, end in spans]
    expected = gradients(
        model, sum((hidden * weights[start:end]).sum() for hidden, (start, end) in zip(alone, spans, strict=True))
    )

    # One row of 768 whose documents are at most 256 long is regrouped.
    rows = {"position_ids": position_ids.view(-1, row_len), "cu_seqlens": bounds, "max_seqlen": ROW_LEN}
    hidden = model(input_ids.view(-1, row_len), **rows).flatten(0, 1)
    for (start, end), document in zip(spans, alone, strict=True):
        assert (hidden[start:end] - document).abs().max() <= 1e-5
    end = spans[-1][1]
    found = gradients(model, (hidden[:end] * weights[:end]).sum())
    assert set(found) == set(expected)
    for name in found:
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * max(1, expected[name].abs().max()), name


@pytest.mark.parametrize("family", ["modernbert", "mistral"])
@pytest.mark.parametrize("kernel", ["flex", "sdpa", "math"])
def test_windows_are_the_same_in_every_kernel(monkeypatch, family, kernel):
    """The CPU's choice is a band of keys; a GPU takes a block mask, or with fp32 a mask over rows."""

    def chosen(shape, *, document_ids, cu_seqlens, causal, window, device, dtype, **_):
        if kernel == "flex":
            return flex_backend(shape, document_ids, cu_seqlens, causal=causal, window=window, device=device)
        masked = masked_backend(shape, document_ids, cu_seqlens, causal, window, 0.0, device, dtype)
        return masked._replace(name=kernel)

    model, _ = model_of(family)
    input_ids, position_ids, bounds, _ = packed()
    with torch.no_grad():
        expected = model(input_ids, position_ids, cu_seqlens=bounds)
        monkeypatch.setattr("torchrecipes.models.transformer.choose_attention_backend", chosen)
        found = model(input_ids, position_ids, cu_seqlens=bounds)
        assert (found - expected).abs().max() <= 1e-5
        model.windows = (None,) * len(model.windows)
        assert (model(input_ids, position_ids, cu_seqlens=bounds) - expected).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_stays_close(family):
    model, _ = model_of(family)
    input_ids, position_ids, bounds, _ = packed()
    rows = {"input_ids": input_ids, "position_ids": position_ids, "cu_seqlens": bounds}
    expected = model(**rows)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(**rows)
        assert model.head(hidden).dtype == torch.bfloat16
    assert (hidden - expected).abs().mean() < 0.01 * expected.abs().mean()


@pytest.mark.parametrize("family", ["neobert", "bert", "gpt2", "llama", "qwen3"])
def test_compiled_blocks_see_one_graph(family):
    torch.compiler.reset()
    model, _ = model_of(family)
    input_ids, position_ids, bounds, _ = packed()
    rows = {"input_ids": input_ids, "position_ids": position_ids, "cu_seqlens": bounds}
    expected = model(**rows)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(model(**rows), expected, atol=1e-5, rtol=0)
        model(**rows | {"cu_seqlens": torch.arange(0, 3 * ROW_LEN + 1, 128, dtype=torch.int32)})


def test_compiled_blocks_of_global_and_local_layers_are_three_graphs():
    """The first block, whose norm is the embedding's, and one for each kind of layer."""
    torch.compiler.reset()
    model = modernbert("tiny", vocab_size=67)
    input_ids, position_ids, bounds, _ = packed()
    rows = {"input_ids": input_ids, "position_ids": position_ids, "cu_seqlens": bounds}
    expected, graphs = model(**rows), torch._dynamo.testing.CompileCounter()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=graphs)
    torch.testing.assert_close(model(**rows), expected, atol=1e-5, rtol=0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        model(**rows | {"cu_seqlens": torch.arange(0, 3 * ROW_LEN + 1, 128, dtype=torch.int32)})
    assert graphs.frame_count == 3


@pytest.mark.parametrize("family", ["neobert", "gpt2"])
def test_compiled_blocks_see_few_shapes_of_regrouped_documents(family):
    torch.compiler.reset()
    rows, row_len = 2, 1024
    model = FAMILIES[family](
        vocab_size=67, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=row_len
    )
    input_ids = torch.arange(rows * row_len).view(rows, row_len) % 67

    def step(longest):
        lengths = [longest] * (row_len // longest)
        lengths = ([n for n in [*lengths, row_len - sum(lengths)] if n]) * rows
        batch = {
            "position_ids": torch.cat([torch.arange(n) for n in lengths]).view(rows, row_len),
            "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        }
        hidden = model(input_ids, **batch)
        return gradients(model, hidden.square().sum())

    longest = [50, 64, 100, 250, 600, 190, 33, 120, 300]
    expected = [step(n) for n in longest]
    model.blocks[0].compile(fullgraph=True, backend="aot_eager")
    for i, n in enumerate(longest):
        # The first five: rows of 64, another number of them, rows of 128 and of 256, rows as they are.
        with torch._dynamo.config.patch(error_on_recompile=i >= 5):
            for name, gradient in step(n).items():
                torch.testing.assert_close(gradient, expected[i][name], atol=1e-5, rtol=1e-4)


def cache_of(model, max_len):
    attention = model.blocks[0].self_attn
    return KVCache(len(model.blocks), 3, max_len, attention.num_kv_heads, attention.head_dim)


@pytest.mark.parametrize("family", DECODERS)
def test_a_cache_gives_what_the_whole_gives(family):
    """Prompts of different lengths, padded on the right, then token by token."""
    model, _ = model_of(family)
    input_ids = packed()[0][:, :40]
    lengths = torch.tensor([1, 17, 30])
    expected = model(input_ids)
    cache = cache_of(model, 41)
    padding = torch.arange(30) >= lengths[:, None]
    found = model(input_ids[:, :30].masked_fill(padding, 66), cache=cache)
    for row, length in enumerate(lengths):
        assert (found[row, :length] - expected[row, :length]).abs().max() <= 1e-5
    for _ in range(10):
        rows = torch.arange(3)[:, None]
        hidden = model(input_ids[rows, lengths[:, None]], position_ids=lengths[:, None], cache=cache)
        assert (hidden - expected[rows, lengths[:, None]]).abs().max() <= 1e-5
        lengths = lengths + 1


@pytest.mark.parametrize("family", DECODERS)
def test_a_cache_takes_several_tokens_at_once(family):
    model, _ = model_of(family)
    input_ids = packed()[0][:, :40]
    cache, pieces = cache_of(model, 40), []
    for start, end in ((0, 11), (11, 12), (12, 40)):
        pieces.append(model(input_ids[:, start:end], torch.arange(start, end)[None], cache=cache))
    assert (torch.cat(pieces, 1) - model(input_ids)).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="40"):
        model(input_ids[:, :1], torch.tensor([[40]]), cache=cache)


@pytest.mark.parametrize("family", DECODERS)
def test_no_token_sees_a_later_one(family):
    model, _ = model_of(family)
    input_ids = packed()[0][:, :40]
    changed = input_ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 67
    expected, found = model(input_ids), model(changed)
    assert torch.equal(expected[:, :20], found[:, :20])
    assert (expected[:, 20:] - found[:, 20:]).abs().max() > 0.1
