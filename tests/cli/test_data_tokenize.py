"""`tune-style data tokenize` and `data append`."""

import json

import pytest

from torchrecipes.cli.main import main
from torchrecipes.data import open_corpus, prepare_corpus
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import load_tokenizer, train_bpe


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"the text number {i} of a dozen\n\na second paragraph {i}\n")
    (tmp_path / "more.txt").write_text("something else, and no more\n")
    return tmp_path


def tokenize(*words):
    return main(["data", "tokenize", *words])


TRAIN = ("--tokenizer", "train_bpe:vocab_size=300", "--objective", "causal")


def files_of(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.glob("*/*.*")) if path.suffix != ".lock"
    }


def test_it_writes_the_files_that_a_run_would(text):
    assert tokenize("--data", "texts", *TRAIN, "-o", "corpus", "--validation-fraction", "0.2", "--threads", "1") == 0
    source = files(["texts"])
    tokenizer = train_bpe(source, vocab_size=300, causal=True, folder="expected/tokenizer")
    prepare_corpus("expected", source, tokenizer, validation_fraction=0.2)
    assert files_of(text / "corpus") == files_of(text / "expected")


def test_a_config_says_what_is_read_and_how(text, capsys):
    (text / "run.yaml").write_text(
        "data:\n  source: {_component_: torchrecipes.data.sources.files, path: texts, sample_by: paragraph}\n"
        "  eval_sets: {validation: {_component_: torchrecipes.data.sources.files, path: more.txt}}\n"
        "tokenizer: {_component_: torchrecipes.data.tokenizers.train_wordpiece, vocab_size: 200}\n"
        "an_unknown_key: 1\n"
    )
    assert tokenize("--config", "run.yaml", "--objective", "mlm", "-o", "corpus") == 0, capsys.readouterr().err
    assert open_corpus("corpus/train").num_documents == 24
    assert open_corpus("corpus/eval_sets/validation/train").num_documents == 1
    assert not (text / "corpus" / "validation").exists()
    assert load_tokenizer("corpus/tokenizer").mask_id is not None


def test_a_mixture_has_a_corpus_for_every_source_and_so_have_its_parts(text, capsys):
    source = "{_component_: torchrecipes.data.sources.files, path: %s, sample_by: line}"
    (text / "run.yaml").write_text(
        "data:\n  validation_fraction: 0\n  source:\n    _component_: torchrecipes.data.sources.mixture\n    sources:\n"
        f"      one: {source % 'texts'}\n      two: {source % 'more2.txt'}\n"
        f"  eval_sets: {{three: {source % 'more.txt'}}}\n"
    )
    (text / "more2.txt").write_text("one\ntwo\nthree\n")
    assert tokenize("--config", "run.yaml", *TRAIN, "-o", "corpus") == 0, capsys.readouterr().err
    sizes = {"one/train": 24, "two/train": 3, "eval_sets/three/train": 1}
    assert {name: open_corpus(f"corpus/{name}").num_documents for name in sizes} == sizes
    for job in ("1", "0"):
        words = ("--config", "run.yaml", "--tokenizer", "corpus/tokenizer", "--objective", "causal", "-o", "jobs")
        assert tokenize(*words, "--shard-index", job, "--num-shards", "2") == 0, capsys.readouterr().err
    assert tokenize("--merge", "-o", "jobs") == 0, capsys.readouterr().err
    assert {name: open_corpus(f"jobs/{name}").num_documents for name in sizes} == sizes


def test_the_same_command_again_changes_nothing(text):
    words = ("--data", "texts", *TRAIN, "-o", "corpus")
    assert tokenize(*words) == 0
    before = files_of(text / "corpus")
    assert tokenize(*words) == 0
    assert files_of(text / "corpus") == before


def test_jobs_of_an_array_and_their_merge(text, capsys):
    assert main(["data", "tokenize", "--data", "texts", *TRAIN, "-o", "whole", "--validation-fraction", "0"]) == 0
    for index in "021":
        words = ("--data", "texts", "--tokenizer", "whole/tokenizer", "--objective", "causal", "-o", "corpus")
        assert tokenize("--merge", "-o", "corpus") == 2
        assert tokenize(*words, "--validation-fraction", "0", "--shard-index", index, "--num-shards", "3") == 0
    assert tokenize("--merge", "-o", "corpus") == 0
    whole, merged = open_corpus("whole/train"), open_corpus("corpus/train")
    assert len(merged.shards) == 3
    assert merged.read(0, merged.num_tokens).tolist() == whole.read(0, whole.num_tokens).tolist()
    capsys.readouterr()
    assert main(["data", "append", "corpus", "--data", "more.txt"]) == 0
    assert open_corpus("corpus/train").num_documents == 13


def test_append_finds_the_tokenizer_of_the_corpus(text, capsys):
    assert tokenize("--data", "texts", *TRAIN, "-o", "corpus") == 0
    assert main(["data", "append", "corpus", "--data", "more.txt"]) == 0
    corpus = open_corpus("corpus/train")
    assert json.loads((text / "corpus/train/corpus.json").read_text())["additions"][0]["documents"] == 1
    tokenizer = load_tokenizer("corpus/tokenizer", causal=True)
    assert corpus.shards[-1].tokens.tolist() == tokenizer.encode("something else, and no more")
    assert main(["data", "append", "corpus", "--data", "more.txt"]) == 2
    assert "--again" in capsys.readouterr().err
    assert main(["data", "append", "corpus", "--data", "more.txt", "--again"]) == 0
    train_bpe(files(["more.txt"]), vocab_size=300, causal=True, folder="t")
    assert main(["data", "append", "corpus", "--data", "texts", "--tokenizer", "t"]) == 2
    assert "is not the tokenizer of corpus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data", "texts", "-o", "c", "--objective", "mlm"], "--tokenizer"),
        (["--data", "texts", "-o", "c", "--tokenizer", "train_bpe"], "--objective"),
        (["-o", "c", *TRAIN], "--data"),
        (["--data", "texts", "-o", "c", *TRAIN, "--shard-index", "1"], "--num-shards"),
        (["--data", "texts", "-o", "c", *TRAIN, "--shard-index", "0", "--num-shards", "2"], "--tokenizer"),
        (["--data", "texts", "-o", "c", *TRAIN, "--validation-fraction", "2"], "--validation-fraction"),
        (["--data", "texts", "-o", "c", *TRAIN, "--threads", "-2"], "--threads"),
        (["--data", "texts", "-o", "c", "--tokenizer", "train_bpe:vocab=3", "--objective", "mlm"], "vocab_size"),
        (["--data", "texts", "-o", "c", "--tokenizer", "train_bep", "--objective", "mlm"], "train_bpe"),
        (["--data", "texts", "-o", "c", "--tokenizer", "texts", "--objective", "mlm"], "tokenizer.json"),
        (["--data", "texts", "-o", "more.txt", *TRAIN], "--output"),
        (["--merge", "-o", "nothing"], "nothing"),
    ],
)
def test_wrong_input_is_one_message_that_names_the_option(text, capsys, words, named):
    assert tokenize(*words) == 2
    err = capsys.readouterr().err
    assert named in err and "Traceback" not in err
    assert not (text / "c" / "train").exists()


@pytest.mark.parametrize(
    ("line", "option"), [('{"body": "a"}', "--text-column, or count and skip such records with --on-bad-record skip"),
    ("[", "--on-bad-record skip")]
)  # fmt: skip
def test_a_bad_record_names_the_options_that_help(text, capsys, line, option):
    (text / "bad.jsonl").write_text(line + "\n")
    assert tokenize("--data", "bad.jsonl", *TRAIN, "-o", "c") == 2
    assert option in capsys.readouterr().err


def test_a_bad_record_of_a_config_names_the_key_that_helps(text, capsys):
    (text / "bad.jsonl").write_text("[\n")
    source = "{_component_: torchrecipes.data.sources.files, path: bad.jsonl, on_bad_record: stop}"
    (text / "run.yaml").write_text(f"data:\n  source: {source}\n")
    assert tokenize("--config", "run.yaml", *TRAIN, "-o", "c") == 2
    err = capsys.readouterr().err
    assert "data.source.on_bad_record=skip" in err and "--on-bad-record" not in err


def test_token_files_of_a_config_are_left_as_they_are(text, capsys):
    (text / "tokens.bin").write_bytes(bytes(64))
    tokens = "{_component_: torchrecipes.data.token_files.nanogpt_tokens, path: tokens.bin}"
    (text / "run.yaml").write_text(f"data:\n  source: {tokens}\n")
    assert tokenize("--config", "run.yaml", *TRAIN, "-o", "c") == 2
    assert "tokenized already" in capsys.readouterr().err


def test_a_causal_tokenizer_for_masked_models_points_to_the_objective(text, capsys):
    train_bpe(files(["texts"]), vocab_size=300, causal=True, folder="t")
    assert tokenize("--data", "texts", "--tokenizer", "t", "--objective", "mlm", "-o", "c") == 2
    assert "--objective causal" in capsys.readouterr().err
