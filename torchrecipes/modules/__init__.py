"""Building blocks of the models: plain `nn.Module`s and functions that know nothing of data or training.

Tensors are named by the letters of their dimensions where that helps (`x_BSD`, `mask_B1SS`):

    B  rows of a batch                    D  hidden size
    S  tokens per row                     N  query heads
    T  tokens of a batch, B * S           K  key and value heads (K divides N; K < N is grouped-query attention)
    R  rows after regrouping documents    H  size of one head
    L  tokens per regrouped row           I  size inside the feed-forward layer
    M  selected tokens                    V  vocabulary
"""

from torchrecipes.modules.attention import SelfAttention, attention
from torchrecipes.modules.cache import KVCache
from torchrecipes.modules.embedding import BertEmbedding
from torchrecipes.modules.feed_forward import GeluMLP, SwiGLU
from torchrecipes.modules.head import LMHead, MLMTransform
from torchrecipes.modules.init import initial_value, initialize
from torchrecipes.modules.moe import Experts, MoE, Router, Routing
from torchrecipes.modules.norm import LayerNorm, RMSNorm
from torchrecipes.modules.plan import AttentionPlan, attention_plan
from torchrecipes.modules.rotary import apply_rotary, rotary_tables
from torchrecipes.modules.transformer import MoEBlock, PostNormBlock, PreNormBlock, activation_dtype, residual_stream

__all__ = [
    "AttentionPlan",
    "BertEmbedding",
    "Experts",
    "GeluMLP",
    "KVCache",
    "LMHead",
    "LayerNorm",
    "MLMTransform",
    "MoE",
    "MoEBlock",
    "PostNormBlock",
    "PreNormBlock",
    "RMSNorm",
    "Router",
    "Routing",
    "SelfAttention",
    "SwiGLU",
    "activation_dtype",
    "apply_rotary",
    "attention",
    "attention_plan",
    "initial_value",
    "initialize",
    "residual_stream",
    "rotary_tables",
]
