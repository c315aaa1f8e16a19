"""Reads tokenizer files: which file of a folder is read, and which token has which role.

1. A `tokenizer.json` is read as it is; `tokenizer_config.json` and `special_tokens_map.json` beside it say which token
   is the mask, the padding and so on. Where they do not, the usual names do (`[MASK]`, `<mask>`, ...).
2. BERT's original `vocab.txt` becomes the WordPiece tokenizer that BERT used.
3. A SentencePiece `.model` is converted (sentencepiece_model.py).

Ids are those of the file, or the file is refused: `tokenizers` numbers added tokens by counting, whatever the file
says. Nothing is downloaded and nothing of what is read is executed.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import xxhash
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

PADDING = re.compile(r"<\|inert_\d+\|>")  # names of vocabulary padding

SLOW_FILES = "vocab.json merges.txt tokenizer.model spiece.model sentencepiece.bpe.model tiktoken.model".split()

CHAT_TEMPLATE = "chat_template.jinja"
IDS_KEY = "ids_xxh3"  # in tokenizer_config.json: how many ids there were when it was saved, and a checksum of the names
DOMAIN_SUFFIXES = "domain_suffixes"  # in tokenizer_config.json of a tokenizer of domain names
# Keys of tokenizer_config.json with which `transformers` would change what tokenizer.json says, or that name files.
REBUILD_KEYS = set(
    "add_bos_token add_eos_token add_prefix_space added_tokens_decoder auto_map backend clean_up_tokenization_spaces "
    "do_basic_tokenize do_lower_case errors from_slow gguf_file is_local legacy max_length merges merges_file "
    "name_or_path never_split pad_to_multiple_of sp_model_kwargs special_tokens_map_file split_special_tokens stride "
    "strip_accents tokenize_chinese_chars tokenizer_class tokenizer_file tokenizer_padding tokenizer_truncation "
    "trim_offsets truncation_strategy vocab vocab_file".split()
) | {IDS_KEY, *(f"{role}_token" for role in ROLES)}


@dataclass
class TokenizerFiles:
    """What a tokenizer's files say.

    Attributes:
        backend: the tokenizer as in the file, without vocabulary padding at its end, truncation and padding.
        roles: special tokens by role; a token may be missing in `backend`.
        config: the other keys of `tokenizer_config.json`, which a checkpoint keeps.
        chat_template: content of `chat_template.jinja`, or None.
    """

    backend: tokenizers.Tokenizer
    roles: dict[str, AddedToken]
    config: dict[str, Any] = field(default_factory=dict)
    chat_template: bytes | None = None


def read_tokenizer(path: Path, causal: bool = False) -> TokenizerFiles:
    """Reads a `tokenizer.json`, a Hugging Face folder, a BERT `vocab.txt` or a SentencePiece `.model`.

    Args:
        path: the file or folder.
        causal: for a model that predicts the next token: a SentencePiece model gets none of BERT's special tokens.

    Raises:
        UserError: there is no tokenizer (code `no_tokenizer`), a file cannot be read (`unreadable_tokenizer`), or its
            ids are not unique (`duplicate_ids`), would change (`moved_ids`) or have changed since it was saved
            (`changed_ids`).
    """
    if not path.exists():
        raise _no_tokenizer(
            f"there is no file or folder {path}",
            "Give a tokenizer.json, a folder with one (as Hugging Face's save_pretrained writes it), or a "
            f"SentencePiece .model. Nothing is downloaded{_how_to_download(path)}",
        )
    if path.is_dir():
        path = _file_in(path)
    if path.name == "vocab.txt":
        files = _read_vocab_txt(path)
    elif path.suffix == ".json":
        backend = read_json(path)
        _check_unchanged(path, backend)
        files = TokenizerFiles(backend, _roles(path, backend))
    elif path.suffix == ".model":
        files = _read_sentencepiece(path, causal)
    else:
        hint = "Give a tokenizer.json, a folder with one, a BERT vocab.txt, or a SentencePiece .model."
        raise _no_tokenizer(f"{path} is not a tokenizer file", hint)
    if path.name in ("tokenizer.json", "vocab.txt"):
        files.config = {key: value for key, value in _config(path).items() if key not in REBUILD_KEYS}
        template = path.with_name(CHAT_TEMPLATE)
        files.chat_template = template.read_bytes() if template.is_file() else None
    return files


def _how_to_download(path: Path) -> str:
    """Return the end of the hint for a path that may be meant as a name on the hub (`gpt2`, `you/model`)."""
    # `runs/one` is a path where there is a folder `runs`.
    a_path = path.suffix in (".json", ".txt", ".model") or (len(path.parts) > 1 and path.parent.exists())
    if a_path or len(path.parts) > 2:
        return "."
    return f". For a model on the hub and its tokenizer: hf download {path} --local-dir {path.name}"


def _file_in(folder: Path) -> Path:
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            return folder / name
    slow = [name for name in SLOW_FILES if (folder / name).is_file()]
    if not slow:
        hint = "Give the folder that holds the tokenizer."
        checkpoints = sorted((folder / "checkpoints").glob("step-*[0-9]"), key=lambda path: (len(path.name), path.name))
        if checkpoints:
            hint = f"It is the folder of a run: give one of its checkpoints, such as the newest, {checkpoints[-1]}"
        raise _no_tokenizer(f"{folder} holds no tokenizer.json", hint)
    model = next((name for name in slow if name.endswith(".model")), None)
    plain = f" (or give {folder / model} itself: plain SentencePiece ids)" if model else ""
    raise _no_tokenizer(
        f"{folder} holds only files of a slow tokenizer ({', '.join(slow)}), no tokenizer.json",
        'Convert it once: python -c "from transformers import AutoTokenizer as A; '
        f"A.from_pretrained('{folder}').save_pretrained('{folder}')\"{plain}",
    )


def _no_tokenizer(problem: str, hint: str) -> UserError:
    return UserError(problem, key="path", hint=hint, code="no_tokenizer")


def _unreadable(problem: str, hint: str = "Get the file again.") -> UserError:
    return UserError(problem, hint=hint, code="unreadable_tokenizer")


def read_json(path: Path) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json`, without vocabulary padding at its end, truncation and padding.

    Tokens that `transformers` added after the padding keep their ids, and so the padding before them stays.

    Raises:
        UserError: not such a file, or its ids are not unique or not those that `tokenizers` gives.
    """
    content = _json(path)
    try:
        vocab = content["model"]["vocab"]
        if isinstance(vocab, list):
            vocab = {name: i for i, (name, _) in enumerate(vocab)}
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        last = max((i for name, i in (vocab | added).items() if not PADDING.fullmatch(name)), default=-1)
        content["added_tokens"] = [
            token for token in content["added_tokens"] if token["id"] < last or not PADDING.fullmatch(token["content"])
        ]
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        stated = vocab | {token["content"]: token["id"] for token in content["added_tokens"]}
    except Exception as error:  # tokenizers raises plain Exception
        problem = f"{path} is not a tokenizer.json that tokenizers {tokenizers.__version__} can read"
        hint = "Save it again, or upgrade tokenizers."
        raise _unreadable(f"{problem} ({type(error).__name__}: {error})", hint) from error
    _check_ids(path, stated, backend)
    # Many files carry the limits of the model they came with: documents would be cut there silently.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_ids(path: Path, stated: dict[str, int], backend: tokenizers.Tokenizer) -> None:
    names: dict[int, str] = {}
    double = []
    for name, i in stated.items():
        if names.setdefault(i, name) != name:
            double.append(f"{i} ({names[i]!r}, {name!r})")
    if double:
        hint = "Give every token an id of its own."
        raise UserError(f"{path} gives an id to two tokens: {_some(double)}", hint=hint, code="duplicate_ids")
    moved = [
        f"{name!r} has id {i}, but would get {backend.token_to_id(name)}"
        for name, i in stated.items()
        if backend.token_to_id(name) != i
    ]
    if moved:
        hint = "Added tokens come after the vocabulary, without a gap; number them so."
        raise UserError(f"{path}: {_some(moved)}", hint=hint, code="moved_ids")


def ids_checksum(backend: tokenizers.Tokenizer, count: int) -> str:
    """The number of ids and the xxh3-128 (hex) of their tokens' names in order: what must not change after training."""
    names = [""] * count
    for name, i in backend.get_vocab(with_added_tokens=True).items():
        if i < count:
            names[i] = name
    return f"{count}-{xxhash.xxh3_128_hexdigest(chr(0).join(names).encode('utf-8', 'surrogatepass'))}"


def _check_unchanged(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Checks the ids of a tokenizer that `Tokenizer.save` wrote; tokens that were added later do not matter."""
    stated = _config(path).get(IDS_KEY) if path.name == "tokenizer.json" else None
    if not isinstance(stated, str) or not (count := stated.partition("-")[0]).isdecimal():
        return
    if ids_checksum(backend, int(count)) != stated:
        raise UserError(
            f"the first {int(count):,} tokens of {path} are not those that were saved: their ids have changed, and a "
            "model that was trained with them would read other words",
            hint=f"Restore the file. If it is meant to be another tokenizer, remove {IDS_KEY} from "
            "tokenizer_config.json.",
            code="changed_ids",
        )


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:  # a JSON error says line and column
        raise _unreadable(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise _unreadable(f"{path} does not hold a JSON object")
    return content


def _config(path: Path) -> dict[str, Any]:
    """The content of the `tokenizer_config.json` beside `path`."""
    file = path.with_name("tokenizer_config.json")
    return _json(file) if file.is_file() else {}


def _roles(path: Path, backend: tokenizers.Tokenizer) -> dict[str, AddedToken]:
    stated: dict[str, Any] = {}
    if path.name == "tokenizer.json":
        special_tokens_map = path.with_name("special_tokens_map.json")
        stated = (_json(special_tokens_map) if special_tokens_map.is_file() else {}) | _config(path)
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


def _read_vocab_txt(path: Path) -> TokenizerFiles:
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise _unreadable(f"{path} is not UTF-8 text ({error})") from error
    lines = lines[:-1] if lines[-1] == "" else lines
    vocab = {token: i for i, token in enumerate(lines)}
    double = [
        f"{token!r} in lines {i + 1} and {vocab[token] + 1}" for i, token in enumerate(lines) if vocab[token] != i
    ]
    if double:
        hint = "The number of a line is an id: give every line another token."
        raise UserError(f"{path} has tokens twice: {_some(double)}", hint=hint, code="duplicate_ids")
    missing = [name for name in ("[UNK]", "[CLS]", "[SEP]") if name not in vocab]
    if missing:
        problem = f"{path} has no line {missing[0]}, which a BERT vocabulary has"
        raise _unreadable(problem, "Give a tokenizer.json instead.")
    config = _config(path)
    backend = bert_wordpiece(
        vocab,
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        split_chinese=config.get("tokenize_chinese_chars", True),
    )
    names = {role: USUAL_NAMES[role][0] for role in ("cls", "sep", "pad", "mask", "unk")}
    return TokenizerFiles(backend, {role: special_token(name) for role, name in names.items() if name in vocab})


def bert_wordpiece(
    vocab: dict[str, int], lowercase: bool, strip_accents: bool | None = None, split_chinese: bool = True
) -> tokenizers.Tokenizer:
    """BERT's tokenizer over `vocab`, which holds `[UNK]`, `[CLS]` and `[SEP]`: Devlin et al. 2018, appendix A.

    Args:
        vocab: ids by token; a token that continues a word starts with `##`.
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


def _read_sentencepiece(path: Path, causal: bool) -> TokenizerFiles:
    backend, names = load_sentencepiece(path)
    if causal:
        roles = {role: special_token(names[role]) for role in ("bos", "eos", "pad", "unk") if role in names}
        return TokenizerFiles(backend, roles)
    # What masked language modeling needs and the model lacks gets BERT's names, after the model's own ids. The mask
    # takes the blank before it along: "a [MASK] b" is then "a word b" with the word masked.
    roles = {role: special_token(name) for role, name in names.items()}
    for role in ("cls", "sep", "pad", "mask"):
        roles.setdefault(role, special_token(USUAL_NAMES[role][0], lstrip=role == "mask"))
    backend.add_special_tokens([roles[role] for role in ("cls", "sep", "pad", "mask")])
    backend.post_processor = between(backend, roles["cls"].content, roles["sep"].content)
    return TokenizerFiles(backend, roles)
