import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchrecipes.config import MISSING, Component, component, load, to_yaml

HERE = __name__


class Color(Enum):
    red = 1
    blue = 2


def train(size: int, name: str = "x", parts: Any = None, inner: Any = None):
    return size


@dataclass
class Data:
    folder: Path = Path("x")
    share: float = 0.5


@dataclass
class Config:
    output_dir: str = MISSING
    seed: int = 0
    text: str = ""
    anything: Any = None
    pair: tuple[int, float] = (1, 2.0)
    color: Color = Color.red
    flag: bool = True
    table: dict[str, float] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    optimizer: Component = component(f"{HERE}.train", size=3)
    writers: list[Component] = component()
    off: Component | None = None


def test_every_value_has_its_provenance(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(f"output_dir: runs/x\ndata:\n  share: 1\nwriters:\n- _component_: {HERE}.train\n  size: 10k\n")
    config = load(Config, path, ["seed=7", "optimizer.name=on it"])
    lines = [line.replace(f"{path}:", "my.yaml:") for line in to_yaml(config).splitlines()]
    assert [tuple(part.rstrip() for part in line.split("  # ")) for line in lines] == [
        ("output_dir: runs/x", "my.yaml:1"),
        ("seed: 7", "override"),
        ('text: ""', "default"),
        ("anything: null", "default"),
        ("pair: [1, 2.0]", "default"),
        ("color: red", "default"),
        ("flag: true", "default"),
        ("table: {}", "default"),
        ("data:",),
        ("  folder: x", "default"),
        ("  share: 1.0", "my.yaml:3"),
        ("optimizer:",),
        (f"  _component_: {HERE}.train", "default"),
        ("  size: 3", "default"),
        ("  name: on it", "override"),
        ("writers:",),
        (f"  - _component_: {HERE}.train", "my.yaml:5"),
        ("    size: 10000", "my.yaml:6"),
        ('"off": null', "default"),
    ]


TEXTS = [
    "plain",
    "two words",
    "~/data/my file.txt",
    "a/b-c_d.1",
    "on",
    "None",
    "null",
    "~",
    "1:30",
    "010",
    "5",
    "1e-3",
    "10B",
    "2024-01-05",
    "",
    " padded ",
    "a: b",
    "a #b",
    "*.txt",
    "- x",
    "[x]",
    "{x}",
    "'quoted'",
    'say "x"',
    "two\nlines\n",
    "tab\t",
    "back\\slash",
    "${seed}",
    "Zürich 😀 \x85 \u2028 \x7f",
    "x" * 500,
    "key:",
    "?",
    "!tag",
    "%",
    "@",
    "???x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tmp_path, text):
    config = load(Config, None, ["output_dir=x"])
    config.text = text
    config.anything = [text, {"key of it": text, text: [text]}]
    config.table = {text: 1.0}
    path = tmp_path / "out.yaml"
    path.write_text(to_yaml(config))
    again = load(Config, path)
    assert (again.text, again.anything, again.table) == (text, config.anything, config.table)


@pytest.mark.parametrize("number", [0, -5, 10**15, 1e-5, 1e300, 0.1, -2.5e-10, math.inf, -math.inf, 3.0, True, None])
def test_numbers_survive_the_round_trip(tmp_path, number):
    config = load(Config, None, ["output_dir=x"])
    config.anything = [number, [number, []]]
    path = tmp_path / "out.yaml"
    path.write_text(to_yaml(config))
    again = load(Config, path).anything
    assert again == [number, [number, []]]
    assert type(again[0]) is type(number)
    assert math.isnan(yaml.safe_load(to_yaml(Config(anything=math.nan)))["anything"])


def test_a_full_config_survives_the_round_trip(tmp_path):
    overrides = [
        "output_dir=runs/${seed}",
        "seed=10k",
        "pair=[3, 1e-3]",
        "color=blue",
        "table={a: 1, b: 2}",
        "data.folder=~/x",
        f"optimizer={{_component_: {HERE}.train, size: 1, parts: [[1, 2], {{a: [b, {{c: d}}]}}]}}",
        f"optimizer.inner={{_component_: {HERE}.train, size: 2}}",
        f"writers=[{{_component_: {HERE}.train, size: 1}}, {{_component_: {HERE}.train, size: 2, parts: []}}]",
        f"off={{_component_: {HERE}.train, size: 4}}",
    ]
    config = load(Config, None, overrides)
    path = tmp_path / "out.yaml"
    path.write_text(to_yaml(config))
    again = load(Config, path)
    assert again == config
    assert "# default" not in to_yaml(again)  # all of it is from the file now
    values = [line.split("  #")[0].rstrip() for line in to_yaml(config).splitlines()]
    assert [line.split("  #")[0].rstrip() for line in to_yaml(again).splitlines()] == values


def test_a_value_that_the_recipe_changed_says_so():
    config = load(Config, None, ["output_dir=x", "seed=1"])
    config.seed = 2
    config.optimizer.args["size"] = 9
    lines = to_yaml(config).splitlines()
    assert [line.split("#")[1].strip() for line in lines if "seed" in line or "size" in line] == ["set in code"] * 2
    assert "# override" in next(line for line in lines if line.startswith("output_dir"))


def test_a_config_that_was_never_loaded_can_be_written():
    assert yaml.safe_load(to_yaml(Config(output_dir="x")))["optimizer"] == {"_component_": f"{HERE}.train", "size": 3}
    assert "output_dir: ???" in to_yaml(Config()) or 'output_dir: "???"' in to_yaml(Config())


def test_an_interpolation_stays_one_so_that_no_secret_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHRECIPES_TEST_SECRET", "hunter2")
    path = tmp_path / "my.yaml"
    path.write_text(
        "output_dir: runs/${data.folder}\ndata: {folder: '${oc.env:TORCHRECIPES_TEST_SECRET}'}\n"
        f"optimizer: {{_component_: {HERE}.train, size: 1, parts: [a, '${{output_dir}}'], inner: '${{data}}'}}\n"
        "seed: ${oc.decode:${oc.env:TORCHRECIPES_TEST_SEED,3}}\n"
    )
    config = load(Config, path)
    assert config.output_dir == "runs/hunter2" and config.optimizer.args["parts"] == ["a", "runs/hunter2"]
    text = to_yaml(config)
    assert "hunter2" not in text
    assert yaml.safe_load(text)["data"]["folder"] == "${oc.env:TORCHRECIPES_TEST_SECRET}"
    assert yaml.safe_load(text)["seed"] == 3  # a number is a setting, which a resumed run compares
    path.write_text(text)
    assert load(Config, path) == config
    config.output_dir = "elsewhere"  # by the recipe
    assert yaml.safe_load(to_yaml(config))["output_dir"] == "elsewhere"
