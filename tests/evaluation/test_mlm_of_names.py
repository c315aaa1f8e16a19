"""A DomainBERT is evaluated with all that `evaluate_mlm` knows of it, on one rank and on two."""

import math
from contextlib import nullcontext

import pytest
import torch.distributed as dist

from tests import ranks
from torchrecipes.data import evaluation_batches, make_rows, prepare_corpus
from torchrecipes.data.domains import DomainCollator, domain_tokenizer, synthetic_names
from torchrecipes.evaluation import evaluate_mlm, mlm_baseline
from torchrecipes.models import domain_bert


def scores(folder):
    """This process's result, of made-up names and a model of random weights."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    source = synthetic_names(num_names=400)
    tokenizer = domain_tokenizer(source, f"{folder}/{rank}/tokenizer")
    train, held_out = prepare_corpus(f"{folder}/{rank}", source, tokenizer, 0.3, tokenizer_threads=0)
    rows = make_rows("next_fit", held_out, 128, tokenizer.pad_id)
    model = domain_bert(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, seed=1)
    collator = DomainCollator(tokenizer, suffix_probability=0.3)
    batches = evaluation_batches(rows, collator, 2, rank=rank, world_size=world_size)
    baseline = mlm_baseline(held_out, tokenizer, [train])
    return evaluate_mlm(model, batches, tokenizer.unpadded_vocab_size, baseline, nullcontext)


def test_two_ranks_give_the_scores_of_one(tmp_path):
    one = scores(str(tmp_path / "one"))
    first, second = ranks.call(scores, str(tmp_path / "two"))
    assert first == second and first.keys() == one.keys()
    for name, value in one.items():
        assert first[name] == pytest.approx(value, rel=1e-6), name
    assert {"class_loss", "class_accuracy", "class_majority_accuracy", "fivegram_accuracy"} <= one.keys()
    names = ("loss", "hidden_accuracy", "trigram_loss", "targets")
    assert {f"{name}/{kind}" for name in names for kind in ("letter", "dot")} <= one.keys()
    # Of random weights the losses are nearly those of the uniform distribution.
    assert one["loss"] == pytest.approx(math.log(43), abs=0.3)
    assert one["class_loss"] == pytest.approx(math.log(513), abs=0.3)
    assert max(one["fivegram_loss"], one["trigram_loss"]) < one["unigram_loss"] < one["loss"]
