"""Imports torchao where a component needs it: it takes seconds, is optional, and prints warnings."""

import importlib
import logging
from types import ModuleType

from torchrecipes.errors import UserError


def import_torchao(module: str) -> ModuleType:
    """Imports `torchao.<module>`, without its warnings about compiled files for other GPUs and versions of Python.

    Raises:
        UserError: torchao is not installed.
    """
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(f"torchao.{module}")
    except ModuleNotFoundError as error:
        if error.name != "torchao":
            raise
        raise UserError(
            "float8 and low-bit optimizers need the package torchao, which is not installed",
            hint="Install it with: pip install 'torchrecipes[torchao]'",
            code="missing_package",
        ) from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
