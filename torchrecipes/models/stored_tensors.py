"""Reads the safetensors of a folder lazily, one tensor at a time."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchrecipes.errors import UserError
from torchrecipes.model_folder import INDEX, pickle_error

_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        shape: as stored.
        is_float: whether its dtype is a plain floating-point one; integers and float8 hold quantized weights.
        dtype: safetensors' name of it, such as `BF16`.
        read: returns the tensor.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]

    @property
    def is_float(self) -> bool:
        """Whether the values are weights as they are; integers and float8 are quantized ones."""
        return self.dtype in _FLOATS

    def equals(self, other: "StoredTensor") -> bool:
        """Whether both hold the same values."""
        return self.shape == other.shape and torch.equal(self.read(), other.read())


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """Everything in `model.safetensors`, or in the files that its index names: name -> tensor, readable in the context.

    Raises:
        UserError: `no_model`, `pickle`, `missing_shard`, `corrupt_file`, `corrupt_index`.
    """
    with ExitStack() as stack:
        stored = {}
        for file in _tensor_files(folder):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    piece = opened.get_slice(name)
                    stored[name] = StoredTensor(tuple(piece.get_shape()), piece.get_dtype(), _reader(opened, name))
            except FileNotFoundError:
                raise UserError(
                    f"{file} does not exist, but {INDEX} names it",
                    hint="Download the folder again",
                    code="missing_shard",
                ) from None
            except SafetensorError as error:
                raise UserError(
                    f"{file} is corrupt: {error}", hint="Download the folder again", code="corrupt_file"
                ) from None
        yield stored


def _reader(opened: safe_open, name: str) -> Callable[[], Tensor]:
    return lambda: opened.get_tensor(name)


def _tensor_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{index} is not an index of shards: {error!r}", hint="Save the folder again", code="corrupt_index"
            ) from None
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles:
        raise pickle_error(folder, pickles[0])
    raise UserError(
        f"{folder} has no model.safetensors",
        hint="Give a folder that save_hf() or save_pretrained() wrote",
        code="no_model",
    )
