"""Losses: functions that return a sum over targets. The caller divides once by the targets of the whole step."""

from torchrecipes.losses.causal_lm import causal_lm_loss
from torchrecipes.losses.chunked_cross_entropy import linear_cross_entropy
from torchrecipes.losses.masked_lm import masked_lm_loss
from torchrecipes.losses.source_sums import by_source

__all__ = ["by_source", "causal_lm_loss", "linear_cross_entropy", "masked_lm_loss"]
