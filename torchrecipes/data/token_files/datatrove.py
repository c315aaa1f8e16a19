"""`datatrove_tokens`: the `.ds` files of datatrove's `DocumentTokenizer`, with their `.ds.index`."""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from torchrecipes.data.token_files.source import TokenFile, TokenSource, find_token_files, token_array
from torchrecipes.errors import UserError


def datatrove_tokens(path: str | list[str], dtype: Literal["uint16", "uint32"] | None = None) -> TokenSource:
    """Ids in `.ds` files; the ends of documents are in `.ds.index`.

    Args:
        path: a `.ds` file, a folder of these, or a list. Files of loss masks are not read.
        dtype: of the ids. None: as `.ds.metadata` says, else the one that agrees with the last end in the index.

    Raises:
        UserError: there is no such file (code `no_such_file`).
    """
    paths = find_token_files(path, ".ds")
    return TokenSource(", ".join(map(str, paths)), paths, partial(_read, paths, dtype))


def _read(paths: list[Path], dtype: str | None) -> list[TokenFile]:
    files = []
    for path in paths:
        index = path.with_name(path.name + ".index")
        if not index.is_file():
            hint = "Write it with save_index=True, or read the file with nanogpt_tokens and an eos_id."
            raise UserError(f"there is no {index}, which holds the ends of documents", hint=hint, code="no_such_file")
        ends = token_array(index, "<u8").astype(np.int64)
        total, size = int(ends[-1]) if len(ends) else 0, path.stat().st_size
        item = np.dtype(dtype).itemsize if dtype else 4 if size == 4 * total else 2
        if size != item * total or (ends[1:] < ends[:-1]).any():
            problem = f"{path} has {size:,} bytes, and {index.name} is of {total:,} tokens"
            raise UserError(problem, hint="Tokenize it again, or name its dtype.", code="corrupt_corpus")
        files.append(TokenFile(path, token_array(path, f"<u{item}"), np.concatenate([[0], ends])))
    return files
