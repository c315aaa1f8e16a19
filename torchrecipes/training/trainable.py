"""`set_trainable`: which part of a classifier is trained."""

from typing import Literal

from torchrecipes.errors import UserError
from torchrecipes.models import SequenceClassifier

Trainable = Literal["classifier", "last_2", "last_3", "all", "lora"]


def set_trainable(model: SequenceClassifier, trainable: Trainable) -> str:
    """Chooses the parameters that are trained. Call it before `setup_model` shards the model, or in `build_model`.

    What is below the lowest trained block costs no backward pass, no memory of the optimizer, and has no dropout.

    Args:
        model: changed in place.
        trainable: `classifier`: the head, with a pooler; `last_2`, `last_3`: the head and the last one or two blocks
            with the norm after them; `all`; `lora`: the head and the matrices that `apply_lora` has added.

    Returns:
        What `describe_trainable` says.

    Raises:
        UserError: `too_few_blocks`, `no_lora`, or another word (`unknown_name`).
    """
    blocks = len(model.blocks)
    count = {"classifier": 0, "last_2": 1, "last_3": 2, "all": blocks, "lora": blocks}.get(trainable)
    if count is None:
        names = "classifier, last_2, last_3, all or lora"
        raise UserError(f"{trainable!r} is not {names}", key="trainable", code="unknown_name")
    if count > blocks:
        problem = f"{trainable} trains {count} blocks, and the encoder has {blocks}"
        raise UserError(problem, key="trainable", hint="Use all.", code="too_few_blocks")
    if trainable == "lora":
        if getattr(model, "lora", None) is None:
            hint = "Call torchrecipes.modules.lora.apply_lora(model, ...) first."
            raise UserError("the model has no LoRA", key="trainable", hint=hint, code="no_lora")
        for name, parameter in model.named_parameters():
            is_added = name.rpartition(".")[2] in ("lora_A", "lora_B")
            parameter.requires_grad_(is_added or name in model.lora.trained)
    else:
        model.encoder.requires_grad_(trainable == "all")
        model.head.requires_grad_(True)
        for module in (*model.blocks[blocks - count :], model.encoder.norm) if count else ():
            module.requires_grad_(True)
    model.train(model.training)  # evaluation mode in what is frozen
    return describe_trainable(model, trainable)


def describe_trainable(model: SequenceClassifier, trainable: Trainable) -> str:
    """Says what of a model is trained after `set_trainable`, and how many parameters that are."""
    blocks = len(model.blocks)
    part = {
        "classifier": "the classifier",
        "last_2": f"the classifier and the last of {blocks} blocks",
        "last_3": f"the classifier and the last 2 of {blocks} blocks",
        "all": "all of it",
        "lora": "the classifier and the LoRA matrices",
    }[trainable]
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return f"trainable: {part}, {trained:,} of {sum(p.numel() for p in parameters):,} parameters"
