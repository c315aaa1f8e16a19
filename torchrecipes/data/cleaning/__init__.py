"""Cleaning of text: normalization, filters, duplicates, overlap with evaluation sets; documents in, documents out.

stages              `clean`: all stages of a job
evaluation_overlap  `decontaminate`: overlap with evaluation sets
steps               `CleaningSteps`, `read_steps`: which steps, with which options
normalization       `Normalize`: Unicode normal forms, control and zero-width characters
gopher, c4          the heuristics of these papers
language            `Language`: language identification
boilerplate         lines that recur in many documents
ngrams, signatures  hashes of words and word n-grams; signatures
duplicates          clusters of exact and near duplicates, from files
removal             `Removal`: why a document is removed
pieces              what is cleaned at a time; job arrays, worker processes, continuing
output, report      the output folder; what was removed and why
"""

from torchrecipes.data.cleaning.boilerplate import BoilerplateLines
from torchrecipes.data.cleaning.c4 import C4
from torchrecipes.data.cleaning.duplicates import Clusters, find_duplicates
from torchrecipes.data.cleaning.evaluation_overlap import decontaminate
from torchrecipes.data.cleaning.gopher import GopherQuality, GopherRepetition
from torchrecipes.data.cleaning.language import Language
from torchrecipes.data.cleaning.normalization import Normalize
from torchrecipes.data.cleaning.removal import Removal
from torchrecipes.data.cleaning.signatures import band_keys, estimated_jaccard, minhash
from torchrecipes.data.cleaning.stages import clean
from torchrecipes.data.cleaning.steps import CleaningSteps, ExactDuplicates, NearDuplicates, read_steps

__all__ = [
    "C4",
    "BoilerplateLines",
    "CleaningSteps",
    "Clusters",
    "ExactDuplicates",
    "GopherQuality",
    "GopherRepetition",
    "Language",
    "NearDuplicates",
    "Normalize",
    "Removal",
    "band_keys",
    "clean",
    "decontaminate",
    "estimated_jaccard",
    "find_duplicates",
    "minhash",
    "read_steps",
]
