"""`write_card`: the model card of a fine-tuning run's result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrecipes.models.model_card import write_model_card


def write_card(folder: Path, config: Any, data: Any, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Writes `README.md` into the folder of a result.

    Args:
        folder: the model's.
        config: the recipe's, with the keys `output_dir` and `init_from`.
        data: the run's `ExampleSets`.
        before, after: evaluations of the model at the start and of the result, named as in metrics.jsonl.
    """
    figures = {
        column: {name.removeprefix("eval/"): value for name, value in values.items()}
        for column, values in (("before", before), ("after", after))
    }
    write_model_card(
        folder,
        name=Path(config.output_dir).name,
        base_model=config.init_from,
        training_data=data.origins,
        figures={column: values for column, values in figures.items() if values},
        settings=(folder / "config.yaml").read_text(encoding="utf-8"),  # says where each value comes from
    )
