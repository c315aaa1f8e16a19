"""The recipe for decoders as users run it, on a small text that each test run makes itself."""

import json
import math
import random
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from torchrecipes.cli.main import main
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.data.tokenizers.load import load_tokenizer
from torchrecipes.errors import UserError
from torchrecipes.models import load_hf
from torchrecipes.planning import check_components, duration

RECIPE = find_recipe("causal_pretrain")
STEPS = 12
SETTINGS = f"""
tokenizer: {{_component_: torchrecipes.data.tokenizers.train_bpe, vocab_size: 400}}
data:
  source: {{_component_: torchrecipes.data.sources.files, path: TEXT, sample_by: line}}
  validation_fraction: 0.1
  tokenizer_threads: 0
model: MODEL
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
LLAMA_SIZES = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2"
MODELS = {
    "gpt2": "{_component_: torchrecipes.models.gpt2, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, "
    "max_position_embeddings: 64}",
    "llama": f"{{_component_: torchrecipes.models.llama, {LLAMA_SIZES}, intermediate_size: 64, "
    "max_position_embeddings: 64}",
    "qwen3": f"{{_component_: torchrecipes.models.qwen3, {LLAMA_SIZES}, head_dim: 8, intermediate_size: 64, "
    "max_position_embeddings: 64}",
    "qwen3_moe": f"{{_component_: torchrecipes.models.qwen3_moe, {LLAMA_SIZES}, head_dim: 8, intermediate_size: 64, "
    "moe_intermediate_size: 32, num_experts: 4, num_experts_per_tok: 2, max_position_embeddings: 64}",
}


@pytest.fixture(scope="session")
def animals(tmp_path_factory):
    """Sentences with a grammar, so that context helps: 600 documents."""
    rng = random.Random(0)
    nouns = ["cat", "dog", "fox", "owl", "bee", "ant", "cow", "hen"]
    verbs, places = ["sees", "hears", "finds", "likes"], ["garden", "forest", "river", "house"]
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
def corpus(tmp_path_factory):
    """A corpus folder that all runs share: it is built by the first."""
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture
def train(animals, corpus, tmp_path):
    """train("name", "key=value", ..., model="gpt2") runs the recipe into a folder of that name, which it returns."""

    def run(name, *overrides, model="gpt2"):
        config = tmp_path / f"{model}.yaml"
        config.write_text(SETTINGS.replace("TEXT", str(animals)).replace("MODEL", MODELS[model]))
        recipe = load_recipe(RECIPE)
        settings = [f"output_dir={tmp_path / name}", f"data.corpus_dir={corpus}", *overrides]
        check = partial(check_components, recipe)
        recipe.main(load(recipe.Config, config, settings, recipe=RECIPE, check=check))
        return tmp_path / name

    return run


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return {line["step"]: line["loss"] for line in lines(run) if "loss" in line}


def checkpoint(run, step=STEPS):
    return run / "checkpoints" / f"step-{step:08d}"


def assert_same_weights(run, other, step=STEPS):
    ours, theirs = (load_file(checkpoint(folder, step) / "model.safetensors") for folder in (run, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_timing_the_first_steps_changes_no_number(train, monkeypatch):
    monkeypatch.setattr(duration, "TIMED", 0.05)
    timed = train("timed", "max_steps=null", "max_minutes=0.002", "model.embd_pdrop=0.1")
    (state,) = [json.loads(file.read_text()) for file in timed.glob("checkpoints/*/state.json")][-1:]
    steps = state["max_steps"]
    assert steps == max(losses(timed))
    given = train("given", f"max_steps={steps}", "model.embd_pdrop=0.1")
    assert losses(given) == losses(timed)
    assert_same_weights(timed, given, steps)


@pytest.mark.parametrize("model", MODELS)
def test_learns_and_exports_what_transformers_loads(train, model):
    transformers = pytest.importorskip("transformers")
    settings = [
        "max_steps=120",
        "optimizer.lr=5e-3",
        "eval_every=120",
        "checkpoint.save_every=null",
        "log.log_every=40",
    ]
    run = train("run", *settings, model=model)
    before, after = [line for line in lines(run) if "eval/validation/loss" in line]
    assert (before["step"], after["step"]) == (0, 120)
    assert after["eval/validation/loss"] < after["eval/validation/unigram_loss"] - 1

    folder = checkpoint(run, 120)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours, tokenizer = load_hf(folder).eval(), load_tokenizer(folder, pad_vocab_to_multiple_of=1, causal=True)
    assert abs(before["eval/validation/loss"] - math.log(tokenizer.vocab_size)) < 0.1
    ids = their_tokenizer("the cat sees the", return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode_prompt("the cat sees the")
    with torch.no_grad():
        difference = (theirs(ids).logits - ours.head(ours(ids))).abs().max()
    assert difference < 1e-5
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == tokenizer.eos_id


@pytest.mark.parametrize("model", MODELS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(train, tmp_path, model):
    muon = ["optimizer._component_=torchrecipes.optim.muon", "optimizer.lr=0.02"] if model != "gpt2" else []
    whole = train("whole", *muon, model=model)
    shutil.copytree(whole, tmp_path / "stopped")
    for step in (8, 12):
        shutil.rmtree(checkpoint(tmp_path / "stopped", step))
    resumed = train("stopped", *muon, model=model)
    assert_same_weights(whole, resumed)
    assert losses(whole) == losses(resumed)


@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_micro_batches_do_not_change_the_result(train, model):
    one, four = losses(train("one", model=model)), losses(train("four", "micro_batch_size=2", model=model))
    assert max(abs(one[step] - four[step]) for step in one) < 1e-4


def test_tokens_see_other_documents_only_when_told_to(train):
    apart = losses(train("apart", model="llama"))
    across = losses(train("across", "cross_document_attention=true", model="llama"))
    assert abs(apart[1] - across[1]) < 0.05 and apart[STEPS] != across[STEPS]


def test_samples_are_told_and_kept(train, capsys):
    run = train("run", "sample_every=6", "sample_prompts=['the cat', '']", "sample_tokens=5", model="llama")
    kept = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in kept] == [(6, "the cat"), (6, ""), (12, "the cat"), (12, "")]
    assert f"step 12: sample: the cat{kept[2]['text']}" in capsys.readouterr().out


def test_sampling_changes_nothing(train):
    plain, sampled = train("plain"), train("sampled", "sample_every=3", "sample_tokens=5")
    assert_same_weights(plain, sampled)


def test_a_mixture_of_experts_tells_its_load(train):
    run = train("run", "max_steps=3", model="qwen3_moe")
    last = [line for line in lines(run) if "loss" in line][-1]
    assert last["moe/max_violation"] == max(last["moe/0/max_violation"], last["moe/1/max_violation"])
    assert len(last["moe/1/load"]) == 4 and abs(sum(last["moe/1/load"]) - 1) < 1e-6
    assert 0 < last["moe/entropy"] <= math.log(4) + 1e-6 and last["moe/unused"] == 0


def test_the_budget_is_told_in_steps_and_tokens(train, capsys):
    train("run", "max_steps=null", "total_tokens=1_000")
    assert "duration: 4 steps of 256 tokens, " in capsys.readouterr().out


def keys(error):
    """The config keys at fault."""
    return {problem.key for problem in error.problems or (error,)}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["seq_len=128"], "seq_len"),
        (["sample_every=0"], "sample_every"),
        (["sample_every=3", "sample_prompts=[]"], "sample_prompts"),
        (["sample_every=3", f"sample_prompts=['','{'the cat ' * 64}']"], "sample_prompts"),
        (["max_steps=-3"], "max_steps"),
        (["z_loss=-1"], "z_loss"),
        (["label_smoothing=1.5"], "label_smoothing"),
    ],
)
def test_wrong_settings_name_their_key(train, settings, key):
    with pytest.raises(UserError) as error:
        train("run", *settings)
    assert key in keys(error.value)


SMALL = "hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["lr_scheduler.warmup_steps=50"], "lr_scheduler.warmup_steps"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["model.num_attention_heads=3"], "model"),
        ([f"model={{_component_: torchrecipes.models.bert, {SMALL}}}"], "model"),
        ([f"model={MODELS['qwen3_moe']}", "data.packing=none"], "data.packing"),
        ([f"model={MODELS['qwen3_moe']}", "model.num_experts_per_tok=9"], "model"),
        (["optimizer={_component_: torchrecipes.optim.muon, lr: 0.02, scale: big}"], "optimizer.scale"),
        (["guard.max_skips=0"], "guard.max_skips"),
        (["lr_scheduler.warmup_ratio=1.5", "max_steps=null", "epochs=1"], "lr_scheduler.warmup_ratio"),
        (["lr_scheduler.warmup_steps=500", "max_steps=null", "total_tokens=10_000"], "lr_scheduler.warmup_steps"),
        (["data.validation_fraction=2"], "data.validation_fraction"),
        (["optimizer._component_=torchrecipes.optim.muno"], "optimizer._component_"),
        (["checkpoint.resume=RUN"], "checkpoint.resume"),
    ],
)
def test_mistakes_are_found_before_a_corpus_is_built(train, tmp_path, settings, key):
    if any("RUN" in setting for setting in settings):
        settings = [setting.replace("RUN", str(train("old"))) for setting in settings]
    with pytest.raises(UserError) as error:
        train("run", f"data.corpus_dir={tmp_path / 'corpus'}", *settings)
    assert any(found == key or found.startswith(f"{key}.") for found in keys(error.value)), error.value
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adamw_4bit", "adamw_cpu_offload", "muon"])
def test_every_optimizer_can_be_checked_without_its_device(name, capsys):
    words = ["causal_pretrain", "--config", "gpt2/quickstart", f"optimizer={{_component_: torchrecipes.optim.{name}}}"]
    assert main(["validate", *words]) == 0, capsys.readouterr().err


def test_an_optimizer_that_looks_at_values_is_used_though_it_cannot_be_tried(train):
    run = train("run", "optimizer={_component_: tests.recipes.components.of_large_matrices}", "max_steps=2")
    assert checkpoint(run, 2).exists()


def test_a_checkpoint_beyond_the_last_step_is_refused(train):
    old = train("old")
    with pytest.raises(UserError) as error:
        train("new", f"checkpoint.resume={checkpoint(old)}", "max_steps=5")
    assert error.value.code == "beyond_last_step"


def test_a_decoder_is_no_model_for_masked_tokens(capsys):
    gpt2 = ["model._component_=torchrecipes.models.gpt2", "model.size=tiny"]
    assert main(["validate", "mlm_pretrain", "--config", "neobert/quickstart", *gpt2]) == 2
    assert "gpt2 is a decoder" in capsys.readouterr().err


def test_a_free_mixture_is_loaded_by_this_library_as_the_last_line_says(train, capsys):
    sizes = MODELS["qwen3_moe"].replace("qwen3_moe", "moe")
    run = train("run", f"model={sizes}")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"load it: torchrecipes.models.load_hf({str(checkpoint(run))!r})"
    assert load_hf(checkpoint(run)).config.num_experts == 4


def test_a_copy_of_the_recipe_runs(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["cp", "causal_pretrain", "mine.py"]) == 0
    assert main(["validate", "mine.py", "--config", "gpt2/quickstart"]) == 0
