"""Where a trained causal model is, and how it is loaded: for the verbs that ask one something."""

import argparse
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from torchrecipes.errors import UserError


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder, the device and the precision."""
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a Hugging Face folder of a family")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="default: bf16 on a GPU, else fp32"
    )


def wait_without_spinning() -> None:
    """Lets threads that wait for each other sleep. Call it before torch is imported.

    A token of a small model is a thousand short operations, and threads spin between them: on two cores that two other
    processes used as well, that was 8 tokens per second instead of 330.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def newest_whole_checkpoint(folder: Path) -> Path:
    """`folder` itself when it holds a model, else the newest checkpoint of the run in it that has all its files.

    Raises:
        UserError: there is neither.
    """
    if (folder / "config.json").exists():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a run's folder, a checkpoint, or a Hugging Face folder.")
    checkpoints = sorted((folder / "checkpoints").glob("step-*[0-9]"), key=lambda path: (len(path.name), path.name))
    if not checkpoints:
        raise UserError(f"{folder} holds neither a model (config.json) nor a run's checkpoints. Give a run's folder.")

    from torchrecipes.checkpoint.manifest import verify

    for path in reversed(checkpoints):
        problems = verify(path, checksums=False)
        if not problems:
            return path
        print(f"passed over {path}, which is damaged: {'; '.join(problems)}", file=sys.stderr)
    raise UserError(f"every checkpoint in {folder / 'checkpoints'} is damaged. Give the folder of another run.")


def load_causal(args: argparse.Namespace, verb: str) -> tuple[Path, Any, Any, Callable[[], AbstractContextManager]]:
    """The folder, its model on its device, its tokenizer, and what makes the context to compute in.

    Raises:
        UserError: nothing there, an encoder, or no such device.
    """
    folder = newest_whole_checkpoint(Path(args.run))

    import torch

    from torchrecipes.data.tokenizers.load import load_tokenizer
    from torchrecipes.models import load_hf
    from torchrecipes.models.hub import meta_model_from_hf
    from torchrecipes.training.precision import autocast

    network = meta_model_from_hf(folder)
    if "cache" not in inspect.signature(network.forward).parameters:
        raise UserError(
            f"{folder} holds an encoder ({network.config.model_type}), which reads a text as a whole and does not "
            f"continue it; {verb} is for causal models. Ask an encoder with: tune-style fill-mask {folder} "
            '"The [MASK] is blue."'
        )
    device = _device(args.device)
    tokenizer = load_tokenizer(folder, pad_vocab_to_multiple_of=1, causal=True)
    model = load_hf(folder, report=partial(print, file=sys.stderr)).to(device)
    half = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    return folder, model, tokenizer, partial(autocast, device, torch.bfloat16 if half else torch.float32)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name}: {str(error).splitlines()[0]}. Give cpu, or a device that is there."
        ) from None
    return device
