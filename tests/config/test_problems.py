"""Mistakes in a config: all are reported at once, each with its line, key, code and remedy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from torchrecipes.config import MISSING, Component, MayChange, Range, Steps, component, load
from torchrecipes.config.metadata import Formerly
from torchrecipes.errors import UserError


@dataclass
class Data:
    folder: str = "x"
    share: float = 0.5

    def check(self):
        return [] if self.share <= 1 else [UserError("it is more than 1", key="share", code="too_much")]


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
    save_every: MayChange[Steps | None] = 5
    rows: Steps | Literal["auto"] = "auto"
    ratios: list[Annotated[float, Range(0, 1, closed_above=False)]] = field(default_factory=list)

    def check(self):
        return [UserError("both are set", key="epochs", code="both")] if self.max_steps and self.epochs else []


def problems(config: str | Path | None, *overrides: str) -> list[tuple[str, str, str]]:
    """The place, key and code of each mistake, as the error lists them."""
    with pytest.raises(UserError) as caught:
        load(Config, config, overrides)
    assert caught.value.code == "invalid_config"
    _, *lines = str(caught.value).split("\n")
    found = caught.value.problems
    assert len(lines) == len(found)
    assert all(line.endswith(f": {error}") for line, error in zip(lines, found, strict=True))
    places = [line.strip().removesuffix(f": {error}") for line, error in zip(lines, found, strict=True)]
    return [(place, error.key, error.code) for place, error in zip(places, found, strict=True)]


def in_file(folder: Path, text: str, *overrides: str) -> list[tuple[str, str, str]]:
    path = folder / "my.yaml"
    path.write_text(text)
    return [(place.replace(f"{path}:", "my.yaml:"), key, code) for place, key, code in problems(path, *overrides)]


def hint(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(Config, None, ["output_dir=x", *overrides])
    return caught.value.problems[0].hint


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
save_every: 0
"""
    assert in_file(tmp_path, text, "mode=atuo", "flags=true", "novalue") == [
        ("my.yaml:1", "output_dir", "missing_key"),
        ("my.yaml:2", "sed", "unknown_key"),
        ("my.yaml:3", "learning_rate", "wrong_type"),
        ("my.yaml:4", "flag", "ambiguous_word"),
        ("my.yaml:6", "data.fodler", "unknown_key"),
        ("my.yaml:7", "data.share", "wrong_type"),
        ("my.yaml:9", "seed", "duplicate_key"),
        ("my.yaml:11", "optimizer._component_", "unknown_component"),
        ("my.yaml:12", "names", "wrong_type"),
        ("my.yaml:13", "save_every", "out_of_range"),
        ("override 'mode=atuo'", "mode", "wrong_type"),
        ("override 'flags=true'", "flags", "unknown_key"),
        ("override 'novalue'", None, "bad_override"),
    ]


@pytest.mark.parametrize(
    ("line", "key", "code"),
    [
        ("seed: 1.5", "seed", "wrong_type"),
        ("seed: true", "seed", "wrong_type"),
        ("seed: 10m", "seed", "wrong_type"),
        ("seed: 1e-3", "seed", "wrong_type"),
        ("seed: .inf", "seed", "wrong_type"),
        ("seed:", "seed", "wrong_type"),
        ("seed: {a: 1}", "seed", "wrong_type"),
        ("learning_rate: true", "learning_rate", "wrong_type"),
        ("flag: 1", "flag", "wrong_type"),
        ("flag: 'true'", "flag", "wrong_type"),
        ("flag: yes", "flag", "ambiguous_word"),
        ("output_dir: 5", "output_dir", "wrong_type"),
        ("output_dir: null", "output_dir", "wrong_type"),
        ("output_dir: ???", "output_dir", "missing_key"),
        ("output_dir: None", "output_dir", "ambiguous_word"),
        ("seed: 010", "seed", "ambiguous_word"),
        ("seed: 1:30", "seed", "ambiguous_word"),
        ("names: [a, 5]", "names.1", "wrong_type"),
        ("names: [a, on]", "names.1", "ambiguous_word"),
        ("pair: [1]", "pair", "wrong_type"),
        ("pair: [1, x]", "pair.1", "wrong_type"),
        ("count_or_text: x", "count_or_text", "wrong_type"),
        ("data: 5", "data", "wrong_type"),
        ("data: null", "data", "wrong_type"),
        ("data: {share: 2}", "data.share", "too_much"),
        ("{seed: 1, [a]: 2}", None, "bad_key"),
        ("<<: {seed: 1}", None, "bad_key"),
        ("seed: !!python/name:os.system", "seed", "yaml_tag"),
        ("data: ${nowhere}", "data", "bad_interpolation"),
        ("output_dir: ???\nnames: [a, '${output_dir}']", "output_dir", "missing_key"),
        ("output_dir: ${", "output_dir", "bad_interpolation"),
        ("share: 1", "share", "unknown_key"),
        ("text: 1", "text", "unknown_key"),
        ("banana: 1", "banana", "unknown_key"),
        ("max_steps: 1\nepochs: 1", "epochs", "both"),
        ("save_every: 0", "save_every", "out_of_range"),
        ("save_every: x", "save_every", "wrong_type"),
        ("rows: 0", "rows", "out_of_range"),
        ("rows: many", "rows", "wrong_type"),
        ("ratios: [0.5, 1]", "ratios.1", "out_of_range"),
        ("ratios: [-0.1]", "ratios.0", "out_of_range"),
    ],
)
def test_one_problem_in_a_file(tmp_path, line, key, code):
    has_output_dir = "output_dir" in line
    found = in_file(tmp_path, line, *([] if has_output_dir else ["output_dir=x"]))
    place = f"my.yaml:{1 + line.count(chr(10)) * (key == 'epochs')}"
    assert found == [(place, key, code)]


def test_values_within_their_range_are_taken(tmp_path):
    config = load(Config, None, ["output_dir=x", "save_every=null", "rows=1", "ratios=[0, 0.99]"])
    assert (config.save_every, config.rows, config.ratios) == (None, 1, [0.0, 0.99])


def test_an_optional_key_out_of_range_says_that_null_is_off():
    assert "null" in hint("save_every=0")
    assert "null" not in hint("rows=0")


@pytest.mark.parametrize("text", ["names: &n [a]\nseed: 1", "names: [a]\ncount_or_text: *n", "names: &n [*n]"])
def test_aliases_and_anchors_are_refused_at_their_line(tmp_path, text):
    line = next(number for number, line in enumerate(text.split("\n"), start=1) if "&" in line or "*" in line)
    assert in_file(tmp_path, f"output_dir: x\n{text}") == [(f"my.yaml:{line + 1}", None, "yaml_alias")]
    assert [code for *_, code in problems(None, "output_dir=x", "names=[&a b, *a]")] == ["yaml_alias"]


def test_deep_nesting_is_refused(tmp_path):
    assert in_file(tmp_path, "output_dir: x\nnames: " + "[" * 3000 + "]" * 3000) == [
        ("my.yaml:2", None, "invalid_yaml")
    ]


@pytest.mark.parametrize("first", ["[x, x, x, x]", "xxxx"])
def test_an_interpolation_that_grows_without_bound_is_refused(tmp_path, first):
    is_list = first.startswith("[")
    lines = ["output_dir: ${k30}", f"k0: {first}"]
    for n in range(1, 31):
        both = f"${{k{n - 1}}}"
        lines.append(f"k{n}: [{both!r}, {both!r}]" if is_list else f"k{n}: {both}{both}")
    found = in_file(tmp_path, "\n".join(lines))
    assert ("my.yaml:1", "output_dir", "bad_interpolation") in found


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("share=1", "data.share"),
        ("text=1", "optimizer.text"),
        ("banana=1", "count_or_text, data, epochs, flag, learning_rate"),
        ("LearningRate=1", "learning_rate"),
        ("mode=nevr", "'never'"),
        ("data.shares=1", "'share'"),
        ("optimizer._component_=torchrecipes.config.scalars.red_number", "'read_number'"),
    ],
)
def test_the_hint_names_the_closest_valid_name(override, suggestion):
    assert suggestion in hint(override)


@pytest.mark.parametrize(
    ("override", "key", "code"),
    [
        ("seed", None, "bad_override"),
        ("=1", None, "bad_override"),
        ("seed =1", None, "bad_override"),
        ("data..share=1", None, "bad_override"),
        ("--seed=1", None, "bad_override"),
        ("--seed", None, "bad_override"),
        ("seed=", None, "bad_override"),
        ("seed=abc", "seed", "wrong_type"),
        ("seed=on", "seed", "ambiguous_word"),
        ("names=[a", "names", "invalid_yaml"),
        ("names=[*.txt]", "names", "invalid_yaml"),
        ("names=[[a]*.txt]", "names", "invalid_yaml"),
        ("names.0=a", None, "unknown_key"),
        ("names.x=a", None, "unknown_key"),
        ("seed.x=1", None, "unknown_key"),
        ("data.shares=1", "data.shares", "unknown_key"),
        ("optimzer.text=1", "optimzer", "unknown_key"),
        ("data={folder: x, folder: y}", "data.folder", "duplicate_key"),
    ],
)
def test_one_problem_in_an_override(override, key, code):
    assert problems(None, "output_dir=x", override) == [(f"override '{override}'", key, code)]


@pytest.mark.parametrize(
    ("text", "line", "code"),
    [
        ("", 1, "not_a_config"),
        ("# only a comment\n", 1, "not_a_config"),
        ("just text", 1, "not_a_config"),
        ("- a\n- b\n", 1, "not_a_config"),
        ("seed: 1\n\tflag: true\n", 2, "invalid_yaml"),
        ("data:\n\tshare: 1\n", 2, "invalid_yaml"),
        ("seed: 1\nnames: [a\n", 3, "invalid_yaml"),
        ("names: *.txt\n", 1, "invalid_yaml"),
        ("output_dir: @x\n", 1, "invalid_yaml"),
        ("output_dir: a: b\n", 1, "invalid_yaml"),
        ("seed: 1\n---\nseed: 2\n", 2, "invalid_yaml"),
        ("seed: 1\n  flag: true\n", 2, "invalid_yaml"),
    ],
)
def test_a_file_that_is_no_config_gives_one_message(tmp_path, text, line, code):
    assert in_file(tmp_path, text) == [(f"my.yaml:{line}", None, code)]


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "my.yaml").write_text("output_dir: x\n", encoding="utf-8-sig")
    assert load(Config, tmp_path / "my.yaml").output_dir == "x"


def test_a_broken_file_and_a_broken_override_are_reported_together(tmp_path):
    assert len(in_file(tmp_path, "seed: [", "flag")) == 2


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("mine.yaml", "my.yaml"),
        ("sub/my.yaml", "family/size"),
        ("folder", "family/size"),
        ("latin.yaml", "latin.yaml"),
        ("famly/size", "'family/size'"),
        ("size", "'family/size'"),
        ("banana", "family/size"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, monkeypatch, name, suggestion):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("seed: 1\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: \xe4\n")
    (tmp_path / "shipped" / "configs" / "family").mkdir(parents=True)
    (tmp_path / "shipped" / "configs" / "family" / "size.yaml").write_text("")
    monkeypatch.setattr("torchrecipes.config.catalog.recipes_folder", lambda: tmp_path / "shipped")
    with pytest.raises(UserError) as caught:
        load(Config, name)
    assert name in caught.value.problem and suggestion in str(caught.value)


def test_without_a_file_a_missing_key_says_so():
    assert problems(None) == [("no config", "output_dir", "missing_key")]
    assert "output_dir=" in hint("output_dir=???")


def test_the_line_of_a_check_is_that_of_its_key(tmp_path):
    assert in_file(tmp_path, "output_dir: x\nmax_steps: 5\nepochs: 1\n") == [("my.yaml:3", "epochs", "both")]
    found = in_file(tmp_path, "output_dir: x\nmax_steps: 5\n", "epochs=1")
    assert found == [("override 'epochs=1'", "epochs", "both")]


def test_checks_run_beside_unknown_keys(tmp_path):
    assert len(in_file(tmp_path, "output_dir: x\nmax_steps: 5\nepochs: 1\nsed: 1\n")) == 2


def test_a_config_for_another_recipe_says_so(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("# recipe: causal\nwindow: 1\n")
    with pytest.raises(UserError) as caught:
        load(Config, path, recipe="folder/masked.py")
    title = str(caught.value).split("\n")[0]
    assert "'causal'" in title and "'masked'" in title and len(caught.value.problems) == 2


def test_a_check_after_loading_adds_to_the_same_list(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("output_dir: x\noptimizer:\n  text: 5k\nseed: 1\n")
    errors = [
        UserError("it is odd", key="seed", code="odd"),
        UserError("one", key="optimizer.text"),
        UserError("two", key="optimizer.base"),
    ]
    with pytest.raises(UserError) as caught:
        load(Config, path, check=lambda config: errors if config.seed == 1 else [])
    assert [error.key for error in caught.value.problems] == ["optimizer.base", "optimizer.text", "seed"]
    lines = str(caught.value).split("\n")[1:]
    assert [line.rsplit("my.yaml:")[1].split(":")[0] for line in lines] == ["2", "3", "4"]


def test_a_best_checkpoint_needs_an_evaluation():
    @dataclass
    class Checkpoint:
        keep_best: str | None = "loss"

    @dataclass
    class WithCheckpoint:
        eval_every: Steps | None = 5
        checkpoint: Checkpoint = field(default_factory=Checkpoint)

    assert load(WithCheckpoint, None).checkpoint.keep_best == "loss"
    with pytest.raises(UserError) as caught:
        load(WithCheckpoint, None, ["eval_every=null"])
    assert [(error.key, error.code) for error in caught.value.problems] == [("checkpoint.keep_best", "no_evaluation")]


def test_what_judges_by_a_metric_needs_evaluators_or_validation_data():
    @dataclass
    class Examples:
        validation: str | None = None
        validation_fraction: float = 0.0

    @dataclass
    class Classify:
        early_stopping: str | None = "loss"
        eval_every: Steps | None = 5
        data: Examples = field(default_factory=Examples)

    @dataclass
    class Contrast(Classify):
        evaluators: dict[str, str] = field(default_factory=dict)

    for schema, *overrides in ((Classify,), (Contrast, "data.validation_fraction=0.1")):
        with pytest.raises(UserError) as caught:
            load(schema, None, overrides)
        assert [(error.key, error.code) for error in caught.value.problems] == [("early_stopping", "no_evaluation")]
    load(Classify, None, ["data.validation_fraction=0.1"])
    load(Contrast, None, ["evaluators={a: b}"])


@dataclass
class Packed:
    packing: Annotated[Literal["concat", "none"], Formerly(((True, "concat"), (False, "none")))] = "concat"


@pytest.mark.parametrize(("old", "new"), [("true", "concat"), ("false", "none")])
def test_a_value_of_an_earlier_version_is_refused_with_the_one_to_write(old, new):
    assert load(Packed, None, [f"packing={new}"]).packing == new
    with pytest.raises(UserError) as caught:
        load(Packed, None, [f"packing={old}"])
    (error,) = caught.value.problems
    assert (error.key, error.code) == ("packing", "wrong_type") and new in error.hint
