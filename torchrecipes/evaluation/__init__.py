"""Evaluation: loss, perplexity, fill-mask, generation.

mlm                `evaluate_mlm`, `unigram_baseline`: masked tokens, beside the frequency of words
causal             `evaluate_causal`: next tokens
generation         `generate`, `generate_text`: text from prompts
sampling           from logits to the next token
document_loss      `document_losses`: the loss of every document, to find bad data
text_perplexity    `perplexity` of documents, in windows
position_loss      `loss_by_position`: sums of the loss for ranges of positions
mask_filling       `fill_mask`: the tokens that fit into [MASK]
"""

from torchrecipes.evaluation.causal import evaluate_causal
from torchrecipes.evaluation.document_loss import DocumentLoss, document_losses
from torchrecipes.evaluation.generation import check_prompts, generate, generate_text
from torchrecipes.evaluation.mask_filling import fill_mask
from torchrecipes.evaluation.mlm import evaluate_mlm, unigram_baseline
from torchrecipes.evaluation.position_loss import loss_by_position, position_edges
from torchrecipes.evaluation.text_perplexity import perplexity

__all__ = [
    "DocumentLoss",
    "check_prompts",
    "document_losses",
    "evaluate_causal",
    "evaluate_mlm",
    "fill_mask",
    "generate",
    "generate_text",
    "loss_by_position",
    "perplexity",
    "position_edges",
    "unigram_baseline",
]
