"""Few-shot classification by SetFit's method (Tunstall et al. 2022, arXiv:2209.11055).

n labeled texts make n (n - 1) / 2 pairs, of equal or of different labels. First the encoder is trained to give texts of
a label similar embeddings, from these pairs; then the output layer is fitted on the embeddings of the n texts.
"""

import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.examples import Examples
from torchrecipes.data.batching.shuffle import row_indices
from torchrecipes.devices import fork_rng
from torchrecipes.distributed import clip_grad_norm
from torchrecipes.distributed.collectives import run_on_rank0_and_broadcast
from torchrecipes.errors import UserError
from torchrecipes.losses import CosineRegression
from torchrecipes.models.hub import load_hf_weights, save_hf
from torchrecipes.modules.lora import lora_layers
from torchrecipes.optim import adamw, linear
from torchrecipes.training.guard import Guard


@dataclass
class FewShotConfig:
    """Settings of the contrastive stage and of the output layer."""

    num_iterations: int = 20  # pairs of equal and pairs of different labels per text, each
    batch_size: int = 16  # pairs per step
    lr: float = 2e-5  # peak
    l2: float = 1.0  # regularization of the output layer: 1 / C of scikit-learn's LogisticRegression


def label_pairs(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of texts, in turn one of equal labels and one of different labels.

    All pairs of a kind come in a random order, and then again in another one, as often as is needed: the kind with
    fewer pairs is oversampled. A text whose label no other has is paired with itself, which dropout makes two.

    Args:
        labels: `[n]` integers.
        count: P, the number of pairs.
        seed: selects the orders.

    Returns:
        `[P, 2]` int64, the texts of each pair, and `[P]` float32, 1 for equal labels and 0 for different ones.

    Raises:
        UserError: all labels are equal (code `one_label`).
    """
    first, second = np.triu_indices(len(labels), 1)
    is_same = labels[first] == labels[second]
    same, different = (np.stack((first[kind], second[kind]), axis=1) for kind in (is_same, ~is_same))
    values, counts = np.unique(labels, return_counts=True)
    alone = np.flatnonzero(np.isin(labels, values[counts == 1]))
    same = np.concatenate((same, np.stack((alone, alone), axis=1)))
    if not len(different):
        raise UserError(
            "all examples have the same label, which leaves nothing to tell apart",
            key="data",
            hint="Give examples of another label.",
            code="one_label",
        )
    turns = np.arange(-(-count // 2))
    pairs = np.empty((2 * len(turns), 2), dtype=np.int64)
    for kind, found in enumerate((same, different)):
        pairs[kind::2] = found[row_indices(turns, len(found), seed + kind)[0]]
    return pairs[:count], (np.arange(count) % 2 == 0).astype(np.float32)


def train_on_label_pairs(
    model: nn.Module,
    embed: Callable[[Batch], Tensor],
    rows: Any,
    collator: Any,
    options: FewShotConfig | None = None,
    *,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Trains a model on pairs of labeled texts: cosines are to be 1 for equal labels, and 0 for different ones.

    A step embeds each text of its pairs once. The learning rate falls linearly to 0, after 10 % of warm-up.

    Args:
        model: its parameters with `requires_grad` are trained, in place.
        embed: gives the embeddings `[n, D]` of a batch's examples.
        rows: `ExampleRows` of labeled texts.
        collator: a `LabeledCollator`.
        options: see `FewShotConfig`.
        seed: of the pairs' order and of dropout.
        autocast: makes the context to compute in.
        dtype: of that context; in fp16 the loss is scaled.

    Returns:
        The mean loss of every step.

    Raises:
        UserError: losses or gradients that are not finite, several times in a row (code `diverged`).
    """
    options = options or FewShotConfig()
    labels, loss_function = rows.corpus.labels, CosineRegression()
    device = next(model.parameters()).device
    pairs, same = label_pairs(labels, 2 * options.num_iterations * len(labels), seed)
    starts = range(0, len(pairs), options.batch_size)
    optimizer = adamw(model, lr=options.lr, betas=(0.9, 0.999))
    lr_scheduler = linear(optimizer, len(starts), warmup_ratio=0.1, min_lr_ratio=0.0)
    losses, guard = [], Guard(spike_zscore=None, dtype=dtype)
    model.train()
    with fork_rng(device):
        torch.manual_seed(seed)
        bar = tqdm(starts, desc="pairs of labels", leave=False, disable=not sys.stderr.isatty())
        for step, start in enumerate(bar, start=1):
            part = slice(start, start + options.batch_size)
            numbers, places = np.unique(pairs[part], return_inverse=True)
            batch = collator.batch(rows, numbers, np.zeros(len(numbers), dtype=np.uint64)).to(device)
            with autocast():
                embeddings = embed(batch)
            examples = Examples(
                texts=torch.from_numpy(places.reshape(-1, 2)).to(device),
                hashes=torch.from_numpy(numbers).to(device),
                scores=torch.from_numpy(same[part, None]).to(device),
            )
            loss, _ = loss_function(embeddings, examples)
            loss = loss / len(examples)
            (loss * guard.loss_scale).backward()
            guard.step(optimizer, loss, clip_grad_norm(model, 1.0, guard.loss_scale))
            guard.check(step)
            optimizer.zero_grad()
            lr_scheduler.step()
            losses.append(loss.item())
    return losses


def fit_output_layer(layer: nn.Linear, inputs: Tensor, labels: Tensor, l2: float = 1.0) -> float:
    """Fits a linear layer to convergence: multinomial logistic regression with L2, by L-BFGS in float64.

    It minimizes the summed cross-entropy plus `l2 / 2` times the sum of the squared weights, for inputs that are scaled
    to a mean length of 1; the bias is not regularized. On such inputs it is scikit-learn's `LogisticRegression` with
    `C = 1 / l2`, for more than two classes.

    Args:
        layer: its parameters are set.
        inputs: `[n, D]`.
        labels: `[n]` int64.
        l2: see above.

    Returns:
        The share of the labels that the layer then predicts.
    """
    x, y = inputs.detach().cpu().double(), labels.cpu()
    scale = x.norm(dim=1).mean().clamp(min=1e-12)
    weight = torch.zeros(layer.weight.shape, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x / scale @ weight.T + bias, y, reduction="sum") + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    with torch.no_grad():
        layer.weight.copy_(weight / scale)
        layer.bias.copy_(bias)
        return (x / scale @ weight.T + bias).argmax(1).eq(y).double().mean().item()


def few_shot_start(
    config: Any,
    build_model: Callable[[Any, Any], nn.Module],
    build_collator: Callable[[Any, Any], Any],
    data: Any,
    run: Any,
    options: FewShotConfig | None = None,
) -> str:
    """The weights that a few-shot run starts from: a folder for `init_from`, with encoder and classifier trained.

        if config.few_shot:
            config = replace(config, init_from=few_shot_start(config, build_model, build_collator, data, run))

    The embedding of a text is what enters the output layer of the classifier, so that the model keeps the layout of its
    class. Rank 0 trains a model of its own, and the folder `<output_dir>/few_shot` appears when it is done: a run that
    was interrupted before begins this stage again, one that was interrupted later does not.

    Args:
        config: the recipe's, with `init_from` and `seed`.
        build_model, build_collator: the recipe's. The model is a `SequenceClassifier`; all of it is trained, or with
            LoRA what LoRA trains.
        data: has `train` (`ExampleRows`) and `tokenizer`.
        run: the processes, the device and the number format.
        options: see `FewShotConfig`.

    Raises:
        UserError: there is no `init_from` (code `no_init_from`); the labels are not single ones (`unsupported_task`);
            all examples have the same label (`one_label`).
    """
    if config.init_from is None:
        raise UserError(
            "few_shot needs a pretrained encoder: a few examples do not train one",
            key="init_from",
            hint="Give a sentence encoder, such as the folder of all-MiniLM-L6-v2",
            code="no_init_from",
        )
    labels = data.train.corpus.labels
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            "few_shot makes pairs of examples with equal and with different labels, and needs one label per example",
            key="few_shot",
            hint="Set few_shot=false for several labels or numbers",
            code="unsupported_task",
        )
    folder = Path(run.output_dir) / "few_shot"
    if run.resumes:
        return str(folder) if folder.is_dir() else config.init_from
    arguments = (config, build_model, build_collator, data, run, options or FewShotConfig(), folder)
    return run_on_rank0_and_broadcast(lambda: str(folder) if folder.is_dir() else _write_start(*arguments))


def _write_start(
    config: Any,
    build_model: Callable,
    build_collator: Callable,
    data: Any,
    run: Any,
    options: FewShotConfig,
    folder: Path,
) -> str:
    with torch.device("meta"):
        model = build_model(config, data.tokenizer)
    model.to_empty(device=run.device)
    model.init_weights(config.seed)
    load_hf_weights(model, config.init_from, config.seed)
    if not lora_layers(model):
        model.requires_grad_(True)
    rows, collator = data.train, build_collator(config, data.tokenizer)
    layer = model.head.out_proj
    model.head.out_proj = nn.Identity()  # the classifier's output is the embedding
    common = {"seed": config.seed, "autocast": run.autocast, "dtype": run.dtype}
    losses = train_on_label_pairs(model, model.classify, rows, collator, options, **common)
    embeddings = _embed_all(model, rows, collator, run)
    model.head.out_proj = layer
    accuracy = fit_output_layer(layer, embeddings, torch.from_numpy(rows.corpus.labels), options.l2)
    print(
        f"few_shot: {rows.num_rows} examples, {len(losses)} steps of {options.batch_size} pairs, "
        f"loss {losses[0]:.3f} > {losses[-1]:.3f}; the output layer is right about {accuracy:.1%} of the examples",
        flush=True,
    )
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_hf(model.cpu(), unfinished, data.tokenizer)
    unfinished.rename(folder)
    return str(folder)


@torch.no_grad()
def _embed_all(model: nn.Module, rows: Any, collator: Any, run: Any) -> Tensor:
    model.eval()
    found = []
    for numbers in np.array_split(np.arange(rows.num_rows), -(-rows.num_rows // 64)):
        batch = collator.batch(rows, numbers, np.zeros(len(numbers), dtype=np.uint64)).to(run.device)
        with run.autocast():
            found.append(model.classify(batch).float())
    return torch.cat(found)
