"""The recipe contract: five names, short files, and a library that knows no objective."""

import ast
import inspect
from pathlib import Path

import pytest

import torchrecipes
from torchrecipes.cli.run import load_recipe
from torchrecipes.config.catalog import builtin_recipes

RECIPES = [recipe.path for recipe in builtin_recipes()]
PACKAGE = Path(torchrecipes.__file__).parent
# Keys of one objective, by which a library could tell recipes apart.
OBJECTIVE_KEYS = {
    "mlm_probability", "mask_all", "masked_logits_only", "cross_document_attention", "z_loss", "label_smoothing",
    "router_bias_update_rate", "sample_every", "sample_prompts", "sample_tokens",
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_flat(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert len(source.splitlines()) <= (240 if path.stem == "domain_adapt" else 220)  # that one trains both kinds
    assert sum(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)) <= 15
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    nested = [
        inner
        for function in functions
        for inner in ast.walk(function)
        if isinstance(inner, ast.FunctionDef) and inner is not function
    ]
    for function in nested:
        assert function.end_lineno - function.lineno + 1 <= 6, function.name  # its own line and five


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_five_names(path):
    recipe = load_recipe(path)
    parameters = {
        name: list(inspect.signature(getattr(recipe, name)).parameters)
        for name in ("build_model", "build_collator", "compute_loss", "main")
    }
    assert parameters == {
        "build_model": ["config", "tokenizer"],
        "build_collator": ["config", "tokenizer"],
        "compute_loss": ["model", "batch", "config"],
        "main": ["config"],
    }
    assert {"data", "compute", "checkpoint", "log"} <= set(recipe.Config.__dataclass_fields__)


@pytest.mark.parametrize("folder", ["cli", "planning", "config", "checkpoint", "training"])
def test_the_library_reads_no_key_of_an_objective(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            name = (
                node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
            )
            assert not (isinstance(name, str) and name in OBJECTIVE_KEYS), f"{path}:{node.lineno}: {name}"
