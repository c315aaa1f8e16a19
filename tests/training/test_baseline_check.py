"""The warning about a model that learns no context, with evaluations of models that predict what the test says."""

import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torchrecipes.data.batching.batch import Batch, document_fields
from torchrecipes.data.batching.mlm import MLMCollator
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers import train_char
from torchrecipes.evaluation.mlm import evaluate_mlm, mlm_baseline
from torchrecipes.training import LogConfig, MetricLogger
from torchrecipes.training.baseline_check import kinds_at_baseline
from torchrecipes.training.run import Run


class Guesses(torch.nn.Module):
    """Predicts what `choose` makes of the tokens under the masks, and of the input."""

    def __init__(self, choose, vocab_size, true):
        super().__init__()
        self.choose, self.true = choose, true
        self.head = torch.nn.Linear(vocab_size, vocab_size)
        torch.nn.init.eye_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, input_ids, **_):
        chosen = self.choose(self.true, input_ids[0])
        logits = torch.nn.functional.one_hot(chosen, len(self.head.bias)).float() * 5
        return logits[None]


@pytest.fixture(scope="module")
def evaluate():
    """evaluate(choose) gives the metrics of a model that predicts choose(true tokens, input)."""
    rng = random.Random(0)
    letters = "eeeeaaaiiorstnlcdmpu"
    names = [f"{''.join(rng.choices(letters, k=7))}{rng.randint(10, 99)}.{rng.choice(letters)}o.uk" for _ in range(300)]
    tokenizer = train_char([Document(name, "") for name in names])
    ids = [tokenizer.encode(name) for name in names]
    tokens = np.array([token for name in ids for token in name])[None]
    true = torch.from_numpy(tokens[0].copy())
    positions, labels, num_targets = MLMCollator(tokenizer, 0.3)(tokens, np.uint64([1]))
    batch = Batch(
        input_ids=torch.from_numpy(tokens),
        num_targets=num_targets,
        masked_positions=torch.from_numpy(positions),
        masked_labels=torch.from_numpy(labels),
        **document_fields(np.cumsum([0, *map(len, ids)])[:-1], tokens.shape),
    )
    corpus = SimpleNamespace(num_tokens=len(true), read=lambda start, stop: true[start:stop].numpy())
    baseline = mlm_baseline(corpus, tokenizer)

    def run(choose):
        model = Guesses(choose, tokenizer.vocab_size, true)
        return evaluate_mlm(model, [batch], tokenizer.vocab_size, baseline, nullcontext)

    run.mask = tokenizer.mask_id
    run.dot, run.most_frequent = (tokenizer.encode(text)[1] for text in ".e")
    return run


def log(folder, steps, metrics, first_step=1, every=3):
    options = LogConfig(baseline_evaluations=every)
    run = Run(folder, torch.device("cpu"))
    with MetricLogger(run, options, max_steps=100, tokens_per_step=1.0, first_step=first_step) as logger:
        for step in steps:
            logger.log_eval(step, {"validation": metrics})


def counts(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["eval/validation/at_baseline"] for line in lines]


def only_dots(run):
    return lambda true, seen: torch.full_like(true, run.dot)


def most_frequent(run):
    return lambda true, seen: torch.full_like(true, run.most_frequent)


def dots_where_they_are(run):
    """The head that learned only the dots: above the baseline of all characters."""
    return lambda true, seen: torch.where(true == run.dot, run.dot, run.most_frequent)


def copies(run):
    """Right where the input shows the target, and nowhere else but by chance."""
    return lambda true, seen: torch.where(seen == run.mask, run.most_frequent, seen)


def learned(run):
    """Right for every second character."""
    return lambda true, seen: torch.where(torch.arange(len(true)) % 2 == 0, true, run.most_frequent)


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (only_dots, ["", "letter"]),
        (most_frequent, ["", "letter"]),
        (copies, ["", "letter"]),
        (dots_where_they_are, ["letter"]),
        (learned, []),
    ],
)
def test_a_model_that_learns_no_context_is_found(evaluate, tmp_path, capsys, model, kinds):
    metrics = evaluate(model(evaluate))
    assert kinds_at_baseline(metrics) == kinds
    log(tmp_path, [0, 10, 20, 30, 40, 50, 60], metrics)
    warned = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert [line.split(":")[0] for line in warned] == (["step 30", "step 60"] if kinds else [])
    assert counts(tmp_path) == ([0, 1, 2, 3, 4, 5, 6] if kinds else [0] * 7)


def test_the_count_starts_again_after_a_better_evaluation_and_goes_on_in_a_resumed_run(evaluate, tmp_path, capsys):
    bad, good = (evaluate(model(evaluate)) for model in (most_frequent, learned))
    log(tmp_path, [10, 20], bad)
    log(tmp_path, [30], good, first_step=21)
    log(tmp_path, [40, 50], bad, first_step=31)
    assert counts(tmp_path) == [1, 2, 0, 1, 2] and "warning" not in capsys.readouterr().out
    log(tmp_path, [60], bad, first_step=51)
    assert counts(tmp_path)[-1] == 3 and "step 60: warning: validation" in capsys.readouterr().out
    log(tmp_path, [60], bad, first_step=61)  # the same evaluation again
    assert counts(tmp_path)[-2:] == [3, 3]
    log(tmp_path, [50], bad, first_step=41)  # a rollback
    assert counts(tmp_path) == [1, 2, 0, 1, 2]


def test_a_difference_that_so_few_targets_give_by_chance_is_none():
    values = {"accuracy": 0.14, "unigram_accuracy": 0.1}
    assert kinds_at_baseline(values | {"targets": 100}) == [""]
    assert kinds_at_baseline(values | {"targets": 10_000}) == []
    assert kinds_at_baseline(values | {"targets": 0}) is None and kinds_at_baseline({"accuracy": 0.5}) is None


def test_nothing_is_counted_where_it_is_off(tmp_path, capsys):
    values = {"accuracy": 0.1, "unigram_accuracy": 0.1, "targets": 100}
    log(tmp_path, [10, 20], values, every=None)
    assert "at_baseline" not in (tmp_path / "metrics.jsonl").read_text() and "warning" not in capsys.readouterr().out


def test_accuracy_by_kind_is_a_line_of_its_own(evaluate, tmp_path, capsys):
    log(tmp_path, [10], evaluate(dots_where_they_are(evaluate)))
    first, second = capsys.readouterr().out.splitlines()
    assert "unigram_accuracy" in first and "letter" not in first
    assert "letter 0." in second and "unigram 0." in second and "dot 1.000 (hidden 1.000)" in second
