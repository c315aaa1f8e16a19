"""`HFAdapter`: the two-way map between a model's parameters and its Hugging Face folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.models.stored_tensors import StoredTensor

# Our parameter name -> the Hugging Face tensors that it stacks, (name, rows) in order.
KeyMap = dict[str, list[tuple[str, int]]]


@dataclass(frozen=True)
class LongerPositions:
    """A table of learned positions that is longer than the one in the folder that it will be loaded from.

    Attributes:
        name: of the parameter.
        stored_rows: rows of the table in the folder.
        unused: first rows that are not positions (RoBERTa's: up to the id of padding).
        method: `tile` or `interpolate`, see `extend_context`.
    """

    name: str
    stored_rows: int
    unused: int
    method: str

    def under(self, prefix: str) -> "LongerPositions":
        """The same for a model that has this one under a name, which `prefix` ends with a point."""
        return replace(self, name=f"{prefix}{self.name}")

    def extend(self, table: Tensor, rows: int) -> Tensor:
        """A table `[rows, D]` made of the stored one `[stored_rows, D]`."""
        kept, positions = table[: self.unused], table[self.unused :]
        length = rows - self.unused
        if self.method == "interpolate":
            wide = positions.T[None].float()
            longer = F.interpolate(wide, length, mode="linear", align_corners=True)[0].T.to(table.dtype)
        else:
            longer = positions[torch.arange(length, device=table.device) % len(positions)]
        return torch.cat((kept, longer))


class HFAdapter:
    """Renames, stacks, splits and transposes tensors, and translates the config, in both directions.

    A family subclasses it and attaches an instance to its model as `model.hf_adapter`. The name of a tensor that is
    stored in another file than `model.safetensors` has that file's folder in it: see `stored_tensors.file_of`.

    Attributes:
        config: of the model.
        companions: file name -> contents of what travels from the folder that the model was made from into its
            checkpoints: chat template and generation config. A name may have a folder in it.
        stop_ids: the tokens that end a text, by the folder that the model was made from; the tokenizer has one of them.
        longer_positions: how to extend a table of learned positions that a folder has, if `extend_context` was called.
        architecture: the class of `transformers` that reads the folder.
        encoder_architecture: encoders: the class of `transformers` for the model without its head.
        encoder_prefix: encoders: what the names of the body's tensors begin with beside a head.
        has_pooler: whether that class has a pooler.
        config_class: the family's config, a dataclass whose fields are the keys of config.json that it follows.
        tied: (name, source): a stored copy of a tied head, and what it is a copy of.
        combined: our parameters from which `combine` computes tensors.
        fixed: keys of config.json without a field -> the values that mean what the network does.
        ignored: keys of config.json that do not change the network.
        required: keys that a config.json must have.
        defaults: values of keys that a config.json leaves out, where they are not those of `config_class`.
        keeps_pad_id: whether `pad_token_id` is part of the architecture, and not the tokenizer's.
        token_types: whether the tokenizer should give `token_type_ids`.
    """

    architecture: ClassVar[str] = ""
    encoder_architecture: ClassVar[str] = ""
    encoder_prefix: ClassVar[str] = ""
    has_pooler: ClassVar[bool] = False
    config_class: ClassVar[type | None] = None
    tied: ClassVar[tuple[str, str] | None] = None
    combined: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[dict[str, tuple]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()
    required: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[dict[str, Any]] = {}
    token_types: bool = False
    keeps_pad_id: bool = False

    def __init__(self, config: Any = None):
        self.config = config
        self.companions: dict[str, bytes] = {}
        self.stop_ids: list[int] = []
        self.longer_positions: LongerPositions | None = None

    def read_as(self, other: "HFAdapter") -> None:
        """Reads config.json by the rules of another adapter, and keeps what travels with its folder."""
        self.config_class, self.fixed, self.ignored = other.config_class, other.fixed, other.ignored
        self.required, self.defaults, self.read_keys = other.required, other.defaults, other.read_keys
        self.token_types, self.keeps_pad_id = other.token_types, other.keeps_pad_id
        self.companions, self.stop_ids = other.companions, other.stop_ids

    # The config.

    @staticmethod
    def read_keys(raw: dict) -> dict:
        """config.json as a flat dict whose keys are checked one by one."""
        return raw

    def write_keys(self) -> dict | None:
        """The config.json, without architecture, token ids and dtype; None: there is none."""
        return None

    def with_config(self, config: Any) -> "HFAdapter":
        """An adapter of the same layout for another config."""
        return type(self)(config)

    def for_folder(self, folder: Path) -> "HFAdapter":  # noqa: ARG002
        """The adapter that reads the weights of a folder, where that depends on its config.json."""
        return self

    def encoder_config(self) -> Any:
        """The config of the model without its head."""
        return self.config

    def for_encoder(self) -> "HFAdapter":
        """The adapter for the model without its head, where it is stored as another family's."""
        return self

    # The tensors.

    @cached_property
    def key_map(self) -> KeyMap:
        """Our parameter name -> the tensors that it stacks."""
        return {}

    def parts(self, name: str) -> Sequence[tuple[str, int]]:
        """What our tensor `name` is stored as."""
        return self.key_map[name]

    def normalize_name(self, name: str) -> str | None:
        """A stored tensor's name as `key_map` spells it, whatever class saved it; None: not used."""
        return name

    def transposed(self, name: str) -> bool:  # noqa: ARG002
        """Whether the tensor of this Hugging Face name is stored with its two dimensions exchanged."""
        return False

    def prepare(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Stored tensors by normalized name, with those combined that `key_map` has as one."""
        return stored

    def is_head(self, name: str) -> bool:
        """Whether our parameter `name` belongs to the head, which a folder may lack."""
        return name.startswith("head.")

    def head_of(self, name: str) -> str:  # noqa: ARG002
        """The head that `name` belongs to: a folder has each of them with all its tensors, or not at all."""
        return "head"

    def is_constant(self, name: str) -> bool:  # noqa: ARG002
        """Whether no parameter is read from the tensor of this Hugging Face name, which `split` or `combine` adds."""
        return False

    def combine(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        """Tensors that are stored for `transformers`, and follow from several of ours.

        Args:
            tensors: those that `combined` names.
        """
        return {}

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensor as the tensors that are stored: views of it."""
        parts = self.parts(name)
        pieces = tensor.split([rows for _, rows in parts]) if len(parts) > 1 else [tensor]
        return {
            hf_name: piece.t() if self.transposed(hf_name) else piece
            for (hf_name, _), piece in zip(parts, pieces, strict=True)
        }

    def join(self, parts: Sequence[tuple[str, int]], read: Callable[[str], Tensor]) -> Tensor:
        """The inverse of `split`; `read` returns a stored tensor by its name."""
        pieces = [read(name).t() if self.transposed(name) else read(name) for name, _ in parts]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()

    def stored_shape(self, part: tuple[str, int], shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which a part of our tensor of this shape is stored."""
        name, rows = part
        return (*shape[1:], rows) if self.transposed(name) else (rows, *shape[1:])

    def loading_hint(self, path: str) -> str:
        """How to load a folder that was saved with this adapter, in one line for people."""
        kind = "AutoModelForMaskedLM" if self.architecture.endswith("ForMaskedLM") else "AutoModelForCausalLM"
        return f"load it with transformers: {kind}.from_pretrained({path!r})"


class PlainAdapter(HFAdapter):
    """For models without an adapter of their own: tensors keep their names, and there is no config.json."""

    def parts(self, name: str) -> Sequence[tuple[str, int]]:
        """The tensor itself."""
        return [(name, 0)]

    def stored_shape(self, part: tuple[str, int], shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002
        """The same shape."""
        return shape

    def loading_hint(self, path: str) -> str:
        """How to load it: the architecture is in the config beside it."""
        weights = f"safetensors.torch.load_file({path + '/model.safetensors'!r})"
        return f"load it: model.load_state_dict({weights}), with the model of {path + '/config.yaml'!r}"


def adapter_of(model: nn.Module) -> HFAdapter:
    """The model's `hf_adapter`, or one that changes no name."""
    adapter = getattr(model, "hf_adapter", None)
    return adapter if isinstance(adapter, HFAdapter) else PlainAdapter()
