"""Finds and loads a trained model for the verbs that use one."""

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from torchrecipes.errors import UserError


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder, the device and the precision."""
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a Hugging Face folder")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    choices = ("auto", "bf16", "fp16", "fp32")
    parser.add_argument(
        "--precision", choices=choices, default="auto", help="default: on an NVIDIA GPU bf16 or fp16, else fp32"
    )


def print_counts(counts: Mapping[str, int]) -> None:
    """Print on stderr how many texts were treated differently, by what was done; nothing where there were none."""
    for what, count in counts.items():
        if count > 0:
            print(f"{count:,} {'text was' if count == 1 else 'texts were'} {what}", file=sys.stderr)


def newest_valid_checkpoint(folder: str) -> Path:
    """Return `folder` itself if it holds a model, else the newest checkpoint of the run in it with all its files.

    Raises:
        UserError: no model is there; see `resolve_model_folder`.
    """
    from torchrecipes.models import resolve_model_folder

    return resolve_model_folder(folder, warn=True)


def load_causal(args: argparse.Namespace, verb: str) -> tuple[Path, Any, Any, Callable[[], AbstractContextManager]]:
    """Return the folder, its model on its device, its tokenizer, and a function that returns the autocast context.

    Raises:
        UserError: no model there, an encoder (code `not_causal`), a model without its head (`no_head`), no such device.
    """
    folder = newest_valid_checkpoint(args.run)

    from torchrecipes.data.tokenizers.load import load_tokenizer
    from torchrecipes.models import load_hf_weights, meta_model_from_hf
    from torchrecipes.training.precision import autocast

    report = partial(print, file=sys.stderr)
    model = meta_model_from_hf(folder, report)
    if not getattr(model, "causal", False):
        raise UserError(
            f"{folder} ({model.config.model_type}) is not a causal model of this library; {verb} needs one",
            hint=f'For an encoder use: tune-style fill-mask {folder} "The [MASK] is blue."',
            code="not_causal",
        )
    device = _device(args.device)
    tokenizer = load_tokenizer(folder, pad_vocab_to_multiple_of=1, causal=True)
    model.to_empty(device=device)
    load_hf_weights(model, folder, report=report, require_head=True)
    return folder, model, tokenizer, partial(autocast, device, _dtype(args.precision, device))


def load_text_encoder(args: argparse.Namespace, **options: Any) -> tuple[Path, Any]:
    """Return the folder, and a `TextEncoder` of the embedding model in it.

    Args:
        args: what `add_model_arguments` declared.
        options: of the `TextEncoder`.

    Raises:
        UserError: no model there, a decoder (code `not_an_encoder`), modules that do not exist here
            (`unsupported_modules`), no such device.
    """
    folder = newest_valid_checkpoint(args.run)

    from torchrecipes.data.tokenizers.load import load_tokenizer
    from torchrecipes.evaluation import TextEncoder
    from torchrecipes.models import load_hf_weights, meta_embedding_model
    from torchrecipes.modules import pack_linears
    from torchrecipes.training.precision import autocast

    device = _device(args.device)
    report = partial(print, file=sys.stderr)
    model = meta_embedding_model(folder, report=report).to_empty(device="cpu")
    is_complete = (folder / "modules.json").is_file()  # a pooler beside it is never used: not worth a line
    load_hf_weights(model, folder, report=(lambda _: None) if is_complete else report)
    model = model.eval().to(device)
    tokenizer = load_tokenizer(folder, pad_vocab_to_multiple_of=1, required=("pad",))
    dtype = _dtype(args.precision, device)
    context = partial(autocast, device, dtype)
    if device.type == "cpu":
        pack_linears(model, dtype)
    return folder, TextEncoder(model, tokenizer, autocast=context, **options)


def load_text_classifier(args: argparse.Namespace, **options: Any) -> tuple[Path, Any]:
    """Return the folder, and a `TextClassifier` of the classifier in it.

    Args:
        args: what `add_model_arguments` declared.
        options: of the `TextClassifier`.

    Raises:
        UserError: no model there, none that classifies (code `no_head`), a decoder (`not_an_encoder`), no such device.
    """
    folder = newest_valid_checkpoint(args.run)

    from torchrecipes.data.tokenizers.load import load_tokenizer
    from torchrecipes.evaluation import TextClassifier
    from torchrecipes.models import load_classifier
    from torchrecipes.modules import pack_linears
    from torchrecipes.training.precision import autocast

    device = _device(args.device)
    model = load_classifier(folder, report=partial(print, file=sys.stderr)).to(device)
    tokenizer = load_tokenizer(folder, pad_vocab_to_multiple_of=1, required=("pad",))
    dtype = _dtype(args.precision, device)
    context = partial(autocast, device, dtype)
    if device.type == "cpu":
        pack_linears(model, dtype)
    return folder, TextClassifier(model, tokenizer, autocast=context, **options)


def load_mask_filler(args: argparse.Namespace, **options: Any) -> Any:
    """Return a `MaskFiller` of the encoder in a folder.

    Args:
        args: what `add_model_arguments` declared.
        options: of the `MaskFiller`.

    Raises:
        UserError: no model there, one without its head (code `no_head`), a decoder (`not_an_encoder`), no such device.
    """
    folder = newest_valid_checkpoint(args.run)

    from torchrecipes.data.tokenizers.load import load_tokenizer
    from torchrecipes.evaluation import MaskFiller
    from torchrecipes.models import load_hf, meta_model_from_hf
    from torchrecipes.modules import pack_linears
    from torchrecipes.training.precision import autocast

    if getattr(meta_model_from_hf(folder, report=lambda _: None), "causal", False):
        hint = f"For a decoder use: tune-style generate {folder} --prompt ..."
        raise UserError(f"{folder} is a decoder, which fills no masks", hint=hint, code="not_an_encoder")
    device = _device(args.device)
    model = load_hf(folder, report=partial(print, file=sys.stderr), require_head=True).to(device)
    tokenizer = load_tokenizer(folder, pad_vocab_to_multiple_of=1)
    dtype = _dtype(args.precision, device)
    context = partial(autocast, device, dtype)
    if device.type == "cpu":
        pack_linears(model, dtype)
    return MaskFiller(model, tokenizer, autocast=context, **options)


def load_trained(args: argparse.Namespace) -> tuple[Path, Any, Any, Callable[[], AbstractContextManager]]:
    """Return what `load_causal` does, for a model of either kind: `model.causal` says which.

    Raises:
        UserError: no model there, one without its head (code `no_head`), no such device.
    """
    folder = newest_valid_checkpoint(args.run)

    from torchrecipes.data.tokenizers.load import load_tokenizer
    from torchrecipes.models import load_hf
    from torchrecipes.training.precision import autocast

    device = _device(args.device)
    model = load_hf(folder, report=partial(print, file=sys.stderr), require_head=True).to(device)
    tokenizer = load_tokenizer(folder, pad_vocab_to_multiple_of=1, causal=model.causal)
    return folder, model, tokenizer, partial(autocast, device, _dtype(args.precision, device))


def _device(name: str | None) -> Any:
    from torchrecipes.devices import choose_device

    try:
        return choose_device(name or "auto")
    except UserError as error:
        raise error.under("--device") from None


def _dtype(precision: str, device: Any) -> Any:
    """The dtype to compute in: `auto` is fp32 on a CPU, whatever instructions it has."""
    from torchrecipes.training.precision import resolve_dtype

    return resolve_dtype("fp32" if precision == "auto" and device.type != "cuda" else precision, device)
