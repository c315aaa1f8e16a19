"""The recipe as users run it, on small labeled texts that each test run makes itself."""

import json
import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.errors import UserError
from torchrecipes.models import bert, gpt2, load_classifier, save_hf
from torchrecipes.planning import check_components

RECIPE = find_recipe("classify_finetune")
TOPICS = {"animal": "cat dog fox owl", "tool": "saw axe nail drill", "food": "bread soup rice milk"}
STEPS = 24
SETTINGS = f"""
data:
  source: {{_component_: torchrecipes.data.examples.labeled_texts, path: FOLDER/train.jsonl}}
  validation: {{_component_: torchrecipes.data.examples.labeled_texts, path: FOLDER/validation.jsonl}}
  test: {{_component_: torchrecipes.data.examples.labeled_texts, path: FOLDER/test.jsonl}}
init_from: FOLDER/encoder
seq_len: 32
global_batch_size: 16
micro_batch_size: 16
max_steps: {STEPS}
optimizer: {{_component_: torchrecipes.optim.adamw, lr: 3e-3}}
eval_every: 8
compute: {{precision: fp32}}
log: {{log_every: 1}}
checkpoint: {{save_every: 8, keep_last: 10, async_save: false}}
"""
TEST = "torchrecipes.data.examples.labeled_texts"


def examples(count, seed):
    """Sentences about two topics: `label` is the first, `labels` are both, `score` is the share of the first."""
    rng = random.Random(seed)
    for _ in range(count):
        first, second = rng.sample(sorted(TOPICS), 2)
        share = rng.choice([3, 4])
        words = [rng.choice(TOPICS[first].split()) for _ in range(share)]
        words += [rng.choice(TOPICS[second].split()) for _ in range(4 - share)]
        rng.shuffle(words)
        labels = [first] if share == 4 else [first, second]
        pair = "yes " + rng.choice(TOPICS[first if rng.random() < 0.5 else second].split())
        related = int(any(pair.split()[1] in TOPICS[label].split() for label in labels[:1]))
        yield {
            "text": "the " + " ".join(words), "label": first, "labels": labels, "score": share / 4 - rng.random() / 100,
            "pair": pair, "related": related,
        }  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three sets of examples and an encoder of two blocks with its tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    path = tmp_path_factory.mktemp("labeled")
    for seed, (name, count) in enumerate({"train": 320, "validation": 60, "test": 90}.items()):
        lines = [json.dumps(example) for example in examples(count, seed)]
        (path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "yes", *" ".join(TOPICS.values()).split()]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    encoder = path / "encoder"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    save_hf(bert(vocab_size=len(words), max_position_embeddings=40, initializer_range=0.2, **sizes), encoder)
    tokenizer.save(str(encoder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {"mask_token": "[MASK]", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 40}
    (encoder / "tokenizer_config.json").write_text(json.dumps(names))
    return path


@pytest.fixture(scope="session")
def config(folder):
    path = folder / "config.yaml"
    path.write_text(SETTINGS.replace("FOLDER", str(folder)))
    return path


def run(config, output_dir, *overrides):
    recipe = load_recipe(RECIPE)
    check = partial(check_components, recipe)
    recipe.main(load(recipe.Config, config, [f"output_dir={output_dir}", *overrides], recipe=RECIPE, check=check))
    return output_dir


@pytest.fixture
def train(config, tmp_path):
    """train("name", "key=value", ...) runs the recipe into a folder of that name, which it returns."""
    return lambda name, *overrides: run(config, tmp_path / name, *overrides)


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory):
    """A run of one label whose best checkpoint is that of step 8: by the worst loss."""
    best = "checkpoint.keep_best={metric: eval/validation/log_loss, mode: max}"
    return run(config, tmp_path_factory.mktemp("finished") / "run", best)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return {line["step"]: line["loss"] for line in lines(run) if "loss" in line}


def evaluations(run, name):
    return [line for line in lines(run) if any(key.startswith(f"eval/{name}/") for key in line)]


def weights(run, step=STEPS):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def texts(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def their_logits(result, pairs):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(result).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(result)
    batch = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits.numpy()


def test_learns_and_ends_in_a_folder_for_transformers(train, folder, capsys):
    metrics = pytest.importorskip("sklearn.metrics")
    best = "checkpoint.keep_best={metric: eval/validation/accuracy, mode: max}"
    run = train("run", best, "max_steps=80", "eval_every=80", "checkpoint.save_every=80")
    printed = capsys.readouterr().out
    before, after = evaluations(run, "validation")[0], evaluations(run, "validation")[-1]
    assert before["step"] == 0 and before["eval/validation/accuracy"] < 0.6 < 0.8 < after["eval/validation/accuracy"]
    assert "trainable: all of it" in printed and "animal " in printed and "macro mean" in printed
    assert {path.name for path in run.glob("*.png")} == {
        f"{kind}_{name}.png" for kind in ("confusion_matrix", "calibration") for name in ("validation", "test")
    }
    found = json.loads((run / "model" / "config.json").read_text())
    names = sorted(TOPICS)
    assert found["label2id"] == {name: number for number, name in enumerate(names)}
    logits = their_logits(run / "model", [(example["text"],) for example in texts(folder, "test")])
    labels = [names.index(example["label"]) for example in texts(folder, "test")]
    (tested,) = evaluations(run, "test")  # once
    assert tested["eval/test/accuracy"] == pytest.approx(np.mean(logits.argmax(1) == labels), abs=1e-9)
    assert tested["eval/test/matthews"] == pytest.approx(metrics.matthews_corrcoef(labels, logits.argmax(1)), abs=1e-9)
    scaled = torch.from_numpy(logits / found["classification_temperature"]).softmax(1).numpy()
    assert tested["eval/test/log_loss"] == pytest.approx(metrics.log_loss(labels, scaled), abs=1e-4)


def test_the_result_is_the_best_checkpoint(finished):
    values = {line["step"]: line["eval/validation/log_loss"] for line in evaluations(finished, "validation")}
    assert list(values) == [0, 8, 16, 24]
    best = max((8, 16, 24), key=values.get)
    assert best != STEPS
    result = load_file(finished / "model" / "model.safetensors")
    expected = weights(finished, best)
    assert all(torch.equal(result[name], expected[name]) for name in expected) and result.keys() == expected.keys()
    assert not (finished / "model" / "optimizer").exists()


@pytest.mark.parametrize("trainable", ["all", "classifier"])
def test_a_resumed_run_is_the_run_that_never_stopped(train, tmp_path, trainable):
    settings = [f"trainable={trainable}", "dropout=0.1", "data.test=null"]
    whole = train("whole", *settings)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    for step in (16, 24):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:08d}")
    train("resumed", *settings)
    ours, theirs = weights(whole), weights(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(whole) == losses(resumed) and evaluations(whole, "validation") == evaluations(resumed, "validation")
    before = lines(resumed)
    train("resumed", *settings)
    assert lines(resumed) == before  # a finished run is not trained again


@pytest.mark.parametrize(
    ("trainable", "frozen"),
    [
        ("classifier", ["layer.0.", "layer.1.", "embeddings."]),
        ("last_2", ["layer.0.", "embeddings."]),
        ("lora", ["embeddings."]),
    ],
)
def test_only_what_is_chosen_is_trained(train, folder, capsys, trainable, frozen):
    run = train(trainable, f"trainable={trainable}", "max_steps=4", "eval_every=null", "data.test=null")
    assert "trainable: the classifier" in capsys.readouterr().out
    before, after = load_file(folder / "encoder" / "model.safetensors"), weights(run, 4)
    encoder = {name: tensor for name, tensor in before.items() if "cls." not in name}
    changed = {name for name, tensor in encoder.items() if not torch.equal(tensor, after[name])}
    assert not [name for name in changed for part in frozen if part in name]
    assert bool(changed) == (trainable != "classifier")
    if trainable == "lora":
        assert (run / "checkpoints" / "step-00000004" / "adapter" / "adapter_model.safetensors").exists()


def test_cached_features_train_as_the_frozen_encoder_does(train):
    settings = ["dropout=0", "data.test=null"]
    cached = train("cached", "trainable=classifier", *settings)
    plain = train("plain", "trainable=all", "freeze=[encoder.*]", *settings)
    assert losses(cached) == pytest.approx(losses(plain), abs=1e-5)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(cached)[name], tensor, rtol=0, atol=1e-5)


def test_several_labels_have_thresholds(train):
    metrics = pytest.importorskip("sklearn.metrics")
    sets = [f"data.{name}.label=labels" for name in ("source", "validation", "test")]
    run = train("run", "task=multi_label", "max_steps=40", *sets)
    found = json.loads((run / "model" / "config.json").read_text())
    assert found["problem_type"] == "multi_label_classification" and len(found["classification_thresholds"]) == 3
    model = load_classifier(run / "model")
    assert model.labels.thresholds == pytest.approx(found["classification_thresholds"])
    (tested,) = evaluations(run, "test")
    assert tested["eval/test/macro_f1"] > 0.8
    assert metrics  # the metrics themselves are compared with scikit-learn's in tests/evaluation


def test_a_pair_of_texts_and_a_single_logit(train, folder):
    sets = [f"data.{name}.{key}" for name in ("source", "validation") for key in ("text_pair=pair", "label=[related]")]
    run = train("run", "task=multi_label", "label_names=[related]", "data.test=null", *sets)
    pairs = [(example["text"], example["pair"]) for example in texts(folder, "validation")]
    logits = their_logits(run / "model", pairs)
    assert logits.shape == (60, 1)
    related = np.array([example["related"] for example in texts(folder, "validation")])
    probabilities = 1 / (1 + np.exp(-logits[:, 0]))
    log_loss = -np.mean(np.log(np.where(related == 1, probabilities, 1 - probabilities)))
    last = evaluations(run, "validation")[-1]
    assert last["eval/validation/log_loss"] == pytest.approx(log_loss, abs=1e-5)


def test_a_number(train, folder):
    sets = [f"data.{name}.label=score" for name in ("source", "validation", "test")]
    run = train("run", "task=regression", *sets)
    (tested,) = evaluations(run, "test")
    logits = their_logits(run / "model", [(example["text"],) for example in texts(folder, "test")])
    scores = [example["score"] for example in texts(folder, "test")]
    assert tested["eval/test/mse"] == pytest.approx(np.mean((logits[:, 0] - scores) ** 2), abs=1e-6)


def test_a_share_of_the_examples_is_held_out_of_every_label(train):
    run = train(
        "run", "data.validation=null", "data.validation_fraction=0.25", "data.test=null", "max_steps=2", "eval_every=2"
    )
    corpus = {}
    for part in ("train", "validation"):
        account = json.loads((run / "corpus" / part / "corpus.json").read_text())
        corpus[part] = account["totals"]["label_counts"]
    for trained, held_out in zip(corpus["train"], corpus["validation"], strict=True):
        assert held_out / (trained + held_out) == pytest.approx(0.25, abs=0.01)


def test_early_stopping_ends_the_run(train, capsys):
    stop = "{_component_: torchrecipes.training.EarlyStopping, metric: eval/validation/accuracy, patience: 2}"
    run = train("run", "optimizer.lr=0", "optimizer.weight_decay=0", f"early_stopping={stop}", "data.test=null")
    assert lines(run)[-1]["step"] == 16  # step 0 is the best, 8 and 16 are no better
    assert "finished 16 steps" in capsys.readouterr().out and (run / "model" / "config.json").exists()
    before = lines(run)
    train("run", "optimizer.lr=0", "optimizer.weight_decay=0", f"early_stopping={stop}", "data.test=null")
    assert lines(run) == before


def test_balanced_weights_come_from_the_training_examples(train, folder):
    """The loss of the first step, recomputed from the logits before it."""
    balanced = "loss={_component_: torchrecipes.losses.CrossEntropy, class_weights: balanced}"
    settings = ["max_steps=1", "eval_every=1", "data.test=null", "data.source.max_examples=16", "data.shuffle=false"]
    plain, weighted = train("plain", *settings), train("weighted", balanced, *settings)
    names, labels = sorted(TOPICS), [example["label"] for example in texts(folder, "train")[:16]]
    counts = [labels.count(name) for name in names]
    assert len(set(counts)) > 1
    state = json.loads((plain / "checkpoints" / "step-00000001" / "state.json").read_text())
    assert state["step"] == 1
    assert losses(weighted)[1] != pytest.approx(losses(plain)[1], abs=1e-4)
    explicit = (
        f"loss={{_component_: torchrecipes.losses.CrossEntropy, class_weights: {[16 / (3 * c) for c in counts]}}}"
    )
    assert losses(train("explicit", explicit, *settings)) == pytest.approx(losses(weighted), abs=1e-6)


def test_a_longer_text_is_cut_and_counted(train, folder, capsys):
    train("run", "seq_len=5", "max_steps=1", "eval_every=null", "data.test=null")
    assert "320 texts (100.0%) were cut to 5 tokens" in capsys.readouterr().out


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "overrides", "code"),
    [
        ([{"text": "the cat", "label": "plant"}], ["data.validation.path=FILE"], "unknown_label"),
        ([{"text": "the cat", "label": "a"}] * 20, ["data.source.path=FILE"], "one_class"),
        ([{"text": "the cat", "label": float("nan")}] * 20, ["data.source.path=FILE", "task=regression"], "bad_record"),
        ([{"text": "the cat", "label": None}] * 20, ["data.source.path=FILE"], "bad_record"),
        ([{"text": "the cat", "class": "a"}] * 20, ["data.source.path=FILE"], None),
        ([{"text": " ", "label": "a"}] * 20, ["data.source.path=FILE"], "no_examples"),
    ],
)  # fmt: skip
def test_wrong_examples_are_refused(train, tmp_path, rows, overrides, code):
    path = write(tmp_path, "wrong.jsonl", rows)
    with pytest.raises(UserError) as error:
        train("run", "data.test=null", *(text.replace("FILE", str(path)) for text in overrides))
    assert error.value.hint or error.value.problems or "column" in str(error.value)
    assert code is None or error.value.code == code, error.value.code
    assert str(path.name) in str(error.value) or error.value.code in ("one_class",)


def test_a_loss_of_embeddings_is_refused(train):
    with pytest.raises(UserError) as error:
        train("run", "loss={_component_: torchrecipes.losses.InfoNCE}")
    assert [(e.key, e.code) for e in error.value.problems or [error.value]] == [("loss", "not_a_loss_of_logits")]


def test_a_decoder_and_rows_beyond_the_positions_are_refused(train, tmp_path, folder):
    decoder = tmp_path / "decoder"
    shutil.copytree(folder / "encoder", decoder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
    save_hf(gpt2(vocab_size=19, **sizes), decoder)
    for overrides, code in (([f"init_from={decoder}"], "not_an_encoder"), (["seq_len=64"], None)):
        with pytest.raises(UserError) as error:
            train("run", *overrides)
        found = {problem.code for problem in error.value.problems or [error.value]}
        assert code is None or code in found, found


@pytest.mark.parametrize("trainable", ["all", "classifier"])
def test_two_ranks_are_one(train, config, tmp_path, trainable):
    options = [
        f"trainable={trainable}",
        "micro_batch_size=4",
        "max_steps=8",
        "data.test=null",
        "checkpoint.keep_last=1",
    ]
    one = train("one", *options)
    script = tmp_path / "main.py"
    script.write_text("from torchrecipes.cli.main import _as_process\n_as_process()\n")
    command = ["run", "classify_finetune", "--config", str(config), f"output_dir={tmp_path / 'two'}", *options]
    ranks.run(script, 2, *command)
    two = tmp_path / "two"
    assert losses(two) == pytest.approx(losses(one), abs=1e-6)
    for ours, theirs in zip(evaluations(two, "validation"), evaluations(one, "validation"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    result, expected = (load_file(run / "model" / "model.safetensors") for run in (two, one))
    for name, tensor in expected.items():
        if not name.endswith("key.bias"):  # its gradient is rounding alone, which AdamW makes as large as any other
            torch.testing.assert_close(result[name], tensor, rtol=0, atol=1e-5)


def test_few_examples_start_from_pairs_of_labels(train, capsys):
    """The dropout of SetFit's pairs and the fit of the output layer are tested beside `few_shot_start`."""
    few = ["data.source.max_examples=24", "few_shot=true", "trainable=classifier", "optimizer.lr=1e-6"]
    run = train("run", *few, "max_steps=2", "eval_every=2")
    assert "few_shot: 24 examples" in capsys.readouterr().out
    before = evaluations(run, "validation")[0]["eval/validation/accuracy"]
    plain = train("plain", *few[:1], "max_steps=2", "eval_every=2")
    assert before > evaluations(plain, "validation")[0]["eval/validation/accuracy"]


def test_an_edited_loss_of_a_copied_recipe_is_followed(config, tmp_path):
    """A second term: the squared logits, logged beside the loss."""
    source = RECIPE.read_text()
    edited = source.replace(
        'return loss, {"loss": loss.detach()} | accuracy',
        "term = 0.1 * logits.square().sum()\n"
        '    return loss + term, {"loss": loss.detach(), "term": term.detach()} | accuracy',
    )
    assert edited != source
    path = tmp_path / "my_recipe.py"
    path.write_text(edited)
    recipe = load_recipe(path)
    settings = [f"output_dir={tmp_path / 'run'}", "max_steps=8", "data.test=null", "micro_batch_size=auto"]
    recipe.main(load(recipe.Config, config, settings, recipe=path))
    terms = [line["term"] for line in lines(tmp_path / "run") if "term" in line]
    assert len(terms) == 8 and all(term > 0 for term in terms)
