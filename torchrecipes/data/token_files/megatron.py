"""`megatron_tokens`: the indexed datasets of Megatron-LM (also of GPT-NeoX and NeMo): a `.bin` file and its `.idx`.

The index is, little-endian: the magic bytes, a version (uint64), the code of the dtype (uint8), the number of sequences
and of document boundaries (uint64 each), the lengths of the sequences (int32), their places in bytes (int64), and the
document boundaries as numbers of sequences (int64).
"""

import struct
from functools import partial
from pathlib import Path

import numpy as np

from torchrecipes.data.token_files.source import TokenFile, TokenSource, find_token_files, token_array
from torchrecipes.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # the codes of floating-point types are left out


def megatron_tokens(path: str | list[str]) -> TokenSource:
    """Ids in a `.bin` file, whose `.idx` beside it says where sequences and documents are.

    Args:
        path: a `.bin` file, its path without the ending, a folder of these, or a list.

    Raises:
        UserError: there is no such file (code `no_such_file`).
    """
    given = [path] if isinstance(path, str) else path
    paths = find_token_files([f"{item}.bin" if Path(f"{item}.bin").is_file() else item for item in given], ".bin")
    return TokenSource(", ".join(map(str, paths)), paths, partial(_read, paths))


def _read(paths: list[Path]) -> list[TokenFile]:
    files = []
    for path in paths:
        index = path.with_suffix(".idx")
        try:
            dtype, lengths, places, documents = _read_index(index)
        except FileNotFoundError:
            raise UserError(f"there is no {index}, the index of {path.name}", code="no_such_file") from None
        except (OSError, ValueError, struct.error, KeyError) as error:
            problem = f"{index} is no index of Megatron-LM: {error}"
            raise UserError(problem, hint="Make the files again.", code="corrupt_corpus") from None
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if (places != offsets[:-1] * np.dtype(dtype).itemsize).any():
            raise UserError(
                f"the sequences of {path} do not lie one after the other",
                hint="Write them in order, with Megatron-LM's merge_datasets.py.",
                code="corrupt_corpus",
            )
        tokens = token_array(path, dtype)
        if len(tokens) != offsets[-1]:
            problem = f"{path} has {len(tokens):,} ids, and its index counts {offsets[-1]:,}"
            raise UserError(problem, hint="Make the files again.", code="corrupt_corpus")
        files.append(TokenFile(path, tokens, offsets[documents]))
    return files


def _read_index(path: Path) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """The dtype, and lengths, places and document boundaries."""
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise ValueError("its first bytes are others")
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", content, len(MAGIC))
    if version != 1:
        raise ValueError(f"its version is {version}, not 1")
    if code not in DTYPES:
        raise ValueError(f"its dtype has the code {code}, which is not of integers")
    start = len(MAGIC) + struct.calcsize("<QBQQ")
    lengths = np.frombuffer(content, "<i4", sequences, start)
    places = np.frombuffer(content, "<i8", sequences, start + lengths.nbytes)
    documents = np.frombuffer(content, "<i8", boundaries, start + lengths.nbytes + places.nbytes)
    ends = (int(documents[0]), int(documents[-1])) if boundaries else None
    if ends != (0, sequences) or (np.diff(documents) < 0).any():
        raise ValueError("its document boundaries do not cover its sequences")
    return DTYPES[code], lengths, places, documents
