"""Models to and from Hugging Face folders: `config.json` and safetensors, nothing pickled, no code from the folder.

`transformers` is not used. A foreign `config.json` is read by lists of keys: those that describe the network are
taken, those known to say nothing about it are skipped, and every other key is refused by name, because a setting that
is ignored in silence makes another model of the same weights.
"""

import json
import os
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.models.families.bert import HF_ADAPTER as BERT
from torchrecipes.models.families.custom_moe import HF_ADAPTER as MOE
from torchrecipes.models.families.gpt2 import HF_ADAPTER as GPT2
from torchrecipes.models.families.llama import HF_ADAPTER as LLAMA
from torchrecipes.models.families.neobert import HF_ADAPTER as NEOBERT
from torchrecipes.models.families.olmoe import HF_ADAPTER as OLMOE
from torchrecipes.models.families.qwen3 import HF_ADAPTER as QWEN3
from torchrecipes.models.families.qwen3_moe import HF_ADAPTER as QWEN3_MOE
from torchrecipes.models.hf_adapter import HFAdapter
from torchrecipes.modules import init_tensor

INDEX = "model.safetensors.index.json"  # names the files where there are several
_FAMILIES = {
    family.config_class.model_type: family for family in (BERT, NEOBERT, GPT2, LLAMA, QWEN3, QWEN3_MOE, OLMOE, MOE)
}

# Keys with the only values that we can follow, in any family's config.json.
_FIXED = {
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "torchscript": (False,),
}

# Keys that say nothing about the network: where it came from, what `transformers` returns, labels, special tokens.
_IGNORED = frozenset(
    (
        "model_type architectures transformers_version dtype torch_dtype _name_or_path name_or_path "
        "_commit_hash _attn_implementation attn_implementation use_cache gradient_checkpointing use_bfloat16 "
        "tokenizer_class output_attentions output_hidden_states return_dict use_return_dict id2label label2id "
        "num_labels problem_type finetuning_task task_specific_params classifier_dropout pad_token_id "
        "bos_token_id eos_token_id sep_token_id cls_token_id unk_token_id mask_token_id prefix"
    ).split()
)


def load_hf(path: str | Path, seed: int = 0, report: Callable[[str], None] = print) -> nn.Module:
    """A model from a Hugging Face folder, in fp32. `model_type` says which: see the table in `docs/models.md`.

    Folders saved without their language-model head load too: the head is then initialized, and reported. Pooler and
    next-sentence head of a BERT are dropped, and reported.

    Args:
        path: a folder with `config.json` and `model.safetensors`, or shards with `model.safetensors.index.json`.
        seed: for a head that is not in the folder.
        report: called with each line about something dropped or initialized.

    Raises:
        UserError: no such folder or file; weights only in pickle form; a config.json that asks for what the family's
            network here does not do; tensors missing, unexpected, or of another shape.
    """
    folder = Path(path)
    model = meta_model_from_hf(folder)
    config, family = model.config, _FAMILIES[model.config.model_type]
    key_map = family.key_map(config)
    known = {hf_name for parts in key_map.values() for hf_name, _ in parts}
    hf = _read_tensors(folder, family, known, report)
    try:
        hf = family.stack(hf)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None

    problems, state = [], {}
    headless = {local for local in key_map if local.startswith("head.")}
    if headless and not any(name in hf for local in headless for name, _ in key_map[local]):
        report(f"{folder} has no {family.head}: {', '.join(sorted(headless))} start from seed {seed}")
    else:
        headless = set()
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name in headless:
            state[name] = init_tensor(name, shape, seed=seed, std=config.initializer_range)
            continue
        unfit = []
        for part in key_map[name]:
            hf_name, expected = part[0], family.stored_shape(part, shape)
            if hf_name not in hf:
                unfit.append(f"{hf_name} is missing")
            elif tuple(hf[hf_name].shape) != expected:
                found = tuple(hf[hf_name].shape)
                unfit.append(f"{hf_name} has the shape {found}; config.json makes it {expected}")
        if not unfit:
            state[name] = family.join(key_map[name], hf.__getitem__).float()
        problems += unfit
    problems += [f"{hf_name} is not expected" for hf_name in hf if hf_name not in known]
    if problems:
        raise UserError(
            f"{folder}: the weights do not fit a {family.architecture} of this config.json:\n"
            + "\n".join(f"  {problem}" for problem in sorted(problems))
            + "\nSave the folder again with transformers' save_pretrained(), or correct config.json."
        )
    model.load_state_dict(state, assign=True)
    return model


def meta_model_from_hf(path: str | Path) -> nn.Module:
    """The network that a folder's `config.json` describes, on the meta device, without its weights.

    Raises:
        UserError: as `load_hf` for config.json.
    """
    config = _read_config(Path(path))
    with torch.device("meta"):
        return _FAMILIES[config.model_type].network(config)


def check_family(model: Any) -> None:
    """Checks that a model is one that `save_hf` can write: of a family here, and with that family's parameters.

    Raises:
        UserError: it is not.
    """
    family = _FAMILIES.get(getattr(getattr(model, "config", None), "model_type", None))
    if family is None or not isinstance(model.config, family.config_class):
        raise UserError(
            f"{type(model).__name__} is no model of a family of this library, whose checkpoints it can write. Take one "
            "from torchrecipes.models, or a loop of your own (docs/own-loop.md)"
        )
    names, known = set(model.state_dict()), set(family.key_map(model.config))
    if names != known:
        differ = ", ".join(sorted(names ^ known)[:5])
        raise UserError(
            f"the parameters are not those of a {family.architecture}, and no checkpoint could be written: {differ}. "
            "Take a loop of your own for such a model (docs/own-loop.md)"
        )


def loading_hint(model: nn.Module, path: str | Path) -> str:
    """For people: what loads a folder that `save_hf` made of `model`."""
    family = _FAMILIES[model.config.model_type]
    if family is MOE:
        return f"load it: torchrecipes.models.load_hf({str(path)!r})"
    kind = "AutoModelForMaskedLM" if family.architecture.endswith("ForMaskedLM") else "AutoModelForCausalLM"
    return f"load it with transformers: {kind}.from_pretrained({str(path)!r})"


def save_hf(model: nn.Module, path: str | Path, tokenizer=None) -> None:
    """Writes a folder that `transformers`' from_pretrained() loads: `config.json`, `model.safetensors`, the tokenizer.

    Tied weights are stored once. Each file is complete or not there.

    Args:
        model: of one of the families here, not sharded.
        path: the folder; made where it does not exist.
        tokenizer: has `save(folder)` and the ids of its special tokens (a `torchrecipes.data` Tokenizer), or None.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_hf_config(model, folder, tokenizer)
    write_tensors(hf_state_dict(model), folder / "model.safetensors")


def write_hf_config(model: nn.Module, folder: Path, tokenizer=None) -> None:
    """Writes what a Hugging Face folder has beside the weights: `config.json` and the tokenizer."""
    if tokenizer is not None:
        tokenizer.save(folder, model_max_length=model.config.max_position_embeddings)
    config = json.dumps(hf_config(model, tokenizer), indent=2) + "\n"
    (folder / "config.json.tmp").write_text(config, encoding="utf-8")
    os.replace(folder / "config.json.tmp", folder / "config.json")


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file, complete or not at all, with the rights that any new file in its folder gets."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode  # safetensors would let the owner only read it
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
    temporary.chmod(mode)
    os.replace(temporary, file)


def hf_state_dict(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's tensors under their Hugging Face names: views, detached, no tied weight twice.

    Args:
        model: of one of the families here.
        state: tensors by our names where they are not the model's own (gathered from shards, averaged, ...); all of
            them or some.
    """
    family = _FAMILIES[model.config.model_type]
    key_map = family.key_map(model.config)
    state = model.state_dict() if state is None else state
    tensors = {}
    for name, tensor in state.items():
        tensors |= family.split(tensor.detach(), key_map[name])
    return tensors


def stored_tensors(model: nn.Module, path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(Our name, tensor) of everything that the model has and `save_hf` wrote, one at a time.

    Args:
        model: of the same config as the stored one; its tensors are not looked at.
        path: the folder.
    """
    family = _FAMILIES[model.config.model_type]
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in _tensor_files(Path(path))}
        where = {name: file for file in opened.values() for name in file.keys()}  # noqa: SIM118, it is no dict
        for name, parts in family.key_map(model.config).items():
            yield name, family.join(parts, lambda hf_name: where[hf_name].get_tensor(hf_name))


def hf_config(model: nn.Module, tokenizer=None) -> dict:
    """The model's `config.json`; special token ids come from the tokenizer, and are null or absent without one."""
    family = _FAMILIES[model.config.model_type]
    config = {"architectures": [family.architecture], "model_type": model.config.model_type}
    config |= family.write_keys(model.config)
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    ids = {"pad": None, "bos": None, "eos": None}  # null: transformers' own defaults may be beyond this vocabulary
    if tokenizer is not None:
        ids = {
            "pad": tokenizer.pad_id,
            "bos": tokenizer.cls_id if tokenizer.bos_id is None else tokenizer.bos_id,
            "eos": tokenizer.sep_id if tokenizer.eos_id is None else tokenizer.eos_id,
        }
        if tokenizer.mask_id is not None and model.config.model_type == "eurobert":
            ids["mask"] = tokenizer.mask_id
    return config | {f"{kind}_token_id": value for kind, value in ids.items()}


def _read_config(folder: Path) -> Any:
    """The family's config from config.json; every key that cannot be followed is named in one error."""
    file = folder / "config.json"
    if not file.is_file():
        of_run = sorted(folder.glob("checkpoints/step-*"))
        hint = (
            f"This is a run; its newest model is {of_run[-1]}"
            if of_run
            else "Name a folder that save_pretrained() wrote"
        )
        raise UserError(f"{file} does not exist. {hint}.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}. Save the folder again.") from None
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type not in _FAMILIES:
        raise UserError(f"{file}: model_type is {model_type!r}; supported are {', '.join(sorted(_FAMILIES))}.")
    family = _FAMILIES[model_type]

    keys = family.read_keys(raw)
    known = {field.name: field for field in fields(family.config_class)}
    fixed = _FIXED | family.fixed
    values, problems = {}, []
    for key, value in keys.items():
        if key in known:
            wanted = known[key].type
            if isinstance(value, int) and wanted is float:
                value = float(value)
            if _is_a(value, wanted):
                values[key] = value
            else:
                problems.append(f"{key}: {value!r} is not {getattr(wanted, '__name__', wanted)}")
        elif key in fixed:
            if not any(value == allowed and (value is None) == (allowed is None) for allowed in fixed[key]):
                problems.append(f"{key}: {value!r} is not supported; only {fixed[key][0]!r} is")
        elif key not in _IGNORED and key not in family.ignored:
            problems.append(f"{key}: {value!r} is a key that is not known here")
    for name, field in known.items():
        if field.default is MISSING and name not in keys:
            problems.append(f"{name} is missing")
    if problems:
        raise UserError(
            f"{file}: this {model_type} cannot be loaded:\n"
            + "\n".join(f"  {problem}" for problem in sorted(problems))
            + "\nDelete a key only if you know that it does not change what the model computes."
        )
    try:
        return family.config_class(**values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _is_a(value: object, wanted: type) -> bool:
    """Whether a JSON value has a config field's type; a bool is no int."""
    if typing.get_origin(wanted) is tuple:
        return isinstance(value, tuple) and all(type(item) is typing.get_args(wanted)[0] for item in value)
    if isinstance(wanted, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(wanted))
    return type(value) is wanted


def _read_tensors(folder: Path, family: HFAdapter, known: set[str], report: Callable[[str], None]) -> dict[str, Tensor]:
    """The folder's tensors as `family.key_map` names them (`known`), without what the network has no use for."""
    hf, dropped = {}, []
    for original, tensor in _stored_tensors(folder):
        name = family.normalize_name(original)
        if name is None:
            dropped.append(original)
        elif name in hf and not torch.equal(hf[name], tensor):
            raise UserError(f"{folder}: {original} differs from another tensor that stands for {name}. Delete one.")
        else:
            hf[name] = tensor
    tied_name, source = family.tied
    if tied_name in hf and tied_name not in known:
        if source in hf and not torch.equal(hf[tied_name], hf[source]):
            raise UserError(
                f"{folder}: {tied_name} differs from {source}, but config.json says that they are one. "
                "Set tie_word_embeddings to false there to keep both."
            )
        del hf[tied_name]
    if dropped:
        report(f"{folder}: not used, dropped: {', '.join(sorted(dropped))}")
    return hf


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in model.safetensors, or in the shards that its index names."""
    for file in _tensor_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                for name in names:
                    yield name, tensors.get_tensor(name)
        except FileNotFoundError:
            raise UserError(f"{file} does not exist, but {INDEX} names it. Download the folder again.") from None
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise UserError(f"{file} is damaged: {error}. Download the folder again.") from None


def _tensor_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of shards: {error!r}. Save the folder again.") from None
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{folder} holds its weights in {pickles[0]} only, which is a pickle: reading one can run code. "
            "Convert it where you trust it, with the class that config.json names under architectures: "
            "from_pretrained(folder).save_pretrained(folder)."
        )
    raise UserError(f"{folder} has no model.safetensors. Name a folder that save_hf() or save_pretrained() wrote.")
