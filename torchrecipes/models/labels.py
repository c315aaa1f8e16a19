"""`Labels`: the labels of a classifier, and how its logits become predictions, as config.json has them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from torchrecipes.atomic_write import write_atomically
from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder
from torchrecipes.models.config_json import read_json

Task = Literal["single_label", "multi_label", "regression"]
PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
# Ours in config.json; `transformers` keeps them and does nothing with them.
THRESHOLDS, TEMPERATURE, MAX_LENGTH = (f"classification_{name}" for name in ("thresholds", "temperature", "max_length"))
_IDENTITY = "torch.nn.modules.linear.Identity"


@dataclass
class Labels:
    """The labels of a classifier, and how its logits become predictions.

    Attributes:
        names: of the labels, L.
        task: `single_label`: one of them holds (softmax); `multi_label`: any number of them (a sigmoid each);
            `regression`: the logits are numbers.
        thresholds: multi-label: the least probability of each label that holds. None: 0.5.
        temperature: what logits are divided by before they become probabilities (Guo et al. 2017, arXiv:1706.04599).
        max_length: tokens that a text had at most in training. None: not known.
    """

    names: tuple[str, ...]
    task: Task = "single_label"
    thresholds: tuple[float, ...] | None = None
    temperature: float = 1.0
    max_length: int | None = None

    def __post_init__(self):
        self.names = tuple(str(name) for name in self.names)
        self.thresholds = None if self.thresholds is None else tuple(float(value) for value in self.thresholds)
        if self.task not in PROBLEM_TYPES:
            problem, hint = f"{self.task!r} is not a task", f"The tasks are {', '.join(PROBLEM_TYPES)}"
            raise UserError(problem, key="task", hint=hint, code="unknown_name")
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"{list(self.names)} are not different names of labels", key="label_names", code="labels")
        if self.task == "single_label" and len(self.names) < 2:
            problem = f"there is one label only, {self.names[0]!r}: nothing can be told apart"
            hint = "Give examples of another label, or set task to regression or multi_label."
            raise UserError(problem, key="label_names", hint=hint, code="one_label")
        if self.thresholds is not None and len(self.thresholds) != len(self.names):
            problem = f"{len(self.thresholds)} thresholds for {len(self.names)} labels"
            raise UserError(problem, key="thresholds", code="labels")
        if not self.temperature > 0:
            raise UserError(f"{self.temperature} must be above 0", key="temperature", code="out_of_range")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Args: logits `[n, L]`. Returns: probabilities `[n, L]` fp32; of a regression the numbers themselves."""
        logits = logits.float()
        if self.task == "regression":
            return logits
        logits = logits / self.temperature
        return logits.softmax(-1) if self.task == "single_label" else logits.sigmoid()

    def to_json(self) -> dict[str, Any]:
        """The keys of config.json."""
        keys = {
            "id2label": {str(number): name for number, name in enumerate(self.names)},
            "label2id": {name: number for number, name in enumerate(self.names)},
            "problem_type": PROBLEM_TYPES[self.task],
        }
        if self.task == "regression" and len(self.names) == 1:
            # CrossEncoder would apply a sigmoid: the second key is read by releases before 4.
            keys["sentence_transformers"] = {"activation_fn": _IDENTITY}
            keys["sbert_ce_default_activation_function"] = _IDENTITY
        ours = {THRESHOLDS: self.thresholds and list(self.thresholds), MAX_LENGTH: self.max_length}
        ours[TEMPERATURE] = None if self.temperature == 1.0 else self.temperature
        return keys | {key: value for key, value in ours.items() if value is not None}

    @classmethod
    def from_json(cls, raw: dict) -> "Labels":
        """What a config.json says, with the defaults of `transformers`."""
        names = raw.get("id2label")
        if isinstance(names, dict):
            names = [name for _, name in sorted((int(number), name) for number, name in names.items())]
        else:
            names = [f"LABEL_{number}" for number in range(raw.get("num_labels", 2))]
        task = {theirs: ours for ours, theirs in PROBLEM_TYPES.items()}.get(raw.get("problem_type"))
        if task is None:
            task = "single_label" if len(names) > 1 else _task_of_one_label(raw)
        return cls(tuple(names), task, raw.get(THRESHOLDS), raw.get(TEMPERATURE, 1.0), raw.get(MAX_LENGTH))


def make_labels(
    num_labels: int | None, names: Sequence[str] | None, task: Task = "single_label", max_length: int | None = None
) -> Labels:
    """`Labels` by number or by names; see `SequenceClassifier`."""
    if not names:
        names = [f"LABEL_{number}" for number in range(1 if num_labels is None else num_labels)]
    if num_labels not in (None, len(names)):
        raise UserError(f"{len(names)} names for {num_labels} labels", key="label_names", code="labels")
    return Labels(tuple(names), task, max_length=max_length)


def _task_of_one_label(raw: dict) -> Task:
    """A CrossEncoder and `transformers`' pipeline apply a sigmoid unless the folder says otherwise."""
    activation = (raw.get("sentence_transformers") or {}).get("activation_fn")
    activation = activation or raw.get("sbert_ce_default_activation_function")
    return "regression" if str(activation).endswith(".Identity") else "multi_label"


def is_classifier(raw: dict) -> bool:
    """Whether a config.json is that of a sequence classifier."""
    return any(str(name).endswith("ForSequenceClassification") for name in raw.get("architectures") or ())


def stored_labels(path: str | Path) -> Labels | None:
    """The labels of the classifier in a folder, a checkpoint or a run; None: there is no classifier.

    Raises:
        UserError: as `resolve_model_folder`.
    """
    file = resolve_model_folder(path) / "config.json"
    raw = read_json(file) if file.is_file() else {}
    return Labels.from_json(raw) if is_classifier(raw) else None


def write_calibration(
    folder: str | Path, *, thresholds: Sequence[float] | None = None, temperature: float = 1.0
) -> None:
    """Writes what turns logits into predictions into the config.json of a classifier's folder.

    Args:
        folder: a Hugging Face folder, not a checkpoint with its checksums.
        thresholds, temperature: see `Labels`.
    """
    file = Path(folder) / "config.json"
    raw = read_json(file)
    labels = replace(Labels.from_json(raw), thresholds=thresholds, temperature=temperature)
    kept = {key: value for key, value in raw.items() if key not in (THRESHOLDS, TEMPERATURE)}
    write_atomically(file, [(json.dumps(kept | labels.to_json(), indent=2) + "\n").encode()])


def differ(ours: Labels, theirs: Labels) -> bool:
    """Whether an output layer for these labels is of no use for those. Labels without names, and a single one, may be
    any.
    """
    if len(ours.names) != len(theirs.names):
        return True
    unnamed = tuple(f"LABEL_{number}" for number in range(len(theirs.names)))
    return len(ours.names) > 1 and theirs.names not in (ours.names, unnamed)
