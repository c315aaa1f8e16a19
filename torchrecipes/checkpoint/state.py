"""State of objects as JSON and tensors, and back.

A tensor in a state is replaced by `{"__tensor__": key}` and stored apart, as it is sharded.
"""

from typing import Any

from torch import Tensor

TENSOR = "__tensor__"


def flatten_state(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Separates the tensors of a nested state from the rest.

    Args:
        state: dicts with string keys, lists, tuples, tensors and JSON values.

    Returns:
        The state with a reference in the place of each tensor; and the tensors by key, detached and contiguous. One
        without dimensions gets one: torch.distributed.checkpoint stores zeros for those.

    Raises:
        TypeError: a value that is none of these, with its place.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            tensors[place] = value.detach().reshape(value.shape or (1,)).contiguous()
            return {TENSOR: place} | ({"scalar": True} if value.dim() == 0 else {})
        if isinstance(value, dict):
            return {key: walk(item, f"{place}.{key}" if place else str(key)) for key, item in value.items()}
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
        return {key: unflatten_state(value, tensors) for key, value in stored.items()}
    if isinstance(stored, list):
        return [unflatten_state(value, tensors) for value in stored]
    return stored
