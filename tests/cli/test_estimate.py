import json
import re
import shlex
from pathlib import Path

import pytest

from torchrecipes.cli.main import main

TINY = ("estimate", "mlm_pretrain", "--config", "bert/tiny", "output_dir=nowhere")


def run(capsys, *words):
    assert main([*TINY, *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_table_can_be_read(capsys):
    lines = run(capsys, "--device", "h200", "--world-size", "4", "max_steps=1000000").splitlines()
    assert max(map(len, lines)) <= 120
    said = {line[:14].strip(): line[14:].split(maxsplit=1) for line in lines if line}
    assert said["parameters"][0] == "1,536,128"
    assert said["embedding"][0] == "1,114,624"
    assert "4 x h200, ddp, bfloat16, 1 x 8 rows per step" in " ".join(lines)
    assert said["weights"][0] == "5.9"
    assert said["fits"] == ["8", "rows  micro_batch_size that fits, at most"]
    assert said["steps"][0] == "1,000,000"
    assert said["steps"][1].startswith("of 4,096 tokens, ")
    assert said["time"][1].endswith("at 40% of the device's peak (--mfu)")
    assert said["disk"][0] == "17.6"


def test_json_has_the_same_in_bytes(capsys):
    found = json.loads(run(capsys, "--json", "--device", "a100-80", "--mfu", "0.5"))
    assert found["parameters"]["total"] == found["parameters"]["active"] == 1_536_128
    assert found["memory"]["weights"] == 4 * 1_536_128
    assert found["memory"]["total"] == sum(found["memory"].values()) - found["memory"]["total"]
    assert (found["mfu"], found["strategy"], found["steps"]) == (0.5, "none", 1000)


def test_epochs_depend_on_a_corpus(capsys):
    lines = run(capsys, "--device", "h200", "max_steps=null", "epochs=2").splitlines()
    assert any(line.startswith("steps           by the corpus") for line in lines)
    assert not any(line.startswith("time") for line in lines)


@pytest.mark.parametrize("name", ["gpt2/char_tiny", "qwen3/char_tiny"])
def test_a_vocabulary_of_characters_is_counted_as_large_as_it_may_become(name, capsys):
    words = ["estimate", "causal_pretrain", "--config", name, "data.source.path=nowhere.txt", "--device", "cpu"]
    settings = ["tokenizer.limit_alphabet=200", "tokenizer.pad_vocab_to_multiple_of=16"]
    assert main([*words, *settings]) == 0
    *_, empty, note = capsys.readouterr().out.splitlines()
    assert not empty and note.startswith("counted with 208 ids, the most that tokenizer.limit_alphabet allows; ")
    assert len(note) <= 120
    assert main([*words, *settings, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == [note]
    assert main([*words, "tokenizer._component_=torchrecipes.data.tokenizers.train_bpe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_what_does_not_fit_is_told_with_remedies(capsys):
    words = ("model._component_=torchrecipes.models.bert", "model.hidden_size=8192", "model.num_attention_heads=64")
    lines = run(capsys, "--device", "4090", "global_batch_size=1", *words, "model.num_hidden_layers=12").splitlines()
    assert any("not one row  try activation_checkpointing=full" in line for line in lines)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--device", "h20"], "--device h20 is not known. There are: b200, h200, h100, a100-80, "),
        (["--device", "H200"], "cpu. Did you mean 'h200'?"),
        (["--world-size", "3"], "--world-size 3 does not divide global_batch_size=32. Take a multiple, such as "),
        (["--world-size", "0"], "--world-size 0, --nproc-per-node 8: they are 1 or more."),
        (["--world-size", "16", "--nproc-per-node", "3"], "--world-size 16 is no multiple of the 3 processes"),
        (["--mfu", "40"], "--mfu 40.0: it is a share of the device's peak, between 0 and 1."),
        (["--world-size", "2", "parallel.strategy=hsdp"], "parallel.strategy=hsdp, and --world-size 2 is one machine"),
        (["--world-size", "2", "parallel.strategy=none"], "parallel.strategy=none, and --world-size is 2."),
        (["model.size=3"], "model.size"),
        (["init_from=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_message(words, message, capsys):
    assert main([*TINY, *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2


def test_the_example_of_the_page_is_what_is_printed(capsys):
    page = (Path(__file__).parents[2] / "docs" / "estimate.md").read_text()
    command, shown = re.search(r"```bash\ntune-style (.*?)\n```\n\n```text\n(.*?)```", page, re.DOTALL).groups()
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == shown
