"""The files of `sentence_transformers` beside a model's weights: modules, pooling, prompts; read and written as JSON.

They are written as release 3 does, which 4 to 6 read, too; those of all releases since 2 are read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torchrecipes.errors import UserError
from torchrecipes.models.config_json import read_json
from torchrecipes.models.late_interaction import LateInteraction

# Ours -> theirs, in the keys of release 2 to 5 and in those of 6.
POOLING = {
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "cls": ("pooling_mode_cls_token", "cls"),
    "last": ("pooling_mode_lasttoken", "lasttoken"),
    "weighted_mean": ("pooling_mode_weightedmean_tokens", "weightedmean"),
    "max": ("pooling_mode_max_tokens", "max"),
}
SQUARE_ROOT = "pooling_mode_mean_sqrt_len_tokens"
PYLATE_DENSE = "pylate.models.Dense.Dense"
IDENTITY = "torch.nn.modules.linear.Identity"


class EmbeddingSettings(NamedTuple):
    """What turns hidden states into embeddings; see `EmbeddingModel`."""

    hidden_size: int
    pooling: str
    projection: int | None
    normalize: bool
    prompts: dict[str, str]
    include_prompt: bool
    max_length: int | None
    similarity: str
    default_prompt: str | None
    late_interaction: LateInteraction | None = None


def settings_files(settings: EmbeddingSettings) -> dict[str, bytes]:
    """The files of a folder for `SentenceTransformer`, but for weights, config.json and tokenizer: name -> contents.

    With late interaction, those of a folder for `pylate`.
    """
    if settings.late_interaction is not None:
        return _as_json(_pylate_files(settings, settings.late_interaction))
    kinds = ["Transformer", "Pooling"]
    kinds += ["Dense"] if settings.projection is not None else []
    kinds += ["Normalize"] if settings.normalize else []
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": settings.hidden_size, SQUARE_ROOT: False}
    pooling |= {old: mode == settings.pooling for mode, (old, _) in POOLING.items()}
    prompts = {"query": "", "document": ""} | settings.prompts
    if "passage" in prompts and not prompts["document"]:
        prompts["document"] = prompts["passage"]  # what encode_document looks for first
    contents: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": settings.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": settings.default_prompt,
            "similarity_fn_name": settings.similarity,
        },
        "1_Pooling/config.json": pooling | {"include_prompt": settings.include_prompt},
    }
    if settings.projection is not None:
        contents["2_Dense/config.json"] = {
            "in_features": settings.hidden_size,
            "out_features": settings.projection,
            "bias": True,
            "activation_function": IDENTITY,
        }
    return _as_json(contents)


def _as_json(contents: dict[str, Any]) -> dict[str, bytes]:
    return {name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode() for name, value in contents.items()}


def _pylate_files(settings: EmbeddingSettings, late: LateInteraction) -> dict[str, Any]:
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Dense", "type": PYLATE_DENSE},
        ],
        "sentence_bert_config.json": {"max_seq_length": settings.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": "", "document": ""} | settings.prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "MaxSim",
            "query_prefix": late.query_marker or "",
            "document_prefix": late.document_marker or "",
            "query_length": late.query_length,
            "document_length": late.document_length,
            "attend_to_expansion_tokens": late.expand_queries,
            "do_query_expansion": late.expand_queries,
            "skiplist_words": list(late.skip),
        },
        "1_Dense/config.json": {
            "in_features": settings.hidden_size,
            "out_features": late.size,
            "bias": True,
            "activation_function": IDENTITY,
            "use_residual": False,
        },
    }


def _read_pylate(folder: Path, whole: dict) -> EmbeddingSettings:
    """The settings of a folder of `pylate`, with the same restrictions as `read_settings`."""
    problems: list[UserError] = []
    modules = _read_modules(folder)
    if modules != [("Transformer", ""), ("Dense", "1_Dense")]:
        kinds = ", ".join(kind for kind, _ in modules)
        problem = f"modules are {kinds}, and not Transformer and Dense"
        raise _unsupported(folder, [UserError(problem, key="modules.json")])
    dense = _read(folder, "1_Dense/config.json")
    wanted = {"activation_function": IDENTITY, "bias": True, "use_residual": False}
    for key, value in wanted.items():
        if dense.get(key, value) != value:
            problems.append(UserError(f"{dense[key]!r} is not supported, only {value!r}", key=key))
    expands = whole.get("do_query_expansion", True)
    if expands and not whole.get("attend_to_expansion_tokens", False):
        problem = "false is not supported: expanded queries are texts like others, in which all tokens see each other"
        problems.append(UserError(problem, key="attend_to_expansion_tokens"))
    if any(len(word) != 1 for word in whole.get("skiplist_words", ())):
        problems.append(UserError("words of several characters are not supported", key="skiplist_words"))
    if problems:
        raise _unsupported(folder, problems)
    late = LateInteraction(
        query_length=whole.get("query_length", 32),
        document_length=whole.get("document_length", 180),
        expand_queries=expands,
        query_marker=whole.get("query_prefix") or None,
        document_marker=whole.get("document_prefix") or None,
        skip="".join(whole.get("skiplist_words", LateInteraction.skip)),
        size=dense["out_features"],
    )
    return EmbeddingSettings(
        hidden_size=dense["in_features"],
        pooling="mean",
        projection=late.size,
        normalize=True,
        prompts={name: text for name, text in (whole.get("prompts") or {}).items() if text},
        include_prompt=True,
        max_length=_read(folder, "sentence_bert_config.json", optional=True).get("max_seq_length"),
        similarity="cosine",
        default_prompt=None,
        late_interaction=late,
    )


def read_settings(folder: Path, report: Callable[[str], None]) -> EmbeddingSettings | None:
    """The settings of a folder of `sentence_transformers`; None: it has no modules.json.

    Args:
        folder: the model's.
        report: called with a line about what is skipped.

    Raises:
        UserError: a module, or a setting of one, that does not exist here (code `unsupported_modules`, listing all as
            `problems`); `not_json`.
    """
    if not (folder / "modules.json").is_file():
        return None
    whole = _read(folder, "config_sentence_transformers.json", optional=True)
    if whole.get("similarity_fn_name") == "MaxSim":
        return _read_pylate(folder, whole)
    problems: list[UserError] = []

    def refuse(problem: str, key: str) -> None:
        problems.append(UserError(problem, key=key))

    modules = _read_modules(folder)
    kinds = [kind for kind, _ in modules]
    paths = dict(modules)
    known = ("Transformer", "Pooling", "Dense", "Normalize")
    for kind in kinds:
        if kind not in known:
            refuse(f"the module {kind} is not supported, only {', '.join(known)}", "modules.json")
    order = [kind for kind in known if kind in kinds]
    if not problems and (kinds != order or kinds[:2] != list(known[:2])):
        refuse(f"modules are {', '.join(kinds)}, and not {', '.join(known)} in this order", "modules.json")
    if not problems and paths["Transformer"]:
        refuse(f"the encoder is in {paths['Transformer']}, and not in the folder itself", "modules.json")
    if problems:
        raise _unsupported(folder, problems)

    pooling = _read(folder, f"{paths['Pooling']}/config.json")
    mode = _pooling_mode(pooling, refuse)
    dense = _read(folder, f"{paths['Dense']}/config.json") if "Dense" in kinds else None
    if dense is not None:
        if paths["Dense"] != "2_Dense":
            refuse(f"the projection is in {paths['Dense']}, and not in 2_Dense", "modules.json")
        if dense.get("activation_function") != IDENTITY:
            refuse(f"{dense.get('activation_function')} is not supported, only {IDENTITY}", "activation_function")
        if not dense.get("bias", True):
            refuse("a projection without a bias is not supported", "bias")
        if dense.get("use_residual"):
            refuse("a projection with a residual is not supported", "use_residual")
    bert = _read(folder, "sentence_bert_config.json", optional=True)
    if bert.get("do_lower_case"):
        refuse("true is not supported: texts would have to be lowercased before the tokenizer", "do_lower_case")
    if bert.get("transformer_task", "feature-extraction") != "feature-extraction":
        refuse(f"{bert['transformer_task']!r} is not supported", "transformer_task")
    if whole.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        refuse(f"{whole['model_type']!r} is not supported, only 'SentenceTransformer'", "model_type")
    if problems:
        raise _unsupported(folder, problems)
    if whole.get("truncate_dim"):
        report(f"{folder}: truncate_dim={whole['truncate_dim']} is skipped: embeddings have all dimensions")
    similarity = whole.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        report(f"{folder}: similarity_fn_name={similarity} is skipped: embeddings are compared by cosine")
        similarity = "cosine"
    max_length = bert.get("max_seq_length")
    if max_length is None:  # release 6 has it in the tokenizer's file
        max_length = _read(folder, "tokenizer_config.json", optional=True).get("model_max_length")
    prompts = {name: text for name, text in (whole.get("prompts") or {}).items() if text}
    if "document" in prompts:
        prompts.setdefault("passage", prompts["document"])
    return EmbeddingSettings(
        hidden_size=pooling.get("word_embedding_dimension", pooling.get("embedding_dimension")),
        pooling=mode,
        projection=None if dense is None else dense["out_features"],
        normalize="Normalize" in kinds,
        prompts=prompts,
        include_prompt=pooling.get("include_prompt", True),
        max_length=max_length,
        similarity=similarity,
        default_prompt=whole.get("default_prompt_name"),
    )


def _read_modules(folder: Path) -> list[tuple[str, str]]:
    """(Class, folder) of each module."""
    file = folder / "modules.json"
    try:
        modules = json.loads(file.read_text(encoding="utf-8-sig"))
        found = [(module["type"], module["path"]) for module in modules]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a list of modules: {error!r}", code="not_json") from None
    known = ("sentence_transformers.", "pylate.")
    return [(kind.rpartition(".")[2] if kind.startswith(known) else kind, at) for kind, at in found]


def _pooling_mode(pooling: dict, refuse: Callable[[str, str], None]) -> str:
    modes = pooling.get("pooling_mode")
    if modes is None:
        theirs = {old: ours for ours, (old, _) in POOLING.items()}
        modes = [key for key in (*theirs, SQUARE_ROOT) if pooling.get(key)] or ["pooling_mode_mean_tokens"]
    else:
        modes = [modes] if isinstance(modes, str) else list(modes)
        theirs = {new: ours for ours, (_, new) in POOLING.items()}
    if len(modes) > 1 or modes[0] not in theirs:
        refuse(f"pooling by {', '.join(modes)} is not supported, only one of {', '.join(theirs)}", "pooling_mode")
        return ""
    return theirs[modes[0]]


def _read(folder: Path, name: str, optional: bool = False) -> dict:
    if (folder / name).is_file():
        return read_json(folder / name)
    if optional:
        return {}
    raise UserError(f"{folder / name} is missing", hint="Copy the folder again", code="unsupported_modules")


def _unsupported(folder: Path, problems: list[UserError]) -> UserError:
    return UserError(
        f"{folder}: this model of sentence_transformers cannot be loaded:\n"
        + "\n".join(f"  {problem}" for problem in problems),
        hint="Use sentence_transformers for it, or start from its encoder alone (a folder without modules.json)",
        code="unsupported_modules",
        problems=problems,
    )
