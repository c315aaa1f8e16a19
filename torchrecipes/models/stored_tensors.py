"""Reads the safetensors of a folder lazily, one tensor at a time."""

import json
from collections.abc import Callable, Iterable, Iterator
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


def file_of(name: str, default: str = "model.safetensors") -> tuple[str, str]:
    """The file that holds a tensor, relative to the model's folder, and the tensor's name in it.

    `2_Dense/linear.weight` is `linear.weight` of `2_Dense/model.safetensors`; a name without `/` is in `default`.
    """
    inner, _, short = name.rpartition("/")
    return (f"{inner}/model.safetensors", short) if inner else (default, name)


def by_file(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """File -> the tensors in it by their names there, as `file_of` says; `model.safetensors` always is one."""
    files: dict[str, dict[str, Tensor]] = {"model.safetensors": {}}
    for name, tensor in tensors.items():
        file, short = file_of(name)
        files.setdefault(file, {})[short] = tensor
    return files


@contextmanager
def open_tensors(folder: Path, names: Iterable[str] = ()) -> Iterator[dict[str, StoredTensor]]:
    """Everything in `model.safetensors`, or in the files that its index names: name -> tensor, readable in the context.

    Args:
        folder: the model's.
        names: of tensors in the model's layout. Where some are in files of inner folders (`file_of`), these are read
            as well, if they are there.

    Raises:
        UserError: `no_model`, `pickle`, `missing_shard`, `corrupt_file`, `corrupt_index`.
    """
    with ExitStack() as stack:
        stored = {}
        inner = {file_of(name)[0] for name in names} - {"model.safetensors"}
        for file in (*_tensor_files(folder), *(folder / name for name in sorted(inner) if (folder / name).is_file())):
            prefix = "" if file.parent == folder else f"{file.parent.relative_to(folder).as_posix()}/"
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    piece = opened.get_slice(name)
                    stored[f"{prefix}{name}"] = StoredTensor(
                        tuple(piece.get_shape()), piece.get_dtype(), _reader(opened, name)
                    )
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
