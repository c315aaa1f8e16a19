"""The documentation is right: snippets run, commands validate, keys and links exist."""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import shlex
import typing
from pathlib import Path

import pytest

import torchrecipes
from torchrecipes.cli.main import GROUPS, all_verbs, main
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import Component, load, to_yaml
from torchrecipes.config.catalog import builtin_recipes, find_recipe
from torchrecipes.data.sources import files
from torchrecipes.data.tokenizers import train_wordpiece
from torchrecipes.models import neobert, save_hf

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
# What follows a key's name in names of files (`tokenizer.json`) and in attributes of Python objects (`model.head`).
NOT_KEYS = "py yaml json jsonl safetensors model txt png head router_loss weight step check".split()
FOREIGN = {"add_bos_token", "mmap_mode"}  # options of other libraries


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


def section(page, title):
    """The text under a heading, up to the next heading, without code."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no section '{title}'"
    return found[1]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_snippets_run_one_after_the_other(page, tmp_path, monkeypatch):
    if "import transformers" in read(page):
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), namespace)


def command_lines():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield page, " ".join(line.split())


def commands():
    for page, line in command_lines():
        if line.startswith("tune-style "):
            yield pytest.param(shlex.split(line, comments=True)[1:], id=f"{page.name}: {line[:70]}")


def write_files_of_snippets(folder):
    """The snippets that say in their first line which file they are."""
    for page in PAGES:
        for code in blocks(page, "python"):
            if named := re.match(r"# (\w+\.py)\n", code):
                (folder / named[1]).write_text(code)


def save_small_model(folder):
    """A model folder for commands that begin with trained weights."""
    Path("text.txt").write_text("a few words to train a tokenizer on")
    tokenizer = train_wordpiece(files("text.txt"), vocab_size=64)
    save_hf(neobert("tiny", vocab_size=tokenizer.vocab_size), folder, tokenizer)


@pytest.mark.parametrize("words", list(commands()))
def test_commands_exist_and_their_settings_are_right(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_files_of_snippets(tmp_path)
    verb, *rest = words
    if verb in GROUPS:
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    assert verb in all_verbs()
    for name in [word for word in rest if word.endswith((".py", ".yaml")) and verb in ("run", "validate")]:
        main(["cp", "mlm_pretrain" if name.endswith(".py") else "neobert/small", name])
    for folder in re.findall(r"init_from=(\S+)", " ".join(rest)):
        save_small_model(folder)
    if "WandB" in " ".join(rest):
        pytest.importorskip("wandb", reason="wandb is not installed: pip install '.[wandb]'")
    if verb in ("ls", "cat", "cp"):
        assert main(words) == 0, capsys.readouterr().err
    elif verb in ("run", "validate"):
        assert main(["validate", *rest]) == 0, capsys.readouterr().err
    else:  # these want a run: only whether the words are arguments
        parser = argparse.ArgumentParser(prog=f"tune-style {verb}", exit_on_error=False)
        importlib.import_module(all_verbs()[verb][0]).add_arguments(parser)
        parser.parse_intermixed_args(rest)


def test_targets_of_make_exist():
    targets = re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE)
    for page, line in command_lines():
        if line.startswith("make "):
            assert line.split()[1] in targets, f"{page.name}: {line}"


def test_links_lead_to_files_and_headings():
    for page in PAGES:
        for link, heading in re.findall(r"\]\(([^)#:]*)(?:#([^):]*))?\)", read(page)):
            if link.startswith("reference/") or link in ("contributing.md", "changelog.md"):
                continue  # generated: the strict build of the site checks these
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", read(target), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
                assert heading in slugs, f"{page.name}: {link}#{heading}"


def keys_of(schema, prefix=""):
    """Every key of a `Config`, dotted; a component's key ends in `.*`."""
    for name, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind) and kind is not Component:
            yield from keys_of(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@functools.cache
def known_keys():
    return {key for recipe in builtin_recipes() for key in keys_of(load_recipe(recipe.path).Config)}


@functools.cache
def known_arguments():
    """Names of the parameters of everything that the library exports."""
    names = {"_component_"}
    for module in pkgutil.walk_packages(torchrecipes.__path__, "torchrecipes."):
        if module.name.startswith("torchrecipes.cli") or "._" in module.name:
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if callable(value) and getattr(value, "__module__", "").startswith("torchrecipes."):
                methods = [method for method in vars(value).values() if inspect.isfunction(method)]
                for function in [value, *(methods if inspect.isclass(value) else ())]:
                    with contextlib.suppress(TypeError, ValueError):
                        names |= set(inspect.signature(function).parameters)
    return names


def is_known(key):
    """Whether a dotted key is a key of a recipe, a group of keys, or a component's argument."""
    if any(known == key or known.startswith(f"{key}.") for known in known_keys()):
        return True
    parts = key.split(".")
    if parts[:2] == ["data", "eval_sets"] and len(parts) == 3:  # a name of the user's own
        return True
    return any(".".join(parts[:i]) in known_keys() for i in range(1, len(parts))) and all(
        part in known_arguments() or part.isdigit() for part in parts[-1:]
    )


def mentioned_keys(page):
    """Every `key`, `key=value` and `key: value` in running text, as (key, whether it has a value)."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        for word in span.replace("'", "").split(" "):
            if found := re.fullmatch(r"([a-z_][a-z0-9_]*(?:\.[a-z0-9_]+)*)(=\S*)?", word):
                yield found[1], bool(found[2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_mention_only_keys_that_exist(page):
    roots = {key.split(".")[0] for key in known_keys()}
    names = roots | known_arguments() | FOREIGN
    unknown = []
    for key, has_value in mentioned_keys(page):
        first, *rest = key.split(".")
        if not rest and has_value and key not in names:
            unknown.append(key)
        if rest and first in roots and rest[-1] not in NOT_KEYS and not is_known(key):
            unknown.append(key)
    assert unknown == []


def test_the_quickstart_is_described_as_it_is():
    config = load(load_recipe(find_recipe("mlm_pretrain")).Config, "neobert/quickstart")
    page = read(DOCS / "quickstart.md")
    model = config.model.args
    described = [f"{config.tokenizer.args['vocab_size']:,} entries", f"`max_minutes: {config.max_minutes:g}`"]
    described += [f"every {config.eval_every} steps", f"every {config.checkpoint.save_every} steps"]
    described += [f"and {model['hidden_size']} dimensions"]
    assert model["num_hidden_layers"] == 4 and "NeoBERT of four layers" in page
    assert [text for text in described if text not in page] == []


def test_the_five_mistakes_are_answered_as_shown(tmp_path, monkeypatch, capsys):
    page = DOCS / "configuration.md"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(blocks(page, "yaml")[0])
    assert main(["validate", "mlm_pretrain", "--config", "mine.yaml"]) == 2
    answer = capsys.readouterr().err
    assert answer in blocks(page, "text"), answer


def test_origins_are_shown_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "output_dir: runs/mine\ndata:\n"
        "  source: {_component_: torchrecipes.data.sources.files, path: texts}\n"
        "optimizer:\n  _component_: torchrecipes.optim.adamw\n  lr: 1e-3\n  weight_decay: 0.1\n"
        "max_steps: 2k\n"
    )
    schema = load_recipe(find_recipe("mlm_pretrain")).Config
    written = to_yaml(load(schema, "mine.yaml", ["optimizer.lr=5e-4"]))
    shown = blocks(DOCS / "configuration.md", "text")[-1]
    assert shown in written, written


def recipe_with(name, code):
    """The text of a recipe in which the functions and classes of `code` stand in for those of the same names."""
    text = find_recipe(name).read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    replaced = {node.name for node in ast.parse(code).body if hasattr(node, "name")}
    for node in reversed(tree.body):
        if getattr(node, "name", None) in replaced:
            del lines[node.lineno - 1 : node.end_lineno]
    config_end = next(node.end_lineno for node in tree.body if getattr(node, "name", None) == "Config")
    return "\n".join([*lines[:config_end], "", "", code, *lines[config_end:]])


EDITS = [code for code in blocks(DOCS / "change-a-recipe.md", "py") if "def build_" in code or "def compute_" in code]


@pytest.mark.parametrize("code", EDITS, ids=lambda code: re.search(r"def (\w+)", code)[1])
def test_edits_of_a_recipe_are_valid(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_recipe.py").write_text(recipe_with("mlm_pretrain", code))
    words = ["my_recipe.py", "--config", "neobert/small", "data.source.path=texts"]
    assert main(["validate", *words]) == 0, capsys.readouterr().err
    if "class Net" in code:  # seconds: one of them is enough
        words += ["max_steps=10", "epochs=null", "--device", "cpu"]
        assert main(["estimate", *words]) == 0, capsys.readouterr().err
