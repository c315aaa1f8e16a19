"""Components: how a config names them, what is checked, and what the recipe builds."""

import inspect
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Protocol

import pytest
import torch

from torchrecipes.config import MISSING, Component, Positive, build, component, load, to_yaml
from torchrecipes.config.components import parameters, resolve
from torchrecipes.errors import UserError

HERE = __name__  # the components below are named by this module's own dotted path


class Source(Protocol):
    def parts(self) -> list: ...


class Reader:
    def __init__(self, path: str, limit: Optional[int] = None):  # noqa: UP045
        self.path, self.limit = path, limit

    @classmethod
    def small(cls, path: str = "small"):
        return cls(path, 1)


def adam(model, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: Positive = 1e-8):
    return {"adam": (model, lr, betas, eps)}


def sgd(model, lr: float, *, momentum: float = 0.0, mode: Literal["plain", "nesterov"] = "plain"):
    return {"sgd": (model, lr, momentum, mode)}


def wrapping(inner: Any, items: list = (), seed: int = 0):
    return {"wrapping": (inner, list(items), seed)}


def needs_source(source: Source, tokens: int = 1):
    return ("needs_source", source, tokens)


def swallows(name: str, **rest: Any):
    return (name, rest)


def positional(first: int, /, second: int = 2, *more: int):
    return (first, second, more)


def strange(x: "Unknown" = 1, y: int = 2):  # noqa: F821
    return (x, y)


NOT_CALLABLE = 5


@dataclass
class Config:
    optimizer: Component = component(f"{HERE}.adam", injected=("model", "seed"), lr=0.5)
    source: Component | None = component()
    writers: list[Component] = component(injected=("folder",))
    bare: Optional[Component] = None  # noqa: UP045
    others: list[Component] = field(default_factory=list)


def problem(*overrides: str, schema: type = Config) -> UserError:
    with pytest.raises(UserError) as caught:
        load(schema, None, overrides)
    (found,) = caught.value.problems
    return found


def test_defaults():
    config = load(Config, None)
    assert config == Config(Component(f"{HERE}.adam", {"lr": 0.5}), None, [], None, [])
    assert build(config.optimizer, model="m") == {"adam": ("m", 0.5, (0.9, 0.99), 1e-8)}
    assert build(config.source) is None
    # Two configs share no default.
    Config().optimizer.args["lr"] = 7
    assert Config().optimizer.args == {"lr": 0.5}


def test_arguments_are_merged_and_converted():
    config = load(Config, None, ["optimizer.betas=[0.8, 1]", "optimizer.eps=1e-6"])
    assert config.optimizer.args == {"lr": 0.5, "betas": (0.8, 1.0), "eps": 1e-6}
    assert build(config.optimizer, model="m") == {"adam": ("m", 0.5, (0.8, 1.0), 1e-6)}


def test_another_component_drops_the_arguments_of_the_former(tmp_path):
    other, same = f"optimizer._component_={HERE}.sgd", f"optimizer._component_={HERE}.adam"
    assert load(Config, None, [other, "optimizer.lr=1"]).optimizer == Component(f"{HERE}.sgd", {"lr": 1.0})
    assert load(Config, None, ["optimizer.lr=1", other]).optimizer.args == {"lr": 1.0}  # whatever the order typed
    assert load(Config, None, [same]).optimizer.args == {"lr": 0.5}
    path = tmp_path / "my.yaml"
    path.write_text(f"optimizer:\n  momentum: 0.9\n  lr: 2\n  _component_: {HERE}.sgd\n")
    assert load(Config, path).optimizer.args == {"momentum": 0.9, "lr": 2.0}
    assert load(Config, path, [f"optimizer={{_component_: {HERE}.adam}}"]).optimizer.args == {}
    assert problem(other).code == "missing_argument" and "'lr'" in str(problem(other))


def test_components_can_be_off_and_on():
    assert load(Config, None, [f"source._component_={HERE}.Reader", "source.path=x"]).source.args == {"path": "x"}
    config = load(Config, None, [f"bare={{_component_: {HERE}.Reader.small}}"])
    assert build(config.bare).limit == 1


def test_lists_of_components():
    config = load(Config, None, [f"writers=[{{_component_: {HERE}.Reader, path: a}}, {{_component_: {HERE}.strange}}]"])
    assert [writer.path for writer in config.writers] == [f"{HERE}.Reader", f"{HERE}.strange"]
    assert load(Config, None, [f"others=[{{_component_: {HERE}.strange}}]"]).others == [Component(f"{HERE}.strange")]
    given = component([f"{HERE}.strange", Component(f"{HERE}.Reader", {"path": "a"})])

    @dataclass
    class WithList:
        writers: list[Component] = given

    config = load(WithList, None, ["writers.1.path=b"])
    assert config.writers == [Component(f"{HERE}.strange"), Component(f"{HERE}.Reader", {"path": "b"})]


def test_nested_components_get_the_same_injected_arguments():
    inner = f"inner: {{_component_: {HERE}.adam, lr: 10k}}"
    items = f"items: [1, {{_component_: {HERE}.sgd, lr: 2}}]"
    text = f"optimizer={{_component_: {HERE}.wrapping, {inner}, {items}}}"
    config = load(Config, None, [text])
    adam_built = {"adam": ("m", 10_000.0, (0.9, 0.99), 1e-8)}
    assert build(config.optimizer, model="m", seed=3, other=1) == {
        "wrapping": (adam_built, [1, {"sgd": ("m", 2.0, 0.0, "plain")}], 3)
    }
    assert problem(text.replace("lr: 10k", "lrr: 10k")).key == "optimizer.inner.lrr"


def test_a_component_that_must_be_named():
    @dataclass
    class Required:
        model: Component = component(MISSING, injected=("seed",))

    assert (problem(schema=Required).key, problem(schema=Required).code) == ("model", "missing_key")
    assert load(Required, None, [f"model._component_={HERE}.strange"]).model.path == f"{HERE}.strange"


@pytest.mark.parametrize(
    ("override", "key", "code", "suggestion"),
    [
        ("optimizer.lrr=1", "optimizer.lrr", "unknown_argument", "'lr'"),
        ("optimizer.banana=1", "optimizer.banana", "unknown_argument", "_component_, betas, eps, lr"),
        ("optimizer.model=1", "optimizer.model", "injected_argument", ""),
        ("optimizer.seed=1", "optimizer.seed", "unknown_argument", ""),
        ("optimizer.lr=fast", "optimizer.lr", "wrong_type", ""),
        ("optimizer.eps=0", "optimizer.eps", "out_of_range", "above 0"),
        ("optimizer.betas=[1]", "optimizer.betas", "wrong_type", ""),
        ("optimizer.betas=0.9", "optimizer.betas", "wrong_type", "[...]"),
        ("optimizer._componet_=x", "optimizer._componet_", "unknown_argument", "'_component_'"),
        (f"optimizer._component_={HERE}.adan", "optimizer._component_", "unknown_component", "'adam'"),
        ("optimizer._component_=sdg", "optimizer._component_", "unknown_component", f"'{HERE}.sgd'"),
        ("optimizer=sdg", "optimizer._component_", "unknown_component", f"'{HERE}.sgd'"),
        ("optimizer._component_=5", "optimizer._component_", "wrong_type", ""),
        ("optimizer._component_=null", "optimizer._component_", "wrong_type", ""),
        ("optimizer._component_=torchrecipes.confg.load", "optimizer._component_", "unknown_component", "'config'"),
        ("optimizer._component_=torchrecipes.config.lod.load", "optimizer._component_", "unknown_component", "'load'"),
        ("optimizer._component_=torchrecips.x", "optimizer._component_", "unknown_component", "'torchrecipes'"),
        (f"optimizer._component_={HERE}.NOT_CALLABLE", "optimizer._component_", "unknown_component", ""),
        ("optimizer._component_=a b.c", "optimizer._component_", "unknown_component", ""),
        (f"optimizer={HERE}.sgd", "optimizer", "missing_argument", "`lr: ...`"),
        ("optimizer=null", "optimizer", "wrong_type", ""),
        ("optimizer=5", "optimizer", "wrong_type", ""),
        ("source.path=x", "source", "missing_key", "_component_"),
        ("source._componet_=x.y", "source._componet_", "unknown_key", "'_component_'"),
        (f"source._component_={HERE}.Reader", "source", "missing_argument", "`path: ...`"),
        (f"source={{_component_: {HERE}.needs_source, source: my/*.txt}}", "source.source", "wrong_type", ""),
        (f"source={{_component_: {HERE}.positional, first: 1}}", "source.first", "unknown_argument", ""),
        (f"source={{_component_: {HERE}.strange, y: a}}", "source.y", "wrong_type", ""),
        (
            f"writers=[{{_component_: {HERE}.sgd, folder: 3, lr: 1, model: 1}}]",
            "writers.0.folder",
            "unknown_argument",
            "",
        ),
        (f"writers={{_component_: {HERE}.strange}}", "writers", "wrong_type", ""),
    ],
)
def test_mistakes_in_a_component(override, key, code, suggestion):
    found = problem(override)
    assert (found.key, found.code) == (key, code)
    assert suggestion in (found.hint or "")


def test_a_bare_dotted_path_is_a_component(tmp_path):
    expected = Component(f"{HERE}.sgd", {"lr": 2.0})
    assert load(Config, None, [f"source={HERE}.Reader.small"]).source == Component(f"{HERE}.Reader.small")
    assert load(Config, None, [f"writers=[{HERE}.strange]"]).writers == [Component(f"{HERE}.strange")]
    # Arguments beside it are kept, in whatever order they are typed.
    assert load(Config, None, [f"optimizer={HERE}.sgd", "optimizer.lr=2"]).optimizer == expected
    assert load(Config, None, ["optimizer.lr=2", f"optimizer={HERE}.sgd"]).optimizer == expected
    path = tmp_path / "my.yaml"
    path.write_text(f"optimizer: {HERE}.sgd\n")
    config = load(Config, path, ["optimizer.lr=2"])
    assert config.optimizer == expected
    assert f"_component_: {HERE}.sgd" in to_yaml(config) and "my.yaml:1" in to_yaml(config)


def test_an_optimizer_and_a_scheduler_of_torch():
    @dataclass
    class Torch:
        optimizer: Component = component(f"{HERE}.adam", injected=("model", "params"))
        lr_scheduler: Component = component(f"{HERE}.strange", injected=("optimizer", "max_steps"))

    overrides = ["optimizer=torch.optim.AdamW", "optimizer.lr=1e-2", "optimizer.betas=[0.8, 0.9]"]
    config = load(Torch, None, [*overrides, "lr_scheduler=torch.optim.lr_scheduler.StepLR", "lr_scheduler.step_size=2"])
    model = torch.nn.Linear(2, 2)
    optimizer = build(config.optimizer, model=model, params=model.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.01 and optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert build(config.lr_scheduler, optimizer=optimizer, max_steps=9).step_size == 2


@dataclass
class Pretrained:
    model: Component | None = component(f"{HERE}.strange", replaced_by="init_from", replaced_if="config.json")
    tokenizer: Component | None = component(f"{HERE}.swallows", replaced_by="init_from", name="x")
    init_from: str | None = None


def test_init_from_replaces_components_that_are_not_set():
    config = load(Pretrained, None, ["init_from=folder"])
    assert config.model is None and config.tokenizer is None
    assert to_yaml(config).count("# replaced by init_from") == 2
    assert load(Pretrained, None).tokenizer.args == {"name": "x"}


@pytest.mark.parametrize("place", ["", "checkpoints/step-00000005"])
def test_init_from_beside_a_component_that_is_set_is_a_contradiction(tmp_path, place):
    (tmp_path / "init" / place).mkdir(parents=True)
    init_from = f"init_from={tmp_path / 'init'}"
    path = tmp_path / "my.yaml"
    path.write_text("tokenizer: {name: y}\n")
    with pytest.raises(UserError) as caught:
        load(Pretrained, path, [init_from])
    (found,) = caught.value.problems
    assert (found.key, found.code) == ("tokenizer", "contradiction")
    assert "my.yaml:1" in str(caught.value) and f"override '{init_from}'" in str(caught.value)  # both places
    # A network of one's own with weights that have no config.json.
    assert load(Pretrained, None, [init_from, "model.y=3"]).model.args == {"y": 3}
    (tmp_path / "init" / place / "config.json").write_text("{}")
    assert problem(init_from, "model.y=3", schema=Pretrained).code == "contradiction"
    again = load(Pretrained, None, [init_from, "model=null", "tokenizer=null"])
    assert again.model is None
    path.write_text(to_yaml(again))  # what a run stores
    assert load(Pretrained, path) == again


def test_without_init_from_a_replaced_component_cannot_be_null():
    assert problem("tokenizer=null", schema=Pretrained).code == "missing_key"


def test_a_literal_argument():
    base = [f"optimizer._component_={HERE}.sgd", "optimizer.lr=1"]
    assert load(Config, None, [*base, "optimizer.mode=nesterov"]).optimizer.args["mode"] == "nesterov"
    assert "'nesterov'" in problem(*base, "optimizer.mode=nestrov").hint


def test_a_function_that_takes_anything_is_given_anything():
    config = load(Config, None, [f"source={{_component_: {HERE}.swallows, name: a, else: [1k]}}"])
    assert build(config.source) == ("a", {"else": ["1k"]})


def test_components_of_the_standard_library_and_builtins():
    assert resolve("collections.OrderedDict") is __import__("collections").OrderedDict
    assert resolve("os.path.join") is __import__("os").path.join
    assert list(parameters(dict))  # no signature, so anything goes
    config = load(Config, None, ["source={_component_: builtins.dict, a: 1}"])
    assert build(config.source, model="unused") == {"a": 1}


def test_importing_a_component_that_needs_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needy_component.py").write_text("import package_that_nobody_has\n")
    (tmp_path / "broken_component.py").write_text("1 / 0\n")
    assert "package_that_nobody_has" in problem("optimizer._component_=needy_component.f").problem
    assert "ZeroDivisionError" in problem("optimizer._component_=broken_component.f").problem
    assert "needy_component" not in sys.modules


def test_a_config_that_was_made_by_hand_is_built_too():
    assert build(Component(f"{HERE}.Reader", {"path": Path("x")})).path == Path("x")
    with pytest.raises(UserError) as caught:
        build(Component(f"{HERE}.Raeder"))
    assert caught.value.code == "unknown_component" and "'Reader'" in caught.value.hint


def test_building_leaves_the_config_alone():
    node = Component(f"{HERE}.wrapping", {"inner": None, "items": [1]})
    build(node)["wrapping"][1].append(2)
    assert node.args["items"] == [1]


def test_an_argument_of_a_component_may_be_called_default():
    # `default` is positional only, so that a component may have an argument of that name.
    spec = inspect.signature(component).parameters
    assert spec["default"].kind is inspect.Parameter.POSITIONAL_ONLY
    with pytest.raises(AssertionError):
        component(None, lr=1)
