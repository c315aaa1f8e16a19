"""Model families: each with its config, its builders by size, and its two-way map to the Hugging Face key_map."""

from torchrecipes.models.compatibility import check_positions, check_tokenizer_compatibility
from torchrecipes.models.decoder import Decoder
from torchrecipes.models.families.bert import Bert, BertConfig, bert, bert_base, bert_mini, bert_small, bert_tiny
from torchrecipes.models.families.custom_moe import MoEConfig, moe, moe_500m
from torchrecipes.models.families.gpt2 import (
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
from torchrecipes.models.families.llama import LlamaConfig, llama, llama_700m, llama_tiny
from torchrecipes.models.families.neobert import (
    NeoBert,
    NeoBertConfig,
    neobert,
    neobert_100m,
    neobert_base,
    neobert_tiny,
)
from torchrecipes.models.families.olmoe import OlmoeConfig, olmoe, olmoe_tiny
from torchrecipes.models.families.qwen3 import Qwen3Config, qwen3, qwen3_0_6b, qwen3_tiny
from torchrecipes.models.families.qwen3_moe import Qwen3MoeConfig, moe_1_5b, moe_1b, moe_tiny, qwen3_moe
from torchrecipes.models.hub import (
    check_family,
    hf_config,
    hf_state_dict,
    load_hf,
    loading_hint,
    meta_model_from_hf,
    save_hf,
)
from torchrecipes.models.param_count import active_parameters

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
    "check_positions",
    "check_tokenizer_compatibility",
    "gpt2",
    "gpt2_large",
    "gpt2_medium",
    "gpt2_small",
    "gpt2_tiny",
    "gpt2_xl",
    "gpt_750m",
    "hf_config",
    "hf_state_dict",
    "llama",
    "llama_700m",
    "llama_tiny",
    "load_hf",
    "loading_hint",
    "meta_model_from_hf",
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
