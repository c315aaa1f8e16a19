"""Components: a dotted path and keyword arguments in a config, an object in the recipe.

    optimizer: {_component_: torchrecipes.optim.adamw, lr: 1e-3}                                         # YAML
    optimizer: Component = component("torchrecipes.optim.adamw", injected=("model", "params"), lr=1e-3)  # Config
    optimizer = build(config.optimizer, model=model, params=model.parameters())                          # main

There is no registry: any importable callable is a component.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchrecipes.config.suggest import closest, did_you_mean
from torchrecipes.errors import UserError

# The default of a required key. It is OmegaConf's mark, so `???` in a YAML file means the same.
MISSING: Any = "???"


@dataclass
class Component:
    """A checked `_component_` node of a config.

    Attributes:
        path: the dotted path of the callable.
        args: its keyword arguments, of the types in its signature; nested components are `Component`s.
    """

    path: str
    args: dict[str, Any] = dataclasses.field(default_factory=dict)


def component(
    default: str | list | None = None,
    /,
    *,
    injected: tuple[str, ...] = (),
    replaced_by: str | None = None,
    replaced_if: str | None = None,
    **default_args: Any,
) -> Any:
    """Declare a field of a recipe's `Config` that holds a `Component`, a `Component | None` or a `list[Component]`.

    Args:
        default: the dotted path of the default component; None is off (an empty list for `list[Component]`), `MISSING`
            requires the config to name one; for a list, dotted paths or `Component`s.
        injected: the names of the arguments that the recipe passes to `build`; a config cannot set them.
        replaced_by: another key, such as `init_from`, that replaces this component when it is set: the component is
            None then, and a config that sets both is refused.
        replaced_if: a file, such as `config.json`; a config may set both when the folder that `replaced_by` names
            does not hold it.
        default_args: the arguments of the default component; a config that names another component drops them.
    """
    metadata = {"injected": injected, "replaced_by": replaced_by, "replaced_if": replaced_if}
    if isinstance(default, list):
        assert not default_args, "the arguments of a list's components belong in the list: Component(path, args)"
        items = [Component(item) if isinstance(item, str) else item for item in default]
        return dataclasses.field(default_factory=lambda: _copy(items), metadata=metadata)
    if default is None or default == MISSING:
        assert not default_args, "arguments without a default component"
        return dataclasses.field(default=default, metadata=metadata)
    node = Component(default, default_args)
    return dataclasses.field(default_factory=lambda: _copy(node), metadata=metadata)


def build(node: Component | None, **injected: Any) -> Any:
    """Import the callable that `node` names and call it with its arguments and those of `injected` in its signature.

    Nested components are built first, with the same injected arguments. None (off) gives None.

    Raises:
        UserError: the dotted path does not exist (code `unknown_component`).
    """
    if node is None:
        return None
    target = resolve(node.path)
    args = {name: _build_nested(value, injected) for name, value in node.args.items()}
    taken = {name: value for name, value in injected.items() if name in parameters(target)}
    return target(**args, **taken)


def resolve(path: str) -> Callable:
    """Return the callable at a dotted path.

    Raises:
        UserError: no such module or attribute (code `unknown_component`, its hint names the closest one), or the module
            fails to import (`import_failed`, `missing_package`).
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"'{path}' is not a dotted path like torchrecipes.optim.adamw", code="unknown_component")
    module, used = None, 0
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        try:
            module, used = importlib.import_module(name), end
        except ModuleNotFoundError as error:
            if error.name != name:
                raise UserError(
                    f"{path} needs the package '{error.name}', which is not installed", code="missing_package"
                ) from error
            break
        except Exception as error:
            raise UserError(
                f"importing {name} failed: {type(error).__name__}: {error}", code="import_failed"
            ) from error
    if module is None:
        hint = did_you_mean(parts[0], _top_level_names(), "Packages that are imported already")
        raise UserError(f"there is no package '{parts[0]}'", hint=hint, code="unknown_component")
    target: Any = module
    for position in range(used, len(parts)):
        holder, name = ".".join(parts[:position]), parts[position]
        if not hasattr(target, name):
            hint = did_you_mean(name, _public_names(target), "It has")
            raise UserError(f"{holder} has no '{name}'", hint=hint, code="unknown_component")
        target = getattr(target, name)
    if not callable(target):
        raise UserError(f"{path} is a {type(target).__name__}, which cannot be called", code="unknown_component")
    return target


def parameters(target: Callable) -> dict[str, inspect.Parameter]:
    """Return the parameters of `target` that can be passed by keyword, with annotations resolved where possible.

    A `**kwargs` parameter has its own name and the kind VAR_KEYWORD, as have the parameters of a builtin without a
    signature.
    """
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return {"arguments": inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)}
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    names = getattr(function, "__globals__", {})
    unusable = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return {
        name: parameter.replace(annotation=_annotation(parameter, names))
        for name, parameter in signature.parameters.items()
        if parameter.kind not in unusable
    }


def suggest_path(path: str, default: str | None) -> str | None:
    """Return the dotted path that a bare name such as `adamw` most likely means, in the module of `default`."""
    if "." in path or not default or "." not in default:
        return None
    home = default.rpartition(".")[0]
    try:
        near = closest(path, _public_names(importlib.import_module(home)))
    except ImportError:  # the default is a class's method, or needs a package that is not installed
        return None
    return f"{home}.{near}" if near else None


def _annotation(parameter: inspect.Parameter, names: dict[str, Any]) -> Any:
    if parameter.annotation is inspect.Parameter.empty:
        return Any
    try:
        holder = type("Holder", (), {"__annotations__": {"it": parameter.annotation}})
        return typing.get_type_hints(holder, names, include_extras=True)["it"]
    except Exception:  # an annotation that only type checkers can read: the argument's type is not checked
        return Any


def _public_names(holder: Any) -> set[str]:
    names = {name for name in dir(holder) if not name.startswith("_") and callable(getattr(holder, name, None))}
    return names | {module.name for module in pkgutil.iter_modules(getattr(holder, "__path__", []))}


def _top_level_names() -> set[str]:
    return {name for name in sys.modules if "." not in name and not name.startswith("_")}


def _build_nested(value: Any, injected: dict[str, Any]) -> Any:
    if isinstance(value, Component):
        return build(value, **injected)
    if isinstance(value, list | tuple):
        return type(value)(_build_nested(item, injected) for item in value)
    if isinstance(value, dict):
        return {name: _build_nested(item, injected) for name, item in value.items()}
    return value


def _copy(value: Any) -> Any:
    # Two configs must not share the arguments of a default.
    if isinstance(value, Component):
        return Component(value.path, _copy(value.args))
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    return value
