"""Builds model, optimizer, scheduler and guard on the meta device and validates them together.

A config names any importable callable, and calling one can do anything. So a component is called here only if its
class, or the return annotation of its function, says that it makes a model, an optimizer, a scheduler or a guard, and
the same holds for every component nested in its arguments. All others are only imported and checked against their
signatures, which loading the config has done.
"""

import dataclasses
import importlib.util
import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from torchrecipes.config import Component, build
from torchrecipes.config.components import parameters, resolve
from torchrecipes.errors import UserError
from torchrecipes.model_folder import similar_folder
from torchrecipes.models import check_positions
from torchrecipes.modules import MoE
from torchrecipes.planning.fake_model import TokenizerStandIn, meta_model, tokenizer_for
from torchrecipes.planning.memory_estimate import build_optimizer
from torchrecipes.training.guard import Guard
from torchrecipes.training.precision import set_residual_dtype
from torchrecipes.training.setup import freeze

# The components that are built: key, the class that they have to declare, and the code of the error if they do not.
# Any object with a guard's methods is one, so another class is no error there.
FAMILIES = {
    "model": (nn.Module, "not_a_model"),
    "optimizer": (torch.optim.Optimizer, "not_an_optimizer"),
    "lr_scheduler": (LRScheduler, "not_a_scheduler"),
    "guard": (Guard, None),
}
BUILDABLE = tuple(family for family, _ in FAMILIES.values())
UNKNOWN_LENGTH = 10**9  # steps, where the corpus decides how many there are
# Keys that `build_model` does not use; all other components of a config may become part of the model.
_NOT_IN_MODEL = (
    *("tokenizer", "data", "collator", "optimizer", "lr_scheduler", "guard", "ema"),
    *("checkpoint", "compute", "log", "loss", "evaluators", "final_evaluators", "early_stopping"),
)


def check_components(recipe: ModuleType, config: Any) -> list[UserError]:
    """Builds model (on the meta device), collator of names, optimizer, scheduler and guard, and discards them.

    Args:
        recipe: the recipe's module.
        config: an instance of its `Config`.

    Returns:
        The problems, each with its key: of the components, of `seq_len` against the model's positions, of an
        `init_from` that does not exist, of a corpus folder that cannot be written, of packages that are missing.
    """
    problems = [*_check_folders(config), *_check_packages(config)]

    def attempt(key: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except UserError as error:
            for problem in error.problems or [error]:
                if problem.key == "max_length":  # of a model whose recipe gives it seq_len
                    fields = {"hint": problem.hint, "code": problem.code, "problems": problem.problems}
                    problem = UserError(problem.problem, key="seq_len", **fields)
                is_complete = problem.key and problem.key.split(".")[0] in vars(config)
                problems.append(problem if is_complete else problem.under(key))
        except Exception as error:  # of a component of the user's own
            last = traceback.extract_tb(error.__traceback__)[-1]
            # Reported already, by the check of arguments.
            is_missing_argument = isinstance(error, TypeError) and last.filename == build.__code__.co_filename
            # An optimizer that reads values cannot be built for a model that has none: it passes.
            needs_values = key == "optimizer" and isinstance(error, RuntimeError) and "meta" in str(error).lower()
            if not is_missing_argument and not needs_values:
                problem = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
                problems.append(UserError(problem, key=key, code="component_failed"))

    model = optimizer = scheduler = None
    if _is_buildable(config, "model", problems):
        key = "model" if config.model else "init_from"
        model = attempt(key, lambda: meta_model(config, _tokenizer(config), recipe.build_model))
    if _is_collator_known(config):
        attempt("collator", lambda: recipe.build_collator(config, tokenizer_for(config)))
    if model is not None:
        attempt("freeze", lambda: freeze(model, config.freeze))
        attempt("seq_len", lambda: check_positions(model, config.seq_len))
        # In bf16: check_shared_keys compares it with the precision.
        attempt("compute", lambda: set_residual_dtype(model, config.compute.residual, torch.bfloat16))
        if config.data.pads_rows and any(isinstance(module, MoE) for module in model.modules()):
            problem = "none pads rows, and the routers of experts would learn from padding"
            problems.append(
                UserError(problem, key="data.packing", hint="Set concat, best_fit or next_fit", code="padded_experts")
            )
        if _is_buildable(config, "optimizer", problems):
            optimizer = attempt("optimizer", lambda: build_optimizer(config, model))
    if _is_buildable(config, "lr_scheduler", problems):
        scheduler = attempt("lr_scheduler", lambda: build_scheduler(config, _max_steps(config), optimizer))
    problems += _needs_arguments("optimizer", optimizer) + _needs_arguments("lr_scheduler", scheduler)
    if _is_buildable(config, "guard", problems):
        attempt("guard", lambda: build(config.guard))
    return problems


def _needs_arguments(key: str, built: Any) -> list[UserError]:
    """A problem if `built.step()` needs arguments, such as a closure or a metric: a recipe's loop passes none."""
    if built is None:
        return []
    step = inspect.signature(getattr(built.step, "__wrapped__", built.step)).parameters.values()
    needed = [p.name for p in step if p.name in ("closure", "metrics") and p.default is inspect.Parameter.empty]
    if not needed:
        return []
    problem = f"{type(built).__name__}.step needs {', '.join(needed)}, which the recipe does not pass"
    hint = "Use another one, or call its step in a copy of the recipe"
    return [UserError(problem, key=key, hint=hint, code="step_needs_arguments")]


def build_scheduler(config: Any, max_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
    """The config's scheduler for so many steps, of a placeholder optimizer if none is given."""
    optimizer = optimizer or torch.optim.SGD([torch.zeros(1)])
    return build(config.lr_scheduler, optimizer=optimizer, max_steps=max_steps)


def declared_type(path: str) -> type | None:
    """The class that a component makes: itself, or the return annotation of the function; None: it does not say."""
    target = resolve(path)
    if inspect.isclass(target):
        return target
    try:
        annotation = inspect.signature(target, eval_str=True).return_annotation
    except Exception:  # a builtin without a signature, or an annotation that only type checkers can read
        return None
    is_class = inspect.isclass(annotation) and annotation is not inspect.Signature.empty
    return annotation if is_class else None


def _is_buildable(config: Any, key: str, problems: list[UserError]) -> bool:
    """Whether the component under `key` may be built; where its type is declared and wrong, that is a problem."""
    node = getattr(config, key)
    if node is None:  # a model from `init_from`
        return key == "model" and bool(config.init_from) and Path(config.init_from).exists()
    family, code = FAMILIES[key]
    declared = declared_type(node.path)
    if declared is None:
        return False
    if not issubclass(declared, family):
        if code:
            problem = f"{node.path} makes a {declared.__name__}, not a {family.__module__}.{family.__qualname__}"
            problems.append(UserError(problem, key=f"{key}._component_", hint="Name one that does", code=code))
        return False
    inner = [node.args]
    if key == "model":
        inner += [value for name, value in vars(config).items() if name not in (*_NOT_IN_MODEL, "model")]
    return all(issubclass(declared_type(other.path) or object, BUILDABLE) for other in _components(inner))


def _is_collator_known(config: Any) -> bool:
    """Whether the config's collator may be built: it is one of this library, for a tokenizer with an exact stand-in."""
    node = getattr(config, "collator", None)
    if node is None or config.tokenizer is None or not hasattr(resolve(config.tokenizer.path), "stand_in"):
        return False
    return node.path.startswith("torchrecipes.") and not [*_components(node.args)]


def _components(value: Any) -> Iterator[Component]:
    """All components in a value, nested ones included."""
    if isinstance(value, Component):
        yield value
        yield from _components(value.args)
    elif isinstance(value, dict):
        yield from _components(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _components(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _components(list(vars(value).values()))


def _tokenizer(config: Any) -> Any:
    """The tokenizer's numbers; a small stand-in for one whose component is not to be called, or that fails later."""
    if config.tokenizer is not None and "source" not in parameters(resolve(config.tokenizer.path)):
        return TokenizerStandIn(1024)  # loading one runs its component
    try:
        return tokenizer_for(config)
    except UserError as error:
        if error.code == "unknown_vocab_size":
            return TokenizerStandIn(1024)
        raise


def _max_steps(config: Any) -> int:
    if config.max_steps:
        return config.max_steps
    if config.total_tokens and not config.data.pads_rows:
        return -(-config.total_tokens // (config.global_batch_size * config.seq_len))
    return UNKNOWN_LENGTH


def _check_folders(config: Any) -> Iterator[UserError]:
    """Folders that are not there or not writable: found before the tokenizer is trained, not after."""
    if config.init_from and not Path(config.init_from).exists() and not Path(config.init_from).is_absolute():
        name, near = Path(config.init_from).name, similar_folder(config.init_from)
        download = f"Download it first: hf download {config.init_from} --local-dir {name}, then init_from={name}"
        yield UserError(
            f"there is no folder {config.init_from}, and models are not downloaded",
            key="init_from",
            hint=f"Did you mean {near}?" if near else download,
            code="not_found",
        )
    folder = Path(config.data.corpus_dir or Path(config.output_dir) / "corpus")
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("."))
    has_corpus = (folder / "train" / "corpus.json").exists()
    # Where not even the parent is there, this is a config for another machine.
    is_here = config.data.corpus_dir is None or existing in (folder, folder.parent)
    if is_here and not has_corpus and not (existing.is_dir() and os.access(existing, os.W_OK)):
        yield UserError(
            f"{existing} cannot be written",
            key="data.corpus_dir" if config.data.corpus_dir else "output_dir",
            hint="Give a folder that can be, or one that has the corpus",
            code="not_writable",
        )


def _check_packages(config: Any) -> Iterator[UserError]:
    for number, node in enumerate(config.log.loggers):
        package = getattr(resolve(node.path), "requires", None)
        if package and importlib.util.find_spec(package) is None:
            yield UserError(
                f"{node.path} needs the package {package}, which is not installed",
                key=f"log.loggers.{number}",
                hint=f"pip install {package}",
                code="missing_package",
            )
