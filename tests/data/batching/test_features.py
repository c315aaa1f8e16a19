import numpy as np
import pytest
import torch

from tests.data.batching.memory_examples import PAD, TOKENIZER, random_examples
from torchrecipes.data.batching.example_rows import ExampleRows
from torchrecipes.data.batching.features import FeatureCollator, FeatureRows
from torchrecipes.data.batching.labeled import LabeledCollator
from torchrecipes.data.batching.loader import Loader, evaluation_batches

ROWS = ExampleRows(random_examples(21, most=1, labels=np.arange(21)), 64, PAD)
FEATURES = FeatureRows(ROWS, torch.arange(21.0)[:, None] * torch.ones(3, dtype=torch.bfloat16))


def loader(rows, collator, **changes):
    settings = {"seed": 1, "global_batch_size": 6, "micro_batch_size": 3} | changes
    return Loader(rows, collator, **settings)


def test_features_come_in_the_order_of_their_texts_and_a_run_may_switch():
    texts, features = loader(ROWS, LabeledCollator(TOKENIZER)), loader(FEATURES, FeatureCollator(FEATURES))
    for _ in range(9):
        expected = sorted(label for batch in texts.next_step() for label in batch.examples.labels.tolist())
        batches = features.next_step()
        assert [batch.num_targets for batch in batches] == [3, 3]
        for batch in batches:
            assert torch.equal(batch.features, batch.examples.labels[:, None].to(batch.features.dtype).expand(3, 3))
            assert batch.input_ids.shape == (1, 0) and batch.num_texts == 0
        assert sorted(label for batch in batches for label in batch.examples.labels.tolist()) == expected
    switched = loader(FEATURES, FeatureCollator(FEATURES))
    switched.load_state_dict(texts.state_dict())
    assert switched.step == texts.step


def test_evaluation_has_every_feature_once():
    batches = list(evaluation_batches(FEATURES, FeatureCollator(FEATURES), 4))
    assert [label for batch in batches for label in batch.examples.labels.tolist()] == list(range(21))
    assert torch.equal(torch.cat([batch.features for batch in batches]), FEATURES.features)


def test_made_up_features_have_the_shape_of_real_ones_and_counts_must_agree():
    batch = FeatureCollator(FEATURES).example_batch(5, 64)
    assert batch.features.shape == (5, 3) and batch.features.dtype == FEATURES.features.dtype
    assert batch.examples.labels.shape == (5,) and batch.num_targets == 5
    with pytest.raises(ValueError, match="20"):
        FeatureRows(ROWS, torch.zeros(20, 3))
