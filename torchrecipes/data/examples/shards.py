"""The file format of an example corpus: a safetensors file per shard.

| array | shape, dtype | meaning |
|---|---|---|
| `example_offsets` | `[E+1]` int64 | where the texts of an example begin in `text_offsets` |
| `text_offsets` | `[T+1]` int64 | where a text begins in `tokens` |
| `text_hashes` | `[T]` int64 | xxh3 of the text without its prompt |
| `labels` | `[E]` int64, `[E, L]` or `[E]` float32 | class number, classes of a multi-label task, or a number |
| `values` | `[E, C]` float32 | scores; NaN where an example has fewer |
| `second_starts` | `[T]` int32 | where the second sentence begins in a text; the text's length where there is none |
| `tokens` | `[N]` uint16 or uint32 | all texts, each as the tokenizer's post-processor makes it: `[CLS] ... [SEP]` |

`labels` and `values` are there where the examples have any.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from torchrecipes.atomic_write import write_atomically
from torchrecipes.data.corpus.shards import map_file
from torchrecipes.data.examples.block import ExampleBlock

FORMAT = "torchrecipes-examples-1"
DTYPES = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
          "F32": np.dtype("<f4")}  # fmt: skip
ORDER = ("example_offsets", "text_offsets", "text_hashes", "labels", "values", "second_starts", "tokens")


@dataclass(frozen=True, eq=False)
class ExampleShard:
    """An open shard; arrays are read-only views of the file, as the module's table says.

    Attributes:
        path: the file.
        first_example: number of examples in the shards before it.
        values, labels: None where there are none.
    """

    path: Path
    first_example: int
    example_offsets: np.ndarray
    text_offsets: np.ndarray
    text_hashes: np.ndarray
    second_starts: np.ndarray
    tokens: np.ndarray
    values: np.ndarray | None = None
    labels: np.ndarray | None = None

    @property
    def num_examples(self) -> int:
        """Examples in it."""
        return len(self.example_offsets) - 1

    def columns(self) -> np.ndarray:
        """Which text of its example each text is, int64 `[T]`."""
        return ranges(np.zeros(self.num_examples, np.int64), np.diff(self.example_offsets))

    def example_lengths(self) -> np.ndarray:
        """Tokens of all texts of every example, int64."""
        return np.diff(self.text_offsets[self.example_offsets])


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, int | str]:
    """Writes a shard, complete or not at all.

    Args:
        path: the file.
        arrays: by the names of the format.

    Returns:
        Its `file`, `size` in bytes, and `xxh3` of the file, for `corpus.json`.
    """
    # int64 comes first and uint16 last, so that all are aligned.
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in ORDER if name in arrays}
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict = {"__metadata__": {"format": FORMAT}}
    position = 0
    for name, array in arrays.items():
        end = position + array.nbytes
        header[name] = {"dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    chunks = [struct.pack("<Q", len(text)), text, *(memoryview(a).cast("B") for a in arrays.values() if a.size)]
    digest = xxhash.xxh3_64()
    for chunk in chunks:
        digest.update(chunk)
    write_atomically(path, chunks)
    return {"file": path.name, "size": 8 + len(text) + position, "xxh3": digest.hexdigest()}


def open_arrays(path: Path, first_example: int) -> ExampleShard:
    """Maps a shard into memory.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is no such file, or it is no complete shard.
        UserError: more shards are open than a process may open files (code `too_many_files`).
    """
    content = map_file(path)
    size = len(content)
    header_size = int(content[:8].view("<u8")[0]) if size >= 8 else size
    if header_size > size - 8:
        raise ValueError("its header is corrupt")
    header = json.loads(bytes(content[8 : 8 + header_size]))
    if header.pop("__metadata__")["format"] != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    arrays, end = {}, 0
    for name, stated in header.items():
        dtype, shape = DTYPES[stated["dtype"]], stated["shape"]
        begin, end = stated["data_offsets"]
        if end - begin != int(np.prod(shape)) * dtype.itemsize or 8 + header_size + end > size:
            raise ValueError("its size is not what its header says")
        arrays[name] = np.ndarray(shape, dtype, content, 8 + header_size + begin)
    shard = ExampleShard(path=path, first_example=first_example, **arrays)
    if 8 + header_size + end != size or shard.text_offsets[-1] != len(shard.tokens):
        raise ValueError("its size is not what its header says")
    if shard.example_offsets[-1] != len(shard.text_hashes):
        raise ValueError("its offsets are corrupt")
    return shard


def read_examples(
    shards: Sequence[ExampleShard], numbers: np.ndarray, num_texts: int, num_scores: int, prompt_lengths: Sequence[int]
) -> ExampleBlock:
    """Reads examples out of shards, in the order given.

    Args:
        shards: ascending by their first examples; one at least.
        numbers: int64 `[n]`, of examples that are in them.
        num_texts, num_scores: texts and scores of an example, the most that any has.
        prompt_lengths: tokens of the prompt of every column.
    """
    of_shard = np.searchsorted([shard.first_example for shard in shards], numbers, "right") - 1
    groups = [(shards[index], np.flatnonzero(of_shard == index)) for index in np.unique(of_shard)]
    first_texts, counts = np.empty_like(numbers), np.empty_like(numbers)
    for shard, chosen in groups:
        local = numbers[chosen] - shard.first_example
        first_texts[chosen] = shard.example_offsets[local]
        counts[chosen] = shard.example_offsets[local + 1] - first_texts[chosen]
    starts = offsets(counts)  # of the examples' texts among the N
    lengths, seconds, hashes = (np.empty(starts[-1], np.int64) for _ in range(3))
    values = np.full((len(numbers), num_scores), np.nan, np.float32)
    labels = shards[0].labels
    if labels is not None:
        labels = np.empty((len(numbers), *labels.shape[1:]), labels.dtype)
    places = []  # of every shard: its texts there and here
    for shard, chosen in groups:
        there = ranges(first_texts[chosen], counts[chosen])
        here = ranges(starts[chosen], counts[chosen])
        places.append((shard, there, here))
        lengths[here] = shard.text_offsets[there + 1] - shard.text_offsets[there]
        seconds[here], hashes[here] = shard.second_starts[there], shard.text_hashes[there]
        local = numbers[chosen] - shard.first_example
        if shard.values is not None:
            values[chosen, : shard.values.shape[1]] = shard.values[local]
        if labels is not None:
            labels[chosen] = shard.labels[local]
    ends = offsets(lengths)
    tokens = np.empty(ends[-1], shards[0].tokens.dtype)
    for shard, there, here in places:
        tokens[ranges(ends[here], lengths[here])] = shard.tokens[ranges(shard.text_offsets[there], lengths[here])]
    columns = ranges(np.zeros_like(counts), counts)
    prompts = np.array(prompt_lengths)[np.minimum(columns, len(prompt_lengths) - 1)]
    width = np.arange(num_texts)
    return ExampleBlock(
        tokens=tokens,
        text_lengths=lengths,
        second_starts=seconds,
        text_hashes=hashes,
        prompt_lengths=np.minimum(prompts, lengths),
        example_texts=np.where(width < counts[:, None], starts[:-1, None] + width, -1),
        values=values if num_scores else None,
        labels=labels,
    )


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Return int64 `[N+1]`, where each of N pieces begins that have these lengths, and where the last ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return `starts[0], starts[0] + 1, ...` (`counts[0]` of them), then those from `starts[1]`, and so on."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)


def file_checksum(path: Path) -> str:
    """Return the xxh3-64 (hex) of a file."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
