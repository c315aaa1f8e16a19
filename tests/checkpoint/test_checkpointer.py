import json
import random
import shutil

import numpy as np
import pytest
import torch

from torchrecipes.checkpoint import manifest
from torchrecipes.checkpoint.checkpointer import Checkpointer, verify
from torchrecipes.checkpoint.resume import check_resumable
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.models import bert, load_hf, neobert
from torchrecipes.optim import adamw


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([Document("a small text for a small tokenizer, " * 3, "here")], vocab_size=60)


def make(kind=neobert, seed=0):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = kind(vocab_size=64, **sizes, seed=seed)
    return model, adamw(model, lr=1e-2)


def train(model, optimizer, steps):
    for step in range(steps):
        ids = torch.arange(step, step + 24).view(2, 12) % 60
        loss = model.head(torch.nn.functional.dropout(model(ids), 0.1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(checkpointer, step, model, optimizer, tokenizer, **state):
    return checkpointer.save(
        step,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        state=state,
        config_yaml="seed: 1\n",
        recipe_source="# the recipe\n",
    )


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.fixture
def saved(tmp_path, tokenizer):
    """(checkpointer, path) of one checkpoint of a model that trained three steps."""
    checkpointer = Checkpointer(tmp_path)
    model, optimizer = make()
    train(model, optimizer, 3)
    return checkpointer, save(checkpointer, 3, model, optimizer, tokenizer, corpus="abc")


@pytest.mark.parametrize("kind", [neobert, bert])
def test_training_goes_on_to_the_last_bit(tmp_path, tokenizer, kind):
    torch.manual_seed(5)
    model, optimizer = make(kind)
    train(model, optimizer, 3)
    path = save(Checkpointer(tmp_path), 3, model, optimizer, tokenizer, rows=48)
    drawn = random.random(), np.random.rand()
    train(model, optimizer, 3)

    torch.manual_seed(99)
    other, other_optimizer = make(kind, seed=9)
    resumed = Checkpointer(tmp_path).resume("auto")
    assert (resumed.step, resumed.state, resumed.path) == (3, {"rows": 48}, path)
    resumed.load_model(other)
    resumed.load_optimizer(other, other_optimizer)
    resumed.restore_rng()
    assert (random.random(), np.random.rand()) == drawn
    train(other, other_optimizer, 3)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_scheduled_learning_rate_is_restored_and_other_settings_stay(saved):
    model, saved_optimizer = make()
    optimizer = adamw(model, lr=0.5, weight_decay=0.25)
    saved[0].resume("auto").load_optimizer(model, optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in saved_optimizer.param_groups]
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    assert len(optimizer.state) == len(list(model.parameters()))


def test_it_is_a_hugging_face_folder_with_everything_to_repeat_the_run(saved):
    transformers = pytest.importorskip("transformers")
    _, path = saved
    transformers.AutoModelForMaskedLM.from_pretrained(path)
    assert len(transformers.AutoTokenizer.from_pretrained(path)) == 64
    load_hf(path)
    assert (path / "config.yaml").read_text() == "seed: 1\n" and (path / "recipe.py").read_text() == "# the recipe\n"
    versions = json.loads((path / "manifest.json").read_text())["versions"]
    assert versions["torch"] == torch.__version__
    # Safetensors begin with the length of a JSON header, nothing in the folder is a pickle or an archive of one.
    for file in files(path):
        assert file.suffix in {".safetensors", ".json", ".yaml", ".py"}
        assert not file.read_bytes().startswith((b"\x80", b"PK"))


def test_any_flipped_byte_is_found_and_named(saved):
    _, path = saved
    rng = random.Random(0)
    for file in files(path):
        whole = file.read_bytes()
        for position in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(12))}:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            problems = verify(path)
            assert problems and file.name in problems[0], (file.name, position)
        file.write_bytes(whole)
    assert verify(path) == []


def test_a_changed_byte_between_the_values_of_the_manifest_is_found(saved):
    file = saved[1] / "manifest.json"
    whole = file.read_bytes()
    spaces = [position for position, byte in enumerate(whole) if byte in b" \n"]
    for position in spaces[::5]:
        file.write_bytes(whole[:position] + b"\t" + whole[position + 1 :])
        json.loads(file.read_bytes())
        assert verify(saved[1]) == ["manifest.json is damaged"]
    file.write_bytes(whole + b"\n")
    assert verify(saved[1]) == ["manifest.json is damaged"]


def test_a_bad_sector_is_damage(saved, monkeypatch):
    def checksum(file):
        if file.name == "model.safetensors":
            raise OSError(5, "Input/output error")
        return whole(file)

    whole = manifest._checksum
    monkeypatch.setattr(manifest, "_checksum", checksum)
    assert verify(saved[1]) == ["model.safetensors cannot be read (Input/output error)"]


def test_a_renamed_checkpoint_is_not_taken_for_another_step(saved, capsys):
    checkpointer, path = saved
    renamed = shutil.copytree(path, path.with_name("step-00000007"))
    assert checkpointer.resume("auto").path == path
    assert f"passed over {renamed}, which is damaged: manifest.json is of step 3" in capsys.readouterr().out
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
def test_a_planted_pickle_is_refused_by_name(saved, name):
    checkpointer, path = saved
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=f"{name} does not belong there"):
        checkpointer.resume(str(path))


def test_a_damaged_checkpoint_is_passed_over_and_said(saved, tokenizer, tmp_path, capsys):
    checkpointer, first = saved
    model, optimizer = make()
    second = save(checkpointer, 6, model, optimizer, tokenizer)
    with (second / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert checkpointer.resume("auto").path == first
    assert f"passed over {second}" in (out := capsys.readouterr().out) and "model.safetensors has 100 bytes" in out
    # The run comes to that step again: the damaged one is replaced.
    again = Checkpointer(tmp_path, keep_last=1)
    assert save(again, 6, model, optimizer, tokenizer) == second and verify(second) == []
    assert not first.exists()
    (second / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        checkpointer.resume("auto")


def test_which_checkpoint_is_taken(saved, tmp_path):
    checkpointer, path = saved
    assert checkpointer.resume("never") is None
    assert Checkpointer(tmp_path / "new").resume("auto") is None
    assert Checkpointer(tmp_path / "new").resume(str(path)).step == 3
    with pytest.raises(UserError, match="does not exist"):
        checkpointer.resume(str(tmp_path / "none"))


def test_the_newest_are_kept(tmp_path, tokenizer):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    model, optimizer = make()
    for step in (8, 9, 10, 11):
        save(checkpointer, step, model, optimizer, tokenizer)
    assert sorted(path.name for path in checkpointer.folder.iterdir()) == ["step-00000010", "step-00000011"]
    with pytest.raises(UserError, match="keep_last is 0"):
        Checkpointer(tmp_path, keep_last=0)


def test_the_newest_is_the_largest_number(saved, tokenizer):
    checkpointer, _ = saved
    model, optimizer = make()
    for step in (99_999_999, 100_000_000):
        path = save(checkpointer, step, model, optimizer, tokenizer)
    assert path.name == "step-100000000" and checkpointer.resume("auto").path == path


def test_saving_a_step_twice_leaves_the_first_and_says_so(saved, tokenizer, capsys):
    checkpointer, path = saved
    before = (path / "manifest.json").read_bytes()
    model, optimizer = make(seed=4)
    assert save(checkpointer, 3, model, optimizer, tokenizer) == path
    assert f"{path} is saved already" in capsys.readouterr().out
    assert (path / "manifest.json").read_bytes() == before


def test_a_checkpoint_that_another_run_left_is_not_taken_for_this_one(saved, tmp_path, tokenizer):
    model, optimizer = make(seed=4)
    with pytest.raises(UserError, match="is there already, and this run has not written it"):
        save(Checkpointer(tmp_path), 3, model, optimizer, tokenizer)


def test_going_back_in_the_same_folder_is_refused(saved, tmp_path, tokenizer):
    checkpointer, first = saved
    model, optimizer = make()
    second = save(checkpointer, 6, model, optimizer, tokenizer)
    with pytest.raises(UserError, match=r"is of step 3, and .*step-00000006 is newer.*output_dir"):
        Checkpointer(tmp_path).resume(str(first))
    other = Checkpointer(tmp_path / "other")
    assert other.resume(str(first)).step == 3
    assert Checkpointer(tmp_path).resume(str(second)).step == 6


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(saved, tmp_path, tokenizer, capsys):
    model, optimizer = make()
    path = save(saved[0], 6, model, optimizer, tokenizer)
    (path / "model.safetensors").write_bytes(b"")
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.resume("auto").step == 3
    assert save(checkpointer, 6, model, optimizer, tokenizer) == path and verify(path) == []
    assert "which is damaged, is replaced: model.safetensors has 0 bytes" in capsys.readouterr().out
    assert checkpointer.resume("auto").step == 6


def test_damaged_checkpoints_do_not_push_out_whole_ones(saved, tmp_path, tokenizer):
    model, optimizer = make()
    for step in (6, 9):
        (save(saved[0], step, model, optimizer, tokenizer) / "model.safetensors").write_bytes(b"")
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    assert checkpointer.resume("auto").step == 3
    for step in (5, 7):  # it stops early, and again: the damaged ones are newer, then in between
        save(checkpointer, step, model, optimizer, tokenizer)
        assert Checkpointer(tmp_path).resume("auto").step == step
    assert sorted(path.name[-1] for path in checkpointer.folder.iterdir()) == ["5", "7", "9"]


def test_who_may_read_the_text_may_read_the_weights(saved):
    assert len({file.stat().st_mode for file in files(saved[1])}) == 1


def test_left_overs_of_a_dead_save_are_no_checkpoint_and_go(saved, tokenizer):
    checkpointer, path = saved
    left = checkpointer.folder / ".incomplete-step-00000009"
    shutil.copytree(path, left)
    (left / "optimizer.bin").touch()
    assert checkpointer.resume("auto").path == path
    model, optimizer = make()
    assert verify(save(checkpointer, 9, model, optimizer, tokenizer)) == []
    assert not left.exists()


def test_another_model_is_refused_with_what_differs(saved):
    wider = neobert(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(UserError, match=r"another model: embedding.weight is \[64, 16\] there and \[64, 32\]"):
        saved[0].resume("auto").load_model(wider)
    deeper = neobert(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(UserError, match="num_attention_heads is 2 there and 4 here"):
        saved[0].resume("auto").load_model(
            neobert(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
        )
    with pytest.raises(UserError, match=r"blocks.2\S+ is not in the checkpoint.*and \d more"):
        saved[0].resume("auto").load_model(deeper)


def test_another_corpus_is_refused_unless_the_checkpoint_was_named(saved):
    class Corpus:
        folder, fingerprint = "corpus/train", "abc"

    resumed = saved[0].resume("auto")
    check_resumable(resumed, Corpus, "auto")
    Corpus.fingerprint = "other"
    with pytest.raises(UserError, match="not the corpus that"):
        check_resumable(resumed, Corpus, "auto")
    check_resumable(resumed, Corpus, str(resumed.path))


def test_a_checkpoint_with_a_missing_file_does_not_count_among_those_that_are_kept(tmp_path, tokenizer):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    model, optimizer = make()
    for step in (1, 2):
        path = save(checkpointer, step, model, optimizer, tokenizer)
    (path / "model.safetensors").unlink()
    save(checkpointer, 3, model, optimizer, tokenizer)
    assert sorted(path.name for path in checkpointer.folder.iterdir()) == ["step-00000001", "step-00000003"]
