"""The documentation says what is so: its snippets run, its commands are known, its tables are the code's."""

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

import torchrecipes.models
from torchrecipes.cli.main import VERBS, main
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load, to_yaml
from torchrecipes.config.catalog import builtin_configs, find_recipe
from torchrecipes.config.components import parameters, resolve
from torchrecipes.data.sources.text_files import files
from torchrecipes.training.metrics import MetricLogger
from torchrecipes.training.run import MAY_CHANGE

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if page.exists()] + sorted(DOCS.glob("*.md"))


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


@pytest.mark.parametrize("words", list(commands()))
def test_commands_exist_and_their_settings_are_right(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_files_of_snippets(tmp_path)
    verb, *rest = words
    assert verb in VERBS
    for name in [word for word in rest if word.endswith((".py", ".yaml")) and verb in ("run", "validate")]:
        main(["cp", "mlm_pretrain" if name.endswith(".py") else "neobert/small", name])
    if verb in ("ls", "cat", "cp"):
        assert main(words) == 0, capsys.readouterr().err
    elif verb in ("run", "validate"):
        assert main(["validate", *rest]) == 0, capsys.readouterr().err
    else:  # these want a run: only whether the words are arguments
        parser = argparse.ArgumentParser(prog=f"tune-style {verb}", exit_on_error=False)
        importlib.import_module(VERBS[verb][0]).add_arguments(parser)
        parser.parse_intermixed_args(rest)


def test_targets_of_make_exist():
    targets = re.findall(r"^(\w+):", read(ROOT / "Makefile"), re.MULTILINE)
    for page, line in command_lines():
        if line.startswith("make "):
            assert line.split()[1] in targets, f"{page.name}: {line}"


def test_links_lead_to_files_and_headings():
    for page in PAGES:
        for link, heading in re.findall(r"\]\(([^)#:]*)(?:#([^):]*))?\)", read(page)):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", read(target), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
                assert heading in slugs, f"{page.name}: {link}#{heading}"


def in_yaml(value):
    """A default as a config would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)


def keys_table(recipe):
    """The keys of a recipe's Config as Markdown: name, default, and the comment beside it."""
    text = read(Path(recipe))
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
            choices = re.search(r"Literal\[(.*?)\]", kind)
            said = f"one of {choices[1].replace(chr(39), '`')}: " if choices and kind.startswith("Literal") else ""
            yield f"| `{name}` | {default(field.value)} | {said}{comment(field)} |"

    def default(value):
        if isinstance(value, ast.Call) and value.func.id == "component":
            shown = ast.literal_eval(value.args[0])
            extra = [f"{word.arg}={ast.unparse(word.value)}" for word in value.keywords if word.arg != "injected"]
            name = f"{shown.rpartition('.')[2]}({', '.join(extra)})" if isinstance(shown, str) else in_yaml(shown)
            return f"`{name}`"
        if isinstance(value, ast.Call):  # field(default_factory=lambda: ...)
            value = value.keywords[0].value.body
        return "required" if ast.unparse(value) == "MISSING" else f"`{in_yaml(ast.literal_eval(value))}`"

    def comment(field):
        found = [line.split("  # ", 1)[1] for line in lines[field.lineno - 1 : field.end_lineno] if "  # " in line]
        said = " ".join(found).replace("|", "or").replace("<", "&lt;").replace(">", "&gt;")
        return re.sub(r"\b(None|True|False)\b", lambda word: in_yaml(ast.literal_eval(word[1])), said)

    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows(classes["Config"], "")])


PAGE_OF = {"mlm_pretrain": DOCS / "recipes.md", "causal_pretrain": DOCS / "causal_pretrain.md"}


@pytest.mark.parametrize("recipe", PAGE_OF)
def test_the_table_of_keys_is_the_config_dataclass(recipe):
    table = keys_table(find_recipe(recipe))
    assert table in read(PAGE_OF[recipe]), f"{PAGE_OF[recipe].name} should hold\n{table}"


# What a config may name, and the arguments that the recipe passes itself.
COMPONENTS = {
    "torchrecipes.models.": "neobert neobert_base neobert_100m neobert_tiny bert bert_base bert_small bert_mini "
    "bert_tiny gpt2 gpt2_tiny gpt2_small gpt2_medium gpt2_large gpt2_xl gpt_750m llama_700m llama llama_tiny "
    "qwen3 qwen3_tiny qwen3_0_6b qwen3_moe moe_tiny moe_1b moe_1_5b olmoe olmoe_tiny moe moe_500m",
    "torchrecipes.optim.": "adamw adamw_8bit adamw_4bit adamw_cpu_offload muon muon_clip cosine linear constant "
    "warmup_stable_decay",
    "torchrecipes.data.sources.": "files hf_dataset python_docs text_span",
    "torchrecipes.data.tokenizers.": "train_wordpiece train_bpe train_unigram train_char load_tokenizer",
    "torchrecipes.training.loggers.": "TensorBoard WandB",
}
RUNTIME = {"model", "max_steps", "vocab_size of a model", "seed", "source", "folder of a tokenizer", "output_dir"}


def components_table():
    """Every shipped component as Markdown, with the arguments that a config may give and their defaults."""
    rows = ["| component | arguments |", "|---|---|"]
    for home, names in COMPONENTS.items():
        for path in [home + name for name in names.split()]:
            kind = "model" if ".models." in path else "tokenizer" if ".tokenizers." in path else ""
            shown = []
            for name, parameter in parameters(resolve(path)).items():
                if name in RUNTIME or f"{name} of a {kind}" in RUNTIME:
                    continue
                needed = parameter.default is inspect.Parameter.empty
                shown.append(f"`{name}`" if needed else f"`{name}: {in_yaml(parameter.default)}`")
            rows.append(f"| `{path}` | {', '.join(shown)} |")
    return "\n".join(rows)


def test_the_table_of_components_is_their_signatures():
    table = components_table()
    assert table in read(DOCS / "recipes.md"), f"docs/recipes.md should hold\n{table}"


def first_column(text):
    return re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)[1:]  # without the heading


def test_the_shipped_configs_are_listed():
    listed = [cell.strip("`") for page in PAGE_OF.values() for cell in first_column(section(page, "Configs"))]
    assert sorted(listed) == sorted(config.name for config in builtin_configs())


def test_the_sizes_are_those_of_the_models():
    for name, width, stated in re.findall(
        r"^\| `(\w+)` \| (\d+ x \d+) \| ([\d,]+)", section(DOCS / "recipes.md", "Sizes"), re.MULTILINE
    ):
        with torch.device("meta"):
            model = getattr(torchrecipes.models, name)()
        assert f"{sum(p.numel() for p in model.parameters()):,}" == stated, name
        assert f"{model.config.num_hidden_layers} x {model.config.hidden_size}" == width, name


def test_the_metrics_are_listed(tmp_path):
    metrics = MetricLogger(
        tmp_path, 1, device=torch.device("cpu"), tokens_per_step=1, flops_per_token=1, peak_flops=1, loggers=()
    )
    with metrics, metrics.begin_step():
        line = metrics.log(1, lr=1.0, grad_norm=torch.ones(()))
    listed = re.findall(r"`([^`]+)`", " ".join(first_column(section(DOCS / "recipes.md", "What it prints and writes"))))
    assert {name for name in listed if not name.startswith("eval/")} == set(line)


def test_the_quickstart_is_described_as_it_is():
    config = load(load_recipe(find_recipe("mlm_pretrain")).Config, "neobert/quickstart")
    page = read(DOCS / "quickstart.md")
    kept = range(config.save_every, config.max_steps + 1, config.save_every)[-config.keep_last :]
    described = [f"{config.tokenizer.args['vocab_size']:,} entries", f"{config.max_steps} steps"]
    described += [f"every {config.eval_every} steps", f"and {config.model.args['hidden_size']} dimensions"]
    described += [f"step-{step:08d}/" for step in kept]
    assert config.model.args["num_hidden_layers"] == 6 and "NeoBERT of six layers" in page
    assert [text for text in described if text not in page] == []


def test_the_arguments_of_files_are_listed():
    cells = first_column(section(DOCS / "data.md", "Sources"))
    assert set(inspect.signature(files).parameters) <= {cell.strip("`") for cell in cells}


def test_what_may_change_in_a_resumed_run_is_listed():
    listed = re.search(r"These may change:\n(.*?)\.\n", read(DOCS / "checkpoints.md"), re.DOTALL)[1]
    assert sorted(re.findall(r"`([^`]+)`", listed)) == sorted(MAY_CHANGE)


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


def test_what_the_recipe_passes_is_listed():
    listed = {}
    for key, names in re.findall(
        r"^\| `(\w+)` \| ([^|]*) \|$", section(DOCS / "configuration.md", "Components"), re.MULTILINE
    ):
        listed[key] = set(re.findall(r"`(\w+)`", names))
    schema = load_recipe(find_recipe("mlm_pretrain")).Config
    passed = {field.name: set(field.metadata.get("injected", ())) for field in dataclasses.fields(schema)}
    assert listed == {key: names for key, names in passed.items() if names}
