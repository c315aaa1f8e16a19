"""`ClassifierAdapter`: the Hugging Face layout of a sequence classifier, family by family."""

import copy
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torchrecipes.models.config_json import read_json
from torchrecipes.models.encoder_adapter import EncoderAdapter
from torchrecipes.models.hf_adapter import HFAdapter, KeyMap
from torchrecipes.models.labels import Labels, differ, is_classifier
from torchrecipes.models.stored_tensors import StoredTensor


class HeadLayout(NamedTuple):
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


_ROBERTA = HeadLayout(
    "RobertaForSequenceClassification", "classifier.dense", "classifier.out_proj", "tanh", drop_input=True
)
LAYOUTS = {
    "bert": HeadLayout("BertForSequenceClassification", "bert.pooler.dense", "classifier", "tanh"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA._replace(architecture="XLMRobertaForSequenceClassification"),
    "distilbert": HeadLayout(
        "DistilBertForSequenceClassification",
        "pre_classifier",
        "classifier",
        "relu",
        dropout_key="seq_classif_dropout",
    ),
    "modernbert": HeadLayout(
        "ModernBertForSequenceClassification",
        "head.dense",
        "classifier",
        "gelu",
        norm="head.norm",
        poolings=("mean", "cls"),
        pooling_names=("mean", "cls"),
    ),
    "eurobert": HeadLayout(
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
DEFAULT_POOLING = {"modernbert": "cls", "eurobert": "late"}
DEFAULT_DROPOUT = {"distilbert": 0.2, "modernbert": 0.0}


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
        self.encoder, self.family, self.layout = encoder, encoder.family, LAYOUTS[encoder.config.model_type]
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
        adapter.new_output = adapter.new_dense or not is_classifier(raw) or differ(self.labels, Labels.from_json(raw))
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
