"""Model families: each with its config, its builders by size, and its two-way map to the Hugging Face layout."""

from torchrecipes.models.bert import Bert, BertConfig, bert, bert_base, bert_mini, bert_small, bert_tiny
from torchrecipes.models.fit import check_fit
from torchrecipes.models.hub import hf_config, hf_state_dict, load_hf, save_hf
from torchrecipes.models.neobert import NeoBert, NeoBertConfig, neobert, neobert_100m, neobert_base, neobert_tiny

__all__ = [
    "Bert",
    "BertConfig",
    "NeoBert",
    "NeoBertConfig",
    "bert",
    "bert_base",
    "bert_mini",
    "bert_small",
    "bert_tiny",
    "check_fit",
    "hf_config",
    "hf_state_dict",
    "load_hf",
    "neobert",
    "neobert_100m",
    "neobert_base",
    "neobert_tiny",
    "save_hf",
]
