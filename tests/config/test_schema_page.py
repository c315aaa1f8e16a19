from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchrecipes.config import MISSING, Component, MayChange, Range, Steps, component
from torchrecipes.config.schema_page import markdown


@dataclass
class Checkpoint:
    """When a run is saved."""

    save_every: Steps | None = 500  # the last step is always saved


@dataclass
class Config:
    output_dir: str = MISSING  # the run's folder
    rate: Annotated[float, Range(0, 1, closed_above=False)] = 0.1
    mode: Literal["auto", "never"] = "auto"  # a | b
    optimizer: Component = component(  # makes the groups
        "torchrecipes.optim.adamw", lr=1e-3
    )
    loggers: list[Component] = component([])
    log_every: MayChange[Steps] = 10
    checkpoint: MayChange[Checkpoint] = field(default_factory=Checkpoint)


def test_every_key_has_a_row_with_type_range_unit_default_and_comment():
    assert markdown(Config).splitlines() == [
        "| key | type | default | may change on resume | description |",
        "|---|---|---|---|---|",
        "| `output_dir` | text | required |  | the run's folder |",
        "| `rate` | number at least 0 and below 1 | `0.1` |  |  |",
        "| `mode` | `auto` or `never` | `auto` |  | a \\| b |",
        "| `optimizer` | component | `torchrecipes.optim.adamw(lr=0.001)` |  | makes the groups |",
        "| `loggers` | list of component | `[]` |  |  |",
        "| `log_every` | integer at least 1 (optimizer steps) | `10` | yes |  |",
        "",
        "## `checkpoint`",
        "",
        "When a run is saved.",
        "",
        "| key | type | default | may change on resume | description |",
        "|---|---|---|---|---|",
        "| `checkpoint.save_every` | integer at least 1 (optimizer steps) or `null` | `500` | yes "
        "| the last step is always saved |",
    ]
