"""Components: a dotted path and keyword arguments in a config, an object in the recipe.

In YAML `optimizer: {_component_: torchrecipes.optim.adamw, lr: 1e-3}`; in the recipe's `Config`
`optimizer: Component = component("torchrecipes.optim.adamw", injected=("model",), lr=1e-3)`; in its `main`
`optimizer = build(config.optimizer, model=model)`. There is no registry: any importable callable is a component.
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

# The value of a key that the config has to give (OmegaConf's mark, so `???` in a YAML file means the same).
MISSING: Any = "???"


@dataclass
class Component:
    """A `_component_` node of a config that was checked: what to call, and the keyword arguments from the config.

    `path` is dotted; `args` holds values of the types that the signature asks for, and nested `Component`s.
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
        default: dotted path of the component when the config names none; None is off (an empty list for
            `list[Component]`), `MISSING` makes the config name one; for a list, its dotted paths or `Component`s.
        injected: names of the arguments that the recipe passes when it calls `build`; a config cannot set them.
        replaced_by: another key, such as `init_from`, that replaces this component when it is set: the component is
            None then, and a config that sets both is refused.
        replaced_if: a file, such as `config.json`; a config may set both when the folder that `replaced_by` names
            does not hold it.
        default_args: arguments of the default component; a config that names another component drops them.
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
    """Import what `node` names and call it: with its arguments, and with those of `injected` that its signature names.

    Nested components are built first, with the same injected arguments. None (a component that is off) gives None.

    Raises:
        UserError: the dotted path leads nowhere.
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
        UserError: no such module or attribute, with the closest name that exists; or the module fails to import.
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
    """Return the parameters of `target` that a keyword may set, with annotations resolved where that is possible.

    A `**kwargs` parameter is listed under its own name, with its kind VAR_KEYWORD; so is all that a builtin without a
    signature takes.
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


def makes(node: Component, *kinds: type) -> bool:
    """Return whether a component, and each one nested in it, declares that it makes an object of one of `kinds`.

    A class declares its instances, a function its annotated return type. Nothing is called, so that a config can be
    checked without executing the functions that it names.

    Raises:
        UserError: a dotted path leads nowhere.
    """
    target = resolve(node.path)
    if inspect.isclass(target):
        made = target
    else:
        try:
            made = typing.get_type_hints(target).get("return")
        except Exception:  # an annotation that only exists for type checkers
            made = None
    declared = inspect.isclass(made) and issubclass(made, kinds)
    return declared and all(makes(nested, *kinds) for nested in _components_in(list(node.args.values())))


def suggest_path(path: str, default: str | None) -> str | None:
    """Return the full path that a bare name such as `adamw` most likely means: it, or one near it, beside `default`."""
    if "." in path or not default or "." not in default:
        return None
    home = default.rpartition(".")[0]
    try:
        near = closest(path, _public_names(importlib.import_module(home)))
    except ImportError:  # the default is a class's method, or needs a package that is not there
        return None
    return f"{home}.{near}" if near else None


def _annotation(parameter: inspect.Parameter, names: dict[str, Any]) -> Any:
    if parameter.annotation is inspect.Parameter.empty:
        return Any
    try:
        holder = type("Holder", (), {"__annotations__": {"it": parameter.annotation}})
        return typing.get_type_hints(holder, names, include_extras=True)["it"]
    except Exception:  # an annotation that only exists for type checkers: that argument's type is not checked
        return Any


def _public_names(holder: Any) -> set[str]:
    names = {name for name in dir(holder) if not name.startswith("_") and callable(getattr(holder, name, None))}
    return names | {module.name for module in pkgutil.iter_modules(getattr(holder, "__path__", []))}


def _top_level_names() -> set[str]:
    return {name for name in sys.modules if "." not in name and not name.startswith("_")}


def _components_in(value: Any) -> list[Component]:
    if isinstance(value, Component):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [found for item in items for found in _components_in(item)]


def _build_nested(value: Any, injected: dict[str, Any]) -> Any:
    if isinstance(value, Component):
        return build(value, **injected)
    if isinstance(value, list | tuple):
        return type(value)(_build_nested(item, injected) for item in value)
    if isinstance(value, dict):
        return {name: _build_nested(item, injected) for name, item in value.items()}
    return value


def _copy(value: Any) -> Any:
    # Two configs must not share one default's dict of arguments.
    if isinstance(value, Component):
        return Component(value.path, _copy(value.args))
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    return value
