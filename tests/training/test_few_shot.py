"""Few-shot training: pairs of labels, the output layer against scikit-learn, and the start of a run."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from torchrecipes.data.batching.example_rows import ExampleRows
from torchrecipes.data.batching.labeled import LabeledCollator
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.errors import UserError
from torchrecipes.models import SequenceClassifier, bert, load_hf, save_hf
from torchrecipes.models.classifier import meta_classifier_from_hf
from torchrecipes.training.few_shot import (
    FewShotConfig,
    few_shot_start,
    fit_output_layer,
    label_pairs,
    train_on_label_pairs,
)
from torchrecipes.training.run import Run


def test_pairs_alternate_and_every_pair_comes_equally_often():
    labels = np.array([0, 0, 0, 1, 1, 1, 1])  # 3 + 6 equal pairs, 12 different ones
    pairs, same = label_pairs(labels, 72, seed=1)
    assert same.tolist() == [1, 0] * 36
    assert ((labels[pairs[:, 0]] == labels[pairs[:, 1]]) == same).all()
    counts = [Counter(map(tuple, pairs[same == kind])) for kind in (1, 0)]
    assert [(len(count), set(count.values())) for count in counts] == [(9, {4}), (12, {3})]
    again, other = label_pairs(labels, 72, seed=1)[0], label_pairs(labels, 72, seed=2)[0]
    assert np.array_equal(pairs, again) and not np.array_equal(pairs, other)
    assert np.array_equal(label_pairs(labels, 31, seed=1)[0], pairs[:31])


def test_a_text_without_another_of_its_label_is_paired_with_itself():
    pairs, same = label_pairs(np.array([0, 1, 1]), 8, seed=0)
    assert set(map(tuple, pairs[same == 1])) == {(0, 0), (1, 2)}


def test_one_label_is_refused():
    with pytest.raises(UserError) as error:
        label_pairs(np.array([3, 3]), 8, seed=0)
    assert error.value.code == "one_label"


def test_the_output_layer_is_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 8)) * 5 + y[:, None]
    layer = nn.Linear(8, 3)
    accuracy = fit_output_layer(layer, torch.from_numpy(x).float(), torch.from_numpy(y), l2=0.5)
    scaled = x / np.linalg.norm(x, axis=1).mean()
    expected = linear_model.LogisticRegression(C=2.0, tol=1e-10, max_iter=10_000).fit(scaled, y)
    with torch.no_grad():
        found = layer(torch.from_numpy(x).float()).softmax(1).numpy()
    assert np.abs(found - expected.predict_proba(scaled)).max() < 1e-4
    assert accuracy == expected.score(scaled, y)


class Corpus:
    """Texts of two labels: tokens below 30 or above."""

    fingerprint, texts_per_example = "few", 1

    def __init__(self, num_examples=8, labels=None):
        self.num_examples = num_examples
        self.labels = np.arange(num_examples) % 2 if labels is None else labels
        rng = np.random.default_rng(0)
        self.texts = [
            np.concatenate(([2], rng.integers(5, 30, 6 + i) + 30 * (i % 2), [3])) for i in range(num_examples)
        ]
        self.example_lengths = np.array([len(text) for text in self.texts])

    def read(self, numbers):
        texts = [self.texts[number] for number in numbers]
        lengths = np.array([len(text) for text in texts])
        return ExampleBlock(
            np.concatenate(texts),
            lengths,
            lengths,
            numbers.astype(np.int64),
            np.zeros(len(texts), np.int64),
            np.arange(len(texts))[:, None],
            labels=self.labels[numbers],
        )


def classifier(seed=0):
    encoder = bert(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.1,
        initializer_range=0.2,
        seed=seed,
    )
    return SequenceClassifier(encoder, label_names=["low", "high"], seed=seed)


TOKENIZER = SimpleNamespace(pad_id=0, unpadded_vocab_size=64, domain=None)


def rows(**options):
    return ExampleRows(Corpus(**options), 32, 0)


def test_training_separates_the_labels_and_is_repeatable():
    collator, options = LabeledCollator(TOKENIZER), FewShotConfig(num_iterations=40, lr=3e-3)
    results = []
    for _ in range(2):
        model = classifier()
        model.head.out_proj = nn.Identity()
        losses = train_on_label_pairs(model, model.classify, rows(), collator, options, seed=3)
        assert len(losses) == 40 and np.mean(losses[-5:]) < 0.2 < np.mean(losses[:2])
        results.append((losses, model.state_dict()))
    assert results[0][0] == results[1][0]
    for name, tensor in results[0][1].items():
        assert torch.equal(tensor, results[1][1][name])
    model = model.eval()
    batch = collator.batch(rows(), np.arange(8), np.zeros(8, np.uint64))
    embeddings = nn.functional.normalize(model.classify(batch), dim=1)
    cosines = embeddings @ embeddings.T
    labels = torch.arange(8) % 2
    assert cosines[labels[:, None] == labels].min() > cosines[labels[:, None] != labels].max()


@pytest.fixture
def recipe(tmp_path):
    """The arguments of `few_shot_start`."""
    save_hf(classifier(seed=5), tmp_path / "start")
    config = SimpleNamespace(init_from=str(tmp_path / "start"), seed=0)
    tokenizer = SimpleNamespace(
        pad_id=0, unpadded_vocab_size=64, domain=None, save=lambda *_, **__: None, cls_id=2, sep_id=3
    )
    tokenizer.bos_id = tokenizer.eos_id = tokenizer.mask_id = None

    def build_model(config, _):
        model = meta_classifier_from_hf(config.init_from, num_labels=2, label_names=["low", "high"])
        model.encoder.requires_grad_(False)  # trainable: classifier
        return model

    data = SimpleNamespace(train=rows(), tokenizer=tokenizer)
    run = Run(tmp_path / "run", torch.device("cpu"))
    run.output_dir.mkdir()
    options = FewShotConfig(lr=1e-3)
    return [config, build_model, lambda _config, tokenizer: LabeledCollator(tokenizer), data, run, options]


def test_a_run_starts_from_a_trained_classifier(recipe, tmp_path):
    config, build_model, _, data, run, _ = recipe
    folder = few_shot_start(*recipe)
    assert folder == str(run.output_dir / "few_shot")
    model = build_model(SimpleNamespace(init_from=folder), None).to_empty(device="cpu")
    from torchrecipes.models import load_hf_weights

    coverage = load_hf_weights(model, folder, report=lambda _: None)
    assert coverage.initialized == []  # the head is there, too
    batch = LabeledCollator(TOKENIZER).batch(data.train, np.arange(8), np.zeros(8, np.uint64))
    assert torch.equal(model.eval().classify(batch).argmax(1), torch.arange(8) % 2)
    before = load_hf(config.init_from, head=False, report=lambda _: None)
    assert not torch.equal(before.blocks[0].mlp.up_proj.weight, model.encoder.blocks[0].mlp.up_proj.weight)


def test_it_is_done_once(recipe):
    folder = few_shot_start(*recipe)
    recipe[1] = None  # not called again
    assert few_shot_start(*recipe) == folder


def test_an_interrupted_stage_leaves_nothing_and_is_done_again(recipe, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchrecipes.training.few_shot.fit_output_layer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        few_shot_start(*recipe)
    assert not (recipe[4].output_dir / "few_shot").exists()
    monkeypatch.undo()
    few_shot_start(*recipe)


@pytest.mark.parametrize("labels", [np.zeros((8, 2), np.float32), np.zeros(8, np.float32), None])
def test_other_labels_are_refused(recipe, labels):
    recipe[3].train.corpus.labels = labels
    with pytest.raises(UserError) as error:
        few_shot_start(*recipe)
    assert (error.value.key, error.value.code) == ("few_shot", "unsupported_task")


def test_a_pretrained_encoder_is_needed(recipe):
    recipe[0].init_from = None
    with pytest.raises(UserError) as error:
        few_shot_start(*recipe)
    assert (error.value.key, error.value.code) == ("init_from", "no_init_from")
