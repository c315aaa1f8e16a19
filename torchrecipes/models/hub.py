"""Models to and from Hugging Face folders: `config.json` and safetensors, nothing pickled, no code from the folder.

A model with an `hf_adapter` is stored in the Hugging Face layout, any other under its own parameter names.
`transformers` is not needed, except for models that `from_transformers` made.
"""

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torchrecipes.atomic_write import write_atomically
from torchrecipes.errors import UserError
from torchrecipes.manifest import verify
from torchrecipes.model_folder import has_hf_config, resolve_model_folder
from torchrecipes.models.compatibility import max_positions
from torchrecipes.models.config_json import config_from_dict, read_json
from torchrecipes.models.hf_adapter import HFAdapter, adapter_of
from torchrecipes.models.stored_tensors import StoredTensor, by_file, open_tensors
from torchrecipes.models.transformer import ENCODERS
from torchrecipes.modules.init import copy_full
from torchrecipes.modules.lora import lora_layers, merged_tensors, without_lora

if TYPE_CHECKING:
    from torchrecipes.data.tokenizers.tokenizer import Tokenizer

# model_type of a foreign config.json -> the file in families/ that has `from_config` and `Adapter`.
FAMILIES = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "distilbert": "distilbert",
    "modernbert": "modernbert",
    "eurobert": "neobert",
    "neobert": "neobert",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "olmoe": "olmoe",
    "torchrecipes_moe": "custom_moe",
}
# A key of config.json that only a `domain_bert` writes, and the file beside its `bert` (families/domain_bert.py).
SUFFIX_KEY, SUFFIX_FILE = "num_suffixes", "domain_bert/model.safetensors"
COMPANIONS = ("chat_template.jinja", "generation_config.json")


class Coverage(NamedTuple):
    """What became of a folder's tensors and a model's parameters.

    Attributes:
        loaded: parameters with the folder's values.
        initialized: parameters of a head that the folder does not have.
        dropped: tensors of the folder that the model does not have, under their names there.
    """

    loaded: list[str]
    initialized: list[str]
    dropped: list[str]


def load_hf(
    path: str | Path,
    seed: int = 0,
    report: Callable[[str], None] = print,
    require_head: bool = False,
    head: bool = True,
) -> nn.Module:
    """Loads a model in fp32 on the CPU. Its `model_type` selects the family: see the table in `docs/models.md`.

    Args:
        path: a Hugging Face folder, a checkpoint, or a run's folder (its newest valid checkpoint).
        seed: for a head that is not in the folder.
        report: called with each line about something skipped, dropped or initialized.
        require_head: refuse a folder without the head instead of initializing it.
        head: False: an encoder without language-model head, see `meta_model_from_hf`.

    Raises:
        UserError: no such folder or file; weights only in pickle form; a config.json that asks for what the family's
            network does not do; tensors missing, unexpected, of another shape or quantized.
    """
    model = meta_model_from_hf(path, report, head)
    model.to_empty(device="cpu")
    if {name for name, _ in model.named_buffers()} - model.state_dict().keys():
        model.init_weights(seed)  # buffers that no folder has
    load_hf_weights(model, path, seed, report, require_head)
    return model


# A run builds its model several times: for the check of its config, for training, and for estimates.
print_once = functools.cache(print)


def meta_model_from_hf(path: str | Path, report: Callable[[str], None] = print_once, head: bool = True) -> nn.Module:
    """The model that a folder's `config.json` describes, on the meta device.

    A `model_type` that no family here has is built by `from_transformers`, where `transformers` is installed.

    Args:
        path: a Hugging Face folder, a checkpoint, or a run's folder (its newest valid checkpoint).
        report: called with each line about a key that is skipped. The default prints each line once per process.
        head: False: an encoder without its language-model head, stored as `AutoModel` stores it. `load_hf_weights`
            names what else is in the folder: that head, a pooler, a classifier.

    Raises:
        UserError: `no_config` without a config.json; `unsupported_config`, `unknown_model_type`, `not_json`; with
            `head=False`, `not_an_encoder` for a decoder, and for a model that only `transformers` has.
    """
    folder = resolve_model_folder(path)
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder} has no config.json: it is not a Hugging Face folder",
            hint="Set model to what config.yaml there has, and init_from to this folder for its weights",
            code="no_config",
        )
    raw = read_json(file)
    family = FAMILIES.get(raw.get("model_type"))
    if head and SUFFIX_KEY in raw:
        family = _with_suffixes(folder, family, report)
    with torch.device("meta"):
        if family is None:
            model = _from_transformers(raw, folder)
        else:
            module = importlib.import_module(f"torchrecipes.models.families.{family}")
            model = module.from_config(config_from_dict(raw, file, module.Adapter, report))
    model.hf_adapter.companions, model.hf_adapter.stop_ids = _companions(folder), stop_token_ids(folder)
    if not head:
        if family is None:
            problem = f"{file}: {raw.get('model_type')} has no form without a head here"
            raise UserError(problem, hint=f"Use one of {', '.join(ENCODERS)}", code="not_an_encoder")
        model.remove_head()
    return model


def is_decoder(path: str | Path) -> bool:
    """Whether the model that a folder's `config.json` describes predicts the next token, or else masked ones.

    Args:
        path: a Hugging Face folder, a checkpoint, or a run's folder.

    Raises:
        UserError: there is no config.json (code `unknown_objective`), or as `meta_model_from_hf`.
    """
    if not has_hf_config(path):
        raise UserError(
            f"{path} has no config.json that says what the model predicts",
            key="objective",
            hint="Set it to causal or masked.",
            code="unknown_objective",
        )
    return bool(meta_model_from_hf(path).causal)


def load_hf_weights(
    model: nn.Module,
    path: str | Path,
    seed: int = 0,
    report: Callable[[str], None] = print,
    require_head: bool = False,
) -> Coverage:
    """Copies a folder's tensors into a model, one at a time. Parameters may be sharded by `fully_shard`.

    A head that is not in the folder is initialized from (seed, name); heads that the model does not have are dropped.
    Both are reported. Anything else that is missing or left over is an error. A table of positions that
    `extend_context` has made longer is filled from the shorter one. LoRA begins anew: B becomes 0.

    Args:
        model: on its device; its parameters may be uninitialized.
        path: a Hugging Face folder, a checkpoint, or a run's folder (its newest valid checkpoint).
        seed: see above.
        report: called with each line about something dropped or initialized.
        require_head: refuse a folder without the head instead of initializing it.

    Returns:
        What was loaded, initialized and dropped.

    Raises:
        UserError: `weights_mismatch`, listing as `problems` each tensor that is missing, unexpected, of another shape
            or quantized; `no_head`; `corrupt_checkpoint`; or as `open_tensors`.
    """
    folder, adapter = resolve_model_folder(path), adapter_of(model)
    if (folder / "manifest.json").exists() and (corrupt := verify(folder)):
        raise UserError(
            f"{folder} is corrupt: {'; '.join(corrupt)}", hint="Give another checkpoint", code="corrupt_checkpoint"
        )
    adapter = adapter.for_folder(folder)
    targets, layers = without_lora(model, model.state_dict()), lora_layers(model)
    parts = {name: adapter.parts(name) for name in targets}
    with open_tensors(folder, _stored_names(parts)) as files:
        stored, dropped = _expected_tensors(folder, files, adapter, parts)
        head = [name for name in targets if adapter.is_head(name) and hasattr(model, "init_weights")]
        there = {adapter.head_of(name) for name in head if any(hf_name in stored for hf_name, _ in parts[name])}
        head = [name for name in head if adapter.head_of(name) not in there]
        if head and require_head:
            raise UserError(
                f"{folder} has no weights for the head ({', '.join(sorted(head))}), and a random one predicts nothing",
                hint="Give a model that was saved with its language-model head",
                code="no_head",
            )
        problems, longer = [], adapter.longer_positions
        for name, target in targets.items():
            if name in head:
                continue
            for part in parts[name]:
                hf_name, expected = part[0], adapter.stored_shape(part, tuple(target.shape))
                if hf_name not in stored:
                    problems.append(UserError("is missing", key=hf_name))
                    continue
                if longer and longer.name == name and stored[hf_name].shape[0] == longer.stored_rows:
                    expected = (longer.stored_rows, *expected[1:])
                if stored[hf_name].shape != expected:
                    found = f"has the shape {stored[hf_name].shape}, the model needs {expected}"
                    problems.append(UserError(found, key=hf_name))
                elif target.is_floating_point() and not stored[hf_name].is_float:
                    problems.append(UserError(f"has the dtype {stored[hf_name].dtype}: it is quantized", key=hf_name))
        known = _stored_names(parts)
        problems += [UserError("is not expected", key=hf_name) for hf_name in stored if hf_name not in known]
        if problems:
            raise UserError(
                f"{folder}: the weights do not fit the model:\n"
                + "\n".join(f"  {problem}" for problem in sorted(problems, key=str)),
                hint="Save the folder again with save_pretrained(), or correct config.json",
                code="weights_mismatch",
                problems=problems,
            )
        loaded = [name for name in targets if name not in head]
        if dropped:
            report(
                f"{folder}: loaded {len(stored)} tensors; not used, because the model has no such parameters: "
                f"{', '.join(sorted(dropped))}"
            )
        if head:
            report(
                f"{folder} has no weights for the head: {len(loaded)} of {len(targets)} parameters were loaded; newly "
                f"initialized, with seed {seed}: {', '.join(sorted(head))}. "
                "Consider training them first, with the other parameters frozen (freeze)"
            )
            model.init_weights(seed)
        with torch.no_grad():
            for name in loaded:
                value = adapter.join(parts[name], lambda hf_name: stored[hf_name].read())
                if longer and longer.name == name and len(value) == longer.stored_rows:
                    value = longer.extend(value, len(targets[name]))
                copy_full(targets[name], value)
            for layer in layers.values():
                layer.lora_B.zero_()
    if layers:
        model.lora.base = str(path)
    return Coverage(loaded, sorted(head), sorted(dropped))


def save_hf(model: nn.Module, path: str | Path, tokenizer: "Tokenizer | None" = None) -> None:
    """Writes the folder of a model: `model.safetensors`, and with an `hf_adapter` what `from_pretrained()` needs.

    Tied weights are stored once. Each file is complete or absent.

    Args:
        model: not sharded.
        path: the folder; created if missing.
        tokenizer: has `save(folder)` and the ids of its special tokens (a `torchrecipes.data` Tokenizer), or None.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_hf_config(model, folder, tokenizer)
    for file, tensors in by_file(hf_state_dict(model)).items():
        (folder / file).parent.mkdir(exist_ok=True)
        write_tensors(tensors, folder / file)


def write_hf_config(model: nn.Module, folder: Path, tokenizer: "Tokenizer | None" = None) -> None:
    """Writes everything but the weights: the tokenizer, and with an `hf_adapter` `config.json` and its companions."""
    adapter = adapter_of(model)
    if tokenizer is not None:
        tokenizer.save(folder, model_max_length=max_positions(model))
        if adapter.token_types:
            _add_input_name(folder / "tokenizer_config.json", "token_type_ids")
    config = hf_config(model, tokenizer)
    if config is not None:
        write_atomically(folder / "config.json", [(json.dumps(config, indent=2) + "\n").encode()])
    for name, contents in adapter.companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, [contents])


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file, complete or not at all, with the permissions of any new file in its folder."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode  # safetensors would let only the owner read it
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
    temporary.chmod(mode)
    os.replace(temporary, file)


def hf_state_dict(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's tensors under the names that they are stored with: views, detached, tied weights once, LoRA merged.

    Args:
        model: any module.
        state: all or some tensors by our names, where they are not the model's own (gathered, averaged, ...).
    """
    ours = merged_tensors(model, model.state_dict()) if state is None else state.items()
    return {name: tensor for _, stored in iterate_hf_tensors(model, ours) for name, tensor in stored.items()}


def iterate_hf_tensors(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(Our name, the tensors that are stored for it), one of ours at a time.

    A tensor that is computed from several of ours comes with the last of them.

    Args:
        model: has the adapter.
        tensors: (our name, full tensor).
    """
    adapter, parts = adapter_of(model), {}
    for name, tensor in tensors:
        stored = adapter.split(name, tensor.detach())
        if name in adapter.combined:
            parts[name] = tensor.detach()
            if len(parts) == len(adapter.combined):
                stored |= adapter.combine(parts)
        yield name, stored


def stored_tensors(model: nn.Module, path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(Our name, tensor) of everything in the model, from a folder that `save_hf` or a checkpoint wrote, one at a time.

    Args:
        model: of the same architecture as the stored one; its values are not read.
        path: the folder.
    """
    adapter = adapter_of(model)
    parts = {name: adapter.parts(name) for name in without_lora(model, model.state_dict())}
    with open_tensors(Path(path), _stored_names(parts)) as stored:
        for name, found in parts.items():
            yield name, adapter.join(found, lambda hf_name: stored[hf_name].read())


def architecture_differences(model: nn.Module, path: str | Path) -> list[str]:
    """What differs between a model and the one that was saved in a folder: names, shapes, and keys of the config.

    Keys that only training uses, such as dropout, do not count.

    Args:
        model: may be on the meta device, or sharded.
        path: a folder that `save_hf` or a checkpoint wrote.
    """
    folder, adapter = Path(path), adapter_of(model)
    expected = {}
    for name, tensor in without_lora(model, model.state_dict()).items():
        shape = tuple(tensor.shape)
        expected |= {part[0]: adapter.stored_shape(part, shape) for part in adapter.parts(name)}
    with open_tensors(folder, expected) as stored:
        found = {name: tensor.shape for name, tensor in stored.items()}
    problems = [f"{name} is not in the checkpoint" for name in expected if name not in found]
    unknown = [name for name in found if name not in expected and not adapter.is_constant(name)]
    problems += [f"{name} is not in this model" for name in unknown]
    problems += [
        f"{name} is {list(found[name])} in the checkpoint and {list(shape)} in this model"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    ours = adapter.write_keys()
    if problems or ours is None or not (folder / "config.json").is_file():
        return problems
    # The same shapes can be another network: other heads, another rope_theta.
    stored_config = read_json(folder / "config.json")
    if stored_config.get("model_type") != adapter.config.model_type:
        return [f"model_type is {stored_config.get('model_type')} in the checkpoint"]
    if adapter.config_class is not None:
        config = config_from_dict(stored_config, folder / "config.json", adapter, print)
        stored_config, ours = vars(config), vars(adapter.config)
    return [
        f"{key} is {stored_config.get(key)} in the checkpoint and {ours[key]} in this model"
        for key in ours
        if not _is_training_key(key) and stored_config.get(key) != ours[key]
    ]


def hf_config(model: nn.Module, tokenizer: "Tokenizer | None" = None) -> dict | None:
    """The model's `config.json`, with the tokenizer's special token ids, or null without one; None: no `hf_adapter`."""
    adapter = adapter_of(model)
    keys = adapter.write_keys()
    if keys is None:
        return None
    config = {"architectures": [adapter.architecture], "model_type": adapter.config.model_type} | keys
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    # null: transformers' own defaults may be beyond this vocabulary
    ids = {kind: keys.get(f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    if tokenizer is not None:
        ids = {
            "pad": ids["pad"] if adapter.keeps_pad_id else tokenizer.pad_id,
            "bos": tokenizer.cls_id if tokenizer.bos_id is None else tokenizer.bos_id,
            "eos": tokenizer.sep_id if tokenizer.eos_id is None else tokenizer.eos_id,
        }
        if len(adapter.stop_ids) > 1:  # a chat model's list goes along, with the tokenizer's own token
            extra = [] if ids["eos"] is None or ids["eos"] in adapter.stop_ids else [ids["eos"]]
            ids["eos"] = [*adapter.stop_ids, *extra]
        if tokenizer.mask_id is not None and config["model_type"] == "eurobert":
            ids["mask"] = tokenizer.mask_id
        if config["model_type"] == "modernbert":
            ids |= {"cls": tokenizer.cls_id, "sep": tokenizer.sep_id}
    elif config["model_type"] == "modernbert":
        ids |= {"cls": None, "sep": None}
    return config | {f"{kind}_token_id": value for kind, value in ids.items()}


def loading_hint(model: nn.Module, path: str | Path) -> str:
    """How to load the folder that was saved of `model`, in one line for people."""
    return adapter_of(model).loading_hint(str(path))


def stop_token_ids(path: str | Path) -> list[int]:
    """The ids that end a text by generation_config.json, or else by config.json: `eos_token_id` may be a list."""
    folder = resolve_model_folder(path)
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("eos_token_id")
            if found is not None:
                return list(found) if isinstance(found, list) else [found]
    return []


def _with_suffixes(folder: Path, family: str | None, report: Callable[[str], None]) -> str | None:
    """The family of a folder that a `domain_bert` was saved in."""
    if (folder / SUFFIX_FILE).is_file():
        return "domain_bert"
    report(
        f"{folder} holds a domain_bert without its {SUFFIX_FILE}: loading it as {family}, with a table of token types "
        "in place of suffix embeddings, and without the classifier of suffixes"
    )
    return family


def _stored_names(parts: dict[str, Any]) -> set[str]:
    return {hf_name for found in parts.values() for hf_name, _ in found}


def _expected_tensors(
    folder: Path, files: dict[str, StoredTensor], adapter: HFAdapter, parts: dict[str, Any]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The folder's tensors by normalized name, and the names of those that belong to heads the model does not have."""
    stored, dropped = {}, []
    known = _stored_names(parts)
    tied_name, source = adapter.tied or ("", "")
    # `score.weight` belongs to another head, `model.extra` to another network.
    tops = {hf_name.partition(".")[0] for hf_name in (*known, tied_name)}
    for original, tensor in files.items():
        name = adapter.normalize_name(original)
        if name is not None and adapter.is_constant(name):
            continue
        if name is None or name.partition(".")[0] not in tops:
            dropped.append(original)
        elif name in stored and not stored[name].equals(tensor):
            raise UserError(
                f"{folder}: {original} differs from another tensor that means {name}",
                hint="Delete one",
                code="weights_mismatch",
            )
        else:
            stored[name] = tensor
    if tied_name in stored and tied_name not in known:
        if source in stored and not stored[tied_name].equals(stored[source]):
            raise UserError(
                f"{folder}: {tied_name} differs from {source}, but config.json ties them",
                hint="Set tie_word_embeddings to false there to keep both",
                code="weights_mismatch",
            )
        del stored[tied_name]
    try:
        return adapter.prepare(stored), dropped
    except UserError as error:
        raise UserError(f"{folder}: {error}", code="weights_mismatch") from None


def _from_transformers(raw: dict, folder: Path) -> nn.Module:
    known = ", ".join(sorted(FAMILIES))
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            f"{folder / 'config.json'}: model_type is {raw.get('model_type')!r}; the families here are {known}",
            hint="transformers may know it: pip install 'torchrecipes[transformers]'",
            code="unknown_model_type",
        )
    from torchrecipes.models.transformers_model import from_transformers

    return from_transformers(str(folder))


def _is_training_key(key: str) -> bool:
    """Whether a checkpoint may be resumed with another value of it."""
    ignored = ("initializer_range", "max_position_embeddings", "router_aux_loss_coef", "router_z_loss_coef")
    return key in (*ignored, "transformers_version") or "drop" in key or key.endswith("_token_id")


def _companions(folder: Path) -> dict[str, bytes]:
    """What `transformers` reads beside the weights and a checkpoint keeps."""
    found = {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()}
    tokenizer_config = folder / "tokenizer_config.json"
    if COMPANIONS[0] not in found and tokenizer_config.is_file():
        template = read_json(tokenizer_config).get("chat_template")
        if isinstance(template, list):  # of templates with names
            template = next((item["template"] for item in template if item.get("name") == "default"), None)
        if isinstance(template, str):
            found[COMPANIONS[0]] = template.encode()
    return found


def _add_input_name(file: Path, name: str) -> None:
    """Adds `name` to what the tokenizer returns to `transformers`' models."""
    if not file.is_file():
        return
    config = read_json(file)
    names = config.get("model_input_names", ["input_ids", "attention_mask"])
    if name not in names:
        config["model_input_names"] = [names[0], name, *names[1:]]
        write_atomically(file, [(json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()])
