"""`nanogpt_tokens`: flat files of ids, as nanoGPT's `prepare.py` scripts write them."""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from torchrecipes.data.token_files.source import TokenFile, TokenSource, find_token_files, token_array
from torchrecipes.errors import UserError

CHUNK = 1 << 24  # tokens


def nanogpt_tokens(
    path: str | list[str], dtype: Literal["uint16", "uint32"] = "uint16", eos_id: int | None = None
) -> TokenSource:
    """Ids in flat files without a header.

    Args:
        path: a `.bin` file, a folder of these, or a list.
        dtype: of the ids, little-endian.
        eos_id: the id that ends a document and belongs to it: 50256 in GPT-2's vocabulary. The files are read once to
            find it. None: a file is one document.

    Raises:
        UserError: there is no such file (code `no_such_file`); the corpus, when it is opened: no document ends in
            `eos_id` (`no_end_of_document`).
    """
    paths = find_token_files(path, ".bin")
    return TokenSource(", ".join(map(str, paths)), paths, partial(_read, paths, dtype, eos_id))


def _read(paths: list[Path], dtype: str, eos_id: int | None) -> list[TokenFile]:
    arrays = [token_array(path, np.dtype(dtype).newbyteorder("<")) for path in paths]
    files = [TokenFile(path, ids, _document_offsets(ids, eos_id)) for path, ids in zip(paths, arrays, strict=True)]
    if eos_id is not None and all(len(file.document_offsets) == 2 and len(file.tokens) for file in files):
        raise UserError(
            f"no document ends in {', '.join(map(str, paths))}: the id {eos_id} is not there",
            key="eos_id",
            hint="Name the id that ends a document, or leave it out: a file is one document then.",
            code="no_end_of_document",
        )
    return files


def _document_offsets(tokens: np.ndarray, eos_id: int | None) -> np.ndarray:
    ends = [np.zeros(1, np.int64)]
    if eos_id is not None:
        for start in range(0, len(tokens), CHUNK):
            ends.append(np.flatnonzero(tokens[start : start + CHUNK] == eos_id) + (start + 1))
    return np.concatenate([*ends, [len(tokens)]])
