"""`SequenceClassifier`: an encoder with a classification head, stored as `AutoModelForSequenceClassification` has it.

| family                | the head sees                        | dense layer, then the output layer           |
|-----------------------|--------------------------------------|----------------------------------------------|
| bert                  | the first token                      | the pooler: tanh, dropout                    |
| roberta, xlm-roberta  | the first token, with dropout        | tanh, dropout                                |
| distilbert            | the first token                      | ReLU, dropout                                |
| modernbert            | the first token or the mean          | GELU, LayerNorm, dropout                     |
| neobert (as eurobert) | the first token, the mean or `late`  | GELU; `late`: the mean of the tokens' logits |
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchrecipes.atomic_write import write_atomically
from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder
from torchrecipes.models.config_json import read_json
from torchrecipes.models.encoder_adapter import EncoderAdapter
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.hub import load_hf_weights, meta_model_from_hf, print_once
from torchrecipes.models.stored_tensors import StoredTensor
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import ClassificationHead, init_weights
from torchrecipes.modules.pooling import Pooling

Task = Literal["single_label", "multi_label", "regression"]
PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
# Ours in config.json; `transformers` keeps them and does nothing with them.
THRESHOLDS, TEMPERATURE, MAX_LENGTH = (f"classification_{name}" for name in ("thresholds", "temperature", "max_length"))
_IDENTITY = "torch.nn.modules.linear.Identity"


class _Layout(NamedTuple):
    """The classification head of a family in `transformers`.

    Attributes:
        architecture: its class.
        dense, out_proj, norm: names of the layers' tensors, without `.weight` and `.bias`.
        activation: see `ClassificationHead`.
        poolings: those that the class has, the default of a new head first, under our names.
        pooling_names: those of `poolings` in `classifier_pooling`; (): the class has one pooling only.
        dropout_key: of config.json; "": the class has no dropout.
        drop_input: see `ClassificationHead`.
    """

    architecture: str
    dense: str
    out_proj: str
    activation: str
    norm: str = ""
    poolings: tuple[str, ...] = ("cls",)
    pooling_names: tuple[str, ...] = ()
    dropout_key: str = "classifier_dropout"
    drop_input: bool = False


_ROBERTA = _Layout(
    "RobertaForSequenceClassification", "classifier.dense", "classifier.out_proj", "tanh", drop_input=True
)
_LAYOUTS = {
    "bert": _Layout("BertForSequenceClassification", "bert.pooler.dense", "classifier", "tanh"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA._replace(architecture="XLMRobertaForSequenceClassification"),
    "distilbert": _Layout(
        "DistilBertForSequenceClassification",
        "pre_classifier",
        "classifier",
        "relu",
        dropout_key="seq_classif_dropout",
    ),
    "modernbert": _Layout(
        "ModernBertForSequenceClassification",
        "head.dense",
        "classifier",
        "gelu",
        norm="head.norm",
        poolings=("mean", "cls"),
        pooling_names=("mean", "cls"),
    ),
    "eurobert": _Layout(
        "EuroBertForSequenceClassification",
        "dense",
        "classifier",
        "gelu",
        poolings=("mean", "cls", "late"),
        pooling_names=("mean", "bos", "late"),
        dropout_key="",
    ),
}
# What `transformers` assumes where a folder with a classifier does not say it.
_DEFAULT_POOLING = {"modernbert": "cls", "eurobert": "late"}
_DEFAULT_DROPOUT = {"distilbert": 0.2, "modernbert": 0.0}


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


class SequenceClassifier(nn.Module):
    """An encoder and a classification head: logits over labels for every text.

    Parts without a trainable parameter (`set_trainable`) stay in evaluation mode in training: no dropout in them.

    Attributes:
        encoder, head: the parts; the head has everything after the final norm, BERT's pooler as well.
        labels: names, task, and how logits become probabilities.
        pooling: `cls` (the first token), `mean`, or `late`: the mean of the tokens' logits.
        hf_adapter: the layout of `AutoModelForSequenceClassification`.

    Args:
        encoder: of this library, such as `bert("mini", vocab_size=8192)`. Its language-model head is removed.
        num_labels: L. None: as many as there are names.
        label_names: of the labels. None: LABEL_0, LABEL_1, ...
        task, max_length: see `Labels`.
        pooling: of those that the family has, see above. None: `mean` where it has that, else `cls`.
        dropout: probability in the head, in training. None: that of the encoder's hidden states.
        seed: of the initial weights.

    Raises:
        UserError: the encoder is a decoder (`not_an_encoder`), the family has no such pooling (`unknown_name`), or the
            labels do not fit the task (`one_label`, `labels`).
    """

    causal = False

    def __init__(
        self,
        encoder: Transformer,
        *,
        num_labels: int | None = None,
        label_names: Sequence[str] | None = None,
        task: Task = "single_label",
        max_length: int | None = None,
        pooling: str | None = None,
        dropout: float | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if encoder.head is not None:
            encoder.remove_head()
        config, labels = encoder.config, make_labels(num_labels, label_names, task, max_length)
        self.encoder, self.labels, self.config, self.position_offset = encoder, labels, config, encoder.position_offset
        layout = _LAYOUTS[config.model_type]
        self.pooling = pooling or layout.poolings[0]
        if self.pooling not in layout.poolings:
            problem = f"{config.model_type} has no classifier with {self.pooling!r} pooling"
            hint = f"Use {' or '.join(layout.poolings)}"
            raise UserError(problem, key="pooling", hint=hint, code="unknown_name")
        if dropout is None:
            dropout = getattr(config, "hidden_dropout_prob", getattr(config, "dropout", 0.0))
        self.head = ClassificationHead(
            config.hidden_size,
            len(labels.names),
            activation=layout.activation,
            dropout_p=dropout,
            drop_input=layout.drop_input,
            bias=getattr(config, "classifier_bias", True),
            norm_eps=config.norm_eps if layout.norm else None,
            norm_bias=getattr(config, "norm_bias", True),
        )
        self._pool = Pooling("cls" if self.pooling == "cls" else "mean")
        self.hf_adapter = ClassifierAdapter(encoder.hf_adapter, labels, self.pooling, dropout)
        init_weights(self.head, seed=seed, std=config.initializer_range)

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's blocks."""
        return self.encoder.blocks

    @property
    def num_labels(self) -> int:
        """L."""
        return len(self.labels.names)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.labels.names

    def init_weights(self, seed: int) -> None:
        """Sets every parameter to its initial value; those on the meta device stay as they are."""
        self.encoder.init_weights(seed)
        init_weights(self.head, seed=seed, std=self.config.initializer_range)

    def train(self, mode: bool = True) -> "SequenceClassifier":
        """Sets training or evaluation mode; parts that are not trained are always in evaluation mode."""
        super().train(mode)
        for module in (self.encoder, self.encoder.embedding, *self.blocks):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        token_type_ids: Tensor | None = None,
        *,
        num_texts: int | None = None,
        features: Tensor | None = None,
        return_features: bool = False,
    ) -> Tensor:
        """Logits of every text, `[N, L]` fp32.

        Args:
            input_ids, position_ids, document_ids, cu_seqlens, max_seqlen: see `Transformer.forward`.
            token_type_ids: in the shape of `input_ids`, 1 in the second text of a pair. An encoder without token types
                ignores them.
            num_texts: N, the documents that are texts, the first ones. None: all; without `cu_seqlens`, every row is
                a text.
            features: `[N, D]`, in place of tokens.
            return_features: return what enters the head instead, `[N, D]` fp32.

        Raises:
            UserError: features of a classifier with `late` pooling (code `no_features`).
        """
        if features is not None:
            return self.head(features).float()
        types = token_type_ids if self.hf_adapter.token_types else None
        hidden_BSD = self.encoder(input_ids, position_ids, document_ids, cu_seqlens, max_seqlen, None, types)
        if self.pooling == "late":
            if return_features:
                raise no_features()
            return self._pool(self.head(hidden_BSD), num_texts, cu_seqlens)
        pooled_ND = self._pool(hidden_BSD, num_texts, cu_seqlens)
        return pooled_ND if return_features else self.head(pooled_ND).float()

    def classify(self, batch: Any) -> Tensor:
        """Logits of a `Batch`'s examples, `[n, L]` fp32, from its features where it has them."""
        if batch.features is not None:
            return self(features=batch.features)
        return _by_example(self(batch.input_ids, **batch.documents, num_texts=batch.num_texts), batch)

    def features(self, batch: Any) -> Tensor:
        """What enters the head for a `Batch`'s examples, `[n, D]` fp32.

        Raises:
            UserError: the pooling is `late` (code `no_features`).
        """
        documents = batch.documents | {"num_texts": batch.num_texts, "return_features": True}
        return _by_example(self(batch.input_ids, **documents), batch)

    def head_logits(self, features: Tensor) -> Tensor:
        """Logits of features, `[n, L]` fp32."""
        return self(features=features)

    def calibrate(self, *, thresholds: Sequence[float] | None = None, temperature: float = 1.0) -> None:
        """Sets what turns logits into predictions; `save_hf` writes it into config.json.

        Args:
            thresholds: multi-label: the least probability of each label that holds.
            temperature: what logits are divided by.
        """
        self.labels = replace(self.labels, thresholds=thresholds, temperature=temperature)
        self.hf_adapter.labels = self.labels


def _by_example(of_texts: Tensor, batch: Any) -> Tensor:
    """Rows of a batch's texts in the order of its examples."""
    return of_texts if batch.examples is None else of_texts[batch.examples.texts[:, 0]]


def no_features() -> UserError:
    """The mistake that a classifier with `late` pooling has no features of a text."""
    return UserError(
        "with late pooling the head sees every token: a text has no features that could be kept",
        key="pooling",
        hint="Use mean.",
        code="no_features",
    )


class ClassifierAdapter(HFAdapter):
    """The layout of `AutoModelForSequenceClassification`.

    A pooler is loaded from a folder that has it, and so is the transform of ModernBERT's language-model head. The
    output layer is loaded if the folder is a classifier with the same labels, and new otherwise.

    Args:
        encoder: the adapter of the encoder without head.
        labels, pooling, dropout: see `SequenceClassifier`.
    """

    def __init__(self, encoder: EncoderAdapter, labels: Labels, pooling: str, dropout: float):
        super().__init__(encoder.config)
        self.encoder, self.family, self.layout = encoder, encoder.family, _LAYOUTS[encoder.config.model_type]
        self.labels, self.pooling, self.dropout = labels, pooling, dropout
        self.companions, self.stop_ids = encoder.companions, encoder.stop_ids
        self.architecture = self.layout.architecture
        self.config_class, self.fixed, self.ignored = encoder.config_class, encoder.fixed, encoder.ignored
        self.required, self.defaults, self.read_keys = encoder.required, encoder.defaults, encoder.read_keys
        self.token_types, self.keeps_pad_id = encoder.token_types, encoder.keeps_pad_id
        self.new_output = self.new_dense = False  # of the folder that is read: see `for_folder`

    def with_config(self, config: Any) -> "ClassifierAdapter":
        """An adapter of the same layout for another config."""
        return ClassifierAdapter(self.encoder.with_config(config), self.labels, self.pooling, self.dropout)

    def write_keys(self) -> dict:
        """The config.json, without token ids and dtype."""
        keys = self.family.with_config(self.config).write_keys() | self.labels.to_json()
        if self.layout.dropout_key:
            keys[self.layout.dropout_key] = self.dropout
        if self.layout.pooling_names:
            keys["classifier_pooling"] = self.layout.pooling_names[self.layout.poolings.index(self.pooling)]
        return keys

    @cached_property
    def key_map(self) -> KeyMap:
        """Our parameter name -> the tensors that it stacks."""
        layout, hidden, labels = self.layout, self.config.hidden_size, len(self.labels.names)
        layers = {"dense": (layout.dense, hidden), "out_proj": (layout.out_proj, labels)}
        layers |= {"norm": (layout.norm, hidden)} if layout.norm else {}
        key_map = {
            f"encoder.{name}": parts for name, parts in self.family.key_map.items() if not self.family.is_head(name)
        }
        for ours, (theirs, rows) in layers.items():
            for kind in ("weight", "bias"):
                key_map[f"head.{ours}.{kind}"] = [(f"{theirs}.{kind}", rows)]
        return key_map

    def for_folder(self, folder: Path) -> "ClassifierAdapter":
        """The adapter that reads this folder: which parts of the head are new depends on its config.json."""
        raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        adapter = copy.copy(self)
        # A published NeoBERT has another activation in its head.
        adapter.new_dense = raw.get("model_type", self.config.model_type) != self.config.model_type
        adapter.new_output = adapter.new_dense or not is_classifier(raw) or _differ(self.labels, Labels.from_json(raw))
        return adapter

    def normalize_name(self, name: str) -> str | None:
        """A stored tensor's name as `key_map` spells it, whatever class saved it; None: not used."""
        own = {self.layout.out_proj: not self.new_output, self.layout.dense: not self.new_dense}
        own |= {self.layout.norm: not self.new_dense} if self.layout.norm else {}
        for full in (name, f"{self.family.encoder_prefix}{name}"):
            layer = full.rpartition(".")[0]
            if layer in own:
                return full if own[layer] else None
        if name.startswith("classifier."):  # of another kind, such as a token's
            return None
        return self.family.normalize_name(name)

    def transposed(self, name: str) -> bool:
        """Whether the tensor of this Hugging Face name is stored with its two dimensions exchanged."""
        return self.family.transposed(name)

    def prepare(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Stored tensors by normalized name, with those combined that `key_map` has as one."""
        return self.family.prepare(stored)

    def is_head(self, name: str) -> bool:
        """Whether our parameter `name` belongs to the head, of which a folder may lack any layer."""
        return name.startswith("head.")

    def head_of(self, name: str) -> str:
        """The layer that `name` belongs to."""
        return name.rpartition(".")[0]

    def is_constant(self, name: str) -> bool:
        """Whether it is a constant of the family."""
        return self.family.is_constant(name)

    def loading_hint(self, path: str) -> str:
        """How to load a folder that was saved with this adapter, in one line for people."""
        return (
            f"load it with transformers: AutoModelForSequenceClassification.from_pretrained({path!r})\n"
            f'or classify with it: tune-style predict {path} "..."'
        )


def is_classifier(raw: dict) -> bool:
    """Whether a config.json is that of a sequence classifier."""
    return any(str(name).endswith("ForSequenceClassification") for name in raw.get("architectures") or ())


def _differ(ours: Labels, theirs: Labels) -> bool:
    """Whether an output layer for these labels is of no use for those. Labels without names may be any."""
    unnamed = tuple(f"LABEL_{number}" for number in range(len(theirs.names)))
    if len(ours.names) != len(theirs.names):
        return True
    return theirs.names not in (ours.names, unnamed)


def stored_labels(path: str | Path) -> Labels | None:
    """The labels of the classifier in a folder, a checkpoint or a run; None: there is no classifier.

    Raises:
        UserError: as `resolve_model_folder`.
    """
    file = resolve_model_folder(path) / "config.json"
    raw = read_json(file) if file.is_file() else {}
    return Labels.from_json(raw) if is_classifier(raw) else None


def meta_classifier_from_hf(
    path: str | Path,
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    task: Task = "single_label",
    max_length: int | None = None,
    pooling: str | None = None,
    dropout: float | None = None,
    report: Callable[[str], None] = print_once,
) -> SequenceClassifier:
    """A classifier around the encoder that a folder's `config.json` describes, on the meta device.

    `load_hf_weights` fills it, and says which parts of the head are new.

    Args:
        path: a Hugging Face folder, of a classifier or not, an embedding model, a checkpoint, or a run's folder.
        num_labels, label_names, task, max_length: see `SequenceClassifier`. With neither number nor names: those of the
            folder's classifier, with its task, thresholds and temperature.
        pooling, dropout: see `SequenceClassifier`. None: those of the folder where it says them.
        report: called with each line about a key that is skipped, or a head that will be new.

    Raises:
        UserError: `no_head` without number and names of labels where the folder has no classifier; `not_an_encoder`; as
            `meta_model_from_hf`.
    """
    folder = resolve_model_folder(path)
    encoder = meta_model_from_hf(folder, report, head=False)
    raw = read_json(folder / "config.json")
    model_type, found = encoder.config.model_type, Labels.from_json(raw) if is_classifier(raw) else None
    if num_labels is None and not label_names:
        if found is None:
            kind = ", ".join(raw.get("architectures") or [model_type])
            hint = f"Train one from it: tune-style run classify_finetune init_from={folder} ..."
            raise UserError(f"{folder} ({kind}) has no classifier", hint=hint, code="no_head")
        labels = found
    else:
        labels = make_labels(num_labels, label_names, task, max_length)
    if found is not None and _differ(labels, found):
        report(
            f"{folder} classifies into {', '.join(found.names)}, and the labels here are {', '.join(labels.names)}: "
            "the output layer is new"
        )
    layout = _LAYOUTS[model_type]
    if pooling is None:
        ours = dict(zip(layout.pooling_names, layout.poolings, strict=False))
        default = _DEFAULT_POOLING.get(model_type) if found else None
        pooling = ours.get(raw.get("classifier_pooling"), default)
    if dropout is None:
        dropout = raw.get(layout.dropout_key, _DEFAULT_DROPOUT.get(model_type) if found else None)
    names, rest = labels.names, {"task": labels.task, "max_length": labels.max_length}
    with torch.device("meta"):
        model = SequenceClassifier(encoder, label_names=names, **rest, pooling=pooling, dropout=dropout)
    if labels is found:
        model.calibrate(thresholds=found.thresholds, temperature=found.temperature)
    return model


def load_classifier(path: str | Path, report: Callable[[str], None] = print) -> SequenceClassifier:
    """Loads a trained classifier in fp32 on the CPU, in evaluation mode.

    Args:
        path: a folder that `AutoModelForSequenceClassification` loads, a checkpoint, or a run's folder.
        report: called with each line about something skipped or dropped.

    Raises:
        UserError: `no_head` for a folder without a classifier, or without some of its tensors; `not_an_encoder`; as
            `load_hf_weights`.
    """
    model = meta_classifier_from_hf(path, report=report).to_empty(device="cpu")
    load_hf_weights(model, path, report=report, require_head=True)
    return model.eval()


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
