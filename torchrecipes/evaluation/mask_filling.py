"""Fill-mask: the most probable tokens for each `[MASK]` of a text."""

from dataclasses import dataclass

import torch
from torch import nn

from torchrecipes.errors import UserError


@dataclass(frozen=True)
class Prediction:
    """A guess for one mask: the text of the token and its probability."""

    token: str
    probability: float


@torch.no_grad()
def fill_mask(model: nn.Module, tokenizer, text: str, top_k: int = 5) -> list[list[Prediction]]:
    """The `top_k` most probable tokens for every mask in `text`, in the order of the masks.

    Args:
        model: returns hidden states and has a `head` (`torchrecipes.models.load_hf`). It is put into evaluation mode.
        tokenizer: its vocabulary padding is never predicted.
        text: contains the tokenizer's mask token at least once, as in `"The [MASK] is blue."`

    Raises:
        UserError: `text` has no mask, or is longer than the model's positions.
    """
    mask_token = tokenizer.decode_token(tokenizer.mask_id)
    ids = tokenizer.encode_prompt(text)
    positions = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    if not positions:
        raise UserError(f"{text!r} has no {mask_token}. Write {mask_token} where the model should predict a token.")
    if len(ids) > model.config.max_position_embeddings:
        raise UserError(
            f"the text has {len(ids)} tokens, the model {model.config.max_position_embeddings} positions. Shorten it."
        )
    model.eval()
    device = next(model.parameters()).device
    hidden = model(torch.tensor([ids], device=device))
    logits = model.head(hidden[0, positions])[:, : tokenizer.unpadded_vocab_size].float()
    probability, token = logits.softmax(-1).topk(min(top_k, tokenizer.unpadded_vocab_size))
    return [
        [Prediction(tokenizer.decode_token(t), p) for t, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(token.tolist(), probability.tolist(), strict=True)
    ]
