"""`none` is a choice of some keys, and a mistake for `null` everywhere else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from torchrecipes.config import load, to_yaml
from torchrecipes.errors import UserError


@dataclass
class Config:
    mode: Literal["none", "full"] = "full"
    other: Literal["all", "some"] = "all"
    path: str | None = None
    name: str = "x"
    rate: float | None = 1.0


def test_none_may_be_a_choice_with_and_without_quotes(tmp_path):
    assert load(Config, None, ["mode=none"]).mode == "none"
    assert load(Config, None, ["mode='none'"]).mode == "none"
    file = tmp_path / "config.yaml"
    file.write_text("mode: none\n")
    config = load(Config, file, [])
    assert type(config.mode) is str and config.mode == "none"
    assert yaml.safe_load(to_yaml(config))["mode"] == "none"
    Path(file).write_text(to_yaml(config))
    assert load(Config, file, []) == config


@pytest.mark.parametrize("key", ["other", "path", "name", "rate"])
def test_none_is_refused_by_other_keys_with_the_remedy(key):
    with pytest.raises(UserError) as caught:
        load(Config, None, [f"{key}=none"])
    assert caught.value.problems[0].key == key and "null" in caught.value.problems[0].hint


def test_quoted_none_is_text(tmp_path):
    config = load(Config, None, ["path='none'"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(Config, tmp_path / "again.yaml", []).path == "none"
