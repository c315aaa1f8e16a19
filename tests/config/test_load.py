"""What a config becomes when nothing is wrong with it."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from torchrecipes.config import MISSING, Component, component, load, parse
from torchrecipes.errors import UserError


class Color(Enum):
    red = 1
    blue = 2


@dataclass
class Nested:
    share: float = 0.5
    names: list[str] = field(default_factory=list)


@dataclass
class Guard:
    patience: int = 3
    factor: float = 2.0


@dataclass
class Config:
    output_dir: str = MISSING
    seed: int = 0
    lr: float = 1e-3
    flag: bool = False
    tokens: int | None = None
    path: Path | None = None
    mode: Literal["auto", "never", 3] = "auto"
    color: Color = Color.red
    betas: tuple[float, float] = (0.9, 0.99)
    sizes: tuple[int, ...] = ()
    table: dict[str, float] = field(default_factory=dict)
    text_or_list: str | list[str] = "one"
    number_or_text: int | str = 1
    anything: Any = None
    nested: Nested = field(default_factory=Nested)
    bare: Nested = MISSING  # must be in the config
    guard: Guard | None = None
    made: str = field(default="by the recipe", init=False)


@dataclass
class WithBareNested:
    nested: Nested
    seed: int = 1


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def read(folder: Path, text: str, *overrides: str) -> Config:
    return load(Config, write(folder, f"output_dir: runs/x\nbare: {{}}\n{text}"), list(overrides))


def test_defaults_stay(tmp_path):
    config = read(tmp_path, "")
    expected = Config(output_dir="runs/x", bare=Nested())
    assert config == expected
    assert type(config) is Config
    assert config.nested.names is not Config().nested.names


@pytest.mark.parametrize(
    ("yaml_value", "key", "value"),
    [
        ("10k", "seed", 10_000),
        ("10B", "tokens", 10_000_000_000),
        ("10_000", "seed", 10_000),
        ("1e6", "seed", 1_000_000),
        ("3.0", "seed", 3),
        ("2.5M", "tokens", 2_500_000),
        ("'12'", "seed", 12),
        ("null", "tokens", None),
        ("", "tokens", None),
        ("1e-3", "lr", 0.001),
        ("1", "lr", 1.0),
        ("5k", "lr", 5000.0),
        ("true", "flag", True),
        ("some text", "output_dir", "some text"),
        ("'1:30'", "output_dir", "1:30"),
        ('"None"', "output_dir", "None"),
        ("|-\n  two\n  lines", "output_dir", "two\nlines"),
        ("~/data", "path", Path("~/data")),
        ("never", "mode", "never"),
        ("3", "mode", 3),
        ("blue", "color", Color.blue),
        ("2", "color", Color.blue),
        ("[0.8, 1]", "betas", (0.8, 1.0)),
        ("[1, 2k, 3]", "sizes", (1, 2000, 3)),
        ("{a: 1, b: 2e-1}", "table", {"a": 1.0, "b": 0.2}),
        ("two", "text_or_list", "two"),
        ("[a, b]", "text_or_list", ["a", "b"]),
        ("5", "number_or_text", 5),
        ("5k", "number_or_text", "5k"),
        ("[1, {a: x}]", "anything", [1, {"a": "x"}]),
        ("{share: 1}", "nested", Nested(share=1.0)),
        ("{patience: 5}", "guard", Guard(patience=5)),
        ("{}", "guard", Guard()),
    ],
)
def test_values_get_the_type_of_their_key(tmp_path, yaml_value, key, value):
    path = write(tmp_path, f"{key}: {yaml_value}\n")
    others = [text for name, text in {"output_dir": "output_dir=x", "bare": "bare={}"}.items() if name != key]
    config = load(Config, path, others)
    assert getattr(config, key) == value
    assert type(getattr(config, key)) is type(value)


def test_a_nested_dataclass_needs_no_default():
    assert load(WithBareNested, None) == WithBareNested(Nested())
    assert load(WithBareNested, None, ["nested.share=0.1"]).nested.share == 0.1


def test_interpolation(tmp_path):
    config = read(
        tmp_path,
        "nested: {names: [a, b]}\ntext_or_list: ${nested.names}\n"
        "path: ${output_dir}/corpus\ntokens: ${seed}\nseed: 5k\nlr: ${nested.share}\nanything: \\${kept}\n",
    )
    assert config.text_or_list == ["a", "b"]
    assert config.path == Path("runs/x/corpus")
    assert config.tokens == 5000
    assert config.lr == 0.5  # of a default
    assert config.anything == "${kept}"


def test_interpolation_reads_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHRECIPES_TEST_SEED", "17")
    assert read(tmp_path, "seed: ${oc.env:TORCHRECIPES_TEST_SEED}").seed == 17


def test_the_last_override_wins(tmp_path):
    assert read(tmp_path, "seed: 1", "seed=2", "seed=3").seed == 3


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("lr=1e-3", "lr", 0.001),
        ("output_dir=a=b=c", "output_dir", "a=b=c"),
        ("output_dir=my/*.jsonl", "output_dir", "my/*.jsonl"),
        ("output_dir=*.jsonl", "output_dir", "*.jsonl"),
        ("output_dir=a: b #c", "output_dir", "a: b #c"),
        ("output_dir=!x", "output_dir", "!x"),
        ("output_dir=''", "output_dir", ""),
        ("output_dir='1:30'", "output_dir", "1:30"),
        ("text_or_list=[a,b]", "text_or_list", ["a", "b"]),
        ("tokens=null", "tokens", None),
        ("nested.share=0.25", "nested", Nested(share=0.25, names=["a"])),
        ("nested.names.0=z", "nested", Nested(names=["z"])),
        ("nested={share: 1}", "nested", Nested(share=1.0, names=["a"])),  # mappings merge
        ("guard.patience=9", "guard", Guard(patience=9)),
        ("table.new=1", "table", {"old": 0.0, "new": 1.0}),
    ],
)
def test_an_override(tmp_path, override, key, value):
    assert getattr(read(tmp_path, "nested: {names: [a]}\ntable: {old: 0}", override), key) == value


def test_the_config_file_may_be_a_shipped_name(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "configs" / "family").mkdir(parents=True)
    (tmp_path / "recipes" / "configs" / "family" / "size.yaml").write_text("seed: 8\n")
    monkeypatch.setattr("torchrecipes.config.catalog.recipes_folder", lambda: tmp_path / "recipes")
    for name in ("family/size", "family/size.yaml"):
        assert load(Config, name, ["output_dir=x", "bare={}"]).seed == 8


def test_dataclasses_may_be_frozen(tmp_path):
    frozen = dataclasses.make_dataclass("Frozen", [("seed", int, 1)], frozen=True)
    assert load(frozen, None, ["seed=2"]).seed == 2


def test_a_recipe_may_write_its_annotations_as_text(tmp_path):
    script = tmp_path / "recipe.py"
    script.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torchrecipes.config import load\n"
        "@dataclass\nclass Config:\n    seed: int | None = None\n"
        "print(load(Config, None, ['seed=1k']).seed)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "1000\n"


@dataclass
class Small:
    seed: int = 0
    model: Component = component("torchrecipes.config.scalars.read_number", text="1")


def test_parse_reads_a_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    path = write(tmp_path, "seed: 4\n")
    assert parse(Small, ["--config", str(path)]).seed == 4
    assert parse(Small, ["seed=1", "--config", str(path), "model.text=7k"]).model.args == {"text": "7k"}
    assert parse(Small, []).seed == 0
    with pytest.raises(UserError):
        parse(Small, ["sed=1"])


SCRIPT = """
from dataclasses import dataclass
from torchrecipes.config import parse
from torchrecipes.errors import UserError

@dataclass
class Config:
    what: str = "nothing"

def main(config):
    if config.what == "user": raise UserError("the corpus is gone. Look elsewhere.")
    if config.what == "bug": raise ValueError("a bug")
    if config.what == "stop": raise KeyboardInterrupt
    print("done", config.what)

if __name__ == "__main__":
    main(parse(Config))
"""


@pytest.mark.parametrize(
    ("words", "code", "message", "traceback"),
    [
        (["what=x"], 0, "", False),
        (["wht=x"], 2, "'what'", False),
        (["what=user"], 2, "the corpus is gone. Look elsewhere.", False),
        (["what=user", "--debug"], 2, "the corpus is gone", True),
        (["what=bug"], 1, "ValueError: a bug", True),
        (["what=stop"], 130, "", False),
    ],
)
def test_plain_python_on_a_recipe_reports_mistakes_as_the_cli_does(tmp_path, words, code, message, traceback):
    (tmp_path / "mine.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "mine.py", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code
    assert message in done.stderr
    assert ("Traceback" in done.stderr) == traceback
    assert ("done x" in done.stdout) == (code == 0)


def test_only_one_of_many_processes_reports_a_config_error(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    for rank, reported in (("0", True), ("3", False)):
        command = ["env", f"RANK={rank}", sys.executable, "mine.py", "wht=x"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert ("wht" in done.stderr) == reported
