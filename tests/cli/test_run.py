"""`run` and `validate` on small recipes of the test's own."""

import os
import sys
from pathlib import Path

import pytest

from torchrecipes.cli.main import main
from torchrecipes.cli.openmp import SPIN_COUNT
from torchrecipes.cli.run import load_recipe

RECIPE = '''
"""A recipe that tells what it was given."""
from dataclasses import dataclass
from pathlib import Path
from torchrecipes.config import Component, build, component, parse, to_yaml
from torchrecipes.errors import UserError


def double(number: int, seed: int) -> int:
    return 2 * number + seed


@dataclass
class Config:
    output_dir: str
    seed: int = 0
    part: Component = component("{name}.double", injected=("seed",), number=5)


def main(config: Config) -> None:
    if config.seed == 13:
        raise UserError("13 is no seed. Take another.")
    if config.seed == 14:
        raise KeyboardInterrupt
    if config.seed == 15:
        1 / 0
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "out.txt").write_text(f"{{build(config.part, seed=config.seed)}} {{Path(__file__).name}} {{__name__}}")
    (folder / "config.yaml").write_text(to_yaml(config))


if __name__ == "__main__":
    main(parse(Config))
'''


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    yield
    for name in set(sys.modules) - before:
        if not getattr(sys.modules[name], "__file__", None) or str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


def recipe(name: str = "my_recipe", folder: Path = Path(".")) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.py"
    path.write_text(RECIPE.format(name=name))
    return path


def test_a_recipe_file_runs_from_any_folder_with_the_components_in_it(tmp_path, monkeypatch):
    path = recipe(folder=tmp_path / "elsewhere")
    (tmp_path / "my.yaml").write_text("seed: 1\noutput_dir: out\n")
    assert main(["run", str(path), "--config", "my.yaml", "part.number=1k"]) == 0
    assert Path("out/out.txt").read_text() == "2001 my_recipe.py my_recipe"
    # The config that the run wrote repeats it.
    assert main(["run", str(path), "--config", "out/config.yaml", "output_dir=again"]) == 0
    assert Path("again/out.txt").read_text().startswith("2001 ")


def test_without_a_config_file_the_defaults_and_the_overrides_are_used():
    assert main(["run", str(recipe()), "output_dir=out"]) == 0
    assert Path("out/out.txt").read_text().startswith("10 ")


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(monkeypatch, given, count):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # restores it
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["run", str(recipe()), "output_dir=out"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == count


def test_a_shipped_recipe_and_a_shipped_config_are_found_by_name(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    recipe("mlm", shipped)
    (shipped / "mlm.py").write_text((shipped / "mlm.py").read_text().replace('"mlm.double"', '"own_part.triple"'))
    (shipped / "configs" / "family").mkdir(parents=True)
    (shipped / "configs" / "family" / "size.yaml").write_text("# recipe: mlm\nseed: 2\n")
    (tmp_path / "own_part.py").write_text("def triple(number: int, seed: int): return 3 * number + seed\n")
    monkeypatch.setattr("torchrecipes.config.catalog.recipes_folder", lambda: shipped)
    monkeypatch.setattr("torchrecipes.cli.run.recipes_folder", lambda: shipped)
    # A component in the working folder is found, too.
    assert main(["run", "mlm", "--config", "family/size", "output_dir=out"]) == 0
    assert Path("out/out.txt").read_text().startswith("17 ")
    assert str(shipped) not in sys.path  # a shipped recipe is no module for anybody to import


def test_the_check_comes_before_the_run(capsys):
    path = recipe()
    Path("my.yaml").write_text("sed: 1\noutput_dir: out\npart:\n  numbr: 3\n")
    for verb in ("run", "validate"):
        assert main([verb, str(path), "--config", "my.yaml", "seed=x"]) == 2
        _, *lines = capsys.readouterr().err.splitlines()
        assert [line.split(": ")[:2] for line in lines] == [
            ["  my.yaml:1", "sed"],
            ["  my.yaml:4", "part.numbr"],
            ["  override 'seed=x'", "seed"],
        ]
        assert "'seed'" in lines[0] and "'number'" in lines[1]
    assert not Path("out").exists()


def test_validate_says_ok_and_runs_nothing(capsys):
    assert main(["validate", str(recipe()), "output_dir=out"]) == 0
    assert capsys.readouterr().out == "ok\n"
    assert not Path("out").exists()


@pytest.mark.parametrize(("seed", "code", "message"), [(13, 2, "13 is no seed. Take another.\n"), (14, 130, "")])
def test_how_a_run_ends_early(seed, code, message, capsys):
    assert main(["run", str(recipe()), "output_dir=out", f"seed={seed}"]) == code
    assert capsys.readouterr().err == message


def test_a_bug_in_a_recipe_is_a_traceback():
    with pytest.raises(ZeroDivisionError):
        main(["run", str(recipe()), "output_dir=out", "seed=15"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "mlm_pretran"], "'mlm_pretrain'"),
        (["run", "nowhere.py"], "nowhere.py"),
        (["validate", "mlm_pretrain", "--config", "neobert/quickstrt"], "'neobert/quickstart'"),
        (["run", "no_config.py"], "no_config.py"),
        (["run", "no_main.py"], "no_main.py"),
        (["run", "no_dataclass.py"], "no_dataclass.py"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(words, message, capsys):
    Path("no_config.py").write_text("def main(config): ...\n")
    Path("no_main.py").write_text("import dataclasses\nConfig = dataclasses.make_dataclass('Config', [])\n")
    Path("no_dataclass.py").write_text("class Config: ...\ndef main(config): ...\n")
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_config_name_is_reported_before_the_recipe_is_imported(capsys):
    Path("slow.py").write_text("raise AssertionError('imported')\n")
    assert main(["run", "slow.py", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_a_recipe_does_not_shadow_a_module_of_its_name(tmp_path):
    module = load_recipe(recipe("json").resolve())
    assert module.__name__ == "recipe_json"
    assert "scanner" in dir(sys.modules["json"])
    assert load_recipe(recipe("my-recipe.v2").resolve()).Config


def test_a_recipe_that_does_not_import_leaves_nothing_behind():
    Path("broken.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_recipe(Path("broken.py").resolve())
    assert "broken" not in sys.modules


def test_other_ranks_stay_silent_about_a_config_error(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SystemExit) as stop:
        main(["run", str(recipe()), "sed=1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""
