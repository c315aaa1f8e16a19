import os
from pathlib import Path

import pytest

from torchrecipes.cli.main import main
from torchrecipes.config.catalog import find_builtin


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    (folder / "configs" / "family").mkdir(parents=True)
    (folder / "mlm.py").write_text("recipe text\n")
    (folder / "configs" / "family" / "size.yaml").write_text("# recipe: mlm\n# For.\nseed: 1\n")
    (folder / "configs" / "family" / "whole.yaml").write_text("# recipe: mlm\n# For.\noutput_dir: runs/whole\n")
    monkeypatch.setattr("torchrecipes.config.catalog.recipes_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "target", "command"),
    [
        ("mlm my_recipe.py", "my_recipe.py", "run my_recipe.py --config family/size output_dir=runs/my_recipe"),
        ("mlm my_recipe", "my_recipe.py", "run my_recipe.py --config family/size output_dir=runs/my_recipe"),
        ("mlm made/deep/", "made/deep/mlm.py", "run made/deep/mlm.py --config family/size output_dir=runs/mlm"),
        ("mlm .", "mlm.py", "run mlm.py --config family/size output_dir=runs/mlm"),
        ("family/size my.yaml", "my.yaml", "run mlm --config my.yaml output_dir=runs/my"),
        ("family/size a/v1.2", "a/v1.2.yaml", "run mlm --config a/v1.2.yaml output_dir=runs/v1.2"),
        ("family/whole my.yaml", "my.yaml", "run mlm --config my.yaml"),
    ],
)
def test_the_path_of_the_copy_and_its_command_are_printed(words, target, command, capsys):
    assert main(["cp", *words.split()]) == 0
    assert Path(target).read_bytes() == find_builtin(words.split()[0]).path.read_bytes()
    assert capsys.readouterr().out == f"Wrote {target}. To run it:\n\n    tune-style {command}\n"


def test_the_command_prefers_the_quickstart_config(shipped, capsys):
    (Path("shipped") / "configs" / "family" / "quickstart.yaml").write_text(
        "# recipe: mlm\n# For.\noutput_dir: runs/q\n"
    )
    assert main(["cp", "mlm", "my_recipe.py"]) == 0
    # Not the config's own folder, where a run of the recipe as it is shipped may be.
    assert "run my_recipe.py --config family/quickstart output_dir=runs/my_recipe\n" in capsys.readouterr().out


def test_a_path_with_spaces_is_quoted_in_the_command(capsys):
    assert main(["cp", "mlm", "my recipe.py"]) == 0
    assert "tune-style run 'my recipe.py' --config" in capsys.readouterr().out


def test_a_file_that_exists_is_kept_unless_forced(capsys):
    Path("mine.py").write_text("precious")
    assert main(["cp", "mlm", "mine.py"]) == 2
    err = capsys.readouterr().err
    assert "mine.py" in err and "--force" in err
    assert Path("mine.py").read_text() == "precious"
    assert main(["cp", "mlm", "mine.py", "--force"]) == 0
    assert Path("mine.py").read_text() == "recipe text\n"


def test_mistakes_are_one_message(capsys):
    assert main(["cp", "mlmm", "x.py"]) == 2
    assert "'mlm'" in capsys.readouterr().err
    Path("file").write_text("")
    assert main(["cp", "mlm", "file/x.py"]) == 2
    assert "file/x.py" in capsys.readouterr().err
    assert not os.path.exists("x.py")
