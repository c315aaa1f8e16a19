"""`MTEBTasks`: tasks of the Massive Text Embedding Benchmark, as an evaluator."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from torchrecipes.errors import UserError
from torchrecipes.evaluation.embeddings import Encoder, check_dims, unit_rows

BATCH = 1024  # texts that mteb hands over at a time; the encoder makes its own batches of all of them


class MTEBTasks:
    """The main scores of MTEB tasks (Muennighoff et al. 2023, arXiv 2210.07316), and their mean.

    Tasks are downloaded when they are first evaluated. Nothing is written into mteb's cache of results.

    Args:
        tasks: names such as `STSBenchmark` or `NFCorpus`, or tasks of your own: objects of mteb's `AbsTask`.
        languages: of tasks in several languages, as ISO 639-3 codes: `eng`; None: all.
        splits: evaluate these; None: those that each task names, mostly `test`.

    Raises:
        UserError: mteb is not installed (code `missing_package`), or has no such task (`unknown_task`).
    """

    def __init__(
        self, tasks: Sequence[Any], *, languages: Sequence[str] | None = None, splits: Sequence[str] | None = None
    ):
        mteb = _mteb()
        if not tasks:
            raise UserError("no task is named", key="tasks", hint="Such as [STSBenchmark].", code="unknown_task")
        self.tasks = [_task(mteb, task, languages, splits) if isinstance(task, str) else task for task in tasks]

    def __call__(self, encoder: Encoder, dims: Sequence[int] = ()) -> dict[str, float]:
        """Evaluates an encoder.

        Args:
            encoder: has a method `encode`, as `TextEncoder`. Its prompts `query` and `passage` are used where a task
                has queries and passages.
            dims: Matryoshka dimensions to evaluate beside the full one.

        Returns:
            The main score of every task under its name, and `mean`; with `_dim<d>` after the name for every Matryoshka
            dimension.

        Raises:
            UserError: a dimension is out of range.
        """
        mteb = _mteb()
        results: dict[str, float] = {}
        for dim in (None, *dims):
            suffix = "" if dim is None else f"_dim{dim}"
            found = mteb.evaluate(
                _MTEBEncoder(encoder, dim),
                self.tasks,
                co2_tracker=False,
                cache=None,
                show_progress_bar=False,
                encode_kwargs={"batch_size": BATCH, "show_progress_bar": False},
            )
            scores = {task.task_name: float(task.get_score()) for task in found.task_results}
            results |= {f"{name}{suffix}": score for name, score in scores.items()}
            results[f"mean{suffix}"] = float(np.mean(list(scores.values()))) if scores else math.nan
        return results


class _MTEBEncoder:
    """An encoder as mteb calls it."""

    def __init__(self, encoder: Encoder, dim: int | None):
        from mteb.models import ModelMeta

        self.encoder, self.dim = encoder, dim
        name = {"name": "torchrecipes/encoder", "similarity_fn_name": "cosine"}
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=name)

    def encode(self, inputs: Iterable[dict[str, list[str]]], *, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """Embeddings of all texts of a loader."""
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = {None: "", "query": "query", "document": "passage"}[prompt_type and str(prompt_type.value)]
        embeddings = self.encoder.encode(texts, prompt=prompt)
        if self.dim is None:
            return embeddings
        check_dims([self.dim], embeddings.shape[1])
        return unit_rows(embeddings, self.dim)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """The cosines of all rows with all rows, `[n, m]`."""
        return unit_rows(np.atleast_2d(embeddings1)) @ unit_rows(np.atleast_2d(embeddings2)).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """The cosines of rows with the same place, `[n]`."""
        first, second = unit_rows(np.atleast_2d(embeddings1)), unit_rows(np.atleast_2d(embeddings2))
        return np.einsum("nd,nd->n", first, second)


def _mteb() -> Any:
    try:
        import mteb
    except ImportError:
        hint = "Install it: pip install 'torchrecipes[mteb]'"
        raise UserError("MTEBTasks needs mteb", hint=hint, code="missing_package") from None
    return mteb


def _task(mteb: Any, name: str, languages: Sequence[str] | None, splits: Sequence[str] | None) -> Any:
    try:
        return mteb.get_task(name, languages=languages, eval_splits=splits)
    except (KeyError, ValueError) as error:
        raise UserError(str(error).strip("'\""), key="tasks", code="unknown_task") from None
