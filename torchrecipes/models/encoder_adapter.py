"""`EncoderAdapter`: the Hugging Face layout of an encoder without its language-model head, such as `BertModel`."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.stored_tensors import StoredTensor


class EncoderAdapter(HFAdapter):
    """The layout that `AutoModel` saves: the family's, without the head and without the prefix of the body's names.

    Where `AutoModel` has a pooler (BERT, RoBERTa), the folder gets one that passes the first token's state to its tanh
    unchanged: a folder without one would load with missing tensors. A pooler in a folder that is read is not used.

    Args:
        family: the adapter of the model with its head.

    Attributes:
        family: see above: it has the names with the prefix, which a class with another head uses.
    """

    def __init__(self, family: HFAdapter):
        super().__init__(family.encoder_config())
        self.family = family
        self.read_as(family)
        self.architecture, self.prefix = family.encoder_architecture, family.encoder_prefix

    def with_config(self, config: Any) -> "EncoderAdapter":
        """An adapter of the same layout for another config."""
        return EncoderAdapter(self.family.with_config(config))

    def write_keys(self) -> dict | None:
        """The config.json, without token ids and dtype."""
        return self.family.with_config(self.config).write_keys()

    @cached_property
    def key_map(self) -> KeyMap:
        """Our parameter name -> the tensors that it stacks."""
        return {
            ours: [(name.removeprefix(self.prefix), rows) for name, rows in parts]
            for ours, parts in self.family.key_map.items()
            if not self.family.is_head(ours)
        }

    def normalize_name(self, name: str) -> str | None:
        """A stored tensor's name as `key_map` spells it, whatever class saved it; None: not used."""
        name = self.family.normalize_name(name)
        return None if name is None else name.removeprefix(self.prefix)

    def transposed(self, name: str) -> bool:
        """Whether the tensor of this Hugging Face name is stored with its two dimensions exchanged."""
        return self.family.transposed(f"{self.prefix}{name}")

    def prepare(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Stored tensors by normalized name, with those combined that `key_map` has as one."""
        return self.family.prepare(stored)

    def is_head(self, name: str) -> bool:  # noqa: ARG002
        """Nothing is."""
        return False

    def is_constant(self, name: str) -> bool:
        """Whether it is the pooler that `split` adds, or a constant of the family."""
        is_pooler = self.family.has_pooler and name.startswith("pooler.")
        return is_pooler or self.family.is_constant(f"{self.prefix}{name}")

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensor as the tensors that are stored; beside the embedding's norm, the pooler."""
        tensors = super().split(name, tensor)
        if self.family.has_pooler and name == "embedding.norm.weight":
            size = len(tensor)
            tensors["pooler.dense.weight"] = torch.eye(size, dtype=tensor.dtype, device=tensor.device)
            tensors["pooler.dense.bias"] = tensor.new_zeros(size)
        return tensors

    def loading_hint(self, path: str) -> str:
        """How to load a folder that was saved with this adapter, in one line for people."""
        return f"load it with transformers: AutoModel.from_pretrained({path!r})"
