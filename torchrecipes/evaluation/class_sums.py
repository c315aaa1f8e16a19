"""`ClassSums`: how well the classes of documents are predicted, beside the most frequent class."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchrecipes.distributed.collectives import all_gather_object
from torchrecipes.evaluation.running import RunningSum
from torchrecipes.losses import document_class_loss


class ClassSums:
    """Sums over the documents of batches that have classes, of one rank."""

    def __init__(self, device: torch.device):
        self.sums = RunningSum((3,), device)
        self.labels: list[Tensor] = []

    def add(self, hidden: Tensor, model: nn.Module, batch: Any) -> None:
        """Counts a batch, without waiting for the device: arguments of `document_class_loss`."""
        _, sums = document_class_loss(hidden, model, batch)
        if sums:
            names = ("class_loss", "class_accuracy", "targets/class_loss")
            self.sums.add(torch.stack([sums[name].to(self.sums.dtype) for name in names]))
            self.labels.append(batch.class_labels)

    def means(self) -> dict[str, float]:
        """`class_loss`, `class_accuracy` and `class_majority_accuracy` of all ranks; {} where there was no class."""
        labels = torch.cat(self.labels).cpu().numpy() if self.labels else np.empty(0, np.int64)
        counted = all_gather_object(np.bincount(labels[labels >= 0]).tolist())
        loss, correct, targets = self.sums.over_ranks().tolist()
        if not targets:
            return {}
        counts = np.zeros(max(map(len, counted)))
        for of_rank in counted:
            counts[: len(of_rank)] += of_rank
        means = {"class_loss": loss, "class_accuracy": correct, "class_majority_accuracy": counts.max()}
        return {name: float(value / targets) for name, value in means.items()}
