from pathlib import Path

import pytest

import torchrecipes
from torchrecipes.config import catalog
from torchrecipes.errors import UserError

CHECKOUT = Path(torchrecipes.__file__).parent.parent


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    (folder / "configs" / "family").mkdir(parents=True)
    (folder / "mlm.py").write_text('"""Pretrain it.\n\nMore."""\n')
    (folder / "odd.py").write_text("def (:\n")
    (folder / "silent.py").write_text("x = 1\n")
    (folder / "_private.py").write_text("")
    (folder / "configs" / "family" / "size.yaml").write_text("# recipe: mlm\n# A small one.\nseed: 1\n")
    (folder / "configs" / "bare.yaml").write_text("seed: 1\n")
    monkeypatch.setattr(catalog, "recipes_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_in_a_checkout_the_recipes_are_beside_the_package():
    assert catalog.recipes_folder() == CHECKOUT / "recipes"


def test_recipes_and_configs_are_what_is_on_disk(shipped):
    assert [(recipe.name, recipe.summary) for recipe in catalog.builtin_recipes()] == [
        ("mlm", "Pretrain it."),
        ("odd", "(does not parse: line 1)"),
        ("silent", ""),
    ]
    assert [(config.name, config.recipe, config.summary) for config in catalog.builtin_configs()] == [
        ("bare", None, ""),
        ("family/size", "mlm", "A small one."),
    ]


def test_a_recipe_is_found_by_name_or_path(shipped, tmp_path):
    assert catalog.find_recipe("mlm") == catalog.find_recipe("mlm.py") == shipped / "mlm.py"
    (tmp_path / "mlm.py").write_text("mine")
    assert catalog.find_recipe("mlm") == shipped / "mlm.py"
    assert catalog.find_recipe("mlm.py") == catalog.find_recipe("./mlm.py") == tmp_path / "mlm.py"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mlmm", "'mlm'"),
        ("banana", "mlm, odd, silent"),
        ("folder/mine.py", "mlm, odd, silent"),
        ("shipped", "mlm, odd, silent"),
        ("my.yaml", "mlm, odd, silent"),
    ],
)
def test_a_recipe_that_does_not_exist(shipped, tmp_path, name, hint):
    (tmp_path / "my.yaml").write_text("")
    with pytest.raises(UserError) as caught:
        catalog.find_recipe(name)
    assert caught.value.code == "not_found" and name in caught.value.problem and hint in caught.value.hint


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("family", "'family/quickstart' or 'family/size' or 'family/small'"),
        ("quickstart", "'family/quickstart' or 'other/quickstart'"),
        ("family/siez", "'family/size'"),
        ("family_size", "'family/size'"),
        ("siez", "'family/size'"),
    ],
)
def test_a_config_that_does_not_exist(shipped, name, near):
    (shipped / "configs" / "other").mkdir()
    for made in ("family/small", "family/quickstart", "other/quickstart"):
        (shipped / "configs" / f"{made}.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError) as caught:
        catalog.find_config(name)
    assert caught.value.code == "not_found" and near in caught.value.hint


def test_a_config_file_wins_over_a_shipped_name(shipped, tmp_path):
    assert catalog.find_config("family/size") == shipped / "configs" / "family" / "size.yaml"
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "size.yaml").write_text("mine")
    assert catalog.find_config("family/size.yaml") == Path("family/size.yaml")
    assert catalog.find_config("family/size") == shipped / "configs" / "family" / "size.yaml"


def test_without_shipped_files_the_message_says_so(shipped, monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "recipes_folder", lambda: tmp_path / "nothing")
    with pytest.raises(UserError) as caught:
        catalog.find_recipe("mlm")
    assert caught.value.code == "not_found" and "No recipe" in caught.value.hint


def test_cat_and_cp_find_both_kinds(shipped):
    assert catalog.find_builtin("mlm").name == catalog.find_builtin("mlm.py").name == "mlm"
    assert catalog.find_builtin("family/size").name == catalog.find_builtin("family/size.yaml").name == "family/size"
    with pytest.raises(UserError) as caught:
        catalog.find_builtin("family/siez")
    assert "'family/size'" in caught.value.hint
