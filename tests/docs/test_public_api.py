"""Exported functions and classes are documented and typed."""

import importlib
import inspect
import pkgutil

import torchrecipes


def exported():
    """Every exported function, and every public method of an exported class, by its dotted name."""
    found = {}
    for info in pkgutil.walk_packages(torchrecipes.__path__, "torchrecipes."):
        if not info.ispkg or "._" in info.name:
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not getattr(value, "__module__", "").startswith("torchrecipes."):
                continue
            if inspect.isfunction(value):
                found[f"{value.__module__}.{value.__qualname__}"] = value
            elif inspect.isclass(value):
                for member in vars(value).values():
                    public = inspect.isfunction(member) and not member.__name__.startswith("_")
                    if public and member.__module__ == value.__module__:
                        found[f"{value.__module__}.{member.__qualname__}"] = member
    return found


def test_exported_functions_have_docstrings():
    assert [name for name, function in exported().items() if not inspect.getdoc(function)] == []


def test_exported_functions_are_annotated():
    missing = []
    for name, function in exported().items():
        signature = inspect.signature(function)
        parameters = [parameter for parameter in signature.parameters.values() if parameter.name not in ("self", "cls")]
        missing += [f"{name}({p.name})" for p in parameters if p.annotation is inspect.Parameter.empty]
        missing += [name] if signature.return_annotation is inspect.Signature.empty else []
    assert missing == []
