"""Components as a user might write them, right ones and wrong ones."""

import torch
from torch import nn

from torchrecipes.models import llama


def linear(vocab_size):
    return nn.Linear(3, 3)


def nothing(model=None):
    pass


def larger(vocab_size):
    model = llama(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model.extra = nn.Linear(3, 3)
    return model


def broken(vocab_size):
    raise KeyError("mine")


def of_large_matrices(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.norm() > 0.1], lr=1e-3)


class Schedule:
    def __init__(self, max_steps):
        pass


class Plain(nn.Module):
    """An encoder of one's own, without an adapter."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 16)
        self.head = nn.Linear(16, vocab_size)

    def forward(self, input_ids, position_ids=None, document_ids=None, cu_seqlens=None, max_seqlen=None):
        return self.embedding(input_ids)
