"""Where a classifier starts from: folders with and without a head, and what becomes of the labels."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchrecipes.errors import UserError
from torchrecipes.manifest import flush, write_manifest
from torchrecipes.models import (
    EmbeddingModel,
    SequenceClassifier,
    bert,
    gpt2,
    load_classifier,
    load_hf_weights,
    meta_classifier_from_hf,
    meta_model_from_hf,
    modernbert,
    neobert,
    roberta,
    save_hf,
    stored_labels,
    write_calibration,
)

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
BUILDERS = {"bert": bert, "roberta": roberta, "modernbert": modernbert, "neobert": neobert}
IDS = torch.randint(4, 64, (3, 9), generator=torch.Generator().manual_seed(0))
OUTPUT = ["head.out_proj.bias", "head.out_proj.weight"]
HEAD = ["head.dense.bias", "head.dense.weight", *OUTPUT]


def started_from(folder, report=lambda line: None, seed=5, **arguments):
    model = meta_classifier_from_hf(folder, report=report, **arguments).to_empty(device="cpu")
    return model, load_hf_weights(model, folder, seed=seed, report=report)


def saved_classifier(folder, builder=bert, **arguments):
    model = SequenceClassifier(builder(**SIZES), **({"label_names": ["a", "b", "c"]} | arguments))
    save_hf(model, folder)
    return model


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "REMOVED"}))


@pytest.mark.parametrize("family", BUILDERS)
def test_a_masked_model(tmp_path, family):
    """The encoder is its encoder, and the head is new; ModernBERT's is half there."""
    pretrained = BUILDERS[family](**SIZES, seed=3)
    save_hf(pretrained, tmp_path)
    reports = []
    model, coverage = started_from(tmp_path, reports.append, label_names=["x", "y"])
    new = [name for name in HEAD if family != "modernbert" or name in OUTPUT]
    kept = ["head.dense.weight"] if family == "modernbert" else []
    assert coverage.initialized == sorted({name for name, _ in model.named_parameters()} & set(new))
    assert all(any(name in line for line in reports) for name in coverage.initialized)
    assert all(name in coverage.loaded for name in kept)
    pretrained.remove_head()
    with torch.no_grad():
        assert torch.equal(model.encoder.eval()(IDS), pretrained.eval()(IDS))
    assert model.pooling == ("mean" if family in ("modernbert", "neobert") else "cls")
    assert model.head.out_proj.weight.std() > 0.01
    again, _ = started_from(tmp_path, label_names=["x", "y"])
    assert torch.equal(model.head.out_proj.weight, again.head.out_proj.weight)


@pytest.mark.parametrize("pooler", [True, False])
def test_the_pooler_of_a_bert_is_kept_or_new(tmp_path, pooler):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SIZES)
    theirs = transformers.BertModel(config, add_pooling_layer=pooler)
    theirs.save_pretrained(tmp_path)
    model, coverage = started_from(tmp_path, num_labels=2)
    assert coverage.initialized == (OUTPUT if pooler else HEAD)
    if pooler:
        assert torch.equal(model.head.dense.weight, theirs.pooler.dense.weight)
        with torch.no_grad():
            first = theirs.eval()(input_ids=IDS).pooler_output
            pooled = torch.tanh(model.head.dense(model.eval()(IDS, return_features=True)))
        assert (pooled - first).abs().max() < 1e-5


@pytest.mark.parametrize("family", BUILDERS)
def test_an_embedding_model(tmp_path, family):
    """Its folder has the names of `AutoModel`, and for a BERT a pooler that passes the first token on."""
    trained = EmbeddingModel(BUILDERS[family](**SIZES, seed=3), projection=8)
    save_hf(trained, tmp_path)
    model, coverage = started_from(tmp_path, label_names=["x", "y"])
    new = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert set(coverage.initialized) == (set(OUTPUT) if family == "bert" else new)
    with torch.no_grad():
        assert torch.equal(model.encoder.eval()(IDS), trained.encoder.eval()(IDS))


def test_a_checkpoint_and_a_run(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000007"
    source = saved_classifier(folder)
    write_manifest(folder, 7, flush(folder, ["config.json", "model.safetensors"]))
    for path in (folder, tmp_path):
        model, coverage = started_from(path, pytest.fail, label_names=["a", "b", "c"])
        assert coverage.initialized == []
        assert torch.equal(model.head.out_proj.weight, source.head.out_proj.weight)
    assert load_classifier(tmp_path).label_names == stored_labels(tmp_path).names == ("a", "b", "c")


def test_a_classifier_with_the_same_labels_keeps_its_head(tmp_path):
    first = saved_classifier(tmp_path)
    model, coverage = started_from(tmp_path, pytest.fail, label_names=["a", "b", "c"])
    assert coverage.initialized == [] and coverage.dropped == []
    assert torch.equal(model.head.out_proj.weight, first.head.out_proj.weight)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "c", "b"], ["d", "e", "f"]])
def test_a_classifier_with_other_labels_gets_a_new_output_layer(tmp_path, names):
    first = saved_classifier(tmp_path)
    reports = []
    model, coverage = started_from(tmp_path, reports.append, label_names=names)
    assert coverage.initialized == OUTPUT
    assert coverage.dropped == ["classifier.bias", "classifier.weight"]
    assert torch.equal(model.head.dense.weight, first.head.dense.weight)
    assert any("a, b, c" in line and ", ".join(names) in line for line in reports)
    assert model.head.out_proj.weight.shape == (len(names), 32)


def test_labels_without_names_fit_any_names(tmp_path):
    saved_classifier(tmp_path, num_labels=3, label_names=None)
    _, coverage = started_from(tmp_path, pytest.fail, label_names=["x", "y", "z"])
    assert coverage.initialized == []


def test_a_single_label_may_have_any_name(tmp_path):
    saved_classifier(tmp_path, label_names=["relevance"], task="regression")
    _, coverage = started_from(tmp_path, pytest.fail, label_names=["score"], task="multi_label")
    assert coverage.initialized == []


@pytest.mark.parametrize("kind", ["BertForTokenClassification", "RobertaForTokenClassification"])
def test_the_head_of_another_kind_is_not_taken(tmp_path, kind):
    """`classifier.weight` of a model for tokens has the name and the shape of ours."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind.replace("ForTokenClassification", "Config"))(**SIZES, num_labels=2)
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_classifier(tmp_path)
    assert error.value.code == "no_head"
    _, coverage = started_from(tmp_path, num_labels=2)
    assert coverage.initialized == HEAD
    assert "classifier.weight" in coverage.dropped


def test_a_published_neobert_gets_a_new_head(tmp_path):
    """Its own classifier has a tanh where an `eurobert` has a GELU."""
    source = neobert(**SIZES, lm_head_bias=True, tie_word_embeddings=False)
    save_hf(source, tmp_path)
    reports = []
    model, coverage = started_from(tmp_path, reports.append, label_names=["x", "y"])
    assert coverage.initialized == HEAD
    source.remove_head()
    with torch.no_grad():
        assert torch.equal(model.encoder.eval()(IDS), source.eval()(IDS))
    save_hf(model, tmp_path / "saved")
    assert load_classifier(tmp_path / "saved", report=pytest.fail).label_names == ("x", "y")
    saved_classifier(tmp_path / "head", neobert)
    model = meta_classifier_from_hf(tmp_path / "head")
    edit_config(tmp_path / "head", model_type="neobert")
    adapter = model.hf_adapter.for_folder(tmp_path / "head")
    assert adapter.normalize_name("dense.weight") is None and adapter.normalize_name("classifier.bias") is None


def test_a_decoder_is_refused(tmp_path):
    with pytest.raises(UserError) as error:
        SequenceClassifier(gpt2(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    assert error.value.code == "not_an_encoder"
    save_hf(gpt2(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2), tmp_path)
    with pytest.raises(UserError) as error:
        meta_classifier_from_hf(tmp_path, num_labels=2)
    assert error.value.code == "not_an_encoder"


def test_a_folder_without_classifier_classifies_nothing(tmp_path):
    save_hf(bert(**SIZES), tmp_path)
    assert stored_labels(tmp_path) is None
    with pytest.raises(UserError) as error:
        load_classifier(tmp_path)
    assert error.value.code == "no_head"


def test_a_missing_bias_or_block_is_an_error(tmp_path):
    saved_classifier(tmp_path)
    for lost in ("classifier.bias", "bert.encoder.layer.1.output.dense.bias"):
        tensors = load_file(tmp_path / "model.safetensors")
        whole = dict(tensors)
        del tensors[lost]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError) as error:
            load_classifier(tmp_path)
        assert [problem.key for problem in error.value.problems] == [lost]
        save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", BUILDERS)
def test_save_load_save_changes_no_byte(tmp_path, family):
    model = saved_classifier(
        tmp_path / "first", BUILDERS[family], task="multi_label", dropout=0.1, max_length=77, seed=2
    )
    model.calibrate(thresholds=[0.25, 0.5, 0.75], temperature=1.25)
    save_hf(model, tmp_path / "first")
    again = load_classifier(tmp_path / "first", report=pytest.fail)
    assert again.labels == model.labels and again.labels.max_length == 77
    save_hf(again, tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    with torch.no_grad():
        assert torch.equal(again(IDS), model.eval()(IDS))
    assert meta_model_from_hf(tmp_path / "first", pytest.fail).config == model.config  # as an encoder again


def test_calibration_is_written_into_a_folder(tmp_path):
    saved_classifier(tmp_path, task="multi_label")
    write_calibration(tmp_path, thresholds=[0.1, 0.2, 0.3], temperature=2.0)
    labels = load_classifier(tmp_path).labels
    assert labels.thresholds == (0.1, 0.2, 0.3) and labels.temperature == 2.0
    logits = torch.tensor([[1.0, -2.0, 0.0]])
    assert torch.allclose(labels.probabilities(logits), torch.sigmoid(logits / 2))
    write_calibration(tmp_path)
    assert load_classifier(tmp_path).labels.thresholds is None


@pytest.mark.parametrize(
    ("keys", "task"),
    [
        ({"problem_type": "regression"}, "regression"),
        ({"problem_type": "multi_label_classification"}, "multi_label"),
        ({}, "multi_label"),  # transformers and CrossEncoder apply a sigmoid to one logit
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "regression"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, "multi_label"),
    ],
)
def test_the_task_of_one_label(tmp_path, keys, task):
    saved_classifier(tmp_path, num_labels=1, label_names=None, task="regression")
    removed = dict.fromkeys(
        ("problem_type", "sentence_transformers", "sbert_ce_default_activation_function"), "REMOVED"
    )
    edit_config(tmp_path, **removed | keys)
    assert load_classifier(tmp_path).labels.task == task


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"label_names": ["a"]}, "one_label"),
        ({"label_names": ["a", "a"]}, "labels"),
        ({"label_names": ["a", "b"], "num_labels": 3}, "labels"),
        ({"label_names": ["a", "b"], "task": "ranking"}, "unknown_name"),
        ({"label_names": ["a", "b"], "pooling": "mean"}, "unknown_name"),
    ],
)
def test_labels_that_do_not_work(arguments, code):
    with pytest.raises(UserError) as error:
        SequenceClassifier(bert(**SIZES), **arguments)
    assert error.value.code == code


@pytest.mark.parametrize(("task", "function"), [("regression", "Identity"), ("multi_label", "Sigmoid")])
def test_a_reranker_loads_as_a_cross_encoder(tmp_path, task, function):
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.0")
    pairs = [("what is it", "it is a word"), ("who", "a longer text with more words in it than the other one")]
    tokenizer = _tokenizer(tmp_path / "tokenizer", [text for pair in pairs for text in pair])
    torch.manual_seed(0)
    encoder = bert(**SIZES | {"vocab_size": tokenizer.vocab_size, "initializer_range": 0.2})
    model = SequenceClassifier(encoder, num_labels=1, task=task).eval()
    save_hf(model, tmp_path / "model", tokenizer)
    ours = load_classifier(tmp_path / "model")
    theirs = sentence_transformers.CrossEncoder(str(tmp_path / "model"), device="cpu")
    scores = theirs.predict(pairs)
    expected = []
    for pair in pairs:
        encoded = tokenizer.backend.encode(*pair)
        types = torch.tensor([encoded.type_ids])
        assert types.any()
        with torch.no_grad():
            logits = ours(torch.tensor([encoded.ids]), token_type_ids=types)
        expected.append(ours.labels.probabilities(logits).item())
    assert abs(expected[0] - expected[1]) > 1e-3
    assert torch.allclose(torch.tensor(scores), torch.tensor(expected), atol=1e-5)
    assert str(theirs.activation_fn).startswith(function)


def _tokenizer(folder, texts):
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    from torchrecipes.data.tokenizers import load_tokenizer

    words = sorted({word for text in texts for word in text.split()})
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    roles = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return load_tokenizer(folder, pad_vocab_to_multiple_of=1)
