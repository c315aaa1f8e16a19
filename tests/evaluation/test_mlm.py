import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from torchrecipes.data.batching.batch import Batch
from torchrecipes.evaluation.mlm import UnigramBaseline, evaluate_mlm, unigram_baseline
from torchrecipes.models import neobert

VOCAB, REAL = 50, 45


class Tokens:
    """The part of a corpus that is read."""

    def __init__(self, tokens):
        self.tokens, self.num_tokens = np.array(tokens, dtype=np.uint16), len(tokens)

    def read(self, start, stop):
        return self.tokens[start:stop]


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    for used in (7, 3):
        positions, labels = torch.zeros(8, dtype=torch.int64), torch.full((8,), -100)
        positions[:used] = torch.randperm(24, generator=generator)[:used]
        labels[:used] = torch.randint(5, REAL, (used,), generator=generator)
        yield Batch(
            input_ids=torch.randint(0, REAL, (2, 12), generator=generator),
            position_ids=torch.arange(12).expand(2, 12),
            document_ids=None,
            cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32),
            max_seqlen=12,
            num_targets=used,
            masked_positions=positions,
            masked_labels=labels,
        )


def test_the_baseline_is_the_frequency_of_ordinary_tokens():
    baseline = unigram_baseline(Tokens([2, 7, 7, 7, 9, 3, 2, 9, 11, 3]), special_ids=[2, 3], vocab_size=12)
    assert baseline.most_frequent == 7
    expected = torch.full((12,), -math.inf)
    expected[[7, 9, 11]] = torch.tensor([3 / 6, 2 / 6, 1 / 6]).log()
    assert torch.allclose(baseline.log_probability, expected)


def test_scores_equal_a_loop_over_targets_in_float64():
    model = neobert(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    shares = torch.arange(1, VOCAB + 1).double()
    baseline = UnigramBaseline((shares / shares.sum()).log().float(), most_frequent=11)
    settings = {"unpadded_vocab_size": REAL, "baseline": baseline, "autocast": nullcontext}
    scores = evaluate_mlm(model, batches(), **settings, position_edges=(0, 5, 12))

    by_position = {"loss/0-4": [], "loss/5-11": []}
    loss, right, unigram_loss, unigram_right, count = 0.0, 0, 0.0, 0, 0
    for batch in batches():
        logits = model.head(model(batch.input_ids)).double().flatten(0, 1)
        for position, label in zip(batch.masked_positions.tolist(), batch.masked_labels.tolist(), strict=True):
            if label >= 0:
                loss -= logits[position].log_softmax(-1)[label].item()
                name = "loss/0-4" if position % 12 < 5 else "loss/5-11"
                by_position[name].append(-logits[position].log_softmax(-1)[label].item())
                right += logits[position, :REAL].argmax().item() == label
                unigram_loss -= math.log(shares[label] / shares.sum())
                unigram_right += label == 11
                count += 1
    assert scores["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert scores["accuracy"] == pytest.approx(right / count)
    assert scores["unigram_loss"] == pytest.approx(unigram_loss / count, rel=1e-5)
    assert scores["unigram_accuracy"] == pytest.approx(unigram_right / count)
    for name, losses in by_position.items():
        assert scores[name] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_inert_tokens_are_never_predicted():
    model = neobert(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)

    class Head(torch.nn.Module):
        """Likes the inert token 49 best, the label second."""

        weight, bias, transform = torch.zeros(VOCAB, 16), torch.zeros(VOCAB), torch.nn.Identity()

    Head.bias[49], Head.bias[20] = 9.0, 5.0
    model.head = Head()
    batch = next(iter(batches()))
    batch.masked_labels[:7] = 20
    baseline = UnigramBaseline(torch.zeros(VOCAB), 0)
    scores = evaluate_mlm(model, [batch], unpadded_vocab_size=REAL, baseline=baseline, autocast=nullcontext)
    assert scores["accuracy"] == 1


def test_nothing_of_the_training_is_touched():
    model = neobert(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ).train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    baseline = UnigramBaseline(torch.zeros(VOCAB), 0)
    evaluate_mlm(model, batches(), unpadded_vocab_size=REAL, baseline=baseline, autocast=nullcontext)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_batches_give_nan():
    model = neobert(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    scores = evaluate_mlm(model, [], REAL, UnigramBaseline(torch.zeros(VOCAB), 0), nullcontext)
    assert len(scores) == 5 and all(math.isnan(value) for value in scores.values())


def test_a_linear_layer_is_a_head():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(VOCAB, 8), torch.nn.Linear(8, VOCAB)

        def forward(self, input_ids, position_ids, document_ids, cu_seqlens, max_seqlen):
            return self.embedding(input_ids)

    baseline = UnigramBaseline(torch.full((VOCAB,), 1 / VOCAB).log(), most_frequent=7)
    scores = evaluate_mlm(Net(), batches(), unpadded_vocab_size=REAL, baseline=baseline, autocast=nullcontext)
    assert 0 < scores["loss"] < 10
