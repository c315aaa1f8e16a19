import pytest
import torch

from torchrecipes.errors import UserError
from torchrecipes.modules import Pooling

MODES = {"mean": "mean", "cls": "cls", "last": "lasttoken", "weighted_mean": "weightedmean", "max": "max"}
LENGTHS = [7, 1, 12, 3]
DIM = 5


def packed(dtype=torch.float32, padding=9):
    """Texts in one row, then padding of huge values: (hidden, cu_seqlens, the texts)."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(n, DIM, generator=generator).to(dtype) for n in LENGTHS]
    rows = [*texts, torch.full((padding, DIM), 1e4, dtype=dtype)] if padding else texts
    bounds = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.cat(rows)[None], bounds, texts


def loop(mode, text, skipped):
    text, weights = text.double()[skipped:], torch.arange(1.0, len(text) + 1).double()[skipped:]
    if mode == "mean":
        return text.mean(0)
    if mode == "weighted_mean":
        return (text * weights[:, None]).sum(0) / weights.sum()
    return {"cls": text[0], "last": text[-1], "max": text.amax(0)}[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pool_from", [None, [0, 0, 4, 2], [3, 5, 12, 1]])
def test_it_equals_a_float64_loop_in_value_and_gradient(mode, pool_from):
    hidden, bounds, texts = packed()
    hidden.requires_grad_()
    pool = None if pool_from is None else torch.tensor(pool_from, dtype=torch.int32)
    found = Pooling(mode)(hidden, len(texts), bounds, pool)
    assert found.dtype == torch.float32 and found.shape == (len(texts), DIM)
    skipped = [min(n, len(t) - 1) for n, t in zip(pool_from or [0] * 4, texts, strict=True)]  # one token always stays
    reference = [text.double().requires_grad_() for text in texts]
    expected = torch.stack([loop(mode, t, n) for t, n in zip(reference, skipped, strict=True)])
    assert (found - expected).abs().max() <= 1e-6
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradient = torch.cat([text.grad for text in reference])
    assert (hidden.grad[0, : sum(LENGTHS)] - gradient).abs().max() <= 1e-6
    assert hidden.grad[0, sum(LENGTHS) :].abs().max() == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", [0, 2])
def test_it_equals_sentence_transformers(mode, prompt):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling as Theirs

    lengths = [7, 3, 12, 4]
    generator = torch.Generator().manual_seed(0)
    padded = torch.randn(4, 12, DIM, generator=generator)
    mask = torch.arange(12)[None] < torch.tensor(lengths)[:, None]
    features = {"token_embeddings": padded, "attention_mask": mask.long(), "prompt_length": prompt}
    expected = Theirs(DIM, MODES[mode], include_prompt=not prompt)(features)["sentence_embedding"]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    pool_from = torch.full((4,), prompt, dtype=torch.int32) if prompt else None
    found = Pooling(mode)(padded[mask][None], 4, bounds, pool_from)
    assert (found - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_one_text_need_no_boundaries(mode):
    rows = torch.randn(3, 6, DIM, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Pooling(mode)(rows), torch.stack([loop(mode, row, 0) for row in rows]).float(), atol=1e-6)


def test_half_precision_states_are_summed_in_fp32():
    states = torch.full((1, 4096, DIM), 1.0, dtype=torch.bfloat16)
    states[0, ::2] = 1 / 128
    assert (Pooling("mean")(states) - (1 + 1 / 128) / 2).abs().max() <= 1e-6


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError) as error:
        Pooling("average")
    assert (error.value.code, error.value.key) == ("unknown_pooling", "pooling")
