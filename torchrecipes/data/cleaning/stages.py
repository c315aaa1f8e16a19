"""`clean`: normalizes, filters and removes duplicates; documents in, documents and a report out.

Stages, each of which can be interrupted and continued, and run by several jobs (but `merge`):

1. `lines`, only with the step `boilerplate_lines`: hashes of all lines, counted.
2. `filter`: every document passes the steps that look at one document alone. Texts, hashes and signatures of those that
   remain go to disk.
3. `merge`, one job: finds the duplicates, and writes the report.
4. `remove`, only with a step for duplicates: writes the documents without them.

Every document is cleaned by itself and every duplicate found by its number in the source's order, so the output is the
same for any number of jobs and workers.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.cleaning import pieces as cut
from torchrecipes.data.cleaning.boilerplate import count_lines, frequent_lines
from torchrecipes.data.cleaning.duplicates import Clusters, PieceFiles, find_duplicates, sort_keys
from torchrecipes.data.cleaning.output import Output, check_shards, read_lines, run_stages, write_lines
from torchrecipes.data.cleaning.pieces import Input, Piece, add_skipped, finished_pieces, process_pieces, save_array
from torchrecipes.data.cleaning.removal import Removal
from torchrecipes.data.cleaning.report import Tally
from torchrecipes.data.cleaning.signatures import band_keys, estimated_jaccard, minhash
from torchrecipes.data.cleaning.steps import CleaningSteps
from torchrecipes.data.progress import Progress
from torchrecipes.data.sources.records import ReadStats, Source, require_documents
from torchrecipes.errors import UserError

FORMAT = 1  # raise it when the same input and steps give other documents than before
MERGED = "merged"  # a file in the folder of unfinished work
STAGES = ("lines", "filter", "merge", "remove")


def clean(
    source: Source,
    output_dir: str | Path,
    steps: CleaningSteps,
    *,
    against: Sequence[Source] = (),
    eval_sets: Sequence[Source] = (),
    shard_index: int = 0,
    num_shards: int = 1,
    stage: str | None = None,
    workers: int | None = 0,
) -> dict[str, Any] | None:
    """Cleans a source. The same call again continues after an interruption, and does nothing when all is done.

    Args:
        source: the documents.
        output_dir: see `torchrecipes.data.cleaning.output`.
        steps: what is done.
        against: other sources; documents that duplicate one of theirs are removed.
        eval_sets: the same for evaluation sets; the report lists them separately.
        shard_index: number of this job, from 0.
        num_shards: number of jobs that share the work.
        stage: what this job does; None: all stages, for a single job.
        workers: worker processes; 0: none, None: one per core, as far as there is work for them. With workers, a
            script needs `if __name__ == "__main__":` around its call.

    Returns:
        The report; None from a stage of several.

    Raises:
        UserError: the folder holds something else (code `other_output`), an earlier stage is not finished
            (`unfinished_stage`), no documents (`no_documents`), and what the source raises.
    """
    if (against or eval_sets) and not steps.removes_duplicates:
        problem = "without a step for duplicates, nothing is compared with other documents"
        hint = "Add exact_duplicates or near_duplicates to the steps."
        raise UserError(problem, key="--against" if against else "--eval-sets", hint=hint, code="unused_option")
    job = _Job(Output(Path(output_dir)), steps, _inputs(source, against, eval_sets))
    check_shards(shard_index, num_shards, stage, job.stages)
    if job.output.open(job.settings):
        print(f"{output_dir} is complete: nothing is left to do", file=sys.stderr, flush=True)
        return job.output.read_report()
    shard = {"shard_index": shard_index, "num_shards": num_shards}
    run_stages(
        job.output,
        {
            "lines": lambda: job.count_lines(workers=workers, **shard),
            "filter": lambda: job.filter(workers=workers, **shard),
            "merge": job.merge,
            "remove": lambda: job.remove(**shard),
        },
        job.stages if stage is None else [stage],
        f"{shard_index}-of-{num_shards}",
    )
    return job.output.read_report() if stage is None else None


def _inputs(source: Source, against: Sequence[Source], eval_sets: Sequence[Source]) -> list[Input]:
    # References come first: the first document of a cluster is kept, and theirs are never removed.
    references = [Input(f"evaluation-{number:03d}", one, True) for number, one in enumerate(eval_sets)]
    references += [Input(f"against-{number:03d}", one, True) for number, one in enumerate(against)]
    return [*references, Input("part", source)]


@dataclass(frozen=True)
class _Job:
    output: Output
    steps: CleaningSteps
    inputs: list[Input]

    @property
    def stages(self) -> list[str]:
        left_out = set() if self.steps.boilerplate_lines else {"lines"}
        left_out |= set() if self.steps.removes_duplicates else {"remove"}
        return [stage for stage in STAGES if stage not in left_out]

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "job": "clean",
            "format": FORMAT,
            "inputs": {one.name: one.source.fingerprint for one in self.inputs},
            "steps": {name: asdict(getattr(self.steps, name)) for name in self.steps.names()},
            "exempt": self.steps.exempt,
            "pieces": [cut.PIECE_DOCUMENTS, cut.PIECE_CHARACTERS, cut.PART_BYTES],
        }

    @property
    def filtered(self) -> Path:
        return self.output.work / "filtered"

    @property
    def texts(self) -> Path:
        # Without duplicates to remove, what is filtered is the output.
        return self.filtered if self.steps.removes_duplicates else self.output.documents

    @property
    def lines(self) -> Path:
        return self.output.work / "lines"

    def count_lines(self, **job: int | None) -> None:
        cleaned = [one for one in self.inputs if not one.is_reference]
        process_pieces("counting lines", cleaned, self.lines, _CountLines(self.steps, self.lines), **job)

    def filter(self, **job: int | None) -> None:
        inputs = self.inputs if self.steps.removes_duplicates else self.inputs[-1:]
        work = _Filter(self.steps, self.filtered, self.texts, self._boilerplate())
        process_pieces("filtering", inputs, self.filtered, work, **job)

    def _boilerplate(self) -> Path | None:
        """Return the file of the hashes of boilerplate lines, which the first job that asks for it makes."""
        if self.steps.boilerplate_lines is None:
            return None
        file = self.output.work / "boilerplate.npy"
        with self.output.locked("boilerplate", wait=True):
            if not file.exists():
                names, documents = [], 0
                for name, record in finished_pieces(self.inputs[-1:], self.lines):
                    names.append((self.lines / f"{name}.lines.npy", self.lines / f"{name}.counts.npy"))
                    documents += record["compared"]
                save_array(file, frequent_lines(names, self.steps.boilerplate_lines.threshold(documents)))
        return file

    def merge(self) -> None:
        """Finds duplicates, and writes which documents to keep and the report."""
        if (self.output.work / MERGED).exists():  # `remove` may have begun
            return
        inputs = self.inputs if self.steps.removes_duplicates else self.inputs[-1:]
        tally, skipped, references, found = Tally(), ReadStats(), {}, []
        for name, record in finished_pieces(inputs, self.filtered):
            found.append((name, record["kept"]))
            if name.startswith("part-"):
                add_skipped(skipped, record)
                skipped.documents += record["documents"]
                tally.add_record(record)
            else:
                one = name.rsplit("-", 2)[0]
                references[one] = references.get(one, 0) + record["documents"]
        require_documents(self.inputs[-1].source, skipped)
        if self.steps.removes_duplicates:
            self._merge_duplicates(found, tally)
        report = {
            "job": "clean",
            "input": self.inputs[-1].source.name,
            "steps": self.settings["steps"],
            "exempt": list(self.steps.exempt),
            "references": [
                {"name": one.source.name, "kind": one.name.rsplit("-", 1)[0], "documents": references.get(one.name, 0)}
                for one in self.inputs[:-1]
            ],
            **tally.to_dict(),
            "bad_records": {
                reason: {"records": count, "examples": skipped.examples[reason]}
                for reason, count in skipped.skipped.items()
            },
        }
        self.output.write_report(report)
        write_atomically(self.output.work / MERGED, [])
        if not self.steps.removes_duplicates:
            self.output.finish(self.settings)

    def _merge_duplicates(self, found: list[tuple[str, int]], tally: Tally) -> None:
        files = [PieceFiles(kept, self.filtered / name) for name, kept in found]
        starts = np.cumsum([0, *(piece.documents for piece in files)])
        near = self.steps.near_duplicates
        progress = Progress("finding duplicates")
        try:
            clusters = find_duplicates(
                files,
                exact=self.steps.exact_duplicates is not None,
                jaccard=None if near is None else near.jaccard,
                on_progress=lambda documents: progress.add(documents, 0),
            )
        finally:
            progress.close()
        keep_folder = self.output.work / "keep"
        keep_folder.mkdir(exist_ok=True)
        for number, (name, _) in enumerate(found):
            if not name.startswith("part-"):
                continue
            here = slice(starts[number], starts[number + 1])
            removed = np.flatnonzero(clusters.first[here] != np.arange(starts[number], starts[number + 1]))
            if len(removed):
                keep = np.ones(files[number].documents, bool)
                keep[removed] = False
                save_array(keep_folder / f"{name}.npy", keep)
                self._count_removed(found, files, starts, clusters, number, removed, tally)

    def _count_removed(
        self,
        found: list[tuple[str, int]],
        files: list[PieceFiles],
        starts: np.ndarray,
        clusters: Clusters,
        number: int,
        removed: np.ndarray,
        tally: Tally,
    ) -> None:
        first = clusters.first[starts[number] + removed]
        owners = np.searchsorted(starts, first, "right") - 1
        characters = np.load(self.filtered / f"{found[number][0]}.characters.npy")
        for local, one, owner in zip(removed.tolist(), first.tolist(), owners.tolist(), strict=True):
            exact = clusters.exact[starts[number] + local]
            kind = found[owner][0].split("-")[0]
            rule = ("exact_duplicates" if exact else "near_duplicates") + ("" if kind == "part" else f".{kind}")
            tally.add_removed(rule, int(characters[local]))
            if tally.wants_example(rule):
                original = one - starts[owner]
                document = self._document(found[number][0], local)
                detail = f"the same as {self._document(found[owner][0], original)['source']}"
                if not exact:
                    pair = files[number].load("signatures")[local], files[owner].load("signatures")[original]
                    detail = f"{detail.replace('the same as', 'similar to')}, Jaccard {estimated_jaccard(*pair):.2f}"
                tally.add_example(rule, document["source"], document["text"], detail)

    def _document(self, name: str, number: int) -> dict[str, Any]:
        return json.loads(_cached_lines(self.filtered / f"{name}.jsonl.zst")[number])

    def remove(self, shard_index: int, num_shards: int) -> None:
        """Writes the documents that are kept; the last job that does tidies up."""
        if not (self.output.work / MERGED).exists():
            hint = "Run --stage merge first."
            raise UserError("the duplicates are not known yet", key="--stage", hint=hint, code="unfinished_stage")
        sizes = [
            (name, record["kept"], record["characters"])
            for name, record in finished_pieces(self.inputs[-1:], self.filtered)
        ]
        progress = Progress("writing", sum(characters for *_, characters in sizes) // num_shards)
        try:
            for number, (name, documents, characters) in enumerate(sizes):
                text, keep = self.filtered / f"{name}.jsonl.zst", self.output.work / "keep" / f"{name}.npy"
                if number % num_shards == shard_index and text.exists():
                    kept = self.output.documents / text.name
                    if keep.exists():
                        lines = zip(read_lines(text), np.load(keep), strict=True)
                        write_lines(kept, (line for line, wanted in lines if wanted))
                        text.unlink()
                    else:
                        text.rename(kept)
                    progress.add(documents, characters)
        finally:
            progress.close()
        if not any(self.filtered.glob("part-*.jsonl.zst")):
            self.output.finish(self.settings)


@cache
def _boilerplate_set(file: Path) -> frozenset[int]:
    return frozenset(np.load(file).tolist())


_lines_cache: dict[Path, list[bytes]] = {}


def _cached_lines(file: Path) -> list[bytes]:
    # Examples of one piece, which are asked for one by one, and of the pieces that hold their originals.
    if file not in _lines_cache:
        if len(_lines_cache) >= 4:
            _lines_cache.clear()
        _lines_cache[file] = read_lines(file)
    return _lines_cache[file]


@dataclass(frozen=True)
class _CountLines:
    """Writes the counts of the lines of a piece, in the texts as they are before boilerplate is removed."""

    steps: CleaningSteps
    folder: Path

    def __call__(self, piece: Piece) -> dict[str, Any]:
        texts = []
        for document in piece.documents:
            if not self.steps.is_exempt(document.source):
                text = document.text
                for _, result in self.steps.apply(document.text, document.source):
                    text = result
                if not isinstance(text, Removal):
                    texts.append(text)
        lines, counts = count_lines(texts, self.steps.boilerplate_lines)
        save_array(self.folder / f"{piece.name}.lines.npy", lines)
        save_array(self.folder / f"{piece.name}.counts.npy", counts)
        return {"compared": len(texts)}


@dataclass(frozen=True)
class _Filter:
    """Applies the steps to the documents of a piece, and writes texts, hashes and signatures."""

    steps: CleaningSteps
    folder: Path
    texts: Path
    boilerplate: Path | None

    def __call__(self, piece: Piece) -> dict[str, Any]:
        tally = Tally()
        is_reference = not piece.name.startswith("part-")
        boilerplate = frozenset() if self.boilerplate is None else _boilerplate_set(self.boilerplate)
        kept = []
        for document in piece.documents:
            tally.add_input(len(document.text))
            text = document.text
            if is_reference:  # texts are compared as they are after normalization
                normalized = text if self.steps.normalize is None else self.steps.normalize(text)
                kept.append(document._replace(text="" if isinstance(normalized, Removal) else normalized))
                continue
            for step, result in self.steps.apply(text, document.source, boilerplate):
                if isinstance(result, Removal):
                    tally.add_removed(result.rule, len(text))
                    if tally.wants_example(result.rule):
                        tally.add_example(result.rule, document.source, text, result.detail)
                    break
                tally.add_changed(step, len(text) - len(result))
                if step != "normalize" and tally.wants_example(f"{step} (changed)"):
                    tally.add_example(f"{step} (changed)", document.source, _difference(text, result), "lines removed")
                text = result
            else:
                kept.append(document._replace(text=text))
        lines = (json.dumps(document._asdict(), ensure_ascii=False).encode() for document in kept)
        write_lines((self.folder if is_reference else self.texts) / f"{piece.name}.jsonl.zst", lines)
        self._write_hashes(piece.name, [document.text for document in kept])
        return {"kept": len(kept), **tally.to_record()}

    def _write_hashes(self, name: str, texts: list[str]) -> None:
        prefix = f"{self.folder / name}."
        if self.steps.removes_duplicates:
            save_array(Path(prefix + "characters.npy"), np.array([len(text) for text in texts], np.uint32))
        if self.steps.exact_duplicates is not None:
            digests = b"".join(xxhash.xxh3_128_digest(" ".join(text.split()).encode()) for text in texts)
            high, low = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2).T
            keys, order = sort_keys(high[None])
            save_array(Path(prefix + "hashes.npy"), np.stack([keys[0], low[order[0]]]))
            save_array(Path(prefix + "hash_order.npy"), order)
        if self.steps.near_duplicates is not None:
            signatures = minhash(texts)
            keys, order = sort_keys(band_keys(signatures))
            save_array(Path(prefix + "signatures.npy"), signatures)
            save_array(Path(prefix + "bands.npy"), keys)
            save_array(Path(prefix + "band_order.npy"), order)


def _difference(text: str, result: str) -> str:
    left = set(result.split("\n"))
    return "\n".join(line for line in text.split("\n") if line not in left)
