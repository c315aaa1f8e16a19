"""`set_dropout`: another dropout than a checkpoint was trained with."""

from torch import nn


def set_dropout(model: nn.Module, probability: float) -> None:
    """Sets the dropout of the embeddings and of what every layer adds; that of attention weights is switched off.

    Dropout of attention weights rules out the fast kernels.

    Args:
        model: of this library, of `transformers`, or any with `nn.Dropout`; changed in place.
        probability: of dropping an element, in training.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ("dropout_p", "embedding_dropout"):
            if hasattr(module, name):
                setattr(module, name, probability)
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
