"""Reads a foreign config.json by lists of keys, since a setting that is silently ignored makes another model.

| key                                                    | treatment                              |
|--------------------------------------------------------|----------------------------------------|
| a field of the family's config                         | followed                               |
| `FIXED`, or the adapter's `fixed`                      | must have a value that changes nothing |
| `IGNORED`, the adapter's `ignored`, or starts with `_` | skipped: it does not touch the network |
| unknown: null, false, 0, empty                         | reported and skipped                   |
| unknown, any other value                               | refused                                |
"""

import json
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torchrecipes.errors import UserError
from torchrecipes.models.hf_adapter import HFAdapter

# Keys with the only values that the networks here can follow, in any family's config.json.
FIXED: dict[str, tuple] = {
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "torchscript": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
}

# Keys that do not change the network: provenance, what `transformers` returns, labels, tokens, generation settings.
IGNORED = frozenset(
    """
    model_type architectures transformers_version dtype torch_dtype name_or_path auto_map transformers.js_config
    attn_implementation use_cache gradient_checkpointing use_bfloat16 keys_to_ignore_at_inference
    tokenizer_class output_attentions output_hidden_states output_past return_dict use_return_dict id2label label2id
    num_labels problem_type finetuning_task task_specific_params classifier_dropout pad_token_id
    bos_token_id eos_token_id sep_token_id cls_token_id unk_token_id mask_token_id decoder_start_token_id prefix
    bos_token eos_token pad_token mask_token is_llama_config max_sequence_length model_max_length n_special
    predict_special_tokens unsloth_version unsloth_fixed sentence_transformers cache_implementation
    do_sample max_length min_length max_new_tokens early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens tf_legacy_loss sbert_ce_default_activation_function
    classification_thresholds classification_temperature classification_max_length
    """.split()
)


def read_json(file: Path) -> dict:
    """A JSON object from a file, with or without a byte order mark.

    Raises:
        UserError: `not_json`.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}", hint="Save the folder again", code="not_json") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file} is not a JSON object", hint="Save the folder again", code="not_json")
    return raw


def config_from_dict(raw: dict, file: Path, adapter: type[HFAdapter] | HFAdapter, report: Callable[[str], None]) -> Any:
    """The family's config from the contents of a config.json.

    Args:
        raw: the contents of `file`.
        file: for messages.
        adapter: of the family.
        report: called with a line about each unknown key that is skipped.

    Raises:
        UserError: `unsupported_config`, listing as `problems` each key that cannot be followed.
    """
    keys = adapter.read_keys(raw)
    known = {field.name: field for field in fields(adapter.config_class)}
    fixed = FIXED | adapter.fixed
    values, problems, skipped = dict(adapter.defaults), [], []
    for key, value in keys.items():
        if key in known:
            wanted = known[key].type
            if isinstance(value, int) and not isinstance(value, bool) and wanted is float:
                value = float(value)
            if _is_a(value, wanted):
                values[key] = value
            else:
                problems.append(UserError(f"{value!r} is not {getattr(wanted, '__name__', wanted)}", key=key))
        elif key in fixed:
            if not any(value == allowed and (value is None) == (allowed is None) for allowed in fixed[key]):
                problems.append(UserError(f"{value!r} is not supported, only {fixed[key][0]!r}", key=key))
        elif key in IGNORED or key in adapter.ignored or key.startswith("_"):
            continue
        elif value:
            problems.append(UserError(f"{value!r} is an unknown key", key=key))
        else:
            skipped.append(f"{key}={value!r}")
    problems += [UserError("is missing", key=key) for key in adapter.required - set(keys)]
    if problems:
        raise UserError(
            f"{file}: this {raw['model_type']} cannot be loaded:\n"
            + "\n".join(f"  {problem}" for problem in sorted(problems, key=str)),
            hint="Delete a key only if you know that it does not change what the model computes, or let transformers "
            f"build it: model: {{_component_: torchrecipes.models.from_transformers, path: {file.parent}}}",
            code="unsupported_config",
            problems=problems,
        )
    if skipped:
        report(f"{file}: skipping unknown keys: {', '.join(sorted(skipped))}")
    try:
        return adapter.config_class(**values)
    except UserError as error:
        raise UserError(f"{file}: {error}", code="unsupported_config", problems=[error]) from None


def _is_a(value: object, wanted: Any) -> bool:
    """Whether a JSON value has a config field's type; a bool is no int."""
    if typing.get_origin(wanted) is tuple:
        return isinstance(value, tuple) and all(type(item) is typing.get_args(wanted)[0] for item in value)
    if isinstance(wanted, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(wanted))
    return type(value) is wanted
