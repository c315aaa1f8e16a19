"""Building blocks of the models: plain `nn.Module`s and functions that know nothing of data or training.

Tensors are named by the letters of their dimensions where that helps (`x_BSD`, `mask_B1SS`):

    B  rows of a batch                    D  hidden size
    S  tokens per row                     N  query heads
    T  tokens of a batch, B * S           K  key and value heads (K divides N; K < N is grouped-query attention)
    R  rows after regrouping documents    H  size of one head
    L  tokens per regrouped row           I  size inside the feed-forward layer
    M  selected tokens                    V  vocabulary
"""

from torchrecipes.modules.attention_backend import AttentionBackend, choose_attention_backend
from torchrecipes.modules.cache import KVCache
from torchrecipes.modules.cpu.packed_linear import pack_linears
from torchrecipes.modules.embedding import BertEmbedding, FactoredTypeEmbedding, factored_type_table
from torchrecipes.modules.feed_forward import GeGLU, GeluMLP, SwiGLU
from torchrecipes.modules.head import ClassificationHead, LMHead, MLMTransform
from torchrecipes.modules.init import init_tensor, init_weights
from torchrecipes.modules.lora import LoRALinear, LoRASettings, apply_lora, init_lora, merge_lora, unmerge_lora
from torchrecipes.modules.moe import Experts, MoE, Router, Routing
from torchrecipes.modules.norm import LayerNorm, RMSNorm
from torchrecipes.modules.pooling import Pooling
from torchrecipes.modules.rotary import apply_rotary, rope_cos_sin
from torchrecipes.modules.self_attention import SelfAttention, attention
from torchrecipes.modules.transformer import MoEBlock, PostNormBlock, PreNormBlock, compute_dtype, to_residual_dtype

__all__ = [
    "AttentionBackend",
    "BertEmbedding",
    "ClassificationHead",
    "Experts",
    "FactoredTypeEmbedding",
    "GeGLU",
    "GeluMLP",
    "KVCache",
    "LMHead",
    "LayerNorm",
    "LoRALinear",
    "LoRASettings",
    "MLMTransform",
    "MoE",
    "MoEBlock",
    "Pooling",
    "PostNormBlock",
    "PreNormBlock",
    "RMSNorm",
    "Router",
    "Routing",
    "SelfAttention",
    "SwiGLU",
    "apply_lora",
    "apply_rotary",
    "attention",
    "choose_attention_backend",
    "compute_dtype",
    "factored_type_table",
    "init_lora",
    "init_tensor",
    "init_weights",
    "merge_lora",
    "pack_linears",
    "rope_cos_sin",
    "to_residual_dtype",
    "unmerge_lora",
]
