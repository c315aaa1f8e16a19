"""`extend_context`: a model that takes longer documents, by scaled RoPE or by a longer table of learned positions."""

import functools
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models.hf_adapter import LongerPositions
from torchrecipes.models.transformer import Transformer

ROTARY = ("yarn", "linear", "theta")
LEARNED = ("tile", "interpolate")

# A run builds its model several times: for the check of its config, for training, and for estimates.
_print_once = functools.cache(functools.partial(print, flush=True))


def extend_context(
    model: nn.Module,
    seq_len: int,
    *,
    method: Literal["yarn", "linear", "theta", "tile", "interpolate"] | None = None,
    factor: float | None = None,
    theta: float | None = None,
) -> nn.Module:
    """Changes a model so that it takes documents of `seq_len` tokens, to be trained on some of that length afterwards.

    Call it on a model with its weights, or on one on the meta device before they are loaded, as in `build_model` of a
    recipe: `load_hf_weights` then extends the stored table of positions while it reads it. Checkpoints have the longer
    `max_position_embeddings`, the scaling of RoPE and the longer table in them, and `transformers` reads all three. A
    model that takes `seq_len` tokens already is left as it is, unless `theta` is given.

        model = extend_context(meta_model_from_hf(folder), 4096)  # a recipe: longer_context: {_component_: ...}

    - `yarn` (RoPE, the default): lowers the frequencies of long wavelengths and sharpens the softmax (Peng et al. 2023,
      arXiv:2309.00071).
    - `linear` (RoPE): divides all frequencies, which is position interpolation (Chen et al. 2023, arXiv:2306.15595).
    - `theta` (RoPE): raises the base, to `theta`, or by `factor ** (H / (H - 2))`, which stretches the longest
      wavelength by `factor` ("NTK-aware"; Roziere et al. 2023, arXiv:2308.12950, section 2.4).
    - `tile` (learned positions, the default): repeats the table, so that position p starts as p modulo the old length
      (Beltagy et al. 2020, arXiv:2004.05150).
    - `interpolate` (learned positions): stretches the table linearly, and so moves the positions that it had.

    Local attention (ModernBERT) keeps its own RoPE: a token never sees further than before.

    Args:
        model: of `torchrecipes.models`; changed in place. Not sharded.
        seq_len: tokens of the longest document.
        method: see above. None: `yarn`, or `tile` where positions are learned.
        factor: RoPE: how many times longer. None: `seq_len` / the length that the model was trained for.
        theta: `theta` only: the new base. None: see above.

    Returns:
        The same model.

    Raises:
        UserError: `unsupported_method` for this model, its scaling, or these arguments; `bad_size` for a `factor` or
            `theta` that is not above 1.
    """
    if not isinstance(model, Transformer):
        problem = f"the positions of {type(model).__name__} are not known here"
        raise UserError(problem, key="longer_context", hint="Extend it before", code="unsupported_method")
    table = _position_table(model)
    methods = LEARNED if table is not None else ROTARY if model.rotary else ()
    method = method or ("tile" if table is not None else "yarn")
    for key, value in (("factor", factor), ("theta", theta)):
        if value is None:
            continue
        if value <= 1:
            raise UserError(f"{value} is not above 1", key=f"longer_context.{key}", code="bad_size")
        if method not in ROTARY or (key == "theta") > (method == "theta"):
            raise UserError(f"method {method} has no {key}", key=f"longer_context.{key}", code="unsupported_method")
    if method not in methods:
        kind = "learned positions" if table is not None else "RoPE"
        problem = f"{method} is not for a model with {kind}"
        hint = f"Choose from {', '.join(methods)}"
        raise UserError(problem, key="longer_context.method", hint=hint, code="unsupported_method")
    config, offset = model.config, model.position_offset
    positions = config.max_position_embeddings - offset
    if seq_len <= positions and theta is None:
        _print_once(f"longer_context: the model takes documents of {positions:,} tokens already; it is left as it is")
        return model
    changes = {"max_position_embeddings": max(seq_len, positions) + offset}
    if table is None:
        changes |= _rotary_changes(config, method, factor or max(1.0, seq_len / positions), factor, seq_len, theta)
    _set_config(model, replace(config, **changes))
    if table is not None:
        name, old = table
        longer = LongerPositions(f"{name}.weight", len(old.weight), offset, method)
        new = nn.Embedding(seq_len + offset, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        if old.weight.is_meta:
            model.hf_adapter.longer_positions = longer
        else:
            with torch.no_grad():
                new.weight.copy_(longer.extend(old.weight, len(new.weight)))
        model.set_submodule(name, new)
    said = {key: value for key, value in changes.items() if key != "max_position_embeddings"}
    shown = "".join(f", {key}={value}" for key, value in said.items())
    _print_once(f"longer_context: documents of {seq_len:,} tokens, before {positions:,}, by {method}{shown}")
    return model


def _position_table(model: Transformer) -> tuple[str, nn.Embedding] | None:
    for name in ("position_embedding", "embedding.position_embeddings"):
        try:
            table = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(table, nn.Embedding):
            return name, table
    return None


def _rotary_changes(
    config: Any, method: str, ratio: float, factor: float | None, seq_len: int, theta: float | None
) -> dict[str, Any]:
    """The keys of the config that change.

    Args:
        config: the model's.
        method: one of `ROTARY`.
        ratio: how many times longer than before.
        factor, seq_len, theta: as the user gave them.
    """
    if method == "theta":
        size = config.head_dim
        return {"rope_theta": float(theta or config.rope_theta * ratio ** (size / (size - 2)))}
    scaling = config.rope_scaling or {"rope_type": method}
    if scaling["rope_type"] != method:
        raise UserError(
            f"the model has RoPE scaling of type {scaling['rope_type']}, to which {method} cannot be added",
            key="longer_context.method",
            hint="Choose theta, or the type that it has",
            code="unsupported_method",
        )
    if method == "linear":
        return {"rope_scaling": scaling | {"factor": float(scaling.get("factor", 1.0) * ratio)}}
    original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    lengths = {"factor": float(factor or seq_len / original), "original_max_position_embeddings": original}
    return {"rope_scaling": scaling | lengths}


def _set_config(model: Transformer, config: Any) -> None:
    """Gives the model another config, and an adapter of it."""
    old = model.hf_adapter
    model.config, model.hf_adapter = config, old.with_config(config)
    model.hf_adapter.companions, model.hf_adapter.stop_ids = old.companions, old.stop_ids
