"""Pages that are generated at build time: config keys, command line, API, changelog, contributing."""

import argparse
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

from mkdocs.structure.files import File

import torchrecipes
from torchrecipes.cli.main import all_verbs
from torchrecipes.cli.run import load_recipe
from torchrecipes.config.catalog import builtin_recipes
from torchrecipes.config.components import parameters
from torchrecipes.config.dump import inline
from torchrecipes.config.schema_page import markdown

ROOT = Path(__file__).parents[1]


def on_config(config):
    """Fills the two generated sections of the nav."""
    sections = {"reference/config": config_pages(), "reference/api": api_pages()}
    config.nav = [_fill(item, sections) for item in config.nav]
    return config


def on_files(files, config):
    """Adds the generated pages."""
    pages = {**config_pages(), **api_pages(), "reference/cli.md": cli_page()}
    pages["reference/components.md"] = components_page()
    for name in ("changelog", "contributing"):
        text = (ROOT / f"{name.upper()}.md").read_text(encoding="utf-8")
        pages[f"{name}.md"] = re.sub(r"\]\(docs/", "](", text)  # links are relative to the root there
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def config_pages() -> dict[str, str]:
    """One page per recipe: its keys, from its `Config`."""
    return {f"reference/config/{recipe.name}.md": _config_page(recipe) for recipe in builtin_recipes()}


def _config_page(recipe) -> str:
    keys = markdown(load_recipe(recipe.path).Config)
    return f"# {recipe.name}\n\n{recipe.summary}\n\n{keys}"


def components_page() -> str:
    """The components of the library by config key, with the arguments that a config may give."""
    sections = ["# Components\n", COMPONENTS_INTRO]
    for title, (module, is_component) in COMPONENTS.items():
        sections.append(f"## {title}\n\n| component | arguments |\n|---|---|")
        try:
            exported = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        names = getattr(exported, "__all__", None) or vars(exported)
        for name in sorted(names):
            value = getattr(exported, name)
            if callable(value) and getattr(value, "__module__", "").startswith("torchrecipes.") and is_component(value):
                injected = INJECTED | ({"vocab_size"} if title == "model" else set())
                shown = [_argument(item) for item in parameters(value).values() if item.name not in injected]
                sections.append(f"| `{module}.{name}` | {', '.join(shown)} |")
        sections.append("")
    return "\n".join(sections)


COMPONENTS_INTRO = """\
What each key of a config may name, with arguments and defaults. Arguments that the recipe passes itself are left out.
Your own functions and classes work as well: [Components](../configuration.md#components).
"""
INJECTED = {"model", "params", "optimizer", "max_steps", "source", "folder", "causal", "output_dir", "seed", "self"}


def _takes(*names: str):
    """A test for public functions that have one of these parameters."""
    return lambda value: inspect.isfunction(value) and bool(set(names) & set(inspect.signature(value).parameters))


def _is_model(value) -> bool:
    return inspect.isfunction(value) and (
        "vocab_size" in inspect.signature(value).parameters or value.__name__ == "from_transformers"
    )


COMPONENTS = {
    "model": ("torchrecipes.models", _is_model),
    "tokenizer": ("torchrecipes.data.tokenizers", inspect.isfunction),
    "data.source": ("torchrecipes.data.sources", _takes("path", "name", "limit_mb")),
    "optimizer": ("torchrecipes.optim", _takes("model")),
    "lr_scheduler": ("torchrecipes.optim", _takes("max_steps")),
    "guard": ("torchrecipes.training.guard", inspect.isclass),
    "ema": ("torchrecipes.training.ema", inspect.isclass),
    "log.loggers": ("torchrecipes.training.loggers", inspect.isclass),
}


def _argument(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return f"`{parameter.name}`"
    return f"`{parameter.name}: {inline(list(value) if isinstance(value := parameter.default, tuple) else value)}`"


def cli_page() -> str:
    """The help text of every verb of `tune-style`."""
    sections = ["# Command line\n"]
    for verb, (module, _) in all_verbs().items():
        parser = argparse.ArgumentParser(prog=f"tune-style {verb}", formatter_class=_Help)
        importlib.import_module(module).add_arguments(parser)
        sections.append(f"## {verb}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
    return "\n".join(sections)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, width=100)


def api_pages() -> dict[str, str]:
    """One page per subpackage: the names that it exports, with their docstrings."""
    names = [info.name for info in pkgutil.walk_packages(torchrecipes.__path__, "torchrecipes.") if info.ispkg]
    modules = [importlib.import_module(name) for name in names if "._" not in name and name != "torchrecipes.cli"]
    modules = [module for module in modules if getattr(module, "__all__", None)]
    documented = {}  # of everything exported, the innermost subpackage that exports it
    for module in sorted(modules, key=lambda module: module.__name__.count(".")):
        for name in module.__all__:
            if path := _path(module, name):
                documented[path] = module
    return {f"reference/api/{_short(module)}.md": _api_page(module, documented) for module in modules}


def _short(module) -> str:
    return module.__name__.removeprefix("torchrecipes.")


def _path(module, name: str) -> str | None:
    """Where a function or class is defined; None for other values."""
    value = getattr(module, name)
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return None
    return f"{value.__module__}.{value.__qualname__}"


def _api_page(module, documented) -> str:
    # The map of files in a module's docstring ("name    what it holds") becomes a list.
    docstring = re.sub(r"(?m)^ *(\S+(?:, \S+)*)   +(\S.*)$", r"- `\1`: \2", inspect.getdoc(module) or "")
    elsewhere, here = [], []
    for name in sorted(module.__all__, key=str.lower):
        path = _path(module, name)
        if path and documented[path] is module:
            here.append(f"::: {path}\n")
        elif path:
            page = _short(documented[path])
            elsewhere.append(f"- `{name}`: see [{page}]({page}.md)")
    return "\n".join([f"# {module.__name__}\n", docstring, "", *elsewhere, "", *here])


def _fill(item, sections):
    if isinstance(item, dict):
        return {title: _fill(value, sections) for title, value in item.items()}
    if isinstance(item, list):
        return [_fill(value, sections) for value in item]
    if item in sections:
        return [{Path(path).stem: path} for path in sorted(sections[item])]
    return item
