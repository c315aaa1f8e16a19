"""What a model computes for every example in batches of similar length, against one by one."""

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from tests.data.batching.memory_examples import PAD, TOKENIZER, random_examples
from torchrecipes.data.batching.example_rows import ExampleRows
from torchrecipes.data.batching.labeled import LabeledCollator
from torchrecipes.errors import UserError
from torchrecipes.evaluation import map_examples

LABELS = np.arange(50) % 3
CORPUS = random_examples(50, most=1, labels=LABELS, name="train")
ROWS, COLLATOR = ExampleRows(CORPUS, 64, PAD), LabeledCollator(TOKENIZER)


class Mean(nn.Module):
    """The mean of a text's token embeddings, with dropout in training, and a linear head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.dropout, self.head = nn.Embedding(1000, 5), nn.Dropout(0.5), nn.Linear(5, 3)
        self.calls = []

    def features(self, batch):
        self.calls.append(batch.input_ids.shape[1])
        ends = batch.cu_seqlens.tolist()
        texts = [self.embedding(batch.input_ids[0, a:b]).mean(0) for a, b in itertools.pairwise(ends)]
        return self.dropout(torch.stack(texts[: batch.num_texts])[batch.examples.texts[:, 0]])

    def classify(self, batch):
        return self.head(batch.features if batch.features is not None else self.features(batch))


def expected(model):
    with torch.no_grad():
        texts = [model.embedding(torch.tensor(example[0])).mean(0) for example in CORPUS.texts]
        return torch.stack(texts), model.head(torch.stack(texts))


@pytest.mark.parametrize(("tokens_per_batch", "batches"), [(1, {50}), (100, range(8, 13)), (10**6, {1})])
def test_results_are_in_the_order_of_the_set_whatever_the_batches(tokens_per_batch, batches):
    model = Mean().train()
    before = torch.get_rng_state()
    results = map_examples(
        model, model.classify, ROWS, COLLATOR, autocast=nullcontext, tokens_per_batch=tokens_per_batch
    )
    torch.testing.assert_close(results, expected(model)[1], rtol=0, atol=1e-6)
    assert model.training and model.dropout.training and torch.equal(torch.get_rng_state(), before)
    assert len(model.calls) in batches


def test_an_empty_set_is_refused():
    rows = ExampleRows(random_examples(0), 64, PAD)
    with pytest.raises(UserError) as error:
        map_examples(Mean(), None, rows, COLLATOR, autocast=nullcontext)
    assert error.value.code == "no_examples"
