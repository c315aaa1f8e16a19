"""Features of a frozen encoder: the same training as without them, computed once, and again where something changed."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import ranks
from tests.data.batching.memory_examples import PAD, TOKENIZER, random_examples
from torchrecipes.data.batching.example_rows import ExampleRows
from torchrecipes.data.batching.labeled import LabeledCollator
from torchrecipes.data.batching.loader import Loader
from torchrecipes.errors import UserError
from torchrecipes.evaluation import map_examples
from torchrecipes.models import SequenceClassifier, bert, neobert
from torchrecipes.training import FeatureCache, frozen_features, set_trainable
from torchrecipes.training.run import Run

LABELS = np.arange(50) % 3
ROWS = ExampleRows(random_examples(50, most=1, labels=LABELS, name="train"), 64, PAD)
OTHER = ExampleRows(random_examples(7, seed=1, most=1, labels=LABELS[:7], name="validation"), 64, PAD)
SIZES = {"vocab_size": 1000, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24}


def classifier(seed=0, builder=bert, **options):
    model = SequenceClassifier(builder(**SIZES, seed=seed), num_labels=3, seed=seed, **options)
    set_trainable(model, "classifier")
    return model.train()


def filled(model, folder, sets=(ROWS, OTHER)):
    cache = FeatureCache(LabeledCollator(TOKENIZER))
    cache.fill(model, list(sets), Run(Path(folder), torch.device("cpu")))
    return cache


@pytest.fixture
def encoded(monkeypatch):
    """The number of texts that an encoder has been through."""
    calls, features = [], SequenceClassifier.features

    def counted(model, batch):
        calls.extend([0] * batch.num_texts)
        return features(model, batch)

    monkeypatch.setattr(SequenceClassifier, "features", counted)
    return calls


def test_training_is_the_same_with_and_without(tmp_path):
    def trained(cache):
        model = classifier(dropout=0.1)
        torch.manual_seed(0)
        collator = filled(model, tmp_path) if cache else LabeledCollator(TOKENIZER)
        torch.manual_seed(1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loader = Loader(ROWS, collator, seed=0, global_batch_size=8, micro_batch_size=8)
        losses = []
        for _ in range(10):
            (batch,) = loader.next_step()
            assert (batch.features is not None) == cache
            loss = F.cross_entropy(model.eval().classify(batch), batch.examples.labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return model, losses

    (one, losses), (two, expected) = trained(True), trained(False)
    assert np.allclose(losses, expected, atol=1e-5)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


def test_every_example_has_the_features_that_the_encoder_gives_it(tmp_path):
    model = classifier()
    cache = filled(model, tmp_path)
    options = {"autocast": torch.no_grad}
    direct = map_examples(model, model.classify, ROWS, LabeledCollator(TOKENIZER), **options)
    cached = map_examples(model, model.classify, ROWS, cache, **options)
    assert (direct - cached).abs().max() < 1e-6 and direct.std() > 1e-3
    assert len(cache.batch(OTHER, np.array([3, -1]), np.zeros(2, dtype=np.uint64)).features) == 1
    assert model.training


def test_a_second_run_reads_them(tmp_path, encoded):
    filled(classifier(), tmp_path)
    assert len(encoded) == 57
    filled(classifier(), tmp_path)
    assert len(encoded) == 57


@pytest.mark.parametrize("change", ["weights", "pooling", "examples"])
def test_what_changed_is_computed_again(tmp_path, encoded, change):
    model = classifier(builder=neobert)
    filled(model, tmp_path)
    files = set((tmp_path / "features").iterdir())
    encoded.clear()
    if change == "weights":
        with torch.no_grad():
            model.blocks[1].mlp.down_proj.weight[3, 4] += 1e-3
    if change == "pooling":
        model = classifier(builder=neobert, pooling="cls")
    sets = [ROWS, ExampleRows(random_examples(7, seed=2, most=1, labels=LABELS[:7], name="new"), 64, PAD)]
    cache = filled(model, tmp_path, sets if change == "examples" else (ROWS, OTHER))
    assert len(encoded) == (7 if change == "examples" else 57)
    now = set((tmp_path / "features").iterdir())
    assert len(now) == 2 and len(now & files) == (1 if change == "examples" else 0)
    batch = cache.batch(ROWS, np.arange(50), np.zeros(50, dtype=np.uint64))
    direct = map_examples(model, model.features, ROWS, LabeledCollator(TOKENIZER), autocast=torch.no_grad)
    assert (batch.features - direct).abs().max() < 1e-6


def test_the_head_may_change(tmp_path, encoded):
    model = classifier()
    filled(model, tmp_path)
    with torch.no_grad():
        model.head.dense.weight.add_(1.0)
    filled(model, tmp_path)
    assert len(encoded) == 57


def test_an_interrupted_computation_continues(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(frozen_features, "EXAMPLES_PER_PART", 8)
    note = frozen_features.write_atomically

    def stop_at_24(file, content):
        if b"24" in content[0]:
            raise KeyboardInterrupt  # after the part, before its note
        note(file, content)

    monkeypatch.setattr(frozen_features, "write_atomically", stop_at_24)
    with pytest.raises(KeyboardInterrupt):
        filled(classifier(), tmp_path, [ROWS])
    assert len(encoded) == 24
    assert {file.suffix for file in (tmp_path / "features").iterdir()} == {".part", ".json"}
    monkeypatch.setattr(frozen_features, "write_atomically", note)
    model = classifier()
    cache = filled(model, tmp_path, [ROWS])
    assert len(encoded) == 24 + 50 - 16
    assert [file.suffix for file in (tmp_path / "features").iterdir()] == [".npy"]
    direct = map_examples(model, model.features, ROWS, LabeledCollator(TOKENIZER), autocast=torch.no_grad)
    assert (cache.batch(ROWS, np.arange(50), np.zeros(50)).features - direct).abs().max() < 1e-6


def test_late_pooling_has_no_features(tmp_path):
    with pytest.raises(UserError) as error:
        filled(classifier(builder=neobert, pooling="late"), tmp_path)
    assert error.value.code == "no_features"


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.training.test_frozen_features import ROWS, classifier, LabeledCollator, TOKENIZER
from torchrecipes.error_file import hard_exit
from torchrecipes.distributed.fsdp import parallelize
from torchrecipes.evaluation import map_examples
from torchrecipes.training import FeatureCache
from torchrecipes.training.run import Run

dist.init_process_group("gloo")
CPU = torch.device("cpu")
model = classifier()
parallelize(model, "fsdp", CPU, torch.float32)
cache = FeatureCache(LabeledCollator(TOKENIZER))
cache.fill(model, [ROWS], Run(Path(sys.argv[1]), CPU, rank=dist.get_rank(), world_size=2))
results = map_examples(model, model.classify, ROWS, cache, autocast=torch.no_grad)
if dist.get_rank() == 0:
    torch.save(results, sys.argv[1] + "/logits.pt")
dist.barrier()
hard_exit(0)
"""


def test_ranks_share_the_work(tmp_path, encoded):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    ranks.run(tmp_path / "script.py", 2, str(tmp_path), str(Path(__file__).parents[2]))
    model = classifier()
    cache = filled(model, tmp_path, [ROWS])
    assert not encoded  # the file of two ranks is that of one
    expected = map_examples(model, model.classify, ROWS, cache, autocast=torch.no_grad)
    assert (torch.load(tmp_path / "logits.pt", weights_only=True) - expected).abs().max() < 1e-6
