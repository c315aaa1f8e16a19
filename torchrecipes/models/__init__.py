"""Model families: each with its config, its builders by size, and its two-way map to the Hugging Face layout."""

from torchrecipes.models.active import active_parameters
from torchrecipes.models.bert import Bert, BertConfig, bert, bert_base, bert_mini, bert_small, bert_tiny
from torchrecipes.models.decoder import Decoder
from torchrecipes.models.fit import check_fit, check_positions
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
from torchrecipes.models.hub import check_family, hf_config, hf_network, hf_state_dict, how_to_load, load_hf, save_hf
from torchrecipes.models.llama import LlamaConfig, gpt_750m_modern, llama, llama_tiny
from torchrecipes.models.moe import MoEConfig, moe, moe_500m
from torchrecipes.models.neobert import NeoBert, NeoBertConfig, neobert, neobert_100m, neobert_base, neobert_tiny
from torchrecipes.models.olmoe import OlmoeConfig, olmoe, olmoe_tiny
from torchrecipes.models.qwen3 import Qwen3Config, qwen3, qwen3_0_6b, qwen3_tiny
from torchrecipes.models.qwen3_moe import Qwen3MoeConfig, moe_1_5b, moe_1b, moe_tiny, qwen3_moe

__all__ = [
    "GPT2",
    "Bert",
    "BertConfig",
    "Decoder",
    "GPT2Config",
    "LlamaConfig",
    "MoEConfig",
    "NeoBert",
    "NeoBertConfig",
    "OlmoeConfig",
    "Qwen3Config",
    "Qwen3MoeConfig",
    "active_parameters",
    "bert",
    "bert_base",
    "bert_mini",
    "bert_small",
    "bert_tiny",
    "check_family",
    "check_fit",
    "check_positions",
    "gpt2",
    "gpt2_large",
    "gpt2_medium",
    "gpt2_small",
    "gpt2_tiny",
    "gpt2_xl",
    "gpt_750m",
    "gpt_750m_modern",
    "hf_config",
    "hf_network",
    "hf_state_dict",
    "how_to_load",
    "llama",
    "llama_tiny",
    "load_hf",
    "moe",
    "moe_1_5b",
    "moe_1b",
    "moe_500m",
    "moe_tiny",
    "neobert",
    "neobert_100m",
    "neobert_base",
    "neobert_tiny",
    "olmoe",
    "olmoe_tiny",
    "qwen3",
    "qwen3_0_6b",
    "qwen3_moe",
    "qwen3_tiny",
    "save_hf",
]
