"""The quality of a masked language model, beside baselines: token frequencies, and n-grams of characters."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.evaluation.characters import KINDS, NGRAMS, CharacterBaselines, character_baselines
from torchrecipes.evaluation.class_sums import ClassSums
from torchrecipes.evaluation.position_loss import add_sums, loss_by_position, means_by_position
from torchrecipes.evaluation.running import RunningSum, evaluation_mode
from torchrecipes.losses import linear_cross_entropy

if TYPE_CHECKING:
    from torchrecipes.data.corpus.corpus import Corpus
    from torchrecipes.data.tokenizers.tokenizer import Tokenizer

# What is summed over the targets. `hidden`: those that the input does not show. The last one: hits of a constant
# prediction for each kind of character.
COLUMNS = ("targets", "loss", "accuracy", "hidden_targets", "hidden_loss", "hidden_accuracy")
COLUMNS += ("unigram_loss", "unigram_accuracy", "of_known_kind")
CHUNK_SIZE = 2048  # masked positions whose logits are held at a time


@dataclass(frozen=True)
class UnigramBaseline:
    """The best prediction without context: the frequency of each token.

    Attributes:
        log_probability: `[V]` fp32, the natural logarithm of each token's share; -inf where it never occurs.
        most_frequent: the token that a constant prediction would choose.
        characters: where tokens are characters, what else a model is compared with: see `mlm_baseline`.
    """

    log_probability: Tensor
    most_frequent: int
    characters: CharacterBaselines | None = None


def unigram_baseline(corpus: "Corpus", special_ids: Iterable[int], vocab_size: int) -> UnigramBaseline:
    """Counts the tokens of a corpus (a `torchrecipes.data.corpus.Corpus`) that are not special.

    A model whose loss is not below this baseline's has learned nothing but token frequencies.
    """
    return _unigrams(_count(corpus, special_ids, vocab_size))


def mlm_baseline(corpus: "Corpus", tokenizer: "Tokenizer", training: Iterable["Corpus"] = ()) -> UnigramBaseline:
    """What `evaluate_mlm` compares a model with.

    For any tokenizer that is the frequency of the tokens. Where every ordinary token is one character, results are
    also given by kind of character, and for vocabularies of 256 at most an n-gram model of the training text is
    measured at the same positions: a model that is not better than trigrams does not use more than two characters.

    Args:
        corpus: the evaluation set.
        tokenizer: of the corpora.
        training: the training text, of which 16.8 million tokens are counted at most: see `NGramModel`.
    """
    counts = _count(corpus, tokenizer.special_ids, tokenizer.vocab_size)
    return _unigrams(counts, character_baselines(tokenizer, counts, training))


def _count(corpus: "Corpus", special_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    chunk = 1 << 24
    for start in range(0, corpus.num_tokens, chunk):
        tokens = corpus.read(start, min(start + chunk, corpus.num_tokens))
        counts += np.bincount(tokens, minlength=vocab_size)
    counts[list(special_ids)] = 0
    return counts


def _unigrams(counts: np.ndarray, characters: CharacterBaselines | None = None) -> UnigramBaseline:
    share = torch.from_numpy(counts / max(1, counts.sum()))
    return UnigramBaseline(share.log().float(), int(counts.argmax()), characters)


@torch.no_grad()
def evaluate_mlm(
    model: nn.Module,
    batches: Iterable,
    unpadded_vocab_size: int,
    baseline: UnigramBaseline,
    autocast: Callable[[], AbstractContextManager],
    position_edges: Sequence[int] = (),
) -> dict[str, float]:
    """Evaluates a masked language model on `batches`, without touching any random generator.

    Args:
        model: gives `[B, S, D]` hidden states and has a `head`; its modules' training modes are restored afterwards.
            Where batches have classes of documents it has a `document_head`.
        batches: `Batch` objects with masks, on the model's device; in a process group this rank's share.
        unpadded_vocab_size: ids from here on are padding of the vocabulary and are never predicted.
        baseline: of the same split.
        autocast: makes the context to compute in.
        position_edges: of ranges of positions whose losses are computed, too: see `loss_by_position`.

    Returns:
        `loss` (nats per masked token), `perplexity`, `accuracy` (share of masked tokens that are the model's first
        choice), and `unigram_loss`, `unigram_accuracy`: the same for the baseline. `targets`: the masked tokens. Where
        masking keeps some targets as they are, which a model learns to copy, `hidden_loss` and `hidden_accuracy` are of
        the others alone: compare these with the baselines. With `position_edges` `loss/0-511`, ... for the ranges that
        have a target.

        Where tokens are characters (see `mlm_baseline`) `trigram_loss`, `trigram_accuracy`, `fivegram_loss` and
        `fivegram_accuracy` of the n-gram model, from the true tokens to the left of a target in its document and row;
        and all of these but the perplexity by the target's kind, as in `accuracy/letter`, for kinds that have a target:
        letter, digit, hyphen, dot, other. `unigram_accuracy/letter` is the share of the most frequent letter, that of a
        constant prediction that knows the kind; a kind of one character has none.

        Where documents have classes `class_loss`, `class_accuracy`, and `class_majority_accuracy`, that of always the
        most frequent class; none of them without a document to classify.

        The same on all ranks; NaN where no token is masked.

    Raises:
        UserError: documents have classes, and the model has no `document_head` (code `no_document_head`).
    """
    device = next(model.parameters()).device
    targets = _TargetSums(baseline, device)
    transform = getattr(model.head, "transform", nn.Identity())  # an nn.Linear has none
    classes = ClassSums(device)
    by_position: dict[str, Tensor] = {}
    with evaluation_mode(model):
        for batch in batches:
            with autocast():
                hidden = model(batch.input_ids, **batch.documents)
                rows = hidden.flatten(0, 1).index_select(0, batch.masked_positions)
                losses, predictions = [], []
                for row, label in zip(rows.split(CHUNK_SIZE), batch.masked_labels.split(CHUNK_SIZE), strict=True):
                    row = transform(row)
                    options = {"bias": model.head.bias, "return_token_loss": True}
                    losses.append(linear_cross_entropy(row, model.head.weight, label, **options)[1])
                    logits = F.linear(row, model.head.weight, model.head.bias)
                    predictions.append(logits[:, :unpadded_vocab_size].argmax(-1))
                classes.add(hidden, model, batch)
            token_loss = torch.cat(losses)
            targets.add(batch, token_loss, torch.cat(predictions))
            if position_edges:
                positions = batch.position_ids.flatten()[batch.masked_positions]
                sums = loss_by_position(token_loss, positions, position_edges, batch.masked_labels)
                add_sums(by_position, sums)
    return targets.means() | classes.means() | means_by_position(by_position)


class _TargetSums:
    """Sums over the targets of every kind; where tokens are not characters there is one kind."""

    def __init__(self, baseline: UnigramBaseline, device: torch.device):
        self.baseline, self.characters, self.device = baseline, baseline.characters, device
        self.log_probability = baseline.log_probability.to(device)
        self.kinds, self.ngrams = ("",), None
        if self.characters:
            self.kinds, self.ngrams = KINDS, self.characters.ngrams
            self.kind_of_token = torch.from_numpy(self.characters.kind_of_token).to(device)
            self.most_frequent = torch.from_numpy(self.characters.most_frequent).to(device)
        self.sums = RunningSum((len(self.kinds), len(COLUMNS)), device)
        self.windows: list[Tensor] = []  # for the n-grams, which are looked up on the CPU when all are known

    def add(self, batch: Any, token_loss: Tensor, predictions: Tensor) -> None:
        """Counts a batch, without waiting for the device."""
        labels = batch.masked_labels
        tokens = labels.clamp(min=0)
        kinds = self.kind_of_token[tokens] if self.characters else torch.zeros_like(tokens)
        hidden = batch.input_ids.flatten()[batch.masked_positions] != labels
        correct = predictions == labels
        columns = [
            torch.ones_like(labels),
            token_loss,
            correct,
            hidden,
            token_loss * hidden,
            correct & hidden,
            -self.log_probability[tokens],
            labels == self.baseline.most_frequent,
            labels == self.most_frequent[kinds] if self.characters else torch.zeros_like(labels),
        ]
        values = torch.stack([column.to(self.sums.dtype) for column in columns], 1)
        kinds = torch.where(labels >= 0, kinds, -1)
        of_kind = kinds == torch.arange(len(self.kinds), device=self.device)[:, None]
        self.sums.add(torch.stack([torch.where(chosen[:, None], values, 0).sum(0) for chosen in of_kind]))
        if self.ngrams:
            targets = (batch.masked_positions, labels)
            self.windows.append(self.ngrams.windows(batch.input_ids, batch.position_ids, *targets))

    def means(self) -> dict[str, float]:
        """The means over all targets of all ranks, and over those of every kind that has any."""
        sums = dict(zip(COLUMNS, self.sums.over_ranks().T.numpy(), strict=True)) | self._ngram_sums()
        of_known_kind = sums.pop("of_known_kind")
        result = _means({name: column.sum() for name, column in sums.items()})
        if not self.characters:
            return result
        for number, kind in enumerate(self.kinds):
            of_kind = {name: column[number] for name, column in sums.items()}
            if of_kind["targets"]:
                of_kind["unigram_accuracy"] = of_known_kind[number]
                means = _means(of_kind)
                del means["perplexity"]
                if np.count_nonzero(self.characters.kind_of_token == number) == 1:
                    del means["unigram_accuracy"]
                result |= {f"{name}/{kind}": value for name, value in means.items()}
        return result

    def _ngram_sums(self) -> dict[str, np.ndarray]:
        if not self.ngrams:
            return {}
        sums = RunningSum((2 * len(NGRAMS), len(self.kinds)), self.device)
        if self.windows:
            windows = torch.cat(self.windows).cpu().numpy()
            windows = windows[windows >= 0]
            labels = self.ngrams.last_tokens(windows)
            kinds = self.characters.kind_of_token[labels]
            scores = list(self.ngrams.score(windows))
            rows = []
            for order in NGRAMS.values():
                probability, best = scores[order - 1]
                rows += [-np.log(probability), best == labels]
            by_kind = [np.bincount(kinds, row, len(self.kinds)) for row in rows]
            sums.add(torch.from_numpy(np.stack(by_kind)).to(sums.dtype).to(self.device))
        names = [f"{name}_{metric}" for name in NGRAMS for metric in ("loss", "accuracy")]
        return dict(zip(names, sums.over_ranks().numpy(), strict=True))


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Sums divided by the targets; NaN where there is none. Adds `perplexity` after `loss`; `targets` comes last."""
    targets, hidden_targets = sums["targets"], sums["hidden_targets"]
    means = {}
    for name, value in sums.items():
        if name.startswith("hidden"):
            if name != "hidden_targets" and 0 < hidden_targets < targets:
                means[name] = float(value / hidden_targets)
        elif name != "targets":
            means[name] = float(value / targets) if targets else math.nan
        if name == "loss":
            means["perplexity"] = math.exp(min(means["loss"], 700))
    return means | {"targets": round(float(targets))}
