"""`tune-style tokenizer train`, `inspect` and `extend`."""

import json

import pytest
import torch

from torchrecipes.cli.main import main
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import load_tokenizer, train_bpe, train_wordpiece
from torchrecipes.models import bert, gpt2, llama, load_hf, save_hf

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
INNER = {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog, again and again. " * 20)
    (tmp_path / "new.txt").write_text("hydroxychloroquine and azithromycin, then hydroxychloroquine " * 20)
    return tmp_path


def run(*words):
    return main(["tokenizer", *map(str, words)])


@pytest.mark.parametrize("kind", ["bpe", "char", "unigram", "wordpiece"])
@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_train_makes_what_a_run_loads(text, capsys, kind, objective):
    words = ["train", "--data", "a.txt", "--kind", kind, "--objective", objective, "-o", "t"]
    words += ["--vocab-size", "300" if kind == "bpe" else "60"] if kind != "char" else ["--limit-alphabet", "30"]
    if (kind, objective) == ("wordpiece", "causal"):
        assert run(*words) == 2 and "--kind" in capsys.readouterr().err
        return
    assert run(*words) == 0, capsys.readouterr().err
    tokenizer = load_tokenizer("t", causal=objective == "causal")
    assert tokenizer.encode("the fox")
    before = (text / "t" / "tokenizer.json").read_bytes()
    assert run(*words) == 0
    assert (text / "t" / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--kind", "bpe", "--vocab-size", "many"], "vocab_size"),
        (["--kind", "bpe", "--lowercase", "true"], "lowercase"),
        (["--kind", "wordpiece", "--vocab-size", "3"], "vocab_size"),
    ],
)
def test_train_refuses_wrong_arguments(text, capsys, words, named):
    assert run("train", "--data", "a.txt", "--objective", "mlm", "-o", "t", *words) == 2
    assert named in capsys.readouterr().err


def test_inspect_prints_a_table_and_json(text, capsys):
    train_bpe(files("a.txt"), vocab_size=300, causal=True, folder="t")
    capsys.readouterr()
    assert run("inspect", "t", "--data", "new.txt") == 0
    out = capsys.readouterr().out
    assert "BPE" in out and "<|endoftext|>" in out and "tokens per word" in out and "azithromycin:" in out
    assert run("inspect", "t", "--json", "--data", "new.txt", "--limit", "1") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "BPE" and found["text"]["documents"] == 1
    assert run("inspect", "t", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] is None


@pytest.mark.parametrize(
    ("words", "named"), [(["nothing"], "nothing"), (["t", "--limit", "0"], "--limit"), (["t", "--data", "x"], "--data")]
)
def test_inspect_refuses_wrong_arguments(text, capsys, words, named):
    train_bpe(files("a.txt"), vocab_size=300, causal=True, folder="t")
    assert run("inspect", *words) == 2
    assert named in capsys.readouterr().err


def save(family, folder, padding=64):
    if family == "bert":
        tokenizer = train_wordpiece(files(["a.txt", "new.txt"]), vocab_size=70, pad_vocab_to_multiple_of=padding)
        model = bert(vocab_size=tokenizer.vocab_size, **SIZES, **INNER, seed=1)
        with torch.no_grad():
            model.head.bias.normal_()
    else:
        tokenizer = train_bpe(files("a.txt"), vocab_size=300, causal=True, pad_vocab_to_multiple_of=padding)
        make = {"gpt2": gpt2, "llama": llama}[family]
        untied = {"tie_word_embeddings": False} if family == "llama" else {}
        model = make(vocab_size=tokenizer.vocab_size, **SIZES, **INNER, **untied, seed=1)
    save_hf(model, folder, tokenizer)
    return tokenizer, model


@torch.no_grad()
def logits(model, ids):
    return model.head(model(torch.tensor([ids]), position_ids=torch.arange(len(ids))[None]))[0]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("padding", "count"), [(64, 3), (1, 3), (64, 40)])
def test_extend_keeps_old_logits_and_gives_new_rows_the_mean_of_their_pieces(text, capsys, family, padding, count):
    old_tokenizer, old = save(family, text / "old", padding)
    assert run("extend", "old", "--from-data", count, "--data", "new.txt", "-o", "new") == 0, capsys.readouterr().err
    tokenizer, model = load_tokenizer("new", 1, ()), load_hf("new")
    first = old_tokenizer.unpadded_vocab_size
    added = tokenizer.unpadded_vocab_size - first
    rows = model.config.vocab_size
    # Rows of padding are used first; then as many are added as keep the multiple.
    assert added and rows == max(old.config.vocab_size, -(-(first + added) // padding) * padding)
    ids = old_tokenizer.encode("the lazy fox")
    assert torch.equal(torch.tensor(tokenizer.encode("the lazy fox")[: len(ids) - 1]), torch.tensor(ids[:-1]))
    assert (logits(model, ids)[:, :first] - logits(old, ids)[:, :first]).abs().max() < 1e-6
    tables = {name: table for name, table in model.state_dict().items() if len(table) == rows}
    assert len(tables) == {"bert": 2, "gpt2": 1, "llama": 2}[family]  # embedding; bias or a head of its own
    for i in range(first, first + added):
        pieces = old_tokenizer.text_backend.encode(tokenizer.decode_token(i), add_special_tokens=False).ids
        for name, table in tables.items():
            assert torch.allclose(table[i], old.state_dict()[name][pieces].mean(0), atol=1e-6)
    new = tokenizer.encode("hydroxychloroquine and azithromycin")
    assert max(new) >= first and len(new) < len(old_tokenizer.encode("hydroxychloroquine and azithromycin"))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_transformers_loads_the_result(text, family):
    transformers = pytest.importorskip("transformers")
    old_tokenizer, _ = save(family, text / "old")
    assert run("extend", "old", "--tokens", "<|user|>", "covid", "--special", "-o", "new") == 0
    kind = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    old, new = kind.from_pretrained("old").eval(), kind.from_pretrained("new").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("new")
    first = old_tokenizer.unpadded_vocab_size
    assert tokenizer.convert_tokens_to_ids(["<|user|>", "covid"]) == [first, first + 1]
    ids = torch.tensor([old_tokenizer.encode("the lazy fox")])
    with torch.no_grad():
        assert (old(ids).logits[..., :first] - new(ids).logits[..., :first]).abs().max() < 1e-6
        assert new(torch.tensor([[first, first + 1]])).logits.isfinite().all()
    assert new.get_input_embeddings().num_embeddings == new.config.vocab_size >= len(tokenizer)


def test_mean_of_all_rows(text):
    old_tokenizer, old = save("gpt2", text / "old")
    assert run("extend", "old", "--tokens", "<|a|>", "-o", "new", "--init", "mean") == 0
    first = old_tokenizer.unpadded_vocab_size
    assert torch.allclose(load_hf("new").head.weight[first], old.head.weight[:first].mean(0), atol=1e-6)


def test_tokens_from_a_file_and_a_second_extension(text):
    save("gpt2", text / "old")
    (text / "tokens.txt").write_text("<|a|>\n\n<|b|>\n")
    assert run("extend", "old", "--tokens-file", "tokens.txt", "-o", "one") == 0
    assert run("extend", "one", "--tokens", "<|c|>", "-o", "two") == 0
    one, two = (load_tokenizer(name, 1, ()).backend for name in ("one", "two"))
    assert [two.token_to_id(name) for name in ("<|a|>", "<|b|>")] == [one.token_to_id(n) for n in ("<|a|>", "<|b|>")]
    assert two.token_to_id("<|c|>") == one.token_to_id("<|b|>") + 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["old", "--from-data", "3"], "--data"),
        (["old", "--tokens", "a", "--data", "a.txt"], "--from-data"),
        (["old", "--from-data", "0", "--data", "a.txt"], "--from-data"),
        (["old", "--tokens", "a"], "already"),
        (["old", "--tokens-file", "nothing.txt"], "--tokens-file"),
        (["nothing", "--tokens", "<|a|>"], "nothing"),
        (["old", "--tokens", "<|a|>", "-o", "old"], "--output"),
    ],
)
def test_extend_refuses_wrong_arguments(text, capsys, words, named):
    save("gpt2", text / "old")
    assert run("extend", *words, *([] if "-o" in words else ["-o", "new"])) == 2
    assert named in capsys.readouterr().err
    assert not (text / "new").exists()
