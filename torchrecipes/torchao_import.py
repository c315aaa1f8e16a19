"""torchao, imported where a component needs it (it takes seconds), without what it prints about other machines."""

import importlib
import logging
from types import ModuleType


def import_torchao(module: str) -> ModuleType:
    """Imports `torchao.<module>`.

    torchao tries all of its compiled files, those for other GPUs and versions of Python, too, and warns of every one
    that does not fit. Nothing that is used here is in them.
    """
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(f"torchao.{module}")
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
