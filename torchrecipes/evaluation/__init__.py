"""Evaluation: loss, perplexity, fill-mask, generation; similarity, retrieval and classification.

mlm                `evaluate_mlm`, `mlm_baseline`: masked tokens, beside token frequencies and n-grams
characters         kinds of characters and baselines, where tokens are characters
ngrams             `NGramModel`: interpolated n-grams
causal             `evaluate_causal`: next tokens
generation         `generate`, `generate_text`: text from prompts
sampling           from logits to the next token
document_loss      `document_losses`: the loss of every document, to find bad data
text_perplexity    `perplexity` of documents, in windows
position_loss      `loss_by_position`: sums of the loss for ranges of positions
mask_filling       `fill_mask`, `MaskFiller`: the tokens that fit into [MASK]

text_encoder          `TextEncoder`: embeddings of any number of texts
text_vectors          `TextVectors`, `max_sim_scores`: late interaction
text_classifier       `TextClassifier`: labels and probabilities of any number of texts
over_texts            `map_texts`: what both compute, in windows that are sorted by length
text_tokens           tokens of many texts at once
sts                   `STS`: correlation with people's scores
retrieval             `Retrieval`: MRR, nDCG and recall of an exact search
pair_classification   `PairClassification`: average precision and the best thresholds
mteb_tasks            `MTEBTasks`: tasks of MTEB
embeddings            what these share: the encoder that they take, similarities
top_k, ranking, beir  exact search in chunks, the metrics of rankings, BEIR's layout
classification        `classification_metrics`, `class_scores`: from logits and labels; GLUE's metrics
calibration           `fit_temperature`, `tune_thresholds`
classification_plots  `plot_confusion_matrix`, `plot_calibration`
classification_report `calibrate`, `report_classification`: at the end of a run
over_examples         `map_examples`, `predict_examples`: what a model computes for every example of a set
correlation           Pearson and Spearman
"""

from torchrecipes.evaluation.calibration import fit_temperature, tune_thresholds
from torchrecipes.evaluation.causal import evaluate_causal
from torchrecipes.evaluation.classification import (
    GLUE_METRICS,
    ClassScores,
    class_scores,
    classification_metrics,
    confusion_matrix,
    format_report,
    glue_score,
)
from torchrecipes.evaluation.classification_plots import plot_calibration, plot_confusion_matrix
from torchrecipes.evaluation.classification_report import calibrate, report_classification
from torchrecipes.evaluation.document_loss import DocumentLoss, document_losses
from torchrecipes.evaluation.generation import check_prompts, generate, generate_text
from torchrecipes.evaluation.mask_filling import MaskFiller, fill_mask
from torchrecipes.evaluation.mlm import UnigramBaseline, evaluate_mlm, mlm_baseline, unigram_baseline
from torchrecipes.evaluation.mteb_tasks import MTEBTasks
from torchrecipes.evaluation.ngrams import NGramModel
from torchrecipes.evaluation.over_examples import map_examples, predict_examples
from torchrecipes.evaluation.pair_classification import PairClassification
from torchrecipes.evaluation.position_loss import loss_by_position, position_edges
from torchrecipes.evaluation.retrieval import Retrieval
from torchrecipes.evaluation.sts import STS
from torchrecipes.evaluation.text_classifier import Prediction, TextClassifier
from torchrecipes.evaluation.text_encoder import TextEncoder
from torchrecipes.evaluation.text_perplexity import perplexity
from torchrecipes.evaluation.text_vectors import TextVectors, max_sim_scores

__all__ = [
    "GLUE_METRICS",
    "STS",
    "ClassScores",
    "DocumentLoss",
    "MTEBTasks",
    "MaskFiller",
    "NGramModel",
    "PairClassification",
    "Prediction",
    "Retrieval",
    "TextClassifier",
    "TextEncoder",
    "TextVectors",
    "UnigramBaseline",
    "calibrate",
    "check_prompts",
    "class_scores",
    "classification_metrics",
    "confusion_matrix",
    "document_losses",
    "evaluate_causal",
    "evaluate_mlm",
    "fill_mask",
    "fit_temperature",
    "format_report",
    "generate",
    "generate_text",
    "glue_score",
    "loss_by_position",
    "map_examples",
    "max_sim_scores",
    "mlm_baseline",
    "perplexity",
    "plot_calibration",
    "plot_confusion_matrix",
    "position_edges",
    "predict_examples",
    "report_classification",
    "tune_thresholds",
    "unigram_baseline",
]
