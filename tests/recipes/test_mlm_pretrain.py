"""The recipe as users run it, on a small text that each test run makes itself."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.data.tokenizers.load import load_tokenizer
from torchrecipes.errors import UserError
from torchrecipes.models import load_hf
from torchrecipes.planning import check_components, duration

RECIPE = find_recipe("mlm_pretrain")
STEPS = 12
SETTINGS = f"""
tokenizer: {{_component_: torchrecipes.data.tokenizers.train_wordpiece, vocab_size: 400}}
data:
  source: {{_component_: torchrecipes.data.sources.files, path: TEXT, sample_by: line}}
  validation_fraction: 0.1
  tokenizer_threads: 0
model:
  _component_: torchrecipes.models.neobert
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  intermediate_size: 64
  max_position_embeddings: 64
seq_len: 32
global_batch_size: 8
micro_batch_size: 8
max_steps: {STEPS}
compute:
  precision: fp32
log:
  log_every: 1
checkpoint:
  save_every: 4
  keep_last: 10
eval_every: null
"""
BERT = [
    "model._component_=torchrecipes.models.bert",
    *("hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=64"),
]
BERT = [BERT[0], *(f"model.{setting}" for setting in BERT[1:])]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Sentences with a grammar, so that context helps: 600 documents."""
    rng = random.Random(0)
    nouns = ["cat", "dog", "fox", "owl", "bee", "ant", "cow", "hen"]
    verbs = ["sees", "hears", "finds", "likes"]
    places = ["garden", "forest", "river", "house"]
    path = tmp_path_factory.mktemp("text") / "animals.jsonl"
    with path.open("w") as file:
        for _ in range(600):
            sentences = [
                f"the {(a := rng.choice(nouns))} {rng.choice(verbs)} the {rng.choice(nouns)} in the "
                f"{rng.choice(places)} and the {a} goes home."
                for _ in range(rng.randint(1, 5))
            ]
            file.write(json.dumps({"text": " ".join(sentences)}) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus(text, tmp_path_factory):
    """A corpus folder that all runs share: it is built by the first."""
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture
def train(text, corpus, tmp_path):
    """train("name", "key=value", ...) runs the recipe into a folder of that name, which it returns."""
    config = tmp_path / "config.yaml"
    config.write_text(SETTINGS.replace("TEXT", str(text)))

    def run(name, *overrides):
        recipe = load_recipe(RECIPE)
        settings = [f"output_dir={tmp_path / name}", f"data.corpus_dir={corpus}", *overrides]
        check = partial(check_components, recipe)
        recipe.main(load(recipe.Config, config, settings, recipe=RECIPE, check=check))
        return tmp_path / name

    run.config = config
    return run


def weights(run, step=STEPS):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return {line["step"]: line["loss"] for line in lines(run) if "loss" in line}


def assert_same_weights(run, other, step=STEPS):
    ours, theirs = weights(run, step), weights(other, step)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def stop_at(run, step, to):
    """A copy of a run as it stood when the checkpoint of `step` was written."""
    shutil.copytree(run, to)
    for folder in (to / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return to


def test_learns_context_and_exports_what_transformers_loads(train):
    transformers = pytest.importorskip("transformers")
    run = train("run", "seed=1", "max_steps=300", "optimizer.lr=5e-3", "eval_every=300", "checkpoint.save_every=null")
    before, after = [line for line in lines(run) if "eval/validation/loss" in line]
    assert before["step"] == 0 and after["step"] == 300
    assert after["eval/validation/loss"] < after["eval/validation/unigram_loss"] - 0.5
    assert after["eval/validation/accuracy"] > after["eval/validation/unigram_accuracy"] + 0.1
    assert before["eval/validation/loss"] > after["eval/validation/unigram_loss"]

    folder = run / "checkpoints" / "step-00000300"
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours, tokenizer = load_hf(folder).eval(), load_tokenizer(folder)
    assert len(their_tokenizer) == tokenizer.vocab_size == theirs.config.vocab_size
    prompt = "the cat sees the [MASK] in the garden"
    ids = their_tokenizer(prompt, return_tensors="pt")
    assert ids.input_ids[0].tolist() == tokenizer.encode_prompt(prompt)
    with torch.no_grad():
        difference = theirs(**ids).logits - ours.head(ours(ids.input_ids))
    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("model", ["neobert", "bert"])
def test_a_resumed_run_is_the_run_that_never_stopped(train, tmp_path, model, workers):
    settings = [f"data.num_workers={workers}", *(BERT if model == "bert" else [])]  # bert has dropout
    whole = train("whole", *settings)
    for step in (4, 8):
        resumed = stop_at(whole, step, tmp_path / f"resumed{step}")
        train(resumed.name, *settings)
        assert_same_weights(whole, resumed)
        assert losses(resumed) == losses(whole)


@pytest.mark.parametrize("bits", [8, 4])
def test_optimizer_state_of_few_bits_goes_on_to_the_last_bit(train, tmp_path, bits):
    settings = [f"optimizer._component_=torchrecipes.optim.adamw_{bits}bit", "model.hidden_size=64"]
    whole = train("whole", *settings)
    resumed = stop_at(whole, 4, tmp_path / "resumed")
    train("resumed", *settings)
    assert_same_weights(whole, resumed)
    assert losses(resumed) == losses(whole)


def test_the_guard_goes_back_past_the_bad_data_and_a_resumed_run_does_so_too(train, tmp_path, capsys):
    """The data of step 10 makes its loss NaN: the run goes back to step 8, and leaves the data of 9 and 10 behind."""
    settings = ["guard.on_nonfinite=rollback", "guard.max_skips=1", "checkpoint.keep_last=10"]
    recipe = load_recipe(RECIPE)
    real, seen = recipe.masked_lm_loss, []

    def poisoned(hidden, head, positions, labels, **options):
        loss, token_loss = real(hidden, head, positions, labels, **options)
        key = labels.sum().item()
        seen.append(key)
        return loss * float("nan") if key == bad else loss, token_loss

    bad = None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("torchrecipes.losses.masked_lm_loss", poisoned)
        train("clean", *settings)
        bad = seen[9]
        whole = train("whole", *settings)
        assert "step 10: loss is nan" in capsys.readouterr().out
        # Steps 9 and 10 are done again, with the data of steps 11 and 12.
        assert seen[STEPS + 10 : STEPS + 12] == seen[10:12] and bad not in seen[STEPS + 10 :]
        assert lines(whole)[-1]["rollbacks"] == 1 and list(losses(whole)) == list(range(1, STEPS + 1))
        resumed = stop_at(whole, 8, tmp_path / "resumed")
        train("resumed", *settings)
    assert_same_weights(whole, resumed)


def test_the_micro_batch_size_may_change_and_what_auto_chose_stays(train, tmp_path):
    whole = train("whole", "micro_batch_size=auto")
    resumed = stop_at(whole, 8, tmp_path / "resumed")
    train("resumed", "micro_batch_size=auto")
    assert_same_weights(whole, resumed)
    smaller = stop_at(whole, 8, tmp_path / "smaller")
    train("smaller", "micro_batch_size=2")
    state = json.loads((smaller / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())["state"]
    assert state["loader"]["micro_batch_size"] == 2
    assert losses(smaller) == pytest.approx(losses(whole), abs=1e-5)


def test_a_damaged_checkpoint_costs_only_the_steps_behind_it(train, tmp_path, capsys):
    whole = train("whole")
    resumed = stop_at(whole, 8, tmp_path / "resumed")
    newest = resumed / "checkpoints" / "step-00000008" / "optimizer/shard-00001-model-00001-of-00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    train("resumed")
    assert "step-00000004" in capsys.readouterr().out
    assert_same_weights(whole, resumed)
    assert losses(resumed) == losses(whole)


def test_a_named_checkpoint_goes_on_in_another_folder(train):
    whole = train("whole")
    other = train("other", f"checkpoint.resume={whole}/checkpoints/step-00000008")
    assert_same_weights(whole, other)
    assert losses(other) == {step: loss for step, loss in losses(whole).items() if step > 8}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_has_the_same_losses_and_is_compiled_once(train):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (
        losses(train("plain", "max_steps=4")),
        losses(train("compiled", "max_steps=4", "compute.compile=true")),
    )
    for step, loss in plain.items():
        assert compiled[step] == pytest.approx(loss, abs=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of two blocks one, and of the last norm


def test_a_finished_run_is_not_trained_again(train, capsys):
    run = train("run")
    before = lines(run)
    train("run")
    assert lines(run) == before
    assert "finished" in capsys.readouterr().out


def test_an_evaluation_that_was_interrupted_is_made_on_resuming(train):
    best = "checkpoint.keep_best={metric: eval/validation_ema/loss, mode: max}"
    settings = ["eval_every=8", best, "ema._component_=torchrecipes.training.ema.EMA"]
    folder = train("interrupted", *settings)
    metrics, link = folder / "metrics.jsonl", folder / "checkpoints" / "best"
    complete = metrics.read_text().splitlines()
    assert json.loads(complete[-1])["step"] == STEPS and "eval/validation_ema/loss" in complete[-1]
    metrics.write_text("\n".join(complete[:-2]) + "\n")
    (folder / "checkpoints" / "best.json").unlink()
    link.unlink()
    train("interrupted", *settings)
    assert metrics.read_text().splitlines() == complete
    assert link.readlink().name == f"step-{STEPS:08d}"
    train("interrupted", *settings)  # nothing is missing now
    assert metrics.read_text().splitlines() == complete


def test_evaluation_does_not_change_training(train):
    assert_same_weights(train("with", "eval_every=2", *BERT), train("without", "eval_every=null", *BERT))


def test_two_evaluations_of_one_model_give_one_number(train):
    run = train("run", "eval_every=2", "optimizer.lr=0", "optimizer.weight_decay=0")
    values = {line["eval/validation/loss"] for line in lines(run) if "eval/validation/loss" in line}
    assert len(values) == 1


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_accumulation_changes_nothing(train, micro_batch_size, packing):
    one = losses(train("one", f"data.packing={packing}"))
    many = losses(train("many", f"data.packing={packing}", f"micro_batch_size={micro_batch_size}"))
    assert one.keys() == many.keys()
    for step, loss in one.items():
        assert many[step] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("override", ["masked_logits_only=false", "compute.activation_checkpointing=full"])
def test_what_trades_memory_for_time_gives_the_same_losses(train, override):
    plain, other = losses(train("plain")), losses(train("other", override))
    for step, loss in plain.items():
        assert other[step] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ["mask_all=true"],
        ["compute.precision=bf16"],
        ["epochs=0.5", "max_steps=null"],
        ["total_tokens=2k", "max_steps=null"],
        ["max_grad_norm=null", "lr_scheduler._component_=torchrecipes.optim.constant"],
        [*BERT, "data.packing=none"],
        [
            "tokenizer._component_=torchrecipes.data.tokenizers.train_bpe",
            "tokenizer.vocab_size=400",
            "data.corpus_dir=null",
        ],
    ],
    ids=" ".join,
)
def test_runs_with(train, overrides):
    run = train("run", *overrides)
    assert all(line["loss"] < 8 for line in lines(run) if "loss" in line)
    assert list((run / "checkpoints").glob("step-*"))


def test_a_run_in_minutes_equals_one_of_the_steps_that_they_have_room_for(train, tmp_path, monkeypatch):
    monkeypatch.setattr(duration, "seconds_per_step", lambda *_: 1.0)
    minutes = ["max_steps=null", f"max_minutes={STEPS / 60 / duration.FOR_STEPS + 0.001}"]
    given, timed = train("given"), train("timed", *minutes)
    assert_same_weights(timed, given)
    name = f"checkpoints/step-{STEPS:08d}/state.json"
    assert (timed / name).read_text() == (given / name).read_text()
    stopped = stop_at(timed, 4, tmp_path / "stopped")
    monkeypatch.setattr(duration, "seconds_per_step", lambda *_: 2.0)  # resumed on a slower machine
    train("stopped", *minutes)
    assert_same_weights(stopped, given)
    with pytest.raises(UserError) as error:
        train("stopped", "max_steps=null", "max_minutes=1")
    assert error.value.code == "other_settings"


@pytest.mark.parametrize("inside", ["", f"/checkpoints/step-{STEPS:08d}"])
def test_starts_from_a_run_or_a_checkpoint(train, inside):
    first = train("first", "eval_every=12")
    settings = train.config.read_text()
    kept = settings[: settings.index("tokenizer:")] + settings[settings.index("data:") : settings.index("model:")]
    train.config.write_text(kept + settings[settings.index("seq_len:") :])
    second = train("second", "eval_every=12", f"init_from={first}{inside}", "seed=1")
    stored = (second / "config.yaml").read_text()
    assert "model: null" in stored and "tokenizer: null" in stored  # what was trained, not the defaults
    end = [line for line in lines(first) if "eval/validation/loss" in line][-1]
    start = next(line for line in lines(second) if "eval/validation/loss" in line)
    assert start["eval/validation/loss"] == pytest.approx(end["eval/validation/loss"], abs=1e-5)


def test_a_resumed_run_does_not_read_the_weights_that_it_started_from(train, tmp_path):
    first = train("first")
    settings = train.config.read_text()
    kept = settings[: settings.index("tokenizer:")] + settings[settings.index("data:") : settings.index("model:")]
    train.config.write_text(kept + settings[settings.index("seq_len:") :])
    start = f"init_from={first}/checkpoints/step-{STEPS:08d}"
    (tmp_path / "second" / "checkpoints" / "step-notes").mkdir(parents=True)  # is no checkpoint
    second = train("second", start)
    (tmp_path / "second" / "checkpoints" / "step-notes").rmdir()
    resumed = stop_at(second, 8, tmp_path / "resumed")
    assert losses(second)[1] < losses(first)[1] - 0.15  # it did start from them
    model = first / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    train("resumed", start)
    assert_same_weights(second, resumed)
    with pytest.raises(UserError) as error:
        train("third", start)
    assert error.value.code == "corrupt_checkpoint"


def test_a_model_without_an_adapter_starts_from_its_run(train):
    """The folder has no config.json: the padded vocabulary is that of its tokenizer."""
    own = "model={_component_: tests.recipes.components.Plain}"
    first = train("first", own, "tokenizer.vocab_size=300", "data.corpus_dir=null")
    settings = train.config.read_text()
    train.config.write_text(settings[: settings.index("tokenizer:")] + settings[settings.index("data:") :])
    second = train("second", own, f"init_from={first}", "data.corpus_dir=null", "optimizer.lr=1e-9")
    assert weights(second)["embedding.weight"].shape == weights(first)["embedding.weight"].shape
    assert torch.allclose(weights(second)["embedding.weight"], weights(first)["embedding.weight"], atol=1e-4)


def command(train, run, corpus, *overrides):
    return [
        *(sys.executable, "-m", "torchrecipes.cli.main", "run", "mlm_pretrain", "--config", str(train.config)),
        *(f"output_dir={run}", f"data.corpus_dir={corpus}", *overrides),
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_later(train, corpus, tmp_path, number, code):
    settings = ["max_steps=400", "checkpoint.save_every=null"]
    whole = train("whole", *settings)
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        command(train, stopped, corpus, *settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    output = process.stdout.read()
    assert process.wait() == code, output
    assert (stopped / "checkpoints").exists(), output
    (folder,) = (stopped / "checkpoints").iterdir()
    assert int(folder.name.removeprefix("step-")) < 400
    assert str(folder) in output
    train("stopped", *settings)
    assert_same_weights(whole, stopped, 400)
    assert losses(stopped) == losses(whole)


KILL = """
import os, signal, sys
from torchrecipes.cli.main import main
from torchrecipes.checkpoint.checkpointer import Checkpointer

at, calls = int(sys.argv[1]), 0
fsync, save = os.fsync, Checkpointer.save

def killing_fsync(descriptor):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return fsync(descriptor)

def killed_save(self, step, *args, **kwargs):
    if step == 8:
        os.fsync = killing_fsync
    return save(self, step, *args, **kwargs)

Checkpointer.save = killed_save
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("at", [1, 3, 5])
def test_kill_during_a_save_loses_nothing_before_it(train, corpus, tmp_path, at):
    whole = train("whole")
    killed = tmp_path / "killed"
    arguments = command(train, killed, corpus)[3:]
    process = subprocess.run([sys.executable, "-c", KILL, str(at), *arguments], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    train("killed")
    assert_same_weights(whole, killed)
    assert losses(killed) == losses(whole)


class HostReads(TorchDispatchMode):
    """Counts what would wait for a GPU: a tensor's value read on the host, or a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
        ):
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_steps_between_logs_never_wait_for_the_device(train):
    def reads(name, steps):
        with HostReads() as mode:
            train(name, f"max_steps={steps}", "log.log_every=100", "checkpoint.save_every=null")
        return mode.count

    assert reads("short", 4) == reads("long", 12)


def test_the_folder_of_another_run_is_refused(train):
    train("run")
    with pytest.raises(UserError) as error:
        train("run", "seed=1")
    assert error.value.code == "other_settings" and "seed: saved 0, current 1" in str(error.value)


def test_settings_that_do_not_change_the_result_may_change(train):
    whole = train("whole")
    train("whole", "log.log_every=2", "checkpoint.keep_last=1", "eval_every=6", "micro_batch_size=4", "max_steps=12")
    assert [path.name for path in (whole / "checkpoints").glob("step-*")]


def test_other_text_is_refused_on_resume(train, text, tmp_path):
    """The tokenizer that is trained on it has the same size, and would renumber the words under the weights."""
    whole = train("whole")
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text().replace("cat", "elk").replace("river", "ocean"))
    with pytest.raises(UserError) as error:
        train(
            "other",
            f"checkpoint.resume={whole}/checkpoints/step-00000008",
            f"data.source.path={other}",
            f"data.corpus_dir={tmp_path / 'other_corpus'}",
        )
    assert error.value.code == "other_tokenizer"


def test_touched_text_resumes(train, text, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(text.read_text())
    settings = [f"data.source.path={own}", "data.corpus_dir=null"]
    train("run", *settings, "max_steps=4")
    os.utime(own, (1, 1))
    run = train("run", *settings, "max_steps=4")
    assert (run / "checkpoints" / "step-00000004").exists()


def keys(error):
    """The config keys at fault."""
    return {problem.key for problem in error.problems or (error,)}


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["micro_batch_size=some"], "micro_batch_size"),
        (["compute.strategy=pipeline"], "compute.strategy"),
        (["compute.strategy=hsdp"], "compute.strategy"),
        (["compute.precision=float8", "compute.compile=true"], "compute.precision"),
        (["compute.precision=float8"], "compute.compile"),
        (["compute.precision=float8", "compute.emulate_float8=true", "seq_len=40"], "seq_len"),
        (["seq_len=128"], "seq_len"),
        (["max_steps=null"], "max_steps"),
        (["max_steps=null", "max_minutes=.inf"], "max_minutes"),
        (["micro_batch_size=0", "log.log_every=-1"], "log.log_every"),
        (["max_grad_norm=-1", "checkpoint.keep_last=0"], "max_grad_norm"),
        (["max_grad_norm=-1", "checkpoint.keep_last=0"], "checkpoint.keep_last"),
        (["data.num_workers=-1"], "data.num_workers"),
        (["model.num_hidden_layers=0"], "model"),
        (["epochs=1"], "epochs"),
        (["data.validation_fraction=0", "eval_every=5"], "eval_every"),
        (["compute.precision=fp8"], "compute.precision"),
        (["mlm_probability=1.5"], "mlm_probability"),
        (["checkpoint.resume=/no/such/checkpoint"], "checkpoint.resume"),
        (["freeze=[nothing.*]"], "freeze"),
        (["seq_len=100000", "model.max_position_embeddings=100000"], "seq_len"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_input_names_its_key(train, overrides, key):
    if "data.validation_fraction=0" in overrides:
        overrides = [*overrides, "data.corpus_dir=null"]
    with pytest.raises(UserError) as error:
        train("run", *overrides)
    assert any(found and (found == key or found.startswith(f"{key}.")) for found in keys(error.value)), error.value


def test_a_copied_recipe_runs(train, corpus, tmp_path):
    from torchrecipes.cli.main import main

    copy = tmp_path / "mine" / "my_recipe.py"
    assert main(["cp", "mlm_pretrain", str(copy)]) == 0
    copy.write_text(copy.read_text().replace("def main(config: Config)", "print('MINE')\n\n\ndef main(config: Config)"))
    run = tmp_path / "run"
    arguments = command(train, run, corpus)
    arguments[arguments.index("mlm_pretrain")] = str(copy)
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert "MINE" in result.stdout
    assert "MINE" in (run / "checkpoints" / f"step-{STEPS:08d}" / "recipe.py").read_text()


def test_fp16_skips_what_overflows_and_a_resumed_run_repeats_it(train, tmp_path):
    settings = ["compute.precision=fp16", "guard.init_scale=1e8", "guard.growth_interval=3"]
    whole = train("whole", *settings)
    logged = [line for line in lines(whole) if "loss_scale" in line]
    assert logged[0]["loss_scale"] == 5e7 and logged[-1]["overflowed_steps"] > 3 and logged[-1]["skipped_steps"] == 0
    scales = [line["loss_scale"] for line in logged]
    assert min(scales) < 2**21 and any(later > now for now, later in pairwise(scales))  # and grown again
    resumed = stop_at(whole, 8, tmp_path / "resumed")
    train("resumed", *settings)
    assert_same_weights(whole, resumed)
    assert [line["loss_scale"] for line in lines(resumed)] == scales
