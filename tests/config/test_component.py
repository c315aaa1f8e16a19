"""Components: how a config names them, what is checked, and what the recipe builds."""

import inspect
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Protocol

import pytest

from torchrecipes.config import MISSING, Component, build, component, load
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


def adam(model, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8):
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


def problem(*overrides: str, schema: type = Config) -> str:
    with pytest.raises(UserError) as caught:
        load(schema, None, overrides)
    _, *lines = str(caught.value).split("\n")
    assert len(lines) == 1, lines
    return lines[0]


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


def test_another_component_drops_the_arguments_from_below(tmp_path):
    other, same = f"optimizer._component_={HERE}.sgd", f"optimizer._component_={HERE}.adam"
    assert load(Config, None, [other, "optimizer.lr=1"]).optimizer == Component(f"{HERE}.sgd", {"lr": 1.0})
    assert load(Config, None, ["optimizer.lr=1", other]).optimizer.args == {"lr": 1.0}  # whatever the order typed
    assert load(Config, None, [same]).optimizer.args == {"lr": 0.5}
    path = tmp_path / "my.yaml"
    path.write_text(f"optimizer:\n  momentum: 0.9\n  lr: 2\n  _component_: {HERE}.sgd\n")
    assert load(Config, path).optimizer.args == {"momentum": 0.9, "lr": 2.0}
    assert load(Config, path, [f"optimizer={{_component_: {HERE}.adam}}"]).optimizer.args == {}
    assert "needs the argument 'lr'" in problem(other)


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


def test_nested_components_are_checked_and_built_with_the_same_runtime_arguments():
    inner = f"inner: {{_component_: {HERE}.adam, lr: 10k}}"
    items = f"items: [1, {{_component_: {HERE}.sgd, lr: 2}}]"
    text = f"optimizer={{_component_: {HERE}.wrapping, {inner}, {items}}}"
    config = load(Config, None, [text])
    adam_built = {"adam": ("m", 10_000.0, (0.9, 0.99), 1e-8)}
    assert build(config.optimizer, model="m", seed=3, other=1) == {
        "wrapping": (adam_built, [1, {"sgd": ("m", 2.0, 0.0, "plain")}], 3)
    }
    assert "inner.lrr" in problem(text.replace("lr: 10k", "lrr: 10k"))


def test_a_component_that_must_be_named():
    @dataclass
    class Required:
        model: Component = component(MISSING, injected=("seed",))

    assert "model: missing key (a component): add `_component_: dotted.path`" in problem(schema=Required)
    assert load(Required, None, [f"model._component_={HERE}.strange"]).model.path == f"{HERE}.strange"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", f"optimizer.lrr: {HERE}.adam takes no argument 'lrr': did you mean 'lr'?"),
        ("optimizer.banana=1", "takes no argument 'banana': it takes: _component_, betas, eps, lr"),
        ("optimizer.model=1", f"the recipe passes 'model' to {HERE}.adam itself: remove this key"),
        ("optimizer.seed=1", "takes no argument 'seed'"),
        ("optimizer.lr=fast", "optimizer.lr: expected a number, got the text 'fast'"),
        ("optimizer.betas=[1]", "optimizer.betas: expected a list of 2 values, got 1 values"),
        (
            "optimizer.betas=0.9",
            "optimizer.betas: expected a list of 2 values, got the number 0.9: write [...] around it",
        ),
        ("optimizer._componet_=x", f"{HERE}.adam takes no argument '_componet_': did you mean '_component_'?"),
        (f"optimizer._component_={HERE}.adan", f"{HERE} has no 'adan': did you mean 'adam'?"),
        (
            "optimizer._component_=sdg",
            f"'sdg' is not a dotted path like torchrecipes.optim.adamw: did you mean '{HERE}.sgd'?",
        ),
        ("optimizer._component_=5", "optimizer._component_: expected a dotted path, got the number 5"),
        ("optimizer._component_=null", "optimizer._component_: expected a dotted path, got nothing (null)"),
        ("optimizer._component_=torchrecipes.confg.load", "torchrecipes has no 'confg': did you mean 'config'?"),
        (
            "optimizer._component_=torchrecipes.config.lod.load",
            "torchrecipes.config has no 'lod': did you mean 'load'?",
        ),
        ("optimizer._component_=torchrecips.x", "there is no package 'torchrecips': did you mean 'torchrecipes'?"),
        (f"optimizer._component_={HERE}.NOT_CALLABLE", "is a int, not something that can be called"),
        ("optimizer._component_=a b.c", "'a b.c' is not a dotted path"),
        (f"optimizer={HERE}.sgd", f"optimizer: expected a component: write optimizer._component_={HERE}.sgd"),
        ("optimizer=sgd", f"optimizer: expected a component: write optimizer._component_={HERE}.sgd"),
        ("optimizer=null", "optimizer: expected a component (a mapping with `_component_`), and cannot be null (off)"),
        ("optimizer=5", "optimizer: expected a component (a mapping with `_component_`), got the number 5"),
        ("source.path=x", "source: no component is named here: add `_component_: dotted.path`"),
        ("source._componet_=x.y", "source._componet_: unknown key: did you mean '_component_'?"),
        (
            f"source._component_={HERE}.Reader",
            f"source: {HERE}.Reader needs the argument 'path' (text): add `path: ...` here",
        ),
        (
            f"source={{_component_: {HERE}.needs_source, source: my/*.txt}}",
            "expected a component that makes a Source, got the text",
        ),
        (f"source={{_component_: {HERE}.positional, first: 1}}", "takes no argument 'first'"),
        (f"source={{_component_: {HERE}.strange, y: a}}", "source.y: expected a whole number, got the text 'a'"),
        (f"writers=[{{_component_: {HERE}.sgd, folder: 3, lr: 1, model: 1}}]", "takes no argument 'folder'"),
        (
            f"writers={{_component_: {HERE}.strange}}",
            "writers: expected a list, each element a component, got a mapping",
        ),
    ],
)
def test_what_is_wrong_with_a_component(override, message):
    assert message in problem(override)


def test_a_literal_argument():
    base = [f"optimizer._component_={HERE}.sgd", "optimizer.lr=1"]
    assert load(Config, None, [*base, "optimizer.mode=nesterov"]).optimizer.args["mode"] == "nesterov"
    assert "did you mean 'nesterov'?" in problem(*base, "optimizer.mode=nestrov")


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
    assert "needs the package 'package_that_nobody_has', which is not installed" in problem(
        "optimizer._component_=needy_component.f"
    )
    assert "importing broken_component failed: ZeroDivisionError" in problem("optimizer._component_=broken_component.f")
    assert "needy_component" not in sys.modules


def test_a_config_that_was_made_by_hand_is_built_too():
    assert build(Component(f"{HERE}.Reader", {"path": Path("x")})).path == Path("x")
    with pytest.raises(UserError, match="has no 'Raeder': did you mean 'Reader'"):
        build(Component(f"{HERE}.Raeder"))


def test_building_leaves_the_config_alone():
    node = Component(f"{HERE}.wrapping", {"inner": None, "items": [1]})
    build(node)["wrapping"][1].append(2)
    assert node.args["items"] == [1]


def test_the_helper_takes_its_own_names_apart_from_a_components():
    # `default` is positional only, so that a component may have an argument of that name.
    spec = inspect.signature(component).parameters
    assert spec["default"].kind is inspect.Parameter.POSITIONAL_ONLY
    with pytest.raises(AssertionError):
        component(None, lr=1)
