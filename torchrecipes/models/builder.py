"""Makes the public function of a family out of its config class and its table of sizes."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal

from torchrecipes.errors import UserError
from torchrecipes.models.transformer import Transformer


def model_builder(
    name: str, config_class: type, sizes: dict[str, dict[str, Any]], from_config: Callable[..., Transformer]
) -> Callable[..., Transformer]:
    """A function `name(size=None, *, <the fields of config_class>, seed=0)` that builds a model of the family.

    Its signature and docstring list every key with its default. A size changes the defaults, and arguments come last.

    Args:
        name: of the function.
        config_class: a frozen dataclass whose docstring has an `Attributes` section.
        sizes: size -> the keys in which it differs from the defaults.
        from_config: (config, seed) -> the model; its docstring becomes the first paragraphs of the function's.
    """

    def build(size: str | None = None, *, seed: int = 0, **keys: Any) -> Transformer:
        if size is not None and size not in sizes:
            hint = f"The sizes are {', '.join(sizes)}"
            raise UserError(f"{size!r} is not a size of {name}", key="size", hint=hint, code="unknown_size")
        if unknown := keys.keys() - known.keys():
            raise TypeError(f"{name}() got an unexpected keyword argument {min(unknown)!r}")
        return from_config(config_class(**((sizes[size] if size else {}) | keys)), seed=seed)

    known = {field.name: field for field in fields(config_class) if field.init}
    keyword = inspect.Parameter.KEYWORD_ONLY
    of_size = Literal[tuple(sizes)] | None
    build.__signature__ = inspect.Signature(
        [
            inspect.Parameter("size", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=of_size),
            *(
                inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
                for field in known.values()
            ),
            inspect.Parameter("seed", keyword, default=0, annotation=int),
        ],
        return_annotation=Transformer,
    )
    build.__name__ = build.__qualname__ = name
    build.__module__ = from_config.__module__
    keys = inspect.cleandoc(config_class.__doc__).split("Attributes:\n")[1].split("\n\n")[0]
    build.__doc__ = (
        f"{inspect.cleandoc(from_config.__doc__)}\n\nArgs:\n"
        f"    size: {', '.join(sizes)}; it sets the keys of that size. None: the defaults shown.\n"
        f"{keys}\n    seed: of the initial weights."
    )
    build.sizes = sizes
    return build
