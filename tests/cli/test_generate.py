import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchrecipes.cli.main import main
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_bpe, train_char, train_wordpiece
from torchrecipes.manifest import flush, write_manifest
from torchrecipes.models import gpt2, llama, neobert, save_hf

TEXT = "the quick brown fox jumps over the lazy dog. Änderungen, 水 and 火! "


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints, the newer of another model."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe([Document(TEXT * 3, "a")], vocab_size=300, causal=True)
    for step in (5, 10):
        path = folder / "checkpoints" / f"step-{step:08d}"
        model = gpt2(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
            initializer_range=0.3,
            seed=step,
        )
        save_hf(model, path, tokenizer)
        write_manifest(path, step, flush(path, sorted(file.name for file in path.iterdir())))
    return folder


def generate(capsys, *words):
    code = main(["generate", *map(str, words)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def test_greedy_text_equals_that_of_transformers(run, capsys):
    transformers = pytest.importorskip("transformers")
    newest = run / "checkpoints/step-00000010"
    prompts = ["the quick", "the lazy dog.", ""]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    out, err = generate(capsys, run, *words, "--temperature", 0, "--max-new-tokens", 12, "--device", "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(newest)
    model = transformers.AutoModelForCausalLM.from_pretrained(newest)
    # Tokens that fill the vocabulary up are ruled out: transformers does not know of them.
    inert = [i for name, i in tokenizer.get_vocab().items() if "inert" in name]
    assert inert
    expected = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        settings = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "suppress_tokens": inert}
        whole = model.generate(ids, do_sample=False, max_new_tokens=12, **settings)[0]
        expected.append(tokenizer.decode(whole, skip_special_tokens=True))
    assert out == f"\n{'-' * 40}\n".join(expected) + "\n"
    assert str(newest) in err and "per second" in err


def test_a_seed_repeats_a_text_and_another_one_changes_it(run, capsys):
    words = (run, "--prompt", "the", "--max-new-tokens", 20, "--seed")
    first, _ = generate(capsys, *words, 1)
    assert generate(capsys, *words, 1)[0] == first != generate(capsys, *words, 2)[0]


def test_batches_make_no_difference_and_go_to_a_file(run, tmp_path, capsys):
    prompts = ["the quick", "brown\nfox", "dog\u2028", "the", "the quick", "the quick"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "id": 1}, ensure_ascii=False) + "\n\n" for prompt in prompts))
    outputs = []
    for batch in (1, 2, 6):
        output = tmp_path / f"{batch}.jsonl"
        words = ("--prompts-file", file, "--batch-size", batch, "--max-new-tokens", 9, "--top-k", 20, "--top-p", 0.9)
        out, _ = generate(capsys, run, *words, "--output", output)
        found = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
        assert [line["prompt"] for line in found] == prompts
        assert out == f"\n{'-' * 40}\n".join(line["prompt"] + line["text"] for line in found) + "\n"
        assert all(line["num_tokens"] == 9 or line["ended"] for line in found)
        outputs.append(found)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({found["text"] for found in outputs[0] if found["prompt"] == "the quick"}) == 3


def test_a_single_prompt_is_printed_token_by_token(run, tmp_path, monkeypatch, capsys):
    printed = []

    def note(text, end="\n", file=None, flush=False):
        if file is None:
            printed.append(text + end)

    monkeypatch.setattr("builtins.print", note)
    for seed in range(5):
        words = ("--prompt", "水 the", "--max-new-tokens", 30, "--temperature", 2, "--seed", seed)
        printed.clear()
        output = tmp_path / f"{seed}.jsonl"
        generate(capsys, run, *words, "--output", output)
        found = json.loads(output.read_text())
        assert "".join(printed) == "水 the" + found["text"] + "\n"
        assert printed[0].startswith("水 the") and len(printed) > 2
        assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in printed[:-1])


def test_lines_of_a_text_file_are_prompts(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("the fox\n\nthe dog\n")
    out, _ = generate(capsys, run, "--prompts-file", tmp_path / "prompts.txt", "--prompt", "a", "--max-new-tokens", 1)
    assert [text.split("\n")[0][:5] for text in out.split(f"{'-' * 40}\n")][1:] == ["the f", "the d"]
    assert out.startswith("a")


def test_a_corrupt_checkpoint_is_skipped(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step-00000010/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    _, err = generate(capsys, tmp_path / "run", "--prompt", "a", "--max-new-tokens", 1)
    assert "step-00000010" in err and "step-00000005, cpu" in err
    for manifest in (tmp_path / "run").glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert main(["generate", str(tmp_path / "run"), "--prompt", "a"]) == 2
    assert str(tmp_path / "run/checkpoints") in capsys.readouterr().err


def test_a_text_stops_at_the_model_s_positions(run, tmp_path, capsys):
    output = tmp_path / "texts.jsonl"
    generate(capsys, run, "--prompt", "", "--max-new-tokens", 1000, "--temperature", 0, "--output", output)
    assert json.loads(output.read_text())["num_tokens"] <= 39


@pytest.mark.parametrize("end", [KeyboardInterrupt, MemoryError])
def test_finished_texts_are_kept_when_a_later_one_fails(end, run, tmp_path, monkeypatch, capsys):
    from torchrecipes.evaluation import generation as module

    batches = []

    def fails_the_third_time(model, tokenizer, prompts, **settings):
        batches.append(prompts)
        if len(batches) == 3:
            assert len(output.read_text().splitlines()) == 2  # there already, not only at the end
            raise end
        return [module.Completion(prompt, "!", 1, False) for prompt in prompts]

    monkeypatch.setattr(module, "generate_text", fails_the_third_time)
    output = tmp_path / "texts.jsonl"
    words = ["--prompt", "a", "--prompt", "b", "--prompt", "c", "--batch-size", "1", "--output", str(output)]
    assert main(["generate", str(run), *words]) == (130 if end is KeyboardInterrupt else 2)
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize("name", ["config.yaml", "texts.jsonl"])
def test_a_file_is_not_overwritten(name, run, tmp_path, capsys):
    output = tmp_path / name
    output.write_text("mine")
    assert main(["generate", str(run), "--prompt", "a", "--output", str(output)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"--output: {output}") and ("delete it first" in err) == (name == "texts.jsonl")
    assert output.read_text() == "mine"


def test_a_mistake_leaves_no_output_behind(run, tmp_path, capsys):
    words = ["--prompt", "the " * 60, "--output", str(tmp_path / "texts.jsonl")]
    assert main(["generate", str(run), *words]) == 2
    assert not list(tmp_path.iterdir())


def test_prompts_that_are_too_long_are_found_before_any_work(run, tmp_path, capsys):
    lines = ["the"] * 20 + ["", "the dog " * 30, "the"]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({"prompt": line}) for line in lines))
    for name in ("long.txt", "long.jsonl"):
        assert main(["generate", str(run), "--prompts-file", str(tmp_path / name), "--max-new-tokens", "1"]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert f"{tmp_path / name}:22" in err and "40 positions" in err


def test_unknown_characters_of_a_prompt_are_reported(tmp_path, capsys):
    tokenizer = train_char([Document("abc" * 9, "a")], causal=True)
    save_hf(
        gpt2(
            vocab_size=tokenizer.vocab_size,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
        ),
        tmp_path / "model",
        tokenizer,
    )
    (tmp_path / "prompts.txt").write_text("abc\naböü\nä\n")
    words = (tmp_path / "model", "--max-new-tokens", 20)
    _, err = generate(capsys, *words, "--prompts-file", tmp_path / "prompts.txt")
    assert "3 <unk> in 2 of 3 prompts" in err and f"{tmp_path}/prompts.txt:2\n" in err
    out, err = generate(capsys, *words, "--prompt", "abc")
    assert "<unk>" not in err + out


@pytest.mark.parametrize(
    ("words", "key", "detail"),
    [
        ([], None, "--prompt"),
        (["--prompts-file", "missing.txt"], "--prompts-file", "missing.txt"),
        (["--prompts-file", "bad.jsonl"], "--prompts-file", "bad.jsonl:2"),
        (["--prompts-file", "empty.txt"], "--prompts-file", "empty.txt"),
        (["--prompts-file", "empty.txt", "--prompt", "a"], "--prompts-file", "empty.txt"),
        (["--prompts-file", "latin.txt"], "--prompts-file", "latin.txt"),
        (["--prompt", "a", "--output", "missing/texts.jsonl"], "--output", "missing"),
        (["--prompt", "a", "--output", "folder"], "--output", "folder/texts.jsonl"),
        (["--prompt", "a", "--output", "latin.txt/texts.jsonl"], "--output", "Not a directory"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size", "1 or more"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens", "1 or more"),
        (["--prompt", "a", "--top-k", "0"], "--top-k", "1 or more"),
        (["--prompt", "a", "--top-p", "2"], "--top-p", "at most 1"),
        (["--prompt", "a", "--device", "nonsense"], "--device", "nonsense"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature", "0 (greedy) or more"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature", "nan"),
        (["--prompt", "a", "--prompt", "the " * 60], None, '--prompt "the the the the the the the th..."'),
    ],
)
def test_mistakes_name_the_option_and_the_remedy(run, words, key, detail, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    assert main(["generate", str(run), *words]) == 2
    err = capsys.readouterr().err
    assert detail in err and err.startswith(f"{key}: " if key else "")


def test_a_byte_order_mark_in_prompts_is_skipped(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("the fox\n", encoding="utf-8-sig")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the fox"}\n', encoding="utf-8-sig")
    for name in ("prompts.txt", "prompts.jsonl"):
        out, _ = generate(capsys, run, "--prompts-file", tmp_path / name, "--max-new-tokens", 1)
        assert out.startswith("the fox")


@pytest.mark.parametrize("verb", [["generate", "--prompt", "a"], ["perplexity", "--data", "a.txt"]])
def test_a_folder_without_a_causal_model_is_refused(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "empty").mkdir()
    tokenizer = train_wordpiece([Document(TEXT, "a")], vocab_size=60)
    save_hf(
        neobert(
            vocab_size=tokenizer.vocab_size,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        tmp_path / "encoder",
        tokenizer,
    )
    for folder, message in (
        ("missing", "missing"),
        ("empty", "config.json"),
        ("encoder", "tune-style fill-mask encoder"),
    ):
        assert main([verb[0], folder, *verb[1:]]) == 2
        assert message in capsys.readouterr().err


def test_a_folder_without_a_head_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the fox\n")
    causal = train_bpe([Document(TEXT, "a")], vocab_size=300, causal=True)
    masked = train_wordpiece([Document(TEXT, "a")], vocab_size=60)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = {
        "decoder": (llama(vocab_size=causal.vocab_size, **sizes, tie_word_embeddings=False), causal),
        "encoder": (neobert(vocab_size=masked.vocab_size, **sizes, tie_word_embeddings=False), masked),
    }
    for name, (model, tokenizer) in models.items():
        save_hf(model, tmp_path / name, tokenizer)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        heads = [key for key in tensors if key.startswith(("lm_head", "cls", "decoder"))]
        assert heads
        save_file({key: tensor for key, tensor in tensors.items() if key not in heads}, file, {"format": "pt"})
    for words in (
        ["generate", "decoder", "--prompt", "a"],
        ["perplexity", "decoder", "--data", "a.txt"],
        ["fill-mask", "encoder", "the [MASK]"],
    ):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert out == "" and "head" in err
