import pytest

from torchrecipes.cli.main import main
from torchrecipes.config.catalog import builtin_configs, builtin_recipes


def test_every_recipe_and_config_is_listed_with_what_it_is_for(capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for recipe in builtin_recipes():
        start = lines.index(f"{recipe.name}: {recipe.summary}")
        below = lines[start + 1 : lines.index("", start)]
        for config in builtin_configs():
            line = [line for line in below if f"--config {config.name} " in line]
            assert len(line) == (config.recipe == recipe.name)
            assert not line or line[0].endswith(config.summary)


def test_one_recipe_alone(capsys):
    assert main(["ls", "mlm_pretrain"]) == 0
    assert capsys.readouterr().out.startswith("mlm_pretrain: ")
    assert main(["ls", "mlm_pretrian"]) == 2
    assert "'mlm_pretrain'" in capsys.readouterr().err


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    (tmp_path / "configs" / "family").mkdir(parents=True)
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(f'"""Train {name}."""\n')
        (tmp_path / "configs" / "family" / f"{name}.yaml").write_text(f"# recipe: {name}\n# For {name}.\n")
    (tmp_path / "configs" / "stray.yaml").write_text("seed: 1\n")
    monkeypatch.setattr("torchrecipes.config.catalog.recipes_folder", lambda: tmp_path)


def test_configs_are_listed_below_their_recipe_and_strays_last(shipped, capsys):
    assert main(["ls"]) == 0
    assert capsys.readouterr().out.splitlines()[:9] == [
        "one: Train one.",
        "    --config family/one  For one.",
        "",
        "two: Train two.",
        "    --config family/two  For two.",
        "",
        "Configs whose first line names no recipe here:",
        "    --config stray",
        "",
    ]
    assert main(["ls", "two"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["two: Train two.", "    --config family/two  For two.", ""]
