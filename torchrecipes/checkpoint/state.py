"""Nested state as JSON and tensors, and back.

A tensor is stored apart, as it is sharded, and `{"__tensor__": key}` stands in its place. A dict whose keys are not all
strings, which JSON does not have, becomes `{"__items__": [[key, value], ...]}`.
"""

from typing import Any

from torch import Tensor

TENSOR, ITEMS = "__tensor__", "__items__"


def flatten_state(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Separates the tensors of a nested state from the rest.

    Args:
        state: dicts with strings or integers as keys, lists, tuples (which come back as lists), tensors, numbers,
            strings, booleans and None.

    Returns:
        The state with a reference in the place of each tensor; and the tensors by key, detached and contiguous. One
        without dimensions gets one: torch.distributed.checkpoint stores zeros for those.

    Raises:
        TypeError: a value that is none of these, with its place.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            key = place
            while key in tensors:  # {"a.b": ..., "a": {"b": ...}}
                key += "'"
            tensors[key] = value.detach().reshape(value.shape or (1,)).contiguous()
            return {TENSOR: key} | ({"scalar": True} if value.dim() == 0 else {})
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str | int) or key in (TENSOR, ITEMS):
                    raise TypeError(f"state {place} has the key {key!r}: keys are strings and integers")
            items = {key: walk(item, f"{place}.{key}" if place else str(key)) for key, item in value.items()}
            return items if all(isinstance(key, str) for key in items) else {ITEMS: [list(i) for i in items.items()]}
        if isinstance(value, list | tuple):
            return [walk(item, f"{place}.{number}") for number, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"state {place} is a {type(value).__name__}: a state holds JSON values and tensors")

    return walk(state, ""), tensors


def unflatten_state(stored: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten_state`."""
    if isinstance(stored, dict):
        if TENSOR in stored:
            tensor = tensors[stored[TENSOR]]
            return tensor.reshape(()) if stored.get("scalar") else tensor
        items = stored[ITEMS] if ITEMS in stored else stored.items()
        return {key: unflatten_state(value, tensors) for key, value in items}
    if isinstance(stored, list):
        return [unflatten_state(value, tensors) for value in stored]
    return stored
