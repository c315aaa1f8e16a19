"""The recipe that specializes a model, on a small text that each test run makes itself."""

import json
import math
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from torchrecipes.cli.main import main
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.errors import UserError

RECIPE = find_recipe("domain_adapt")
SIZES = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64"
BASES = {
    "causal": ("causal_pretrain", "train_bpe", f"{{_component_: torchrecipes.models.gpt2, {SIZES}}}"),
    "masked": (
        "mlm_pretrain",
        "train_wordpiece",
        f"{{_component_: torchrecipes.models.bert, intermediate_size: 64, {SIZES}}}",
    ),
}
COMMON = """
seq_len: 32
global_batch_size: 128
micro_batch_size: 128
compute: {precision: fp32}
log: {log_every: 1}
"""
SETTINGS = """
init_from: BASE
data:
  source:
    _component_: torchrecipes.data.sources.mixture
    sources:
      domain: {_component_: torchrecipes.data.sources.files, path: FOLDER/domain.jsonl}
      general: {_component_: torchrecipes.data.sources.files, path: FOLDER/general.jsonl}
    replay_ratio: 0.2
  corpus_dir: FOLDER/corpus-KIND
  validation_fraction: 0.1
  tokenizer_threads: 0
max_steps: 24
eval_every: 4
eval_sequences: 16
optimizer: {_component_: torchrecipes.optim.adamw, lr: 5e-3}
checkpoint: {save_every: 8, keep_last: 20}
forgetting: {set: general, warn: 1%, raise_replay: null, stop: null}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two languages with the same words: a general one, and one that says them backwards."""
    folder, rng = tmp_path_factory.mktemp("adapt"), random.Random(0)
    nouns, verbs = ["cat", "dog", "fox", "owl", "bee", "ant", "cow", "hen"], ["sees", "hears", "finds", "likes"]
    for name in ("general", "domain"):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(600):
                words = " ".join(
                    f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} ." for _ in range(5)
                )
                text = words if name == "general" else " ".join(reversed(words.split()))
                file.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.fixture(scope="session")
def base(folder):
    """base("causal"): a model that has learned the general language."""
    made = {}

    def train(kind):
        if kind not in made:
            recipe, tokenizer, model = BASES[kind]
            config = folder / f"base-{kind}.yaml"
            common = COMMON.replace("128", "32")
            config.write_text(
                f"{common}\nmax_steps: 120\neval_every: null\noutput_dir: {folder}/base-{kind}\nmodel: {model}\n"
                f"tokenizer: {{_component_: torchrecipes.data.tokenizers.{tokenizer}, vocab_size: 300}}\n"
                "optimizer: {_component_: torchrecipes.optim.adamw, lr: 1e-2}\n"
                f"data: {{source: {{_component_: torchrecipes.data.sources.files, path: {folder}/general.jsonl}}, "
                "tokenizer_threads: 0}\n"
            )
            assert main(["run", recipe, "--config", str(config)]) == 0
            made[kind] = folder / f"base-{kind}"
        return made[kind]

    return train


@pytest.fixture
def adapt(folder, base, tmp_path):
    """adapt("name", "key=value", ..., kind="causal") runs the recipe into a folder of that name, which it returns."""

    def run(name, *overrides, kind="causal", recipe=RECIPE, code=0):
        config = tmp_path / f"{kind}.yaml"
        settings = SETTINGS.replace("BASE", str(base(kind))).replace("FOLDER", str(folder)).replace("KIND", kind)
        config.write_text(COMMON + settings)
        module = load_recipe(recipe)
        try:
            module.main(load(module.Config, config, [f"output_dir={tmp_path / name}", *overrides], recipe=recipe))
            assert code == 0
        except SystemExit as end:
            assert end.code == code
        return tmp_path / name

    return run


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run, key):
    return {line["step"]: line[f"eval/{key}"] for line in lines(run) if f"eval/{key}" in line}


def train_lines(run):
    ignored = ("tokens_per_second", "data_wait_fraction", "peak_memory_gib", "eta_s", "mfu")
    return [{k: v for k, v in line.items() if k not in ignored} for line in lines(run) if "loss" in line]


def assert_same(run, other, step):
    ours, theirs = (
        load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for folder in (run, other)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", BASES)
def test_replay_keeps_what_is_lost_without(adapt, kind):
    with_replay = adapt("with", "data.source.replay_ratio=0.4", "max_steps=16", kind=kind)
    without = adapt("without", "data.source.replay_ratio=0", "max_steps=16", kind=kind)
    for run in (with_replay, without):
        loss, change = evaluations(run, "domain/loss"), evaluations(run, "domain/change_percent")
        assert list(loss) == [0, 4, 8, 12, 16]
        assert change[0] == 0 and change[16] == pytest.approx(100 * (loss[16] / loss[0] - 1))
        assert evaluations(run, "domain/change_nats")[16] == pytest.approx(loss[16] - loss[0])
        assert evaluations(run, "domain/perplexity")[16] == pytest.approx(math.exp(loss[16]))
        assert change[16] < -20
    kept, lost = (evaluations(run, "general/change_percent")[16] for run in (with_replay, without))
    assert kept < lost - 5
    assert {"loss/domain", "loss/general"} <= lines(with_replay)[1].keys()


RISE = ("optimizer.lr=3e-2", "lr_scheduler.warmup_steps=0", "optimizer.weight_decay=0")  # destroys the general model


def test_a_planted_rise_raises_the_replay_by_the_stated_rule(adapt, capsys):
    run = adapt("run", *RISE, "forgetting.raise_replay=5%", "max_steps=20")
    shares = {line["step"]: line["replay_share"] for line in train_lines(run)}
    assert shares[4] == pytest.approx(0.2)
    steps = [step for step, value in evaluations(run, "general/change_percent").items() if step and value > 5]
    assert steps
    expected = 0.2
    for step in range(1, 21):
        assert shares[step] == pytest.approx(expected)
        expected = min(0.5, expected * 1.5) if step in steps else expected
    printed = capsys.readouterr().out
    assert "drifting, above raise_replay (5%)" in printed and "from the next block of rows" in printed


def test_a_planted_rise_stops_the_run_which_names_its_best_checkpoint(adapt, capsys):
    limits = "checkpoint.keep_best={metric: eval/domain/loss, at_most: {eval/general/change_percent: 400}}"
    settings = (*RISE, "optimizer.lr=1e-2", "eval_every=2", limits)
    whole = adapt("whole", *settings)
    changes = evaluations(whole, "general/change_percent")
    limit = sorted(changes.values())[len(changes) // 2]
    first = next(step for step, value in changes.items() if value > limit)

    limits = limits.replace("400", str(limit))
    stopped = (*settings, limits, f"forgetting.stop={limit}%", "forgetting.warn=null")
    run = adapt("run", *stopped, code=4)
    assert max(evaluations(run, "general/loss")) == first
    losses = evaluations(run, "domain/loss")
    within = [step for step in losses if step > 0 and changes[step] <= limit]
    best = min(within, key=losses.get)
    assert (run / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    assert (run / "checkpoints" / f"step-{first:08d}").is_dir()
    printed = capsys.readouterr().out
    assert "forgetting, above stop" in printed and f"step-{best:08d}" in printed

    adapt("run", *stopped, code=4)  # asked again, it stays stopped
    assert max(evaluations(run, "general/loss")) == first
    adapt("run", *settings, limits)  # unless the band is lifted
    assert_same(run, whole, 24)


def test_a_killed_run_resumes_to_the_bit_with_the_replay_it_had_raised(adapt, tmp_path):
    """Step 4 is saved before the evaluation that raises the replay, 8 after it, 11 within a block of the new one."""
    settings = (*RISE, "forgetting.raise_replay=5%", "checkpoint.save_every=1", "max_steps=12")
    whole = adapt("whole", *settings)
    assert train_lines(whole)[4]["replay_share"] > 0.25
    for step, lost_log in ((4, False), (4, True), (8, True), (11, False)):
        run = tmp_path / f"run-{step}-{lost_log}"
        shutil.copytree(whole, run, symlinks=True)
        for path in (run / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        if lost_log:  # killed between the save and the evaluation
            kept = [line for line in lines(run) if line["step"] < step or "loss" in line]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        adapt(run.name, *settings)
        assert_same(run, whole, 12)
        assert train_lines(run) == train_lines(whole)
        assert evaluations(run, "general/change_nats") == evaluations(whole, "general/change_nats")


def test_micro_batches_and_workers_change_nothing_but_rounding(adapt):
    settings = (*RISE, "optimizer.lr=1e-2", "forgetting.raise_replay=5%", "max_steps=12")
    whole = adapt("whole", *settings)
    parts = adapt("parts", *settings, "micro_batch_size=32", "data.num_workers=1")
    for ours, theirs in zip(train_lines(parts), train_lines(whole), strict=True):
        assert ours["replay_share"] == theirs["replay_share"] and ours["loss"] == pytest.approx(
            theirs["loss"], rel=2e-3
        )
    assert train_lines(parts)[-1]["replay_share"] > 0.2


def test_two_ranks_agree(adapt, tmp_path):
    settings = (*RISE, "optimizer.lr=1e-2", "forgetting.raise_replay=5%", "max_steps=9")
    whole = adapt("whole", *settings)
    script = tmp_path / "start.py"
    script.write_text("from torchrecipes.cli.main import _as_process\n_as_process()\n")
    output = f"output_dir={tmp_path / 'two'}"
    ranks.run(script, 2, "run", str(RECIPE), "--config", tmp_path / "causal.yaml", output, *settings)
    for ours, theirs in zip(train_lines(tmp_path / "two"), train_lines(whole), strict=True):
        assert ours["replay_share"] == theirs["replay_share"] and ours["loss"] == pytest.approx(
            theirs["loss"], rel=2e-3
        )
    assert train_lines(whole)[-1]["replay_share"] > 0.2


def test_a_second_adaptation_is_judged_against_the_model_before_the_first(adapt):
    first = adapt("first", "data.source.replay_ratio=0", "max_steps=8")
    rise = evaluations(first, "general/change_percent")[8]
    assert rise > 5
    start = f"init_from={first}"
    second = adapt("second", start, "max_steps=4", "forgetting.baseline=base")
    assert evaluations(second, "general/change_percent")[0] == pytest.approx(rise)
    assert evaluations(adapt("third", start, "max_steps=4"), "general/change_percent")[0] == 0


def test_a_copied_recipe_with_another_loss(adapt, tmp_path):
    copy = tmp_path / "mine.py"
    text = RECIPE.read_text()
    changed = text.replace("return loss + router_loss(model)", "return 0.5 * loss + router_loss(model)")
    assert changed != text
    copy.write_text(changed)
    run = adapt("run", "max_steps=4", recipe=copy)
    other = adapt("other", "max_steps=4")
    assert train_lines(run)[0]["grad_norm"] == pytest.approx(train_lines(other)[0]["grad_norm"] / 2, rel=1e-3)


def test_longer_rows_dropout_and_frozen_parameters(adapt, base):
    start = base("causal") / "checkpoints" / "step-00000120" / "model.safetensors"
    settings = ("longer_context._component_=torchrecipes.models.extend_context", "seq_len=128", "dropout=0.1")
    run = adapt("run", *settings, "freeze=[embed*]", "max_steps=4")
    config = json.loads((run / "checkpoints" / "step-00000004" / "config.json").read_text())
    assert config["n_positions"] == 128
    assert {"eval/general/loss/0-63"} <= lines(run)[0].keys() & lines(run)[-1].keys()  # before and after
    before, after = load_file(start), load_file(run / "checkpoints" / "step-00000004" / "model.safetensors")
    assert torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])
    assert not torch.equal(before["transformer.h.0.mlp.c_fc.weight"], after["transformer.h.0.mlp.c_fc.weight"])


@pytest.mark.parametrize(
    ("settings", "key", "code"),
    [
        (["forgetting.set=generel"], "forgetting.set", "unknown_set"),
        (["forgetting.raise_replay=5%", "data.source.replay_ratio=0"], "forgetting.raise_replay", "no_replay"),
        (["checkpoint.keep_best.metric=eval/domian/loss"], "checkpoint.keep_best.metric", "unknown_metric"),
        (["forgetting.warn=3 percent"], "forgetting.warn", "bad_band"),
    ],
)
def test_mistakes_are_reported_before_the_first_step(adapt, settings, key, code):
    with pytest.raises(UserError) as error:
        adapt("run", *settings)
    problem = error.value.problems[0] if error.value.problems else error.value
    assert (problem.key, problem.code) == (key, code)
