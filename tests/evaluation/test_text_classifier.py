"""Predictions in windows that are sorted by length, against `transformers` and one text at a time."""

import numpy as np
import pytest
import torch

from tests.evaluation.classifiers import saved_classifier, texts_of
from torchrecipes.data.progress import Progress
from torchrecipes.data.tokenizers import load_tokenizer
from torchrecipes.errors import UserError
from torchrecipes.evaluation import TextClassifier, over_texts
from torchrecipes.models import bert, load_classifier, modernbert, neobert, roberta

PAIRS = list(zip(texts_of(40), texts_of(40, seed=1), strict=True))


def loaded(folder, **options):
    return TextClassifier(load_classifier(folder), load_tokenizer(folder, pad_vocab_to_multiple_of=1), **options)


def their_logits(folder, texts, max_length=32):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        pair = (text,) if isinstance(text, str) else text
        inputs = tokenizer(*pair, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**inputs).logits[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("builder", [bert, roberta, modernbert, neobert])
@pytest.mark.parametrize("kind", ["texts", "pairs"])
def test_logits_are_those_of_transformers(tmp_path, builder, kind):
    saved_classifier(tmp_path, builder)
    texts = texts_of(40) if kind == "texts" else PAIRS
    expected = their_logits(tmp_path, texts, 30 if builder is roberta else 32)
    classify = loaded(tmp_path, tokens_per_batch=100)
    found = classify.logits(texts)
    assert expected.std(0).min() > 0.01
    assert np.abs(found - expected).max() <= 1e-5
    assert (classify.num_truncated > 0) == (kind == "pairs")


@pytest.mark.parametrize("kind", ["texts", "pairs"])
def test_packed_rows_give_the_same(tmp_path, kind, monkeypatch):
    """As on a GPU in bf16."""
    saved_classifier(tmp_path)
    texts = texts_of(40) if kind == "texts" else PAIRS
    expected = loaded(tmp_path).logits(texts)
    monkeypatch.setattr(over_texts.TextBatches, "are_packed", lambda self: True)
    assert np.abs(loaded(tmp_path, tokens_per_batch=256).logits(texts) - expected).max() <= 1e-5


def test_a_generator_is_classified_window_by_window(tmp_path, monkeypatch):
    saved_classifier(tmp_path)
    monkeypatch.setattr(over_texts, "TEXTS_PER_WINDOW", 7)
    texts = [*texts_of(20), "", *texts_of(3)]
    classify = loaded(tmp_path)
    progress = Progress("predicting")
    parts = list(classify.predict_iter((text for text in texts), progress))
    assert [len(part) for part in parts] == [7, 7, 7, 3]
    assert progress.documents == 24
    found = [prediction for part in parts for prediction in part]
    assert [prediction.labels for prediction in found] == [prediction.labels for prediction in classify.predict(texts)]
    assert found[20].labels == () and np.isnan(found[20].scores).all()
    assert classify.num_empty == 2
    assert classify.predict([]) == [] and classify.logits([]).shape == (0, 3)


def test_single_label(tmp_path):
    saved_classifier(tmp_path, calibration={"temperature": 2.0})
    texts = texts_of(10)
    logits = torch.from_numpy(their_logits(tmp_path, texts))
    for prediction, row in zip(loaded(tmp_path).predict(texts), logits, strict=True):
        assert prediction.labels == (["bad", "fair", "good"][row.argmax()],)
        assert np.abs(prediction.scores - (row / 2).softmax(0).numpy()).max() < 1e-5


def test_several_labels_with_their_thresholds(tmp_path):
    model = saved_classifier(tmp_path, task="multi_label")
    texts = texts_of(30)
    logits = their_logits(tmp_path, texts)
    thresholds = (1 / (1 + np.exp(-logits))).mean(0).tolist()
    for given in (None, thresholds):
        model.calibrate(thresholds=given)
        saved_classifier(tmp_path, task="multi_label", calibration={"thresholds": given})
        counts = np.zeros(3)
        for prediction, row in zip(loaded(tmp_path).predict(texts), logits, strict=True):
            probability = 1 / (1 + np.exp(-row))
            limits = given or [0.5] * 3
            names = zip(["bad", "fair", "good"], probability, limits, strict=True)
            assert prediction.labels == tuple(name for name, p, limit in names if p >= limit)
            counts += probability >= np.array(limits)
        assert given is None or ((counts > 0).all() and (counts < 30).all())


def test_a_regression_gives_numbers(tmp_path):
    saved_classifier(tmp_path, num_labels=1, label_names=None, task="regression")
    expected = their_logits(tmp_path, PAIRS)
    for prediction, row in zip(loaded(tmp_path).predict(PAIRS), expected, strict=True):
        assert prediction.labels == () and np.abs(prediction.scores - row).max() < 1e-5


def test_the_length_is_that_of_training(tmp_path):
    saved_classifier(tmp_path, max_length=9)
    classify = loaded(tmp_path)
    texts = texts_of(30)
    assert np.abs(classify.logits(texts) - their_logits(tmp_path, texts, 9)).max() < 1e-5
    assert classify.num_truncated == sum(len(text.split()) > 7 for text in texts)
    assert loaded(tmp_path, max_length=20).max_length == 20
    with pytest.raises(UserError) as error:
        loaded(tmp_path, max_length=33)
    assert (error.value.key, error.value.code) == ("max_length", "out_of_range")
