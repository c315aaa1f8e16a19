"""The documentation says what is so: its snippets run, its commands are known, its tables are the code's."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from torchrecipes.cli.main import VERBS, main
from torchrecipes.config.files import find_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_snippets_run_one_after_the_other(page, tmp_path, monkeypatch):
    if "import transformers" in page.read_text():
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), namespace)


def commands():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                if line.startswith("tune-style "):
                    yield pytest.param(shlex.split(line, comments=True)[1:], id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_exist_and_their_settings_are_right(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    verb, *rest = words
    assert verb in VERBS
    if verb in ("ls", "cat", "cp", "validate"):
        assert main(words) == 0, capsys.readouterr().err
    elif verb == "run":
        for name in [word for word in rest if word.endswith((".py", ".yaml"))]:
            main(["cp", "mlm_pretrain" if name.endswith(".py") else "neobert/small", name])
        assert main(["validate", *rest]) == 0, capsys.readouterr().err


def test_links_lead_to_files():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def keys_table(recipe):
    """The keys of a recipe's Config as Markdown: name, default, and the comment beside it."""
    text = Path(recipe).read_text(encoding="utf-8")
    lines = text.splitlines()
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}

    def rows(node, prefix):
        for field in node.body:
            if not isinstance(field, ast.AnnAssign):
                continue
            name, kind = f"{prefix}{field.target.id}", ast.unparse(field.annotation)
            if kind in classes:
                yield from rows(classes[kind], f"{name}.")
                continue
            yield f"| `{name}` | `{default(field.value)}` | {comment(field)} |"

    def default(value):
        if isinstance(value, ast.Call) and value.func.id == "component":
            shown = ast.literal_eval(value.args[0])
            extra = [f"{word.arg}={ast.unparse(word.value)}" for word in value.keywords if word.arg != "runtime"]
            return f"{shown.rpartition('.')[2]}({', '.join(extra)})" if isinstance(shown, str) else repr(shown)
        return {"MISSING": "required", "None": "null", "True": "true", "False": "false"}.get(
            ast.unparse(value), ast.unparse(value).strip("'")
        )

    def comment(field):
        found = [line.split("  # ", 1)[1] for line in lines[field.lineno - 1 : field.end_lineno] if "  # " in line]
        return " ".join(found).replace("|", "or")

    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows(classes["Config"], "")])


def test_the_table_of_keys_is_the_config_dataclass():
    table = keys_table(find_recipe("mlm_pretrain"))
    assert table in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), f"docs/recipes.md should hold\n{table}"


def test_the_five_mistakes_are_answered_as_shown(tmp_path, monkeypatch, capsys):
    page = ROOT / "docs" / "configuration.md"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(blocks(page, "yaml")[0])
    assert main(["validate", "mlm_pretrain", "--config", "mine.yaml"]) == 2
    answer = capsys.readouterr().err
    assert answer in blocks(page, "text"), answer
