"""Pages that are generated at build time: config keys, command line, API, changelog, contributing."""

import argparse
import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path

from mkdocs.structure.files import File

import torchrecipes
from torchrecipes.cli.main import VERBS
from torchrecipes.cli.run import load_recipe
from torchrecipes.config.catalog import builtin_recipes
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


def cli_page() -> str:
    """The help text of every verb of `tune-style`."""
    sections = ["# Command line\n"]
    for verb, (module, _) in VERBS.items():
        parser = argparse.ArgumentParser(prog=f"tune-style {verb}", formatter_class=_Help)
        importlib.import_module(module).add_arguments(parser)
        sections.append(f"## {verb}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
    return "\n".join(sections)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, width=100)


def api_pages() -> dict[str, str]:
    """One page per subpackage: the names that it exports, with their docstrings."""
    found = {}
    for info in pkgutil.walk_packages(torchrecipes.__path__, "torchrecipes."):
        if info.ispkg and "._" not in info.name and info.name != "torchrecipes.cli":
            module = importlib.import_module(info.name)
            if exported := getattr(module, "__all__", None):
                short = info.name.removeprefix("torchrecipes.")
                found[f"reference/api/{short}.md"] = _api_page(module, exported)
    return found


def _api_page(module, exported) -> str:
    lines = [f"# {module.__name__}\n", inspect.getdoc(module) or "", ""]
    for name in sorted(exported, key=str.lower):
        value = getattr(module, name)
        home = getattr(value, "__module__", None) or module.__name__
        path = f"{home}.{getattr(value, '__qualname__', name)}" if home.startswith("torchrecipes.") else None
        if path and typing.get_origin(value) is not typing.Annotated:  # a type alias has no page
            lines.append(f"::: {path}\n")
    return "\n".join(lines)


def _fill(item, sections):
    if isinstance(item, dict):
        return {title: _fill(value, sections) for title, value in item.items()}
    if isinstance(item, list):
        return [_fill(value, sections) for value in item]
    if item in sections:
        return [{Path(path).stem: path} for path in sorted(sections[item])]
    return item
