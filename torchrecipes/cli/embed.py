"""`tune-style embed`: turns texts into embeddings with a trained encoder."""

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torchrecipes.cli.openmp import wait_without_spinning
from torchrecipes.cli.text_arguments import add_text_arguments, check_text_arguments
from torchrecipes.cli.trained_model import add_model_arguments, load_text_encoder, print_counts
from torchrecipes.errors import UserError

FORMATS = (".npy", ".jsonl", ".parquet")
NPY_HEADER = 128  # bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `embed`."""
    parser.epilog = (
        "example: tune-style embed runs/embeddings --input texts.jsonl --prompt passage --output texts.npy\n"
        "         cat queries.txt | tune-style embed runs/embeddings --input - --dim 128 --output queries.npy\n"
        '         tune-style embed runs/embeddings "A cat sat on a mat." "There was a mat under the cat."'
    )
    add_model_arguments(parser)
    add_text_arguments(
        parser,
        texts="texts; their embeddings are printed as JSON lines",
        output=".npy: [texts, dimensions] float32; .jsonl, .parquet: with the texts",
    )
    parser.add_argument("--prompt", metavar="NAME", help="query, passage, ... (default: the model's default, if any)")
    parser.add_argument("--dim", type=int, metavar="D", help="the first D dimensions, of length 1 again (Matryoshka)")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a text (default: the model's)")


def main(args: argparse.Namespace) -> None:
    """Embed the texts of the arguments or of a file."""
    output = check_text_arguments(args, FORMATS, ["--dim", "--max-length"])
    if args.input is not None and output is None:
        hint = f"Give --output FILE, which ends in {', '.join(FORMATS)}."
        raise UserError("there is no file for the embeddings", key="--output", hint=hint, code="no_output")
    wait_without_spinning()

    from torchrecipes.atomic_write import check_writable
    from torchrecipes.data.sources import TextRows

    if output is not None:
        check_writable(output.parent, key="--output")
        output.parent.mkdir(parents=True, exist_ok=True)
    try:
        texts = args.texts or TextRows(args.input, args.text_column)
        folder, encoder = load_text_encoder(args, max_length=args.max_length, tokens_per_batch=args.batch_tokens)
        encoder.model.prompt(args.prompt)
    except UserError as error:
        key = {"path": "--input", "prompt": "--prompt", "max_length": "--max-length"}.get(error.key, error.key)
        fields = {"hint": error.hint, "code": error.code, "problems": error.problems}
        raise UserError(error.problem, key=key, **fields) from None
    size = encoder.model.embedding_size
    if args.dim is not None and args.dim > size:
        problem = f"{args.dim}, and the embeddings of {folder} have {size} dimensions"
        raise UserError(problem, key="--dim", code="out_of_range")
    if output is None:
        _print(texts, encoder, args)
    else:
        _write(texts, encoder, args, output)
    counts = {
        f"longer than {encoder.max_length} tokens and cut off": encoder.num_truncated,
        "empty and embedded as such": encoder.num_empty,
    }
    for reason, count in encoder.invalid_names.most_common():
        if reason != "blank":
            counts[f"invalid as a domain name and embedded as written ({reason})"] = count
    print_counts(counts)


def _print(texts: list[str], encoder: Any, args: argparse.Namespace) -> None:
    embeddings = shortened(encoder.encode(texts, args.prompt), args.dim, encoder.model.normalize)
    for text, embedding in zip(texts, embeddings, strict=True):
        print(_json_line(text, embedding))
    if len(texts) > 1:
        from torchrecipes.evaluation.embeddings import unit_rows

        unit = unit_rows(embeddings)
        print("cosines:", file=sys.stderr)
        for row in unit @ unit.T:
            print("  " + "  ".join(f"{value:6.3f}" for value in row), file=sys.stderr)


def _write(texts: Iterable[str], encoder: Any, args: argparse.Namespace, output: Path) -> None:
    from torchrecipes.data.progress import Progress

    kept: deque[str] = deque()
    keep = output.suffix != ".npy"

    def reading() -> Iterator[str]:
        for text in texts:
            kept.append(text)
            yield text

    progress = Progress("embedding", getattr(texts, "num_bytes", None))
    begin, count = time.perf_counter(), 0
    width = args.dim or encoder.model.embedding_size
    try:
        with open_output(output, width) as file:
            for part in encoder.encode_iter(reading() if keep else texts, args.prompt, progress):
                part = shortened(part, args.dim, encoder.model.normalize)
                file.write([kept.popleft() for _ in range(len(part))] if keep else [], part)
                count += len(part)
    finally:
        progress.close()
    seconds = max(time.perf_counter() - begin, 1e-9)
    print(
        f"{count:,} {'text' if count == 1 else 'texts'}, {width} dimensions: {output}; {count / seconds:,.0f} texts/s, "
        f"{progress.tokens / seconds:,.0f} tokens/s"
    )


def shortened(embeddings: Any, dim: int | None, normalize: bool) -> Any:
    """Return the first `dim` columns, of length 1 again where embeddings have that length."""
    from torchrecipes.evaluation.embeddings import unit_rows

    if dim is None:
        return embeddings
    return unit_rows(embeddings, dim) if normalize else embeddings[:, :dim]


class Output(Protocol):
    """A file of embeddings that is being written."""

    def write(self, texts: list[str], embeddings: Any) -> None:
        """Add rows, `[w, D]` float32."""

    def finish(self) -> None:
        """Complete the file."""

    def close(self) -> None:
        """Close it, complete or not."""


@contextmanager
def open_output(path: Path, width: int) -> Iterator[Output]:
    """A file of embeddings in the format of its name, which is there when all rows are in it, or not at all."""
    import os

    from torchrecipes.manifest import fsync

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    output = {".npy": _Npy, ".jsonl": _JsonLines, ".parquet": _Parquet}[path.suffix](temporary, width)
    try:
        yield output
        output.finish()
        output.close()
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        output.close()
        temporary.unlink(missing_ok=True)


class _Npy:
    """Rows are appended; their number enters the header, whose size is fixed, at the end."""

    def __init__(self, path: Path, width: int):
        self.file, self.width, self.rows = path.open("wb"), width, 0
        self.file.write(self._header())

    def _header(self) -> bytes:
        # https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, version 1.0
        described = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self.rows}, {self.width}), }}".encode()
        size = NPY_HEADER - 10
        return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + described.ljust(size - 1) + b"\n"

    def write(self, texts: list[str], embeddings: Any) -> None:  # noqa: ARG002
        self.file.write(embeddings.astype("<f4", order="C", copy=False).data)
        self.rows += len(embeddings)

    def finish(self) -> None:
        self.file.seek(0)
        self.file.write(self._header())

    def close(self) -> None:
        self.file.close()


class _JsonLines:
    def __init__(self, path: Path, width: int):  # noqa: ARG002
        self.file = path.open("w", encoding="utf-8")

    def write(self, texts: list[str], embeddings: Any) -> None:
        for text, embedding in zip(texts, embeddings, strict=True):
            self.file.write(_json_line(text, embedding) + "\n")

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self.file.close()


class _Parquet:
    def __init__(self, path: Path, width: int):
        import pyarrow
        from pyarrow import parquet

        self.schema = pyarrow.schema({"text": pyarrow.string(), "embedding": pyarrow.list_(pyarrow.float32(), width)})
        self.width, self.writer = width, parquet.ParquetWriter(path, self.schema)

    def write(self, texts: list[str], embeddings: Any) -> None:
        import pyarrow

        values = pyarrow.array(embeddings.reshape(-1), pyarrow.float32())
        rows = pyarrow.FixedSizeListArray.from_arrays(values, self.width)
        self.writer.write_table(pyarrow.table([pyarrow.array(texts, pyarrow.string()), rows], schema=self.schema))

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self.writer.close()


def _json_line(text: str, embedding: Any) -> str:
    # Nine digits are a float32 exactly.
    values = ", ".join(f"{value:.9g}" for value in embedding.tolist())
    return f'{{"text": {json.dumps(text, ensure_ascii=False)}, "embedding": [{values}]}}'
