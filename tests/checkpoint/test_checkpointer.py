import json
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler

from torchrecipes import manifest
from torchrecipes.checkpoint import CheckpointConfig, Checkpointer, verify
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.models import bert, load_hf, neobert
from torchrecipes.optim import adamw


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([Document("a small text for a small tokenizer, " * 3, "here")], vocab_size=60)


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text("# the recipe\n")
    return file


class Position:
    """State that is a number."""

    rows = 0

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]


def small(kind=neobert, seed=0, hidden_size=16, num_hidden_layers=2, num_attention_heads=2):
    return kind(
        vocab_size=64,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=32,
        seed=seed,
    )


class Training:
    """A small model that trains into a folder. Keywords that are not of `Checkpointer` are its options."""

    def __init__(self, folder, tokenizer=None, model=None, state=None, recipe=None, lr=1e-2, resume="auto", **options):
        self.model = small() if model is None else model
        self.optimizer = adamw(self.model, lr=lr)
        self.checkpointer = Checkpointer(
            folder / "run",
            CheckpointConfig(resume=resume, **({"async_save": False} | options)),
            model=self.model,
            optimizer=self.optimizer,
            tokenizer=tokenizer,
            state=state,
            config_yaml="seed: 1\n",
            recipe=recipe,
        )
        self.folder, self.save, self.resume = (
            self.checkpointer.folder,
            self.checkpointer.save,
            self.checkpointer.resume,
        )

    def train(self, steps):
        for step in range(steps):
            ids = torch.arange(step, step + 24).view(2, 12) % 60
            loss = self.model.head(torch.nn.functional.dropout(self.model(ids), 0.1)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def values(self):
        """Everything that training changes."""
        for name, tensor in self.model.state_dict().items():
            yield name, tensor
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{kind}.{name}", value


def assert_equal(left, right):
    left, right = dict(left.values()), dict(right.values())
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def refused(code, function, *args):
    """The text of the UserError that a call raises, which has this code."""
    with pytest.raises(UserError) as error:
        function(*args)
    assert error.value.code == code
    return str(error.value)


def names(training):
    return sorted(path.name for path in training.folder.iterdir())


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.fixture
def saved(tmp_path, tokenizer, recipe):
    """(training, path) of one checkpoint of a model that trained three steps."""
    training = Training(tmp_path, tokenizer, recipe=recipe)
    training.train(3)
    return training, training.save(3)


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("kind", [neobert, bert])
def test_resuming_is_exact_to_the_last_bit(tmp_path, tokenizer, kind, async_save):
    torch.manual_seed(5)
    position = Position()
    position.rows = 48
    first = Training(tmp_path, tokenizer, small(kind), {"loader": position}, async_save=async_save)
    first.train(3)
    with first.checkpointer:
        path = first.save(3)
        drawn = random.random(), np.random.rand()
        first.train(3)

    torch.manual_seed(99)
    other = Position()
    second = Training(tmp_path, tokenizer, small(kind, seed=9), {"loader": other})
    assert (second.resume(), other.rows, second.checkpointer.saved) == (3, 48, path)
    assert (random.random(), np.random.rand()) == drawn
    second.train(3)
    assert_equal(first, second)


def test_the_learning_rate_stays_that_of_the_run(saved, tmp_path, tokenizer):
    training = Training(tmp_path, tokenizer, lr=0.5)
    training.optimizer.param_groups[0]["weight_decay"] = 0.25
    assert training.resume() == 3
    assert [group["lr"] for group in training.optimizer.param_groups] == [0.5, 0.5]
    assert training.optimizer.param_groups[0]["weight_decay"] == 0.25
    assert len(training.optimizer.state) == len(list(training.model.parameters()))


SCHEDULERS = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.5),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 9),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[3],
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_torch_schedulers_continue(tmp_path, kind):
    def training(steps, resume):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = SCHEDULERS[kind](optimizer)
        options = CheckpointConfig(async_save=False)
        state = {"lr_scheduler": scheduler}
        checkpointer = Checkpointer(tmp_path, options, model=model, optimizer=optimizer, state=state)
        assert checkpointer.resume() == resume
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return checkpointer, rates

    _, expected = training(8, 0)
    checkpointer, first = training(4, 0)
    checkpointer.save(4)
    _, rest = training(4, 4)
    assert first + rest == expected


def test_a_checkpoint_is_a_hugging_face_folder_with_everything_to_repeat_the_run(saved):
    transformers = pytest.importorskip("transformers")
    _, path = saved
    transformers.AutoModelForMaskedLM.from_pretrained(path)
    assert len(transformers.AutoTokenizer.from_pretrained(path)) == 64
    load_hf(path)
    assert (path / "config.yaml").read_text() == "seed: 1\n" and (path / "recipe.py").read_text() == "# the recipe\n"
    versions = json.loads((path / "manifest.json").read_text())["versions"]
    assert versions["torch"] == torch.__version__
    # Safetensors begin with the length of a JSON header; nothing in the folder is a pickle or an archive of one.
    for file in files(path):
        assert file.suffix in {".safetensors", ".json", ".yaml", ".py"}
        assert not file.read_bytes().startswith((b"\x80", b"PK"))


def test_any_flipped_byte_is_found_and_named(saved):
    _, path = saved
    rng = random.Random(0)
    for file in files(path):
        valid = file.read_bytes()
        for position in {0, len(valid) - 1, *(rng.randrange(len(valid)) for _ in range(12))}:
            corrupt = bytearray(valid)
            corrupt[position] ^= 1 << rng.randrange(8)
            file.write_bytes(corrupt)
            problems = verify(path)
            assert problems and file.name in problems[0], (file.name, position)
        file.write_bytes(valid)
    assert verify(path) == []


def test_a_changed_byte_between_the_values_of_the_manifest_is_found(saved):
    file = saved[1] / "manifest.json"
    valid = file.read_bytes()
    spaces = [position for position, byte in enumerate(valid) if byte in b" \n"]
    for position in spaces[::5]:
        file.write_bytes(valid[:position] + b"\t" + valid[position + 1 :])
        json.loads(file.read_bytes())
        (problem,) = verify(saved[1])
        assert "manifest.json" in problem
    file.write_bytes(valid + b"\n")
    assert len(verify(saved[1])) == 1


def test_a_bad_sector_is_a_problem_of_its_file(saved, monkeypatch):
    def checksum(file):
        if file.name == "model.safetensors":
            raise OSError(5, "Input/output error")
        return original(file)

    original = manifest._checksum
    monkeypatch.setattr(manifest, "_checksum", checksum)
    (problem,) = verify(saved[1])
    assert "model.safetensors" in problem and "Input/output error" in problem


def test_a_renamed_checkpoint_is_not_taken_for_another_step(saved, tmp_path, tokenizer, capsys):
    _, path = saved
    renamed = shutil.copytree(path, path.with_name("step-00000007"))
    assert Training(tmp_path, tokenizer).resume() == 3
    assert str(renamed) in capsys.readouterr().out
    assert verify(shutil.copytree(path, path.with_name("best"))) == []


def test_truncated_missing_and_empty_files_are_named(saved, tmp_path):
    _, path = saved
    for file in files(path):
        for damage in ("truncate", "empty", "remove"):
            copy = tmp_path / "copy"
            shutil.copytree(path, copy)
            target = copy / file.relative_to(path)
            if damage == "remove":
                target.unlink()
            else:
                target.write_bytes(target.read_bytes()[:-1] if damage == "truncate" else b"")
            assert file.name in verify(copy)[0]
            shutil.rmtree(copy)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "optimizer.pt", "scheduler.PKL", "deep/inside/rng.pickle", "optimizer/.metadata"]
)
def test_a_planted_pickle_is_refused_by_name(saved, tmp_path, tokenizer, name):
    _, path = saved
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(b"\x80\x04.")
    assert name in refused("corrupt_checkpoint", Training(tmp_path, tokenizer, resume=str(path)).resume)


def test_a_corrupt_checkpoint_is_skipped_and_reported(saved, tokenizer, tmp_path, capsys):
    training, first = saved
    second = training.save(6)
    with (second / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    again = Training(tmp_path, tokenizer, keep_last=1)
    assert again.resume() == 3
    out = capsys.readouterr().out
    assert str(second) in out and "model.safetensors has 100 bytes" in out
    # The run comes to that step again: the corrupt one is replaced.
    assert again.save(6) == second and verify(second) == []
    assert not first.exists()
    (second / "manifest.json").unlink()
    refused("corrupt_checkpoint", Training(tmp_path, tokenizer).resume)


def test_which_checkpoint_is_resumed(saved, tmp_path, tokenizer):
    _, path = saved
    assert Training(tmp_path, tokenizer, resume="never").resume() == 0
    assert Training(tmp_path / "new", tokenizer).resume() == 0
    other = Training(tmp_path / "new", tokenizer, resume=str(path))
    assert other.resume() == 3 and other.checkpointer.saved == path
    refused("corrupt_checkpoint", Training(tmp_path, tokenizer, resume=str(tmp_path / "none")).resume)


def test_the_newest_are_kept(tmp_path, tokenizer):
    training = Training(tmp_path, tokenizer, keep_last=2)
    for step in (8, 9, 10, 11):
        training.save(step)
    assert names(training) == ["step-00000010", "step-00000011"]


def test_the_newest_is_the_largest_number(saved, tmp_path, tokenizer):
    training, _ = saved
    for step in (99_999_999, 100_000_000):
        path = training.save(step)
    assert path.name == "step-100000000" and Training(tmp_path, tokenizer).resume() == 100_000_000


def test_saving_a_step_twice_leaves_the_first(saved, capsys):
    training, path = saved
    before = (path / "manifest.json").read_bytes()
    training.train(1)
    assert training.save(3) == path
    assert str(path) in capsys.readouterr().out
    assert (path / "manifest.json").read_bytes() == before


def test_a_checkpoint_that_another_run_left_is_not_taken_for_this_one(saved, tmp_path, tokenizer):
    refused("checkpoint_exists", Training(tmp_path, tokenizer).save, 3)


def test_going_back_in_the_same_folder_is_refused(saved, tmp_path, tokenizer):
    training, first = saved
    second = training.save(6)
    text = refused("newer_checkpoints", Training(tmp_path, tokenizer, resume=str(first)).resume)
    assert second.name in text and "output_dir" in text
    assert Training(tmp_path / "other", tokenizer, resume=str(first)).resume() == 3
    assert Training(tmp_path, tokenizer, resume=str(second)).resume() == 6


def test_a_corrupt_checkpoint_is_replaced_when_its_step_comes_again(saved, tmp_path, tokenizer, capsys):
    path = saved[0].save(6)
    (path / "model.safetensors").write_bytes(b"")
    training = Training(tmp_path, tokenizer)
    assert training.resume() == 3
    assert training.save(6) == path and verify(path) == []
    assert "model.safetensors has 0 bytes" in capsys.readouterr().out
    assert Training(tmp_path, tokenizer).resume() == 6


def test_corrupt_checkpoints_do_not_push_out_valid_ones(saved, tmp_path, tokenizer):
    for step in (6, 9):
        (saved[0].save(step) / "model.safetensors").write_bytes(b"")
    training = Training(tmp_path, tokenizer, keep_last=2)
    assert training.resume() == 3
    for step in (5, 7):  # it stops early, and again: the corrupt ones are newer, then in between
        training.save(step)
        assert Training(tmp_path, tokenizer).resume() == step
    assert [name[-1] for name in names(training)] == ["5", "7", "9"]


def test_a_checkpoint_with_a_missing_file_does_not_count_among_those_that_are_kept(tmp_path, tokenizer):
    training = Training(tmp_path, tokenizer, keep_last=2)
    for step in (1, 2):
        path = training.save(step)
    (path / "model.safetensors").unlink()
    training.save(3)
    assert names(training) == ["step-00000001", "step-00000003"]


def test_every_file_has_the_same_permissions(saved):
    assert len({file.stat().st_mode for file in files(saved[1])}) == 1


def test_leftovers_of_a_dead_save_are_no_checkpoint_and_are_removed(saved, tmp_path, tokenizer):
    training, path = saved
    left = training.folder / ".incomplete-step-00000009"
    shutil.copytree(path, left)
    (left / "optimizer.bin").touch()
    assert Training(tmp_path, tokenizer).resume() == 3
    assert verify(training.save(9)) == []
    assert not left.exists()


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"hidden_size": 32}, "[64, 32]"),
        ({"num_attention_heads": 4}, "num_attention_heads"),
        ({"num_hidden_layers": 3}, "2"),
    ],
)
def test_another_model_is_refused_with_what_differs(saved, tmp_path, tokenizer, sizes, named):
    training = Training(tmp_path, tokenizer, small(**sizes))
    before = [tensor.clone() for _, tensor in training.values()]
    assert named in refused("other_model", training.resume)
    assert all(map(torch.equal, before, (tensor for _, tensor in training.values())))


def test_another_tokenizer_is_refused(saved, tmp_path):
    other = train_wordpiece([Document("quite another text for it", "here")], vocab_size=60)
    assert other.vocab_size == 64
    text = refused("other_tokenizer", Training(tmp_path, other).resume)
    assert other.fingerprint in text and str(saved[1]) in text
    refused("other_tokenizer", Training(tmp_path).resume)


def test_a_checkpoint_after_the_last_step_is_refused(saved, tmp_path, tokenizer):
    text = refused("beyond_last_step", Training(tmp_path, tokenizer).resume, 2)
    assert "init_from" in text
    assert Training(tmp_path, tokenizer).resume(3) == 3


def test_what_the_state_has_another_name_for_is_refused(saved, tmp_path, tokenizer):
    text = refused("other_state", Training(tmp_path, tokenizer, state={"position": Position()}).resume)
    assert "position" in text


def test_a_changed_recipe_is_reported_with_the_number_of_lines(saved, tmp_path, tokenizer, recipe, capsys):
    Training(tmp_path, tokenizer, recipe=recipe).resume()
    assert "lines added" not in capsys.readouterr().out
    recipe.write_text("# another recipe\n--- 1\nx = 3\n")
    Training(tmp_path, tokenizer, recipe=recipe).resume()
    assert re.findall(r"\b(\d) lines added, (\d) removed", capsys.readouterr().out) == [("3", "1")]


class Held:
    """State that is whatever it is given."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return self.value

    def load_state_dict(self, state):
        self.value = state


TENSORS = {
    "plain": torch.arange(6.0).view(2, 3) / 7,
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "bf16_scalar": torch.tensor(-0.25, dtype=torch.bfloat16),
    "fp16": torch.tensor([1.0, float("inf")], dtype=torch.float16),
    "int64": torch.tensor([2**62, -1]),
    "int_scalar": torch.tensor(7, dtype=torch.int32),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "strided": torch.arange(12.0).view(3, 4).t()[::2],
}


@pytest.mark.parametrize("async_save", [False, True])
def test_state_with_tensors_comes_back_to_the_last_bit(tmp_path, async_save):
    state = {
        "tensors": TENSORS,
        "list": [1, [torch.ones(2), {"deep": torch.tensor(3)}], None],
        "numbers": {"integer": 2**70, "float": 0.1, "nan": float("nan"), "text": "ä\n", "flag": True},
        "by_number": {0: {"step": torch.tensor(1.0)}, 1: {"step": torch.tensor(2.0)}},
        "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
    }
    first = Training(tmp_path, state={"mine": Held(state), "empty": Held({})}, async_save=async_save)
    with first.checkpointer:
        first.save(1)
    fresh = Held({"tensors": {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}})
    second = Training(tmp_path, state={"mine": fresh, "empty": Held({"unused": 1})})
    assert second.resume() == 1 and second.checkpointer.state["empty"].value == {}

    def same(left, right):
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
        elif isinstance(left, dict):
            assert left.keys() == right.keys()
            for key in left:
                same(left[key], right[key])
        elif isinstance(left, list):
            for pair in zip(left, right, strict=True):
                same(*pair)
        else:
            assert left == right or (left != left and right != right)

    same(state, fresh.value)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"x": [1, object()]}, "mine.x.1"),
        ({"x": np.zeros(2)}, "mine.x"),
        ({"x": {(1, 2): 3}}, "mine.x"),
        ({"x": {"__tensor__": "y"}}, "mine.x"),
    ],
)
def test_a_state_that_cannot_be_stored_is_refused_with_its_place_before_training(tmp_path, value, place):
    with pytest.raises(TypeError) as error:
        Training(tmp_path, state={"mine": Held(value)})
    assert f"state {place} " in str(error.value)


def test_another_optimizer_is_state(tmp_path):
    def make():
        weight = nn.Parameter(torch.ones(3))
        return weight, torch.optim.Adam([weight], lr=0.1)

    def step(weight, optimizer):
        weight.square().sum().backward()
        optimizer.step()

    weight, optimizer = make()
    step(weight, optimizer)
    Training(tmp_path, state={"other": optimizer}).save(1)
    again, resumed = make()
    assert Training(tmp_path, state={"other": resumed}).resume() == 1
    assert torch.equal(resumed.state[again]["exp_avg"], optimizer.state[weight]["exp_avg"])
    step(again, resumed)


class Tied(nn.Module):
    """A network of one's own: tied weights, buffers, a frozen parameter, a parameter without dimensions."""

    def __init__(self, vocab=20, size=8):
        super().__init__()
        self.embedding = nn.Embedding(vocab, size)
        self.frozen = nn.Linear(size, size)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(size)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(size, vocab, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)

    def forward(self, ids):
        return self.norm(self.frozen(self.embedding(ids)).flatten(0, 1)) * self.scale


@pytest.mark.parametrize("async_save", [False, True])
def test_any_module_is_saved_under_its_own_names_and_resumes(tmp_path, tokenizer, async_save):
    torch.manual_seed(3)
    first = Training(tmp_path, tokenizer, Tied(), async_save=async_save)

    def train(training, steps):
        for step in range(steps):
            ids = torch.arange(step, step + 12).view(2, 6) % 20
            training.model.head(training.model(ids)).square().mean().backward()
            training.optimizer.step()
            training.optimizer.zero_grad()

    train(first, 3)
    with first.checkpointer:
        path = first.save(3)
        expected = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
        train(first, 2)
    stored = load_file(path / "model.safetensors")
    assert stored.keys() == expected.keys() and "unsaved" not in stored
    for name, tensor in stored.items():
        assert torch.equal(tensor, expected[name]), name
    Tied().load_state_dict(stored)  # as the last line of a run says
    assert not (path / "config.json").exists() and (path / "tokenizer.json").exists()

    second = Training(tmp_path, tokenizer, Tied())
    assert second.resume() == 3
    assert second.model.head.weight is second.model.embedding.weight
    train(second, 2)
    assert_equal(first, second)
    assert second.model.frozen.weight not in second.optimizer.state
    assert "[20, 16]" in refused("other_model", Training(tmp_path, tokenizer, Tied(size=16)).resume)


def test_freezing_other_parameters_is_refused_by_name(tmp_path):
    Training(tmp_path).save(1)
    model = small()
    model.embedding.requires_grad_(False)
    with pytest.raises(UserError) as error:
        Training(tmp_path, model=model).resume()
    assert "embedding.weight" in str(error.value)


def test_frozen_parameters_are_saved_and_restored(tmp_path, tokenizer):
    model = small()
    model.embedding.requires_grad_(False)
    first = Training(tmp_path, tokenizer, model)
    first.train(2)
    first.save(2)
    other = small(seed=5)
    other.embedding.requires_grad_(False)
    second = Training(tmp_path, tokenizer, other)
    assert second.resume() == 2
    assert_equal(first, second)


def test_a_failed_save_is_not_the_last_one(saved, monkeypatch, capsys):
    training, path = saved
    training.checkpointer.options.on_save_error = "continue"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    training.save(6)
    assert training.checkpointer.saved == path and "on_save_error" in capsys.readouterr().out
    refused("cannot_save", training.checkpointer.wait, True)
    training.checkpointer.options.on_save_error = "stop"
    refused("cannot_save", training.save, 7)
    assert training.checkpointer.saved == path


def test_rolling_back_restores_the_newest_valid_checkpoint(tmp_path, tokenizer):
    position = Position()
    training = Training(tmp_path, tokenizer, state={"loader": position}, keep_last=5)
    for step in (1, 2):
        training.train(1)
        position.rows = step
        path = training.save(step)
    (path / "optimizer" / next((path / "optimizer").iterdir())).write_bytes(b"")
    training.train(1)
    assert training.checkpointer.rollback() == 1 and position.rows == 1
    assert training.checkpointer.saved.name == "step-00000001"
    resumed = Training(tmp_path, tokenizer, state={"loader": Position()})
    assert resumed.resume() == 1
    assert_equal(training, resumed)
    for file in training.folder.glob("*/manifest.json"):
        file.unlink()
    refused("no_checkpoint", training.checkpointer.rollback)
