from torchrecipes.cli.main import main
from torchrecipes.config.catalog import recipes_folder


def test_a_recipe_and_a_config_are_printed_as_they_are(capsys):
    for name, file in {
        "mlm_pretrain": "mlm_pretrain.py",
        "neobert/quickstart": "configs/neobert/quickstart.yaml",
    }.items():
        assert main(["cat", name]) == 0
        assert capsys.readouterr().out == (recipes_folder() / file).read_text()


def test_an_unknown_name_gets_a_suggestion(capsys):
    assert main(["cat", "neobert/quikstart"]) == 2
    assert "'neobert/quickstart'" in capsys.readouterr().err
