"""The wheel, built without the network and used from another folder: the recipes travel inside the package."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torchrecipes

CHECKOUT = Path(torchrecipes.__file__).parent.parent


def tune_style(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "torchrecipes.cli.main", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_package_and_its_recipes_and_nothing_else(installed):
    (wheel,) = installed.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "torchrecipes",
        f"torchrecipes-{torchrecipes.__version__}.dist-info",
    }
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    shipped = {path.relative_to(CHECKOUT / "recipes").as_posix() for path in (CHECKOUT / "recipes").rglob("*.*")}
    in_wheel = {name.removeprefix("torchrecipes/_recipes/") for name in names if "/_recipes/" in name}
    assert in_wheel == {name for name in shipped if name.endswith((".py", ".yaml"))}
    assert f"torchrecipes-{torchrecipes.__version__}.dist-info/licenses/LICENSE" in names


def test_ls_cat_and_cp_from_the_installed_package(installed, tmp_path):
    where = "import torchrecipes; print(torchrecipes.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", where], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(str(installed))

    listed = tune_style(installed, tmp_path, "ls")
    assert (
        listed.returncode == 0 and "mlm_pretrain: " in listed.stdout and "--config neobert/quickstart" in listed.stdout
    )
    printed = tune_style(installed, tmp_path, "cat", "neobert/quickstart")
    assert printed.stdout == (CHECKOUT / "recipes/configs/neobert/quickstart.yaml").read_text()
    copied = tune_style(installed, tmp_path, "cp", "mlm_pretrain", "my_recipe.py")
    assert "tune-style run my_recipe.py --config " in copied.stdout
    assert (tmp_path / "my_recipe.py").read_text() == (CHECKOUT / "recipes/mlm_pretrain.py").read_text()


def test_a_copied_recipe_is_checked_against_the_installed_package(installed, tmp_path):
    assert tune_style(installed, tmp_path, "cp", "mlm_pretrain", "my_recipe.py").returncode == 0
    edited = (
        (tmp_path / "my_recipe.py").read_text().replace("    seed: int = 0", "    seed: int = 0\n    my_key: int = 1")
    )
    (tmp_path / "my_recipe.py").write_text(edited)
    words = ["validate", "my_recipe.py", "--config", "neobert/quickstart"]
    done = tune_style(installed, tmp_path, *words, "my_key=5k")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    done = tune_style(installed, tmp_path, *words, "my_kye=5k")
    assert done.returncode == 2 and "'my_key'" in done.stderr
