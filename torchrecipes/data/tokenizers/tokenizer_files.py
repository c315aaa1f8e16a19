"""Tokenizers as they are found on disk: which file of a folder is read, and which token has which role.

1. A `tokenizer.json` is read as it stands; `tokenizer_config.json` and `special_tokens_map.json` beside it say which
   token is the mask, the padding and so on. Where they do not, the usual names do (`[MASK]`, `<mask>`, ...).
2. BERT's original `vocab.txt` becomes the WordPiece tokenizer that BERT used.
3. A SentencePiece `.model` is converted (sentencepiece_model.py).

Nothing is downloaded and nothing of what is read is executed.
"""

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from torchrecipes.data.tokenizers.sentencepiece_model import load_sentencepiece
from torchrecipes.errors import UserError

ROLES = ("cls", "sep", "pad", "mask", "unk", "bos", "eos")

# What the special tokens are called where no file says so, the likeliest first.
USUAL_NAMES = {
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "pad": ("[PAD]", "<pad>", "<|padding|>", "<|pad|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "unk": ("[UNK]", "<unk>"),
    "bos": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>"),
    "eos": ("</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>"),
}

INERT = re.compile(r"<\|inert_\d+\|>")

SLOW_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
)


def read_tokenizer(path: Path, causal: bool = False) -> tuple[tokenizers.Tokenizer, dict[str, AddedToken]]:
    """Reads a `tokenizer.json`, a Hugging Face folder, a BERT `vocab.txt` or a SentencePiece `.model`.

    Args:
        path: the file or folder.
        causal: for a model that predicts the next token: a SentencePiece model gets none of BERT's special tokens.

    Returns:
        The tokenizer as it is in the file, without inert tokens, truncation and padding, and the special tokens by
        role. A token of the second may be missing in the first.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder. A tokenizer is a tokenizer.json, a folder with one (as Hugging Face's "
            f"save_pretrained writes it), or a SentencePiece .model. Nothing is downloaded{_how_to_download(path)}"
        )
    if path.is_dir():
        path = _file_in(path)
    if path.name == "vocab.txt":
        return _read_vocab_txt(path)
    if path.suffix == ".json":
        backend = read_json(path)
        return backend, _roles(path, backend)
    if path.suffix == ".model":
        return _read_sentencepiece(path, causal)
    raise UserError(
        f"{path}: not a tokenizer file that is known. Give a tokenizer.json, a folder with one, a BERT vocab.txt, or a "
        "SentencePiece .model."
    )


def _how_to_download(path: Path) -> str:
    """What to say of a path that may be meant as a name of the hub (`gpt2`, `FacebookAI/roberta-base`)."""
    # `runs/one` is a path where there is a folder `runs`.
    a_path = path.suffix in (".json", ".txt", ".model") or (len(path.parts) > 1 and path.parent.exists())
    if a_path or len(path.parts) > 2:
        return "."
    return f". For a model of the hub and its tokenizer: hf download {path} --local-dir {path.name}"


def _file_in(folder: Path) -> Path:
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            return folder / name
    slow = [name for name in SLOW_FILES if (folder / name).is_file()]
    if not slow:
        remedy = "Give the folder that holds the tokenizer."
        checkpoints = sorted((folder / "checkpoints").glob("step-*[0-9]"), key=lambda path: (len(path.name), path.name))
        if checkpoints:
            remedy = f"It is a run's: give one of its checkpoints, such as the newest, {checkpoints[-1]}"
        raise UserError(f"{folder}: no tokenizer.json in this folder. {remedy}")
    model = next((name for name in slow if name.endswith(".model")), None)
    hint = f" (or give {folder / model} itself: plain SentencePiece ids)" if model else ""
    raise UserError(
        f"{folder}: only files of a slow tokenizer here ({', '.join(slow)}), no tokenizer.json. Convert it once: "
        f"python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{folder}')"
        f".save_pretrained('{folder}')\"{hint}"
    )


def read_json(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a `tokenizer.json`, without inert tokens, truncation and padding.

    Raises:
        UserError: not such a file.
    """
    content = _json(path)
    try:
        content["added_tokens"] = [t for t in content["added_tokens"] if not INERT.fullmatch(t["content"])]
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(
            f"{path}: not a tokenizer.json that tokenizers {tokenizers.__version__} can read "
            f"({type(error).__name__}: {error}). Save it again, or upgrade tokenizers."
        ) from error
    # Many files carry the limits of the model they came with: a document would silently end there.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # a JSON error says line and column
        raise UserError(f"{path}: not readable as JSON ({error}). Get the file again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object, so no part of a tokenizer. Get the file again.")
    return content


def _roles(path: Path, backend: tokenizers.Tokenizer) -> dict[str, AddedToken]:
    stated: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = path.parent / name
        if path.name == "tokenizer.json" and beside.is_file():
            stated.update(_json(beside))
    roles = {}
    for role in ROLES:
        token = stated.get(f"{role}_token")
        if isinstance(token, dict):
            roles[role] = special_token(token["content"], lstrip=bool(token.get("lstrip")))
        elif isinstance(token, str):
            roles[role] = special_token(token)
        elif f"{role}_token" not in stated:
            known = (name for name in USUAL_NAMES[role] if backend.token_to_id(name) is not None)
            if name := next(known, getattr(backend.model, "unk_token", None) if role == "unk" else None):
                roles[role] = special_token(name)
    return roles


def special_token(content: str, lstrip: bool = False) -> AddedToken:
    """A special token; with `lstrip` it takes the blanks before it along."""
    return AddedToken(content, lstrip=lstrip, normalized=False, special=True)


def _read_vocab_txt(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, AddedToken]]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable UTF-8 text ({error}). Get the file again.") from error
    vocab = {token: i for i, token in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    missing = [name for name in ("[UNK]", "[CLS]", "[SEP]") if name not in vocab]
    if missing:
        raise UserError(
            f"{path}: a BERT vocabulary has a line {missing[0]}, this one has none. Give a tokenizer.json instead."
        )
    config_file = path.parent / "tokenizer_config.json"
    config = _json(config_file) if config_file.is_file() else {}
    backend = bert_wordpiece(
        vocab,
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        split_chinese=config.get("tokenize_chinese_chars", True),
    )
    names = {role: USUAL_NAMES[role][0] for role in ("cls", "sep", "pad", "mask", "unk")}
    return backend, {role: special_token(name) for role, name in names.items() if name in vocab}


def bert_wordpiece(
    vocab: dict[str, int], lowercase: bool, strip_accents: bool | None = None, split_chinese: bool = True
) -> tokenizers.Tokenizer:
    """BERT's tokenizer over `vocab`, which holds `[UNK]`, `[CLS]` and `[SEP]`: Devlin et al. 2018, appendix A.

    Args:
        vocab: ids by token; a token that goes on a word starts with `##`.
        lowercase: lower-cases the text.
        strip_accents: removes accents; None: as `lowercase`.
        split_chinese: makes every Chinese character a word of its own.
    """
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=split_chinese
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = between(backend, "[CLS]", "[SEP]")
    return backend


def between(backend: tokenizers.Tokenizer, cls: str, sep: str) -> processors.TemplateProcessing:
    """The post-processor that puts a text between `cls` and `sep`, both in the vocabulary of `backend`."""
    return processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(name, backend.token_to_id(name)) for name in (cls, sep)],
    )


def begin_with(backend: tokenizers.Tokenizer, bos: str) -> processors.TemplateProcessing:
    """The post-processor that puts `bos`, in the vocabulary of `backend`, before a text."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _read_sentencepiece(path: Path, causal: bool) -> tuple[tokenizers.Tokenizer, dict[str, AddedToken]]:
    backend, names = load_sentencepiece(path)
    if causal:
        return backend, {role: special_token(names[role]) for role in ("bos", "eos", "pad", "unk") if role in names}
    # What masked language modelling needs and the model lacks gets BERT's names, behind the model's own ids. The mask
    # takes the blank before it along: "a [MASK] b" is then what "a word b" is with the word masked.
    roles = {role: special_token(name) for role, name in names.items()}
    for role in ("cls", "sep", "pad", "mask"):
        roles.setdefault(role, special_token(USUAL_NAMES[role][0], lstrip=role == "mask"))
    backend.add_special_tokens([roles[role] for role in ("cls", "sep", "pad", "mask")])
    backend.post_processor = between(backend, roles["cls"].content, roles["sep"].content)
    return backend, roles
