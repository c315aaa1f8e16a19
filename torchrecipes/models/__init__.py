"""Model families, and models to and from Hugging Face folders.

| file              | what                                                                         |
|-------------------|------------------------------------------------------------------------------|
| transformer       | `Transformer`, the one network behind the families                           |
| families/         | one file per family: config, sizes, blocks, Hugging Face layout              |
| classifier        | `SequenceClassifier`: an encoder with a classification head                  |
| classifier_adapter| its layout, family by family                                                 |
| labels            | `Labels`: names of labels, thresholds, temperature, in config.json           |
| builder           | makes a family's function, `neobert(size, *, vocab_size, ...)`               |
| decoder, experts  | what several families share                                                  |
| hf_adapter        | `HFAdapter`, the two-way map to the Hugging Face layout, attached to a model |
| encoder_adapter   | the layout of an encoder without its head                                    |
| late_interaction  | `LateInteraction`: a vector for every token instead                           |
| embedding_model   | `EmbeddingModel`: one vector per text                                        |
| sentence_transformers_folder | the files of `sentence_transformers` beside the weights           |
| model_card        | `write_model_card`: the README.md of a model folder                          |
| hub               | loads and saves folders                                                      |
| config_json       | reads a foreign config.json                                                  |
| dropout           | `set_dropout`: another dropout than a checkpoint was trained with            |
| longer_context    | `extend_context`: scaled RoPE, longer tables of positions                    |
| vocabulary_extension | `extend_vocabulary`: rows for new tokens in a folder's embedding and head     |
| lora_adapter      | `load_lora`, `save_lora`: LoRA to and from peft's folders                    |
| stored_tensors    | reads safetensors lazily                                                     |
| transformers_model| `from_transformers`: any causal or masked model of `transformers`            |
| compatibility     | checks that model, tokenizer, row length and objective fit                   |
| param_count       | active parameters                                                            |
"""

from torchrecipes.model_folder import has_hf_config, resolve_model_folder
from torchrecipes.models.classifier import SequenceClassifier, load_classifier, meta_classifier_from_hf
from torchrecipes.models.compatibility import (
    check_causal,
    check_positions,
    check_tokenizer_compatibility,
    max_positions,
)
from torchrecipes.models.dropout import set_dropout
from torchrecipes.models.embedding_model import (
    EmbeddingConfig,
    EmbeddingModel,
    load_embedding_model,
    meta_embedding_model,
)
from torchrecipes.models.families.bert import bert
from torchrecipes.models.families.custom_moe import moe
from torchrecipes.models.families.distilbert import distilbert
from torchrecipes.models.families.domain_bert import domain_bert
from torchrecipes.models.families.gpt2 import gpt2
from torchrecipes.models.families.llama import llama
from torchrecipes.models.families.mistral import mistral
from torchrecipes.models.families.modernbert import modernbert
from torchrecipes.models.families.neobert import neobert
from torchrecipes.models.families.olmoe import olmoe
from torchrecipes.models.families.qwen2 import qwen2
from torchrecipes.models.families.qwen3 import qwen3
from torchrecipes.models.families.qwen3_moe import qwen3_moe
from torchrecipes.models.families.roberta import roberta
from torchrecipes.models.hf_adapter import HFAdapter
from torchrecipes.models.hub import (
    Coverage,
    architecture_differences,
    hf_config,
    hf_state_dict,
    is_decoder,
    load_hf,
    load_hf_weights,
    loading_hint,
    meta_model_from_hf,
    save_hf,
    stop_token_ids,
)
from torchrecipes.models.labels import Labels, stored_labels, write_calibration
from torchrecipes.models.late_interaction import LateInteraction
from torchrecipes.models.longer_context import extend_context
from torchrecipes.models.lora_adapter import load_lora, save_lora
from torchrecipes.models.model_card import write_model_card
from torchrecipes.models.param_count import active_parameters
from torchrecipes.models.transformer import Transformer
from torchrecipes.models.transformers_model import TransformersModel, from_transformers
from torchrecipes.models.vocabulary_extension import extend_vocabulary

FAMILY_BUILDERS = (
    *(neobert, modernbert, bert, roberta, distilbert, domain_bert),
    *(gpt2, llama, mistral, qwen2, qwen3, qwen3_moe, olmoe, moe),
)

__all__ = [
    "FAMILY_BUILDERS",
    "Coverage",
    "EmbeddingConfig",
    "EmbeddingModel",
    "HFAdapter",
    "Labels",
    "LateInteraction",
    "SequenceClassifier",
    "Transformer",
    "TransformersModel",
    "active_parameters",
    "architecture_differences",
    "bert",
    "check_causal",
    "check_positions",
    "check_tokenizer_compatibility",
    "distilbert",
    "domain_bert",
    "extend_context",
    "extend_vocabulary",
    "from_transformers",
    "gpt2",
    "has_hf_config",
    "hf_config",
    "hf_state_dict",
    "is_decoder",
    "llama",
    "load_classifier",
    "load_embedding_model",
    "load_hf",
    "load_hf_weights",
    "load_lora",
    "loading_hint",
    "max_positions",
    "meta_classifier_from_hf",
    "meta_embedding_model",
    "meta_model_from_hf",
    "mistral",
    "modernbert",
    "moe",
    "neobert",
    "olmoe",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "resolve_model_folder",
    "roberta",
    "save_hf",
    "save_lora",
    "set_dropout",
    "stop_token_ids",
    "stored_labels",
    "write_calibration",
    "write_model_card",
]
