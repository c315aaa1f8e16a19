import json
import re
import shlex
from pathlib import Path

import pytest

from torchrecipes.cli.main import main

TINY = ("estimate", "mlm_pretrain", "--config", "bert/tiny", "output_dir=nowhere")
PARTS = {"weights", "optimizer", "gradients", "activations", "loss", "process"}


def run(capsys, *words):
    assert main([*TINY, *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def first_words(output):
    """The first number or word of every line of the table, by the line's name."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines() if line]
    return {line[0]: line[1].split()[0] for line in lines if len(line) > 1}


def test_the_table_has_the_numbers_of_the_json(capsys):
    words = ("--device", "h200", "--world-size", "4", "max_steps=1000000")
    output = run(capsys, *words)
    found = json.loads(run(capsys, *words, "--json"))
    assert max(map(len, output.splitlines())) <= 120
    table = first_words(output)
    assert table["parameters"] == "1,536,128" == f"{found['parameters']['total']:,}"
    assert table["embedding"] == "1,114,624"
    assert "4 x h200, ddp, bfloat16, 1 x 8 rows per step" in output
    assert table["weights"] == f"{found['memory']['weights'] / 2**20:.1f}"
    assert table["fits"] == str(found["max_micro_batch_size"])
    assert table["steps"] == "1,000,000"
    assert {"time", "disk", "total"} <= table.keys()


def test_json_is_in_bytes(capsys):
    found = json.loads(run(capsys, "--json", "--device", "a100-80", "--mfu", "0.5"))
    assert found["parameters"]["total"] == found["parameters"]["active"] == 1_536_128
    assert found["memory"].keys() == PARTS | {"total"}
    assert found["memory"]["weights"] == 4 * 1_536_128
    assert found["memory"]["total"] == sum(found["memory"].values()) - found["memory"]["total"]
    assert (found["mfu"], found["strategy"], found["steps"]) == (0.5, "none", 1000)


def test_a_cpu_has_an_allocator_and_a_buffer_for_saving(capsys):
    output = run(capsys, "--device", "cpu")
    assert {"allocator overhead", "async-save buffer"} <= first_words(output).keys()
    found = json.loads(run(capsys, "--device", "cpu", "checkpoint.async_save=false", "--json"))
    assert found["memory"].keys() == PARTS | {"total", "allocator_overhead"}


def test_epochs_depend_on_a_corpus(capsys):
    words = ("--device", "h200", "max_steps=null", "epochs=2")
    assert "time" not in first_words(run(capsys, *words))
    found = json.loads(run(capsys, *words, "--json"))
    assert (found["steps"], found["hours"], len(found["notes"])) == (None, None, 1)


def test_the_steps_of_a_run_in_minutes_are_unknown(capsys):
    found = json.loads(run(capsys, "--device", "cpu", "max_steps=null", "max_minutes=5", "--json"))
    assert (found["steps"], found["hours"]) == (None, None)
    (note,) = found["notes"]
    assert "5 minutes" in note


@pytest.mark.parametrize("name", ["gpt2/char_tiny", "qwen3/char_tiny"])
def test_a_vocabulary_of_characters_is_counted_as_large_as_it_may_become(name, capsys):
    words = ["estimate", "causal_pretrain", "--config", name, "data.source.path=nowhere.txt", "--device", "cpu"]
    settings = ["tokenizer.limit_alphabet=200", "tokenizer.pad_vocab_to_multiple_of=16"]
    assert main([*words, *settings]) == 0
    *_, empty, note = capsys.readouterr().out.splitlines()
    assert not empty and "208 ids" in note
    assert len(note) <= 120
    assert main([*words, *settings, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == [note]
    assert main([*words, "tokenizer._component_=torchrecipes.data.tokenizers.train_bpe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_remedies_where_nothing_fits(capsys):
    words = ("model._component_=torchrecipes.models.bert", "model.hidden_size=8192", "model.num_attention_heads=64")
    output = run(capsys, "--device", "4090", "global_batch_size=1", *words, "model.num_hidden_layers=12")
    assert "compute.activation_checkpointing=full" in output


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--device", "h20"], "h200"),
        (["--world-size", "3"], "global_batch_size=33"),
        (["--world-size", "0"], "--world-size"),
        (["--world-size", "16", "--nproc-per-node", "3"], "--nproc-per-node"),
        (["--mfu", "40"], "--mfu"),
        (["--world-size", "2", "compute.strategy=hsdp"], "compute.strategy"),
        (["--world-size", "2", "compute.strategy=none"], "compute.strategy"),
        (["model.size=3"], "model.size"),
        (["init_from=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_message(words, expected, capsys):
    assert main([*TINY, *words]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["gpt2/quickstart", "moe/quickstart", "neobert/quickstart"])
def test_quickstarts_fit_a_small_gpu(name, capsys):
    recipe = "mlm_pretrain" if name.startswith("neobert") else "causal_pretrain"
    assert main(["estimate", recipe, "--config", name, "--device", "l4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["total"] <= found["device_bytes"] and found["max_micro_batch_size"]


def test_the_example_of_the_page_is_what_is_printed(capsys):
    page = (Path(__file__).parents[2] / "docs" / "estimate.md").read_text()
    command, shown = re.search(r"```bash\ntune-style (.*?)\n```\n\n```text\n(.*?)```", page, re.DOTALL).groups()
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == shown
