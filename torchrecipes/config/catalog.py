"""Finds recipes and configs on disk. There is no registry: every file in the folder is listed.

The first two lines of a config name its recipe and its purpose:

    # recipe: mlm_pretrain
    # A small NeoBERT on this machine's own text, about 5 minutes on 2 cores.

The shipped files are in `recipes/` in a checkout, in `torchrecipes/_recipes/` in an installed package.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

import torchrecipes
from torchrecipes.config.suggest import closest
from torchrecipes.errors import UserError


@dataclass(frozen=True)
class BuiltinRecipe:
    """A recipe file: its name on the command line, its path, and the first line of its docstring."""

    name: str
    path: Path
    summary: str


@dataclass(frozen=True)
class BuiltinConfig:
    """A config file: its name on the command line, its path, and the recipe and purpose in its first two lines."""

    name: str
    path: Path
    recipe: str | None
    summary: str


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes; their configs are in its subfolder `configs`."""
    package = Path(torchrecipes.__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def builtin_recipes() -> list[BuiltinRecipe]:
    """Return every shipped recipe, by name. The files are parsed, not imported."""
    paths = sorted(path for path in recipes_folder().glob("*.py") if not path.name.startswith("_"))
    return [BuiltinRecipe(path.stem, path, _docstring_line(path)) for path in paths]


def builtin_configs() -> list[BuiltinConfig]:
    """Return every shipped config, by name."""
    folder = recipes_folder() / "configs"
    found = []
    for path in sorted(folder.rglob("*.yaml")):
        recipe, summary = read_header(path)
        found.append(BuiltinConfig(path.relative_to(folder).with_suffix("").as_posix(), path, recipe, summary))
    return found


def quickstart_first(name: str) -> tuple[bool, str]:
    """Return the key that sorts configs by name, with those first that run on any machine, without data."""
    return name.rsplit("/", 1)[-1] != "quickstart", name


def read_header(path: Path) -> tuple[str | None, str]:
    """Return the recipe that a config's first line names (`# recipe: NAME`), or None, and its second line's comment."""
    with open(path, encoding="utf-8", errors="replace") as file:
        first, second = file.readline().strip(), file.readline().strip()
    if not first.startswith("# recipe:"):
        return None, ""
    return first.removeprefix("# recipe:").strip(), second.lstrip("# ").strip() if second.startswith("#") else ""


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given as a path (`my_recipe.py`) or as the name of a shipped one (`mlm_pretrain`).

    Raises:
        UserError: there is none (code `not_found`); its hint names the closest one.
    """
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path.resolve()
    shipped = {recipe.name: recipe.path for recipe in builtin_recipes()}
    stem = name.removesuffix(".py")
    if stem in shipped and name in (stem, f"{stem}.py"):
        return shipped[stem]
    if path.suffix == ".py" or path.exists():
        problem = f"{name} is not a recipe file (.py)" if path.exists() else f"there is no recipe file {name} here"
        raise _not_found(problem, path.stem, shipped, "recipe")
    raise _not_found(f"there is no recipe '{name}'", name, shipped, "recipe")


def find_config(name: str) -> Path:
    """Return the file of a config given as a path (`my.yaml`) or as the name of a shipped one (`neobert/quickstart`).

    Raises:
        UserError: there is none (code `not_found`); its hint names the closest one.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {config.name: config.path for config in builtin_configs()}
    stem = name.removesuffix(".yaml")
    if stem in shipped:
        return shipped[stem]
    if path.is_dir():
        raise _not_found(f"{name} is a folder, and --config takes a YAML file", stem, shipped, "config")
    problem = f"there is no config file {name} here" if path.suffix else f"there is no config '{name}'"
    folder = path.parent
    beside = {str(folder / p.name) for p in folder.glob("*.y*ml")} if path.suffix and folder.is_dir() else set()
    near = closest(name, beside)
    if near:
        raise UserError(problem, hint=f"Did you mean {near}?", code="not_found")
    raise _not_found(problem, stem, shipped, "config")


def find_builtin(name: str) -> BuiltinRecipe | BuiltinConfig:
    """Return the shipped recipe or config called `name`, with or without its suffix (.py, .yaml).

    Raises:
        UserError: there is none (code `not_found`); its hint names the closest one.
    """
    known = {f"{recipe.name}.py": recipe for recipe in builtin_recipes()}
    known |= {f"{config.name}.yaml": config for config in builtin_configs()}
    for file in (name, f"{name}.py", f"{name}.yaml"):
        if file in known:
            return known[file]
    stem = name.removesuffix(".py").removesuffix(".yaml")
    names = {item.name: item.path for item in known.values()}
    raise _not_found(f"there is no recipe or config '{name}'", stem, names, "recipe and config")


def _not_found(problem: str, name: str, shipped: dict[str, Path], kind: str) -> UserError:
    return UserError(problem, hint=_suggestion(name, shipped, kind), code="not_found")


def _suggestion(name: str, shipped: dict[str, Path], kind: str) -> str:
    if not shipped:
        return f"No {kind} is shipped with this installation."
    tails = {candidate: candidate.rsplit("/", 1)[-1] for candidate in shipped}
    # `gpt2` finds `gpt2/quickstart` and its other sizes, `quickstart` finds that of every family.
    found = sorted((one for one in shipped if one.startswith(f"{name}/")), key=quickstart_first)
    found = found or [one for one, tail in tails.items() if tail == name]
    if not found:
        near = closest(name, shipped)
        tail = closest(name, tails.values())
        found = [near] if near else [one for one in shipped if tails[one] == tail]
    if found:
        return f"Did you mean {' or '.join(map(repr, found))}? (All of them: tune-style ls)"
    return f"The shipped {kind}s are: {', '.join(shipped)}."


def _docstring_line(path: Path) -> str:
    try:
        docstring = ast.get_docstring(ast.parse(path.read_bytes()))
    except SyntaxError as error:
        return f"(does not parse: line {error.lineno})"
    return (docstring or "").strip().split("\n", 1)[0]
