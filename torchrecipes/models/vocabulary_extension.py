"""`extend_vocabulary`: rows for new tokens in the embedding and the head of a Hugging Face folder."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from torchrecipes.atomic_write import write_atomically
from torchrecipes.errors import UserError
from torchrecipes.model_folder import INDEX
from torchrecipes.models.config_json import read_json
from torchrecipes.models.hub import COMPANIONS, SUFFIX_FILE, write_tensors
from torchrecipes.models.stored_tensors import open_tensors

# What embeddings and heads are called in the folders of `transformers` and of this library.
_VOCABULARY = re.compile(
    r"(^|\.)(wte|embed_tokens|word_embeddings|tok_embeddings|embed_in|embed_out|lm_head|decoder|predictions|"
    r"vocab_projector|head|encoder)\.(weight|bias)$"
)


def extend_vocabulary(
    folder: str | Path,
    output: str | Path,
    first_id: int,
    pieces: Sequence[Sequence[int]],
    rows: int,
    init: Literal["pieces", "mean"] = "pieces",
) -> list[str]:
    """Writes a folder's model with rows for new tokens; all other values are the same bits.

    A new token's row is the mean of the rows of the pieces that its text consisted of, in the embedding and in the
    head; `mean` and a token without pieces take the mean of all rows, with which a new token neither takes much
    probability from the others nor is surprising (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
    Language Models"). So do rows of padding after them.

    Args:
        folder: a Hugging Face folder or a checkpoint, with a `config.json`.
        output: the new folder; `config.json` and what travels with a model are copied into it, a tokenizer is not.
        first_id: the id of the first new token; rows from here on are overwritten.
        pieces: for every new token, ids below `first_id`.
        rows: of the new embedding; the folder's or more.
        init: `pieces` or `mean`.

    Returns:
        The names of the tensors that have new rows.

    Raises:
        UserError: no `config.json` (code `no_config`), no embedding in the folder (`no_embedding`), fewer rows than
            tokens; or what `open_tensors` raises.
    """
    folder, output = Path(folder), Path(output)
    if not (folder / "config.json").is_file():
        problem = f"{folder} has no config.json that says how many tokens its model knows"
        raise UserError(problem, hint="Give a Hugging Face folder or a checkpoint.", code="no_config")
    config = read_json(folder / "config.json")
    size = config.get("vocab_size")
    if not isinstance(size, int) or first_id > size or rows < max(size, first_id + len(pieces)):
        problem = f"the model in {folder} has {size} rows, its tokenizer {first_id:,} ids, and {rows:,} rows are wanted"
        raise UserError(problem, hint="Give the model its own tokenizer.", code="vocab_too_large")
    with open_tensors(folder) as stored:
        found = [name for name, tensor in stored.items() if _VOCABULARY.search(name) and tensor.shape[0] == size]
        if not any(len(stored[name].shape) == 2 for name in found):
            problem = f"{folder} has no embedding of {size:,} rows under a name that is known"
            raise UserError(problem, hint="Extend it with transformers instead.", code="no_embedding")
        output.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.read() for name, tensor in stored.items()}
    for name in found:
        tensors[name] = _extend(tensors[name], first_id, pieces, rows, init)
    write_tensors(tensors, output / "model.safetensors")
    (output / INDEX).unlink(missing_ok=True)
    for name in (*COMPANIONS, SUFFIX_FILE):
        if (folder / name).is_file():
            (output / name).parent.mkdir(exist_ok=True)
            write_atomically(output / name, [(folder / name).read_bytes()])
    text = json.dumps(config | {"vocab_size": rows}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(output / "config.json", [text.encode()])
    return found


def _extend(table: Tensor, first_id: int, pieces: Sequence[Sequence[int]], rows: int, init: str) -> Tensor:
    """A table `[rows, ...]` made of one `[V, ...]`; means are taken in fp64."""
    known = table[:first_id].double()
    mean = known.mean(0)
    new = mean.expand(rows - first_id, *table.shape[1:]).clone()
    if init == "pieces":
        for number, ids in enumerate(pieces):
            if ids:
                new[number] = known[list(ids)].mean(0)
    extended = torch.cat((table[:first_id], new.to(table.dtype)))
    # Rows of padding that stay padding keep their values.
    used = first_id + len(pieces)
    extended[used : len(table)] = table[used:]
    return extended
