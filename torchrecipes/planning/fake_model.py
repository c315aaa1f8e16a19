"""Models and tokenizers without data, for estimates: right shapes, no memory, no time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchrecipes.config import build
from torchrecipes.config.components import parameters, resolve
from torchrecipes.data.tokenizers.load import load_model_tokenizer
from torchrecipes.errors import UserError
from torchrecipes.estimation import estimating
from torchrecipes.model_folder import resolve_model_folder


@dataclass(frozen=True)
class TokenizerStandIn:
    """The numbers of a tokenizer that is not trained yet: sizes, and an id for every special token.

    Attributes: those of `torchrecipes.data.tokenizers.Tokenizer`, without the text methods.
    """

    vocab_size: int
    pad_id: int = 0
    unk_id: int = 1
    cls_id: int = 2
    sep_id: int = 3
    mask_id: int = 4
    bos_id: int = 2
    eos_id: int = 3
    append_eos: bool = False
    special_tokens: str = "text"
    fingerprint: str = ""
    domain: None = None

    @property
    def unpadded_vocab_size(self) -> int:
        """The same: nothing is known of padding rows."""
        return self.vocab_size

    @property
    def special_ids(self) -> list[int]:
        """The ids of the special tokens."""
        return list(range(5))


def tokenizer_for(config: Any) -> Any:
    """The tokenizer that a config loads, or a stand-in for one that the run will train.

    Args:
        config: a recipe's config.

    Raises:
        UserError: the tokenizer cannot be loaded, or the size of its vocabulary depends on the text (code
            `unknown_vocab_size`).
    """
    if config.tokenizer is None:
        return _load(lambda causal: load_model_tokenizer(resolve_model_folder(config.init_from), causal))
    make = resolve(config.tokenizer.path)
    if hasattr(make, "stand_in"):
        return make.stand_in(**config.tokenizer.args)
    accepted = parameters(make)
    if "source" not in accepted:
        return _load(lambda causal: build(config.tokenizer, causal=causal))
    values = {name: parameter.default for name, parameter in accepted.items()} | config.tokenizer.args
    if "vocab_size" in values:
        size = values["vocab_size"]
    elif "limit_alphabet" in values:
        size = values["limit_alphabet"] + len(TokenizerStandIn(0).special_ids)
    else:
        raise UserError(
            f"{config.tokenizer.path} takes no vocab_size, so its number of ids is not known before it is trained",
            key="tokenizer._component_",
            hint="Estimate with one that does: tokenizer._component_=torchrecipes.data.tokenizers.train_bpe "
            "tokenizer.vocab_size=...",
            code="unknown_vocab_size",
        )
    multiple = values.get("pad_vocab_to_multiple_of", 1)
    return TokenizerStandIn(-(-size // multiple) * multiple)


def _load(load: Callable[[bool], Any]) -> Any:
    # Only the recipe's `main` knows whether it wants a causal tokenizer; one that can be both is the same for shapes.
    with suppress(UserError):
        return load(False)
    return load(True)


@contextmanager
def fake_tensors(device_type: str, *, first_chunk_only: bool = False) -> Iterator[None]:
    """Inside, new tensors have shapes and no data; kernels are those of `device_type`, and nothing draws numbers.

    Args:
        device_type, first_chunk_only: see `torchrecipes.estimation.estimating`.
    """
    with (
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(allow_non_fake_inputs=True),
        estimating(device_type, first_chunk_only=first_chunk_only),
    ):
        yield


def meta_model(config: Any, tokenizer: Any, build_model: Callable[[Any, Any], nn.Module]) -> nn.Module:
    """The recipe's model on the meta device, in training mode."""
    with torch.device("meta"):
        return build_model(config, tokenizer).train()


def give_storage(model: nn.Module) -> nn.Module:
    """Moves a model in place from the meta device to the CPU, for use inside `fake_tensors`. Tied weights stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            setattr(module, name, made[id(tensor)])
    return model
