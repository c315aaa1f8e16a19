"""Converts a SentencePiece `.model` file to a `tokenizers` object that gives the same ids.

1. `sentencepiece` loads the file, which checks it. The few fields that its Python interface does not show (scores as
   stored, the table of the normalizer) are read from the file, a protocol buffer, in 50 lines: `sentencepiece`'s own
   message classes would need the `protobuf` package, which `sentencepiece` does not install.
2. The pieces keep their ids. What a masked language model needs and the model lacks is added after them.
3. The normalizer is the model's own table (`Precompiled`) and its treatment of blanks.

The ids are equal on text. They differ in rare cases in which the two libraries do:
- Several combining marks on one character, in an order that is not Unicode's, come into Unicode's order; a mark that
  the table does not know on a character that it replaces ("½" with an accent) is lost.
- Of two segmentations with the same score ("====" as "=" "===" or "===" "="), either may be taken.
- A text that begins with a user-defined symbol has no blank before it.
- The literal texts "\u2581" and "<0x41>" are a blank and a byte.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from torchrecipes.errors import UserError

BLANK = "\u2581"  # how SentencePiece writes a blank

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # a piece's type
UNIGRAM, BPE = 1, 2  # a model's type


@dataclass
class Model:
    """The fields of `sentencepiece_model.proto` that decide which ids a text gets, with the defaults stated there."""

    pieces: list[tuple[str, float, int]]  # text, score, type
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def load_sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Reads a `.model` file.

    Returns:
        The tokenizer, without a post-processor, and the special tokens by role (`cls`, `sep`, `pad`, `mask`, `unk`,
        `bos`, `eos`) as far as the model has them: `[CLS]`, `<cls>` or else its begin-of-sentence token is `cls`;
        `[SEP]`, `<sep>` or else its end-of-sentence token is `sep`; `[MASK]`, `<mask>` is `mask`.

    Raises:
        UserError: no SentencePiece model (code `unreadable_tokenizer`), or one of a kind that `tokenizers` cannot
            express (`unsupported_sentencepiece`).
    """
    try:
        content = path.read_bytes()
        library = SentencePieceProcessor(model_proto=content)
        model = _parse(content)
        if UNKNOWN not in (kind for _, _, kind in model.pieces):
            raise ValueError("it has no unknown piece")
        for wrong, what in (
            (model.model_type not in (UNIGRAM, BPE), "its type is neither unigram nor bpe"),
            (model.whitespace_as_suffix, "it was trained with treat_whitespace_as_suffix"),
            (not model.escape_whitespaces, "it was trained with escape_whitespaces=false"),
        ):
            if wrong:
                raise UserError(
                    f"the SentencePiece model {path} cannot be used: {what}",
                    hint="Train it with --model_type=unigram or bpe and without that option, or use train_wordpiece.",
                    code="unsupported_sentencepiece",
                )
        return _convert(model, composes=library.normalize("e\u0301").endswith("\u00e9")), _roles(model)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(
            f"{path} is not a SentencePiece model ({error})",
            hint="Give the .model file that spm_train wrote.",
            code="unreadable_tokenizer",
        ) from error


def _convert(model: Model, composes: bool) -> Tokenizer:
    # An unused piece is never produced: its name gets a blank, which normalized text does not contain.
    names = [f"unused {i}" if kind == UNUSED else text for i, (text, _, kind) in enumerate(model.pieces)]
    unknown = next(i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN)
    if model.model_type == UNIGRAM:
        vocab = [(name, score) for name, (_, score, _) in zip(names, model.pieces, strict=True)]
        tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unknown, byte_fallback=model.byte_fallback))
    else:
        vocab = {name: i for i, name in enumerate(names)}
        tokenizer = Tokenizer(
            models.BPE(
                vocab, _merges(model), unk_token=names[unknown], fuse_unk=True, byte_fallback=model.byte_fallback
            )
        )

    before: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if composes:
        # `Precompiled` looks up single characters and short clusters where SentencePiece looks for the longest match:
        # what consists of more (decomposed Hangul, "U" with two dots, half-width kana) is composed before and after.
        before = [normalizers.NFC(), *before, normalizers.NFC()]
    if model.remove_extra_whitespaces:
        # With a prefix, one blank may stay in front: it is what the prefix would be, and "[MASK] word" needs it.
        ends = r" +\z" if model.add_dummy_prefix else r"\A +| +\z"
        before += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(ends), "")]
    elif model.add_dummy_prefix:
        # The prefix comes in front of a blank, too, and Metaspace would add none there.
        before.append(normalizers.Replace(Regex(r"\A(?= )"), " "))
    tokenizer.normalizer = normalizers.Sequence(before)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=BLANK,
        prepend_scheme="first" if model.add_dummy_prefix else "never",
        split=not any(BLANK in name[1:] for name in names),  # pieces that span words need the text in one piece
    )
    clean = [decoders.Strip(" ", left=1, right=0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *clean]
    )
    kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(text, special=kinds[kind], normalized=not kinds[kind])
            for text, _, kind in model.pieces
            if kind in kinds
        ]
    )
    return tokenizer


def _merges(model: Model) -> list[tuple[str, str]]:
    """The pairs that BPE joins, the best first: SentencePiece joins whatever gives the piece of the highest score."""
    scores = {text: score for text, score, kind in model.pieces if kind == NORMAL}
    pairs = [
        (-score, i, text[:i], text[i:])
        for text, score in scores.items()
        for i in range(1, len(text))
        if text[:i] in scores and text[i:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _roles(model: Model) -> dict[str, str]:
    names = {text for text, _, kind in model.pieces if kind in (CONTROL, USER_DEFINED)}

    def first(*candidates: str) -> str | None:
        return next((name for name in candidates if name in names), None)

    def at(index: int) -> str | None:
        return model.pieces[index][0] if 0 <= index < len(model.pieces) else None

    bos, eos = at(model.bos_id), at(model.eos_id)
    roles = {
        "unk": next(text for text, _, kind in model.pieces if kind == UNKNOWN),
        "bos": bos,
        "eos": eos,
        "pad": at(model.pad_id) or first("[PAD]", "<pad>"),
        "cls": first("[CLS]", "<cls>") or bos,
        "sep": first("[SEP]", "<sep>") or eos,
        "mask": first("[MASK]", "<mask>"),
    }
    return {role: name for role, name in roles.items() if name is not None}


def _parse(content: bytes) -> Model:
    """The message `ModelProto` of sentencepiece_model.proto; the numbers below are its field numbers."""
    model = Model(pieces=[])
    for field, value in _fields(content):
        if field == 1:
            piece = dict(_fields(value))
            # Nine digits are all of a float32, and few enough for tokenizers to read the same number back from JSON.
            score = float(f"{struct.unpack('<f', piece.get(2, bytes(4)))[0]:.9g}")
            model.pieces.append((piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
        elif field == 2:
            trainer = dict(_fields(value))
            model.model_type = trainer.get(3, UNIGRAM)
            model.whitespace_as_suffix = bool(trainer.get(24, 0))
            model.byte_fallback = bool(trainer.get(35, 0))
            model.bos_id, model.eos_id = _signed(trainer.get(41, 1)), _signed(trainer.get(42, 2))
            model.pad_id = _signed(trainer.get(43, -1))
        elif field == 3:
            normalizer = dict(_fields(value))
            model.charsmap = normalizer.get(2, b"")
            model.add_dummy_prefix = bool(normalizer.get(3, 1))
            model.remove_extra_whitespaces = bool(normalizer.get(4, 1))
            model.escape_whitespaces = bool(normalizer.get(5, 1))
    return model


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer message: number and value, an int for a varint, else the bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
        else:
            if kind == 2:
                length, position = _varint(message, position)
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
            else:
                raise ValueError(f"a field of the unknown wire type {kind}")
            value = message[position : position + length]
            if len(value) < length:
                raise ValueError("it ends early")
            position += length
        yield key >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
    raise ValueError("it ends early")


def _signed(value: int) -> int:
    """An int32 as protocol buffers store it: negative numbers as 64-bit two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value
