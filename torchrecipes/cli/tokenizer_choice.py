"""The arguments with which a verb takes a tokenizer, from disk or to be trained, and the kind of model it is for."""

import argparse
from pathlib import Path
from typing import Any

from torchrecipes.errors import UserError

TRAINERS = ("train_bpe", "train_char", "train_unigram", "train_wordpiece")


def add_objective(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Declare `--objective`: `mlm` or `causal`."""
    parser.add_argument(
        "--objective",
        choices=("causal", "mlm"),
        required=required,
        help="what the model will predict: causal (the next token; documents end in an eos token) or mlm (masked "
        "tokens; documents are [CLS] text [SEP])",
    )


def tokenizer_component(text: str) -> Any:
    """Return the component that `train_bpe:vocab_size=8192` or the path of a tokenizer stands for.

    Raises:
        UserError: no such argument, or a value of the wrong type.
    """
    from torchrecipes.cli.data_source import checked_component
    from torchrecipes.config.components import Component

    kind, _, settings = text.partition(":")
    if kind not in TRAINERS:
        from torchrecipes.config.suggest import closest

        near = closest(kind, TRAINERS)
        if near and not Path(text).exists():
            raise UserError(
                f"there is no tokenizer {text}", key="--tokenizer", hint=f"Did you mean {near}?", code="no_tokenizer"
            )
        return Component("torchrecipes.data.tokenizers.load_tokenizer", {"path": text})
    path, arguments = f"torchrecipes.data.tokenizers.{kind}", settings.split(",") if settings else []
    return checked_component("tokenizer", path, arguments)


def make_tokenizer(component: Any, causal: bool, source: Any = None, folder: Path | None = None) -> Any:
    """Build the tokenizer that a component describes: a trained one is kept in `folder`, and read from it again.

    A folder that holds a run stands for its newest valid checkpoint.

    Raises:
        UserError: what `load_tokenizer` and the trainers raise.
    """
    from torchrecipes.config.components import build

    if component.path == "torchrecipes.data.tokenizers.load_tokenizer":
        from torchrecipes.data.tokenizers.load import load_model_tokenizer

        path = Path(component.args["path"])
        if (path / "checkpoints").is_dir():
            from torchrecipes.model_folder import resolve_model_folder

            return load_model_tokenizer(resolve_model_folder(path, warn=True), causal)
    try:
        return build(component, source=source, folder=folder, causal=causal)
    except UserError as error:
        if error.code == "no_special_token" and not causal:
            hint = f"{error.hint} For a model that predicts the next token: --objective causal."
            raise UserError(error.problem, key="--tokenizer", hint=hint, code=error.code) from None
        raise
