"""Model families: each with its config, its builders by size, and its two-way map to the Hugging Face layout."""

from torchrecipes.models.bert import Bert, BertConfig, bert, bert_base, bert_mini, bert_small, bert_tiny
from torchrecipes.models.decoder import Decoder
from torchrecipes.models.fit import check_fit
from torchrecipes.models.gpt2 import (
    GPT2,
    GPT2Config,
    gpt2,
    gpt2_large,
    gpt2_medium,
    gpt2_small,
    gpt2_tiny,
    gpt2_xl,
    gpt_750m,
)
from torchrecipes.models.hub import hf_config, hf_state_dict, load_hf, save_hf
from torchrecipes.models.llama import LlamaConfig, gpt_750m_modern, llama, llama_tiny
from torchrecipes.models.neobert import NeoBert, NeoBertConfig, neobert, neobert_100m, neobert_base, neobert_tiny
from torchrecipes.models.qwen3 import Qwen3Config, qwen3, qwen3_0_6b, qwen3_tiny

__all__ = [
    "GPT2",
    "Bert",
    "BertConfig",
    "Decoder",
    "GPT2Config",
    "LlamaConfig",
    "NeoBert",
    "NeoBertConfig",
    "Qwen3Config",
    "bert",
    "bert_base",
    "bert_mini",
    "bert_small",
    "bert_tiny",
    "check_fit",
    "gpt2",
    "gpt2_large",
    "gpt2_medium",
    "gpt2_small",
    "gpt2_tiny",
    "gpt2_xl",
    "gpt_750m",
    "gpt_750m_modern",
    "hf_config",
    "hf_state_dict",
    "llama",
    "llama_tiny",
    "load_hf",
    "neobert",
    "neobert_100m",
    "neobert_base",
    "neobert_tiny",
    "qwen3",
    "qwen3_0_6b",
    "qwen3_tiny",
    "save_hf",
]
