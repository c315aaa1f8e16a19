"""Imports go one way. The contracts are in pyproject.toml; what they cannot say is checked here."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import torchrecipes

PACKAGE = Path(torchrecipes.__file__).parent
CHECKOUT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every dotted name that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module)
    return names


def test_the_import_contracts_hold(monkeypatch, capsys):
    monkeypatch.chdir(CHECKOUT)
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


def test_every_subpackage_is_under_a_contract():
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = " ".join(next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers"))
    subpackages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {f"torchrecipes.{name}" for name in subpackages} <= set(layers.replace("|", " ").split())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_a_recipe(path):
    recipes = {recipe.stem for recipe in (CHECKOUT / "recipes").glob("*.py")}
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & (recipes | {"recipes", "tests", "benchmarks"})


def test_recipes_import_the_library_torch_and_the_standard_library_only():
    for path in (CHECKOUT / "recipes").glob("*.py"):
        tops = {name.split(".")[0] for name in imported(path)}
        assert tops <= {"torchrecipes", "torch"} | set(sys.stdlib_module_names), path


def test_a_verb_imports_the_heavy_parts_only_inside():
    for path in (PACKAGE / "cli").glob("*.py"):
        top_level = [
            node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top_level}
        ours = {name for name in names if name.startswith("torchrecipes.")}
        assert all(
            name.startswith(("torchrecipes.config", "torchrecipes.cli", "torchrecipes.errors")) for name in ours
        ), path
        assert not {name.split(".")[0] for name in names} & {"torch", "matplotlib", "numpy", "transformers"}, path


# Sends a source to a process that it has started itself, through a pipe, as multiprocessing does. Nothing is in a file.
OWN_PROCESS = PACKAGE / "data" / "corpus" / "tokenizer_process.py"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path != OWN_PROCESS], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_nothing_pickles(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
