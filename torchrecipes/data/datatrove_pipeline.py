"""Steps for pipelines of `datatrove`, which runs them on this machine, with Slurm, or with Ray.

A step is an object that datatrove calls with the documents of a task, its rank, and the number of tasks, so that steps
of its own (readers, filters, writers) may stand between ours:

1. `ReadDocuments` yields a part of one of our sources; the parts of files are consecutive, so tasks one after the other
   have the order of the source.
2. `CleanDocuments` applies the steps of cleaning that judge a document by itself. `CleanStage` runs one stage of
   `torchrecipes.data.cleaning.clean`, whose duplicates are found among the documents of all tasks.
3. `WriteCorpus` tokenizes what reaches it into one part of a corpus per task, and `MergeCorpus`, a task of its own
   after them, joins the parts.

The result is that of `tune-style data clean` and `tune-style data tokenize`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow

from torchrecipes.data.cleaning import Removal, clean, read_steps
from torchrecipes.data.cleaning.steps import DEFAULT_STEPS
from torchrecipes.data.corpus import merge_parts, part_folder, prepare_corpus
from torchrecipes.data.sources import SourcePart, files
from torchrecipes.data.sources.records import Source
from torchrecipes.data.tokenizers import load_tokenizer
from torchrecipes.errors import UserError


class ReadDocuments:
    """Yields the documents of part `rank` of a source.

    Args:
        source: the whole source; found once, here, and not by every task.

    Raises:
        UserError: datatrove is not installed (code `missing_package`).
    """

    def __init__(self, source: Source):
        _datatrove_document()
        self.source = source

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Yield documents of datatrove, after those of the steps before it; their id is `file:line`."""
        document = _datatrove_document()
        yield from data or ()
        for text, place in SourcePart(self.source, rank, world_size):
            yield document(text=text, id=place)


class CleanDocuments:
    """Applies steps of cleaning that need no other document.

    Args:
        steps: as for `read_steps`: names, options `STEP.OPTION=VALUE`, YAML files.

    Raises:
        UserError: an invalid step; one that compares documents (code `needs_all_documents`).
    """

    def __init__(self, steps: Sequence[str]):
        self.steps = read_steps(steps)
        if self.steps.removes_duplicates or self.steps.boilerplate_lines is not None:
            problem = "duplicates and boilerplate lines are found among all documents, and a task sees its own only"
            hint = "Leave these steps to CleanStage."
            raise UserError(problem, key="steps", hint=hint, code="needs_all_documents")

    def __call__(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:  # noqa: ARG002
        """Yield the documents that are kept, with the text as the steps leave it."""
        for document in data:
            results = [result for _, result in self.steps.apply(document.text, document.id, frozenset())]
            last = results[-1] if results else document.text  # nothing changed
            if not isinstance(last, Removal):
                document.text = last
                yield document


class CleanStage:
    """Runs one stage of `clean` for a task: a job of its array. It reads the source itself and yields nothing.

    The stages are `lines` (only where boilerplate lines are removed), `filter`, `merge` (one task) and `remove` (only
    where duplicates are), each in a pipeline that depends on the one before.

    Args:
        stage: its name.
        source: the documents.
        output: the folder of the result: documents and report.
        steps: as for `read_steps`.
        against: sources whose documents, and what duplicates them, are not wanted.
        eval_sets: the same, for evaluation sets.
    """

    def __init__(
        self,
        stage: str,
        source: Source,
        output: str | Path,
        steps: Sequence[str] = DEFAULT_STEPS,
        against: Sequence[Source] = (),
        eval_sets: Sequence[Source] = (),
    ):
        self.stage, self.source, self.output = stage, source, Path(output).absolute()
        self.steps, self.against, self.eval_sets = read_steps(steps), tuple(against), tuple(eval_sets)

    def __call__(self, _data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Run the stage as job `rank` of `world_size`.

        Raises:
            UserError: what `clean` raises.
        """
        clean(
            self.source,
            self.output,
            self.steps,
            against=self.against,
            eval_sets=self.eval_sets,
            stage=self.stage,
            shard_index=rank,
            num_shards=world_size,
            workers=0,
        )


class WriteCorpus:
    """Tokenizes the documents of a task into its part of a corpus, as `tune-style data tokenize` does.

    The documents are first written to a compressed file in the folder of the part, because which of them are held out
    is decided before the first is tokenized; it is removed when the part is complete. A task that is run again
    continues.

    Args:
        folder: of the corpus.
        tokenizer: what `load_tokenizer` reads.
        causal: for a model that predicts the next token.
        source: what the pipeline reads. Its fingerprint becomes that of the corpus, so that a run with this source as
            its `data.source` opens it. Where documents are changed or removed in between, write them to files first,
            and give these to a pipeline of their own.
        validation_fraction: share of the documents held out, chosen by a hash of their text.
        tokenizer_threads: threads of a task, beside the one that reads; 0: that one does both.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: str | Path,
        *,
        causal: bool,
        source: Source,
        validation_fraction: float = 0.005,
        tokenizer_threads: int = 0,
    ):
        self.folder, self.tokenizer, self.causal = Path(folder).absolute(), Path(tokenizer).absolute(), causal
        self.fingerprint = source.fingerprint
        self.validation_fraction, self.tokenizer_threads = validation_fraction, tokenizer_threads

    def __call__(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> None:
        """Write the part of this task.

        Raises:
            UserError: no document reached the step; what `load_tokenizer` and `prepare_corpus` raise.
        """
        tokenizer = load_tokenizer(self.tokenizer, causal=self.causal)
        part = part_folder(self.folder, rank, world_size)
        part.mkdir(parents=True, exist_ok=True)
        held = part / "documents.jsonl.zst"
        if not held.exists():
            _write(held, data)
        source = SourcePart(files(str(held)), 0, 1)
        source.fingerprint = f"{self.fingerprint}:{rank}/{world_size}"
        prepare_corpus(part, source, tokenizer, self.validation_fraction, tokenizer_threads=self.tokenizer_threads)
        if rank == 0:
            tokenizer.save(self.folder / "tokenizer")
        held.unlink()


class MergeCorpus:
    """Joins the parts that the tasks of `WriteCorpus` wrote, in a pipeline of one task that depends on theirs.

    Args:
        folder: of the corpus.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()

    def __call__(self, _data: Any = None, _rank: int = 0, world_size: int = 1) -> None:
        """Join the parts and check every byte.

        Raises:
            UserError: a part is missing (code `missing_part`); there is more than one task (`one_task`).
        """
        if world_size != 1:
            raise UserError(f"{world_size} tasks cannot join one corpus", hint="Set tasks=1.", code="one_task")
        for corpus in merge_parts(self.folder):
            corpus.verify()
            print(corpus.summary())


def _write(path: Path, documents: Iterable[Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with closing(pyarrow.OSFile(str(temporary), "wb")) as file, pyarrow.CompressedOutputStream(file, "zstd") as stream:
        for document in documents:
            row = {"text": document.text, "source": document.id}
            stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    temporary.replace(path)


def _datatrove_document() -> type:
    try:
        from datatrove.data import Document
    except ImportError:
        hint = "pip install 'torchrecipes[corpus]'"
        raise UserError("datatrove is not installed", hint=hint, code="missing_package") from None
    return Document
