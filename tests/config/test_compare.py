"""Which keys of a stored config differ from those of the run that is to resume it."""

from dataclasses import dataclass, field

from torchrecipes.config import Component, MayChange, Steps, changed_keys, component
from torchrecipes.config.check import default_tree


@dataclass
class Checkpoint:
    save_every: Steps | None = 5


@dataclass
class Data:
    folder: str = "x"
    num_workers: MayChange[int] = 0


@dataclass
class Config:
    seed: int = 0
    data: Data = field(default_factory=Data)
    guard: MayChange[Component | None] = component()
    optimizer: Component | None = component()
    checkpoint: MayChange[Checkpoint] = field(default_factory=Checkpoint)
    log_every: MayChange[Steps] = 1
    names: list[str] = field(default_factory=list)


def test_keys_that_may_change_are_left_out():
    saved = {
        "seed": 1,
        "data": {"folder": "x", "num_workers": 0},
        "guard": {"_component_": "a.b", "factor": 1},
        "optimizer": {"_component_": "a.b", "lr": 1.0},
        "checkpoint": {"save_every": 5},
        "log_every": 1,
        "names": ["a"],
    }
    current = {
        "seed": 1,
        "data": {"folder": "y", "num_workers": 4},
        "guard": None,
        "optimizer": {"_component_": "a.b", "lr": 2.0, "eps": 1.0},
        "checkpoint": {"save_every": None},
        "log_every": 9,
        "names": ["a", "b"],
        "removed": 1,
    }
    assert changed_keys(saved, saved, Config) == {}
    assert changed_keys(saved, current, Config) == {
        "data.folder": ("x", "y"),
        "names": (["a"], ["a", "b"]),
        "optimizer.eps": ("absent", 1.0),
        "optimizer.lr": (1.0, 2.0),
        "removed": ("absent", 1),
    }


def test_a_key_that_is_newer_than_the_run_has_its_default_there():
    current = default_tree(Config)
    older = {"guard": None, "data": {"num_workers": 0}, "checkpoint": {}, "log_every": 1}
    assert changed_keys(older, current, Config) == {}
    current |= {"seed": 1, "data": {"folder": "y", "num_workers": 0}, "names": ["a"]}
    expected = {"seed": (0, 1), "data.folder": ("x", "y"), "names": ([], ["a"])}
    assert changed_keys(older, current, Config) == expected
