import pytest

from torchrecipes.cli.main import main
from torchrecipes.config.catalog import builtin_configs

CONFIGS = {config.name: config for config in builtin_configs() if "???" not in config.path.read_text()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_that_leaves_nothing_open_is_ok(name, capsys):
    assert main(["validate", CONFIGS[name].recipe, "--config", name]) == 0
    assert capsys.readouterr().out.startswith("ok")  # and the number of stages


def test_all_the_errors_and_exit_code_2(capsys):
    words = ["validate", "mlm_pretrain", "--config", "neobert/quickstart", "optimizer.lrr=1", "sede=2", "seq_len=long"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "'lr'" in err and "'seed'" in err and "seq_len: " in err
    assert len(err.splitlines()) == 4
