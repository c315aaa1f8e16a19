import dataclasses
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import ranks
from torchrecipes.data.batching.batch import Batch
from torchrecipes.evaluation.causal import evaluate_causal
from torchrecipes.evaluation.mlm import UnigramBaseline

VOCAB, REAL = 50, 45


class Model(nn.Module):
    """Predicts from the token and its position in the document; random, and different in training."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, VOCAB)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, input_ids, position_ids, document_ids, cu_seqlens, max_seqlen):
        hidden = self.embedding(input_ids) + position_ids.unsqueeze(-1) / max_seqlen
        return hidden * 2 if self.training else hidden


def batches(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        labels = torch.randint(5, REAL, (2, 12), generator=generator)
        labels[torch.rand(2, 12, generator=generator) < 0.1 * i] = -100
        yield Batch(
            input_ids=torch.randint(0, REAL, (2, 12), generator=generator),
            position_ids=torch.arange(12).expand(2, 12),
            document_ids=None,
            cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32),
            max_seqlen=12,
            num_targets=int((labels >= 0).sum()),
            labels=labels,
        )


def baseline():
    shares = torch.arange(1, VOCAB + 1).double()
    return UnigramBaseline((shares / shares.sum()).log().float(), most_frequent=VOCAB - 1)


def evaluate(model, these, **options):
    settings = {"unpadded_vocab_size": REAL, "baseline": baseline(), "autocast": nullcontext}
    return evaluate_causal(model, these, **settings, **options)


def test_scores_equal_a_loop_over_targets_in_float64():
    model = Model()
    scores = evaluate(model, batches())
    model.eval()
    loss, right, unigram_loss, count = 0.0, 0, 0.0, 0
    for batch in batches():
        logits = model.head(model(batch.input_ids, **batch.documents)).double().flatten(0, 1)
        for row, label in zip(logits, batch.labels.flatten().tolist(), strict=True):
            if label >= 0:
                loss -= row.log_softmax(-1)[label].item()
                right += row[:REAL].argmax().item() == label
                unigram_loss -= math.log((label + 1) / (VOCAB * (VOCAB + 1) / 2))
                count += 1
    assert scores.keys() == {"loss", "perplexity", "accuracy", "unigram_loss"}
    assert scores["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert scores["accuracy"] == pytest.approx(right / count)
    assert scores["unigram_loss"] == pytest.approx(unigram_loss / count, rel=1e-5)


def test_ranges_of_positions_are_parts_of_the_whole():
    model = Model()
    scores = evaluate(model, batches(), position_edges=(0, 4, 12))
    first = [dataclasses.replace(b, labels=b.labels.masked_fill(b.position_ids >= 4, -100)) for b in batches()]
    first = [dataclasses.replace(b, num_targets=int((b.labels >= 0).sum())) for b in first]
    assert scores["loss/0-3"] == pytest.approx(evaluate(model, first)["loss"], rel=1e-6)
    counts = [sum(b.num_targets for b in these) for these in (first, list(batches()))]
    rest = (scores["loss"] * counts[1] - scores["loss/0-3"] * counts[0]) / (counts[1] - counts[0])
    assert scores["loss/4-11"] == pytest.approx(rest, rel=1e-6)


def test_inert_tokens_are_never_predicted():
    model = Model()
    nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias.zero_()[49] = 9.0
        model.head.bias[20] = 5.0
    batch = next(batches())
    batch.labels.fill_(20)
    assert evaluate(model, [batch])["accuracy"] == 1


def test_a_label_that_the_baseline_never_saw_counts_as_its_rarest_token():
    guess = UnigramBaseline(torch.full((VOCAB,), 0.25).log(), most_frequent=1)
    guess.log_probability[3] = math.log(0.01)
    guess.log_probability[7] = -math.inf
    batch = next(batches())
    batch.labels.fill_(7)
    scores = evaluate_causal(Model(), [batch], unpadded_vocab_size=REAL, baseline=guess, autocast=nullcontext)
    assert scores["unigram_loss"] == pytest.approx(-math.log(0.01))


def test_large_vocabularies_go_in_chunks_to_the_same_numbers(monkeypatch):
    whole = evaluate(Model(), batches())
    monkeypatch.setattr("torchrecipes.evaluation.causal.default_chunk_size", lambda *_: 7)
    assert evaluate(Model(), batches()) == pytest.approx(whole, rel=1e-6)


def test_autocast_is_used():
    scores = evaluate(Model(), batches())
    rounded = evaluate_causal(Model(), batches(), REAL, baseline(), lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert scores["loss"] != rounded["loss"] == pytest.approx(scores["loss"], rel=0.01)


def test_nothing_of_the_training_is_touched():
    model = Model().train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    evaluate(model, batches())
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ranks_with_different_numbers_of_targets_agree_with_one_process():
    alone = evaluate(Model(), batches(), position_edges=(0, 4, 12, 20))
    assert {"loss/0-3", "loss/4-11"} < alone.keys() and "loss/12-19" not in alone
    for out in ranks.run(Path(__file__), 2):
        assert json.loads(out) == pytest.approx(alone, rel=1e-6)


def main():
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    print(json.dumps(evaluate(Model(), list(batches())[rank::size], position_edges=(0, 4, 12, 20))))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()


def test_no_targets_give_nan():
    batch = next(batches(1))
    empty = replace(batch, labels=torch.full_like(batch.labels, -100), num_targets=0)
    for these in ([], [empty]):
        assert all(math.isnan(value) for value in evaluate(Model(), these).values())


def test_a_baseline_that_has_seen_nothing_has_an_infinite_loss():
    nothing = UnigramBaseline(torch.full((VOCAB,), -math.inf), 0)
    scores = evaluate_causal(Model(), batches(), REAL, nothing, nullcontext)
    assert scores["unigram_loss"] == math.inf and math.isfinite(scores["loss"])


def test_every_module_has_its_own_mode_again_also_after_an_error():
    model = Model().train()
    model.head.eval()

    def broken():
        yield next(batches(1))
        raise KeyError

    evaluate(model, batches(1))
    with pytest.raises(KeyError):
        evaluate(model, broken())
    assert model.training and model.embedding.training and not model.head.training
