"""`write_model_card`: the README.md of a model folder, as the Hugging Face hub reads it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from torchrecipes.atomic_write import write_atomically
from torchrecipes.models.config_json import read_json

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_SUFFIXES = """## Public suffixes

The model gets the public suffix of a domain name, such as `com` or `co.uk`, as `token_type_ids`. Those that the
tokenizer of `transformers` gives are all 0: the suffix is unknown, and results are less good. `torchrecipes` computes
them itself in `tune-style embed`, `predict` and `fill-mask`. For `transformers`:

```python
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from torchrecipes.data.tokenizers import load_tokenizer

tokenizer, model = AutoTokenizer.from_pretrained({name!r}), AutoModel.from_pretrained({name!r})
inputs = tokenizer(["example.co.uk", "www.example.com"], padding=True, return_tensors="pt")
ids = inputs["input_ids"]
types = load_tokenizer({name!r}).token_type_ids(ids.flatten().numpy(), np.full(len(ids), ids.shape[1]))
inputs["token_type_ids"] = torch.from_numpy(types).view_as(ids)
print(model(**inputs).last_hidden_state.shape)
```"""


def write_model_card(
    folder: str | Path,
    *,
    name: str,
    base_model: str | None = None,
    training_data: Sequence[str] = (),
    figures: Mapping[str, Mapping[str, float]] | None = None,
    settings: str = "",
    code: str | None = None,
) -> Path:
    """Writes `README.md`: how to use the model, what it was trained on, what it reaches, and its settings.

    The kind of model is read from the folder: embeddings (modules.json), a classifier or a reranker (config.json), and
    whether it is one of domain names (tokenizer_config.json).
    What is not known, such as a language or a licence, is left out.

    Args:
        folder: of a model of `EmbeddingModel` or `SequenceClassifier`; an existing README.md is replaced.
        name: the title; also what the examples load.
        base_model: what training started from, a name on the hub or a path. Only a name enters the metadata.
        training_data: a line for each dataset, such as `pairs.jsonl: 5,749 pairs`.
        figures: column -> metric -> value, such as `{"before": {"stsb/spearman": 0.86}, "after": {...}}`.
        settings: the resolved config, YAML.
        code: for the examples; None: those of the kind of model.

    Returns:
        The file.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    metadata, first, example = _kind_of(folder, config, name)
    on_hub = base_model is not None and HUB_NAME.fullmatch(base_model) and not Path(base_model).exists()
    if on_hub:
        metadata["base_model"] = base_model
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    sections = [f"---\n{front}---", f"# {name}", first]
    if base_model is not None:
        linked = f"[{base_model}](https://huggingface.co/{base_model})" if on_hub else f"`{base_model}`"
        sections.append(f"Training started from {linked}.")
    sections.append(f"## How to use it\n\n{example if code is None else code}")
    if _has_suffixes(folder, config):
        sections.append(_SUFFIXES.format(name=name))
    if training_data:
        sections.append("## Training data\n\n" + "\n".join(f"- {line}" for line in training_data))
    if figures:
        sections.append(f"## Figures\n\n{_table(figures)}")
    if settings:
        sections.append(f"## Settings\n\n```yaml\n{settings.strip()}\n```")
    file = folder / "README.md"
    write_atomically(file, ["\n\n".join(sections).encode(), b"\n"])
    return file


def _has_suffixes(folder: Path, config: dict) -> bool:
    """Whether the tokenizer knows suffixes of domain names, and the model takes them."""
    file = folder / "tokenizer_config.json"
    return config.get("type_vocab_size", 1) > 1 and file.is_file() and "domain_suffixes" in read_json(file)


def _kind_of(folder: Path, config: dict, name: str) -> tuple[dict, str, str]:
    """Metadata, the first sentence and an example."""
    if (folder / "modules.json").is_file():
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        if any(module["type"].endswith(".Pooling") for module in modules):
            return _embeddings(folder, config, name)
        return _late_interaction(name)
    if config.get("sentence_transformers"):
        return _reranker(name)
    return _classifier(config, name)


def _embeddings(folder: Path, config: dict, name: str) -> tuple[dict, str, str]:
    bert = read_json(folder / "sentence_bert_config.json")
    whole = read_json(folder / "config_sentence_transformers.json")
    dense = folder / "2_Dense" / "config.json"
    size = read_json(dense)["out_features"] if dense.is_file() else config.get("hidden_size", config.get("dim"))
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity"]
    metadata = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity", "tags": tags}
    first = (
        f"It maps a text of up to {bert['max_seq_length']:,} tokens to {size} dimensions; texts are compared by their "
        f"{whole['similarity_fn_name']}{' similarity' if whole['similarity_fn_name'] == 'cosine' else ' product'}."
    )
    prompts = {key: text for key, text in whole["prompts"].items() if text}
    if prompts:
        lines = ['queries = model.encode_query(["a question"])', 'passages = model.encode_document(["a passage"])']
        lines.append("print(model.similarity(queries, passages))")
        first += "\n\nPrompts: " + ", ".join(f"`{key}`: {json.dumps(text, ensure_ascii=False)}" for key, text in
                                              prompts.items()) + "."  # fmt: skip
    else:
        lines = ['embeddings = model.encode(["a text", "another text"])']
        lines.append("print(model.similarity(embeddings, embeddings))")
    load = ["from sentence_transformers import SentenceTransformer", "", f"model = SentenceTransformer({name!r})"]
    return metadata, first, _python([*load, *lines])


def _late_interaction(name: str) -> tuple[dict, str, str]:
    tags = ["PyLate", "ColBERT", "sentence-transformers", "feature-extraction", "sentence-similarity"]
    metadata = {"library_name": "PyLate", "pipeline_tag": "sentence-similarity", "tags": tags}
    first = "It maps every token of a text to a vector; texts are compared by MaxSim, as in ColBERT."
    lines = [
        "from pylate import models, scores",
        "",
        f"model = models.ColBERT(model_name_or_path={name!r})",
        'queries = model.encode(["a question"], is_query=True, convert_to_tensor=True)',
        'passages = model.encode(["a passage"], is_query=False, convert_to_tensor=True)',
        "print(scores.colbert_scores(queries[0][None], passages[0][None]))",
    ]
    return metadata, first, _python(lines)


def _reranker(name: str) -> tuple[dict, str, str]:
    tags = ["sentence-transformers", "cross-encoder", "reranker"]
    metadata = {"library_name": "sentence-transformers", "pipeline_tag": "text-ranking", "tags": tags}
    lines = ["from sentence_transformers import CrossEncoder", "", f"model = CrossEncoder({name!r})"]
    lines.append('print(model.predict([("a question", "a passage")]))')
    return metadata, "It gives a pair of texts, such as a question and a passage, a score.", _python(lines)


def _classifier(config: dict, name: str) -> tuple[dict, str, str]:
    tags = ["text-classification"]
    metadata = {"library_name": "transformers", "pipeline_tag": "text-classification", "tags": tags}
    labels = list((config.get("id2label") or {}).values())
    if config.get("problem_type") == "regression":
        first = f"It gives a text {'a number' if len(labels) < 2 else f'{len(labels)} numbers'}."
    else:
        several = "any of these labels" if config.get("problem_type") == "multi_label_classification" else "one label"
        first = f"It gives a text {several}: {', '.join(f'`{label}`' for label in labels)}."
    lines = [
        "from transformers import pipeline",
        "",
        f'classify = pipeline("text-classification", {name!r}, top_k=None)',
    ]
    return metadata, first, _python([*lines, 'print(classify("a text"))'])


def _python(lines: Sequence[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _table(figures: Mapping[str, Mapping[str, float]]) -> str:
    metrics = list(dict.fromkeys(metric for column in figures.values() for metric in column))
    rows = [["metric", *figures], ["---", *["---:"] * len(figures)]]
    for metric in metrics:
        values = (column.get(metric) for column in figures.values())
        rows.append([metric, *("" if value is None else f"{value:.4f}" for value in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
