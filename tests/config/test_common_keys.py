"""What is said when something is wrong with a config: all of it at once, each with its place and its remedy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from torchrecipes.config import MISSING, Component, component, load
from torchrecipes.errors import UserError


@dataclass
class Data:
    folder: str = "x"
    share: float = 0.5

    def check(self):
        return [] if self.share <= 1 else [f"share is {self.share}: it must not be more than 1"]


@dataclass
class Config:
    output_dir: str = MISSING
    seed: int = 0
    learning_rate: float = 1e-3
    flag: bool = False
    mode: Literal["auto", "never"] = "auto"
    names: list[str] = field(default_factory=list)
    pair: tuple[int, int] = (1, 2)
    count_or_text: int | list[int] = 1
    data: Data = field(default_factory=Data)
    optimizer: Component = component("torchrecipes.config.scalars.read_number", text="1")
    max_steps: int | None = None
    epochs: float | None = None

    def check(self):
        return ["epochs and max_steps are both set: keep one"] if self.max_steps and self.epochs else []


def problems(config: str | Path | None, *overrides: str) -> list[str]:
    """The lines of the error, without its title."""
    with pytest.raises(UserError) as caught:
        load(Config, config, overrides)
    title, *lines = str(caught.value).split("\n")
    count = "one problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert title.endswith(f": {count}")
    return [line.strip() for line in lines]


def in_file(folder: Path, text: str, *overrides: str) -> list[str]:
    path = folder / "my.yaml"
    path.write_text(text)
    return [line.replace(f"{path}:", "my.yaml:") for line in problems(path, *overrides)]


def test_everything_is_reported_at_once_sorted_by_line(tmp_path):
    text = """\
# a comment
sed: 1
learning_rate: fast
flag: on
data:
  fodler: y
  share: [1]
seed: 1
seed: 2
optimizer:
  _component_: torchrecipes.config.scalars.red_number
names: one
"""
    assert in_file(tmp_path, text, "mode=atuo", "flags=true", "novalue") == [
        "my.yaml:1: output_dir: missing key (text): add it to the config, or output_dir=... to the command",
        "my.yaml:2: unknown key 'sed': did you mean 'seed'?",
        "my.yaml:3: learning_rate: expected a number, got the text 'fast' "
        "(a number may be written 10000, 10_000, 10k, 2.5M, 10B or 1e-3)",
        "my.yaml:4: flag: on is true to YAML: write true, or 'on' in quotes for text",
        "my.yaml:6: unknown key 'data.fodler': did you mean 'folder'?",
        "my.yaml:7: data.share: expected a number, got a list",
        "my.yaml:9: the key 'seed' is given twice, first in my.yaml:8: remove one",
        "my.yaml:11: optimizer._component_: torchrecipes.config.scalars has no 'red_number': "
        "did you mean 'read_number'?",
        "my.yaml:12: names: expected a list, each element text, got the text 'one': write [...] around it",
        "override 'mode=atuo': mode: expected one of 'auto', 'never', got the text 'atuo': did you mean 'auto'?",
        "override 'flags=true': unknown key 'flags': did you mean 'flag'?",
        "override 'novalue': not an override: write key=value or nested.key=value, without spaces around the =",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: 1.5", "seed: expected a whole number, got the number 1.5"),
        ("seed: true", "seed: expected a whole number, got true"),
        ("seed: 10m", "seed: expected a whole number, got the text '10m' (a number may be written"),
        ("seed: 1e-3", "seed: expected a whole number, got the number 0.001"),
        ("seed: .inf", "seed: expected a whole number, got the number inf"),
        ("seed:", "seed: expected a whole number, got nothing (null); this key cannot be off"),
        ("seed: {a: 1}", "seed: expected a whole number, got a mapping"),
        ("learning_rate: true", "learning_rate: expected a number, got true"),
        ("flag: 1", "flag: expected true or false, got the number 1"),
        ("flag: 'true'", "flag: expected true or false, got the text 'true'"),
        ("flag: yes", "flag: yes is true to YAML: write true"),
        ("output_dir: 5", "output_dir: expected text, got the number 5: put it in quotes if text is meant"),
        ("output_dir: null", "output_dir: expected text, got nothing (null); this key cannot be off"),
        ("output_dir: ???", "output_dir: missing key (text)"),
        ("output_dir: None", "output_dir: None is text to YAML: write null to switch off, or 'None' in quotes"),
        ("seed: 010", "seed: 010 is an octal number to YAML: write 10"),
        ("seed: 1:30", "seed: 1:30 is a number in base 60 to YAML: write the number in full"),
        ("names: [a, 5]", "names.1: expected text, got the number 5"),
        ("names: [a, on]", "names.1: on is true to YAML"),
        ("pair: [1]", "pair: expected a list of 2 values, got 1 values"),
        ("pair: [1, x]", "pair.1: expected a whole number, got the text 'x'"),
        (
            "count_or_text: x",
            "count_or_text: expected a whole number or a list, each element a whole number, got the text",
        ),
        ("data: 5", "data: expected a mapping of keys to values, got the number 5"),
        ("data: null", "data: expected a mapping of keys to values, got nothing (null); this key cannot be off"),
        ("data: {share: 2}", "share is 2.0: it must not be more than 1"),
        ("{seed: 1, [a]: 2}", "the config: a key must be one word"),
        ("<<: {seed: 1}", "merge keys (<<) are not supported"),
        ("seed: !!python/name:os.system", "the YAML tag tag:yaml.org,2002:python/name:os.system is not allowed"),
        ("names: &n [*n]", "names.0: this alias refers to what it is a part of"),
        ("data: ${nowhere}", "data: Interpolation key 'nowhere' not found"),
        ("output_dir: ???\nnames: [a, '${output_dir}']", "output_dir: missing key (text)"),
        ("output_dir: ${", "output_dir: "),
        ("share: 1", "unknown key 'share': did you mean 'data.share'?"),
        ("text: 1", "unknown key 'text': did you mean 'optimizer.text'?"),
        ("banana: 1", "unknown key 'banana': the keys are: count_or_text, data, epochs, flag, learning_rate"),
        ("Learning-Rate: 1", "unknown key 'Learning-Rate': did you mean 'learning_rate'?"),
        ("max_steps: 1\nepochs: 1", "epochs and max_steps are both set: keep one"),
    ],
)
def test_one_problem_in_a_file(tmp_path, line, message):
    has_output_dir = "output_dir" in line
    found = in_file(tmp_path, line, *([] if has_output_dir else ["output_dir=x"]))
    assert len(found) == 1, found
    assert message in found[0]
    assert found[0].startswith(("my.yaml:1: ", "my.yaml:2: "))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "not an override: write key=value"),
        ("=1", "not an override: write key=value"),
        ("seed =1", "not an override: write key=value or nested.key=value, without spaces"),
        ("data..share=1", "not an override"),
        ("--seed=1", "not an override: write seed=1, without dashes"),
        ("--seed", "not an override: write seed=VALUE, without dashes"),
        ("seed=", "no value: write seed=null to switch off, or seed=\"''\" for empty text"),
        ("seed=abc", "seed: expected a whole number, got the text 'abc'"),
        ("seed=on", "seed: on is true to YAML"),
        ("names=[a", "the value is not valid YAML"),
        ("names=[*.txt]", "put text that begins with * or & in quotes"),
        ("names=[[a]*.txt]", "the value is not valid YAML"),
        ("names.0=a", "names is a list that has 0 elements, counted from 0: to replace it write names=[...]"),
        ("names.x=a", "names is a list that has 0 elements"),
        ("seed.x=1", "seed is 0, which has no keys of its own"),
        ("data.shares=1", "unknown key 'data.shares': did you mean 'share'?"),
        ("optimzer.text=1", "unknown key 'optimzer': did you mean 'optimizer'?"),
        ("data={a: 1, a: 2}", "the key 'data.a' is given twice"),
    ],
)
def test_one_problem_in_an_override(override, message):
    found = problems(None, "output_dir=x", override)
    assert found[0].startswith(f"override '{override}': ")
    assert message in found[0]
    assert len(found) == (2 if override == "data={a: 1, a: 2}" else 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "my.yaml:1: the file is empty: expected lines of `key: value`"),
        ("# only a comment\n", "my.yaml:1: the file is empty"),
        ("just text", "my.yaml:1: this is not a config"),
        ("- a\n- b\n", "my.yaml:1: this is not a config"),
        ("seed: 1\n\tflag: true\n", "my.yaml:2: not valid YAML: "),
        ("data:\n\tshare: 1\n", "(indent with spaces, not tabs)"),
        ("seed: 1\nnames: [a\n", "my.yaml:3: not valid YAML"),
        ("names: *.txt\n", "not valid YAML"),
        ("output_dir: @x\n", "put text that begins with a special character in quotes"),
        (
            "output_dir: a: b\n",
            "my.yaml:1: not valid YAML: mapping values are not allowed here (put text that contains ': '",
        ),
        ("seed: 1\n---\nseed: 2\n", "keep one config in a file"),
        ("seed: 1\n  flag: true\n", "my.yaml:2: not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_gives_one_message(tmp_path, text, message):
    found = in_file(tmp_path, text)
    assert len(found) == 1
    assert message in found[0]


def test_a_broken_file_and_a_broken_override_are_reported_together(tmp_path):
    assert len(in_file(tmp_path, "seed: [", "flag")) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.yaml", "There is no config file mine.yaml here. Did you mean my.yaml?"),
        ("sub/my.yaml", "There is no config file sub/my.yaml here."),
        ("folder", "folder is a folder: --config takes a YAML file."),
        ("latin.yaml", "Cannot read the config file latin.yaml: it is not UTF-8 text."),
        ("famly/size", "There is no config 'famly/size'. Did you mean 'family/size'? (All of them: tune-style ls)"),
        ("size", "There is no config 'size'. Did you mean 'family/size'?"),
        ("banana", "There is no config 'banana'. The configs that are shipped: family/size."),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("seed: 1\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: \xe4\n")
    (tmp_path / "shipped" / "configs" / "family").mkdir(parents=True)
    (tmp_path / "shipped" / "configs" / "family" / "size.yaml").write_text("")
    monkeypatch.setattr("torchrecipes.config.catalog.recipes_folder", lambda: tmp_path / "shipped")
    with pytest.raises(UserError) as caught:
        load(Config, name)
    assert str(caught.value).startswith(message)


def test_without_a_file_a_missing_key_says_how_to_give_it():
    assert problems(None) == [
        "no config: output_dir: missing key (text): add it to the config, or output_dir=... to the command"
    ]


def test_the_line_of_a_check_is_that_of_the_first_key_it_names(tmp_path):
    found = in_file(tmp_path, "output_dir: x\nmax_steps: 5\nepochs: 1\n")
    assert found == ["my.yaml:3: epochs and max_steps are both set: keep one"]
    found = in_file(tmp_path, "output_dir: x\nmax_steps: 5\n", "epochs=1")
    assert found == ["override 'epochs=1': epochs and max_steps are both set: keep one"]


def test_checks_run_beside_unknown_keys(tmp_path):
    assert len(in_file(tmp_path, "output_dir: x\nmax_steps: 5\nepochs: 1\nsed: 1\n")) == 2


def test_a_config_for_another_recipe_says_so(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("# recipe: causal\nwindow: 1\n")
    with pytest.raises(UserError) as caught:
        load(Config, path, recipe="folder/masked.py")
    assert "my.yaml (written for the recipe 'causal', used with 'masked'): 2 problems" in str(caught.value)
