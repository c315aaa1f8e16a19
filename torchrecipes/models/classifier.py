"""`SequenceClassifier`: an encoder with a classification head, stored as `AutoModelForSequenceClassification` has it.

| family                | the head sees                        | dense layer, then the output layer           |
|-----------------------|--------------------------------------|----------------------------------------------|
| bert                  | the first token                      | the pooler: tanh, dropout                    |
| roberta, xlm-roberta  | the first token, with dropout        | tanh, dropout                                |
| distilbert            | the first token                      | ReLU, dropout                                |
| modernbert            | the first token or the mean          | GELU, LayerNorm, dropout                     |
| neobert (as eurobert) | the first token, the mean or `late`  | GELU; `late`: the mean of the tokens' logits |
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder
from torchrecipes.models.classifier_adapter import DEFAULT_DROPOUT, DEFAULT_POOLING, LAYOUTS, ClassifierAdapter
from torchrecipes.models.config_json import read_json
from torchrecipes.models.hub import load_hf_weights, meta_model_from_hf, print_once
from torchrecipes.models.labels import Labels, Task, differ, is_classifier, make_labels
from torchrecipes.models.transformer import Transformer
from torchrecipes.modules import ClassificationHead, init_weights
from torchrecipes.modules.pooling import Pooling


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
        layout = LAYOUTS[config.model_type]
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
    if found is not None and differ(labels, found):
        report(
            f"{folder} classifies into {', '.join(found.names)}, and the labels here are {', '.join(labels.names)}: "
            "the output layer is new"
        )
    layout = LAYOUTS[model_type]
    if pooling is None:
        ours = dict(zip(layout.pooling_names, layout.poolings, strict=False))
        default = DEFAULT_POOLING.get(model_type) if found else None
        pooling = ours.get(raw.get("classifier_pooling"), default)
    if dropout is None:
        dropout = raw.get(layout.dropout_key, DEFAULT_DROPOUT.get(model_type) if found else None)
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
