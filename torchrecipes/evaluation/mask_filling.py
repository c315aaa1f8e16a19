"""The predictions of a masked language model for `[MASK]`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.evaluation.running import evaluation_mode
from torchrecipes.models.compatibility import max_positions

if TYPE_CHECKING:
    from torchrecipes.data.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prediction:
    """A prediction for a mask: the token's text, and its probability among all tokens that can be predicted."""

    token: str
    probability: float


@torch.no_grad()
def fill_mask(model: nn.Module, tokenizer: "Tokenizer", text: str, top_k: int = 5) -> list[list[Prediction]]:
    """The `top_k` most probable tokens for every mask in `text`, in the order of the masks.

    Args:
        model: gives hidden states and has a `head` (`torchrecipes.models.load_hf`).
        tokenizer: a `torchrecipes.data.tokenizers.Tokenizer`. Padding of its vocabulary is never predicted.
        text: contains the tokenizer's mask token at least once, as in `"The [MASK] is blue."`

    Raises:
        UserError: `text` has no mask (code `no_mask`), or more tokens than the model has positions (`too_long`).
    """
    mask_token = tokenizer.decode_token(tokenizer.mask_id)
    ids = tokenizer.encode_prompt(text)
    masks = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    if not masks:
        hint = f"Put {mask_token} where the model is to predict a token."
        raise UserError(f"{text!r} has no {mask_token}", hint=hint, code="no_mask")
    if len(ids) > (positions := max_positions(model)):
        problem = f"the text has {len(ids)} tokens, and the model {positions} positions"
        raise UserError(problem, hint="Shorten it.", code="too_long")
    with evaluation_mode(model):
        hidden = model(torch.tensor([ids], device=next(model.parameters()).device))
        logits = model.head(hidden[0, masks])[:, : tokenizer.unpadded_vocab_size].float()
    probability, token = logits.softmax(-1).topk(min(top_k, tokenizer.unpadded_vocab_size))
    return [
        [Prediction(tokenizer.decode_token(t), p) for t, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(token.tolist(), probability.tolist(), strict=True)
    ]
