"""A recipe that is copied and modified: every verb follows the change, and a killed run resumes to the last bit.

The package is installed from its wheel and used outside of the checkout.
"""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file

SETTINGS = """
output_dir: run
tokenizer: {_component_: torchrecipes.data.tokenizers.train_wordpiece, vocab_size: 300}
data:
  source: {_component_: torchrecipes.data.sources.files, path: text.jsonl}
  corpus_dir: corpus
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
micro_batch_size: auto
max_steps: 12
eval_every: 6
compute: {precision: fp32}
checkpoint: {save_every: 2, keep_last: 10}
log: {log_every: 1}
"""


@dataclass
class Edit:
    """A change that a user makes: replacements in the copied recipe, and settings."""

    replacements: list[tuple[str, str]] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    logged: str | None = None  # a metric that the change adds


OWN_MODULE = '''
class Mine(nn.Module):
    """A network of one's own: no adapter, no blocks, its own names."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 16)
        self.mix = nn.GRU(16, 16, batch_first=True)
        self.out = nn.Linear(16, vocab_size)

    def forward(self, input_ids):
        return self.out(self.mix(self.embed(input_ids))[0])


def build_model('''

EDITS = {
    "ema": Edit(
        settings=["ema._component_=torchrecipes.training.ema.EMA", "ema.decay=0.9"], logged="eval/validation_ema/loss"
    ),
    "mask_rate": Edit(
        [
            (
                "def build_collator(",
                "def rising(step: int) -> float:\n    return 0.1 + 0.02 * min(step, 10)\n\n\ndef build_collator(",
            ),
            (
                '    masking = {"mlm_probability": config.mlm_probability, "mask_all": config.mask_all}\n    return',
                '    masking = {"mlm_probability": rising, "mask_all": config.mask_all}\n    return',
            ),
        ],
        ["data.num_workers=1"],
    ),
    "frozen_embeddings": Edit(
        [
            (
                "    check_causal(model, False)\n",
                "    check_causal(model, False)\n    model.embedding.requires_grad_(False)\n",
            )
        ]
    ),
    "second_loss": Edit(
        [
            (
                '    return loss + class_loss, {"loss": loss.detach()} |',
                "    penalty = 1e-3 * batch.num_targets * hidden.float().square().mean()\n"
                '    return loss + penalty, {"loss": loss.detach(), "penalty": penalty.detach()} |',
            )
        ],
        logged="penalty",
    ),
    "own_module": Edit(
        [
            ("\ndef build_model(", OWN_MODULE),
            (
                "        model = build(config.model, vocab_size=tokenizer.vocab_size, seed=config.seed)",
                "        model = Mine(tokenizer.vocab_size)",
            ),
            ("    hidden = model(batch.input_ids, **batch.documents)\n", ""),
            (
                "    loss, token_loss = masked_lm_loss("
                "hidden, model.head, batch.masked_positions, batch.masked_labels, **options)\n",
                "    logits = model(batch.input_ids).flatten(0, 1)[batch.masked_positions]\n"
                '    token_loss = nn.functional.cross_entropy(logits, batch.masked_labels, reduction="none")\n'
                "    loss = token_loss.sum()\n",
            ),
            (
                "    class_loss, sums = document_class_loss(hidden, model, batch)\n",
                "",
            ),
            ('return loss + class_loss, {"loss": loss.detach()} | sums |', 'return loss, {"loss": loss.detach()} |'),
        ],
        ["eval_every=null"],
    ),
    "transformers_model": Edit(
        settings=[
            "model={_component_: torchrecipes.models.from_transformers, model_type: bert, hidden_size: 32, "
            "num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, max_position_embeddings: 64}",
        ]
    ),
    "torch_optimizer": Edit(
        [
            ("from torch import Tensor, nn", "import torch\nfrom torch import Tensor, nn"),
            (
                "    lr_scheduler = build(config.lr_scheduler, optimizer=optimizer, max_steps=max_steps)",
                "    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)",
            ),
        ],
        ["optimizer=torch.optim.AdamW", "optimizer.lr=1e-3"],
    ),
    "own_metric": Edit(
        [
            (
                '    return loss + class_loss, {"loss": loss.detach()} |',
                "    norm = hidden.detach().float().norm(dim=-1).mean() * batch.num_targets\n"
                '    return loss + class_loss, {"loss": loss.detach(), "hidden_norm": norm} |',
            )
        ],
        logged="hidden_norm",
    ),
}

# Imports once, then forks for every verb and every start of the run: starting Python and torch costs seconds. The dry
# runs of preflight are forks, too; tests/cli/test_preflight.py starts them as the verb does.
DRIVER = """
import os, signal, sys, time
from pathlib import Path
import torch._dynamo, torch.distributed.checkpoint
import torchrecipes.evaluation, torchrecipes.losses, torchrecipes.training
from torchrecipes.cli.main import main
from torchrecipes.planning import dry_run

assert "site" in torchrecipes.__file__, torchrecipes.__file__
settings = sys.argv[1:]
if "from_transformers" in str(settings):
    import transformers.models.bert.modeling_bert


def start(words, log):
    child = os.fork()
    if child:
        return child
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os._exit(main(words))


def finish(words, log):
    code = os.waitstatus_to_exitcode(os.waitpid(start(words, log), 0)[1])
    assert code == 0, (words, code, Path(log).read_text())


def check(*words):
    finish([*words, *settings], f"{words[0]}.log")


def run_dry(command):
    main_module = command.index("torchrecipes.cli.main")
    finish(command[main_module + 1 :], "dry_run.log")


dry_run.run = run_dry


config = ["my_recipe.py", "--config", "my.yaml"]
check("validate", *config)
check("estimate", *config)
check("preflight", *config)
check("run", *config, "output_dir=whole")
child = start(["run", *config, *settings], "killed.log")
while not Path("run/checkpoints/step-00000004/manifest.json").exists():
    time.sleep(0.002)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), Path("killed.log").read_text()
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
assert not Path("run/checkpoints/step-00000012").exists()
check("run", *config)
"""


@pytest.fixture(scope="module")
def text():
    draw = random.Random(0)
    words = "the cat dog fox owl sees hears finds likes a river house garden and goes home".split()
    return "".join(
        json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(3, 40)))}) + "\n" for _ in range(300)
    )


@pytest.mark.parametrize("name", EDITS)
def test_every_verb_follows_an_edit(installed, tmp_path, text, name):
    if name == "transformers_model":
        pytest.importorskip("transformers")
    edit = EDITS[name]
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    tune_style = [sys.executable, "-m", "torchrecipes.cli.main"]
    subprocess.run([*tune_style, "cp", "mlm_pretrain", "my_recipe.py"], check=True, **options)
    recipe = (tmp_path / "my_recipe.py").read_text()
    for old, new in edit.replacements:
        assert recipe.count(old) >= 1, old
        recipe = recipe.replace(old, new)
    (tmp_path / "my_recipe.py").write_text(recipe)
    (tmp_path / "text.jsonl").write_text(text)
    (tmp_path / "my.yaml").write_text(SETTINGS)

    done = subprocess.run([sys.executable, "-c", DRIVER, *edit.settings], **options)
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs

    last = "checkpoints/step-00000012"
    assert "resuming from run/checkpoints/step-" in (tmp_path / "run.log").read_text()
    for file in sorted((tmp_path / "whole" / last).rglob("*.safetensors")):
        again = tmp_path / "run" / last / file.relative_to(tmp_path / "whole" / last)
        expected, found = load_file(file), load_file(again)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), file
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    if edit.logged:
        assert any(edit.logged in line for line in lines)
