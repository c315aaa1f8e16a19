"""Losses: functions that return a sum over targets. The caller divides once by the targets of the whole step.

masked_lm, causal_lm     over tokens, through `linear_cross_entropy` (chunked_cross_entropy, fused_softmax)
document_class           over documents, beside the loss of their tokens
source_sums              `by_source`: the loss of each source of a mixture
contrastive              `InfoNCE`
similarity               `CoSENT`, `CosineRegression`: pairs with scores
triplet                  `Triplet`, `BatchHardTriplet`
same_label               `SupervisedContrastive`
distillation             `MarginMSE`, `KLDistillation`: a teacher's scores
matryoshka               `Matryoshka`: another loss at several sizes of an embedding
late_interaction         `max_sim`: texts as sets of vectors
classification           `CrossEntropy`, `BinaryCrossEntropy`, `MeanSquaredError`
examples_of_ranks        embeddings and examples of all ranks
own_candidates           every query and the candidates of its own example
"""

from torchrecipes.losses.causal_lm import causal_lm_loss
from torchrecipes.losses.chunked_cross_entropy import linear_cross_entropy
from torchrecipes.losses.classification import (
    CLASSIFICATION_LOSSES,
    BinaryCrossEntropy,
    CrossEntropy,
    MeanSquaredError,
    check_loss_of_logits,
)
from torchrecipes.losses.contrastive import InfoNCE
from torchrecipes.losses.distillation import KLDistillation, MarginMSE
from torchrecipes.losses.document_class import document_class_loss
from torchrecipes.losses.late_interaction import max_sim
from torchrecipes.losses.masked_lm import masked_lm_loss
from torchrecipes.losses.matryoshka import Matryoshka
from torchrecipes.losses.same_label import SupervisedContrastive
from torchrecipes.losses.similarity import CoSENT, CosineRegression
from torchrecipes.losses.source_sums import by_dataset, by_source
from torchrecipes.losses.triplet import BatchHardTriplet, Triplet

__all__ = [
    "CLASSIFICATION_LOSSES",
    "BatchHardTriplet",
    "BinaryCrossEntropy",
    "CoSENT",
    "CosineRegression",
    "CrossEntropy",
    "InfoNCE",
    "KLDistillation",
    "MarginMSE",
    "Matryoshka",
    "MeanSquaredError",
    "SupervisedContrastive",
    "Triplet",
    "by_dataset",
    "by_source",
    "causal_lm_loss",
    "check_loss_of_logits",
    "document_class_loss",
    "linear_cross_entropy",
    "masked_lm_loss",
    "max_sim",
]
