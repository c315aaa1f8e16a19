"""A run whose corpus is added to while it is stopped."""

import json
import shutil

import torch
from safetensors.torch import load_file

from torchrecipes.cli.main import main

SETTINGS = """
tokenizer: {_component_: torchrecipes.data.tokenizers.train_bpe, vocab_size: 300}
data:
  source: {_component_: torchrecipes.data.sources.files, path: old.jsonl}
  validation_fraction: 0.1
model: {_component_: torchrecipes.models.gpt2, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
seq_len: 32
global_batch_size: 8
micro_batch_size: 8
max_steps: 9
eval_every: null
compute: {precision: fp32}
log: {log_every: 1}
checkpoint: {save_every: 3, keep_last: 10}
output_dir: run
"""


def write(path, words):
    path.write_text(
        "".join(json.dumps({"text": f"the {word} goes home {i} times"}) + "\n" for word in words for i in range(30))
    )


def weights(step):
    return load_file(f"run/checkpoints/step-{step:08d}/model.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_resumes_in_a_new_epoch_over_all_text_and_exactly_so_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "old.jsonl", ["cat", "dog", "fox"])
    write(tmp_path / "new.jsonl", ["owl", "bee"])
    (tmp_path / "run.yaml").write_text(SETTINGS)
    run = ["run", "causal_pretrain", "--config", "run.yaml"]
    assert main(run) == 0, capsys.readouterr().err
    alone = weights(9)
    assert main(["data", "append", "run/corpus", "--data", "new.jsonl"]) == 0, capsys.readouterr().err
    for step in (6, 9):
        shutil.rmtree(f"run/checkpoints/step-{step:08d}")
    capsys.readouterr()
    assert main(run) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "documents were added to the corpus" in out and "from step 4 on" in out
    grown = weights(9)
    assert not same(alone, grown)
    shutil.rmtree("run/checkpoints/step-00000009")
    capsys.readouterr()
    assert main(run) == 0, capsys.readouterr().err
    assert "documents were added" not in capsys.readouterr().out
    assert same(grown, weights(9))
    # Another text in the same place is refused.
    shutil.rmtree("run/corpus")
    write(tmp_path / "old.jsonl", ["hen"])
    assert main([*run, "max_steps=12"]) == 2
