"""Trains tokenizers on documents: WordPiece, byte-level BPE, Unigram, characters.

The same documents give the same vocabulary and the same fingerprint in every run and on every machine. The trainers of
`tokenizers` are not deterministic in two places, which are avoided here: WordPiece numbers characters in the order of a
hash table (they are given in order instead), and Unigram's scores depend on how threads share the work (SentencePiece's
own trainer adds them up in a fixed order, and is faster).
"""

import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tokenizers
import xxhash
from sentencepiece import SentencePieceTrainer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from torchrecipes.atomic_write import check_writable, write_atomically
from torchrecipes.data.progress import Progress, waiting_for
from torchrecipes.data.sources.records import Document, Source, require_documents
from torchrecipes.data.tokenizers.sentencepiece_model import load_sentencepiece
from torchrecipes.data.tokenizers.tokenizer import Tokenizer, make_tokenizer, one_thread
from torchrecipes.data.tokenizers.tokenizer_files import USUAL_NAMES, bert_wordpiece, between, read_json, special_token
from torchrecipes.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4 of every tokenizer of an encoder
END = "<|endoftext|>"  # id 0 of every tokenizer of a causal model: begins documents, ends them, and pads


def train_wordpiece(
    source: Source,
    vocab_size: int = 16_384,
    lowercase: bool = True,
    limit_alphabet: int = 1_000,
    pad_vocab_to_multiple_of: int = 64,
    sample_fraction: float = 1.0,
    folder: str | Path | None = None,
    special_tokens: str = "text",
) -> Tokenizer:
    """Trains BERT's tokenizer: words and parts of words (`##ing`), as in Devlin et al. 2018.

    Args:
        source: the documents; read twice.
        vocab_size: number of ids, special tokens included; fewer where the text does not give as many.
        lowercase: lower-cases the text and removes accents.
        limit_alphabet: characters in the vocabulary, the most frequent ones; others become `[UNK]`.
        pad_vocab_to_multiple_of: the vocabulary is padded to a multiple of this.
        sample_fraction: fraction of the documents that the vocabulary is made from, chosen by a hash of their text: a
            few GB are enough, and take memory in proportion.
        folder: where the tokenizer is saved; one that is there is loaded if it came from the same source and settings.
            None: not saved.
        special_tokens: what the names of special tokens are in documents: "text", characters like others, or "honor",
            the tokens, which the vocabulary is then not made from.

    Raises:
        UserError: no documents (code `no_documents`); `vocab_size` cannot hold the characters; `folder` holds another
            tokenizer (`other_tokenizer`) or cannot be written.
    """

    def train(source: Source) -> tokenizers.Tokenizer:
        blank = bert_wordpiece(dict.fromkeys(SPECIAL, 0), lowercase)  # for its normalizer and its words
        anywhere: Counter[str] = Counter()
        inside: Counter[str] = Counter()
        for chunk, count in _count_words(source, sample_fraction).items():
            for word, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(chunk)):
                for i, character in enumerate(word):
                    anywhere[character] += count
                    if i:
                        inside[character] += count
        # Equally frequent ones in the order of their code points.
        alphabet = sorted(sorted(anywhere, key=lambda c: (-anywhere[c], c))[:limit_alphabet])
        first = [*SPECIAL, *alphabet, *(f"##{c}" for c in alphabet if c in inside)]
        if len(first) > vocab_size:
            raise UserError(
                f"{vocab_size:,} ids cannot hold the {len(first):,} characters and special tokens of this text",
                key="vocab_size",
                hint=f"Set vocab_size to twice that or more, or limit_alphabet below {len(alphabet):,}.",
            )
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=first,  # in this order, and every character of a word is among them
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,  # its bars and ours would overwrite each other
        )
        blank.model = models.WordPiece(unk_token="[UNK]")
        _train(blank, source, sample_fraction, trainer)
        # The trainer made special tokens of all characters: only the vocabulary is kept.
        return bert_wordpiece(blank.get_vocab(), lowercase)

    settings = {"type": "wordpiece", "vocab_size": vocab_size, "lowercase": lowercase, "limit_alphabet": limit_alphabet}
    settings["sample_fraction"] = sample_fraction
    return _load_or_train(folder, settings, source, train, pad_vocab_to_multiple_of, False, special_tokens)


def train_bpe(
    source: Source,
    vocab_size: int = 32_768,
    causal: bool = False,
    pad_vocab_to_multiple_of: int = 64,
    sample_fraction: float = 1.0,
    folder: str | Path | None = None,
    special_tokens: str = "text",
) -> Tokenizer:
    """Trains a byte-level BPE tokenizer like GPT-2's (Radford et al. 2019).

    It has no unknown text, keeps blanks and letter case, and `decode` restores the text (in Unicode's NFC form).

    Args:
        source: the documents; read once.
        vocab_size: number of ids, special tokens and 256 bytes included; fewer where the text does not give as many.
        causal: for a model that predicts the next token: the only special token is `<|endoftext|>`, and documents are
            `<|endoftext|> text`. False: the special tokens of BERT, and `[CLS] text [SEP]`.
        pad_vocab_to_multiple_of: the vocabulary is padded to a multiple of this.
        sample_fraction, folder, special_tokens: as for `train_wordpiece`.

    Raises:
        UserError: as for `train_wordpiece`.
    """

    def train(source: Source) -> tokenizers.Tokenizer:
        alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), (END,) if causal else SPECIAL
        if vocab_size < len(special) + len(alphabet):
            least = len(special) + len(alphabet)
            problem = f"{vocab_size:,} ids cannot hold 256 bytes and {len(special)} special tokens"
            raise UserError(problem, key="vocab_size", hint=f"Set {least} or more.")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[special_token(name, lstrip=name == "[MASK]") for name in special],
            initial_alphabet=alphabet,
            show_progress=False,  # its bars and ours would overwrite each other
        )
        _train(backend, source, sample_fraction, trainer)
        return backend

    settings = {"type": "bpe", "vocab_size": vocab_size, "sample_fraction": sample_fraction}
    return _load_or_train(folder, settings, source, train, pad_vocab_to_multiple_of, causal, special_tokens)


def train_unigram(
    source: Source,
    vocab_size: int = 32_768,
    lowercase: bool = False,
    causal: bool = False,
    pad_vocab_to_multiple_of: int = 64,
    sample_fraction: float = 1.0,
    folder: str | Path | None = None,
    special_tokens: str = "text",
) -> Tokenizer:
    """Trains a Unigram tokenizer (Kudo 2018) with SentencePiece, on text in Unicode's NFKC form.

    Args:
        source: the documents; read once.
        vocab_size: number of ids, special tokens included; fewer where the text does not give as many.
        lowercase: lower-cases the text.
        causal: as for `train_bpe`; `<unk>` is a special token, too.
        pad_vocab_to_multiple_of: the vocabulary is padded to a multiple of this.
        sample_fraction, folder, special_tokens: as for `train_wordpiece`.

    Raises:
        UserError: as for `train_wordpiece`.
    """

    def train(source: Source) -> tokenizers.Tokenizer:
        normalizer = normalizers.Sequence([normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])])
        words: Counter[str] = Counter()
        for chunk, count in _count_words(source, sample_fraction).items():
            for word in normalizer.normalize_str(chunk).split():
                words[word] += count
        model = io.BytesIO()
        with tempfile.TemporaryDirectory() as scratch:
            table = Path(scratch) / "words.tsv"
            rows = (f"{word}\t{count}\n" for word, count in sorted(words.items(), key=lambda row: (-row[1], row[0])))
            with table.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(rows)
            try:
                with waiting_for("training the vocabulary"):
                    SentencePieceTrainer.train(
                        input=str(table),
                        input_format="tsv",
                        model_writer=model,
                        model_type="unigram",
                        vocab_size=vocab_size,
                        hard_vocab_limit=False,  # fewer pieces where the text does not give as many
                        normalization_rule_name="identity",  # done above
                        character_coverage=0.9999,  # rarer characters are unknown
                        num_threads=8,  # fixed: the sums over threads depend on it
                        minloglevel=2,
                        **_CAUSAL_PIECES if causal else _PIECES,
                    )
            except RuntimeError as error:
                problem = f"{vocab_size:,} ids do not fit this text (SentencePiece: {error})"
                raise UserError(problem, key="vocab_size", hint="Set another number.") from error
            path = Path(scratch) / "unigram.model"
            path.write_bytes(model.getvalue())
            backend, _ = load_sentencepiece(path)
        backend.normalizer = normalizer
        # Any white space separates words, and every word gets the mark of a blank before it.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        return backend

    settings = {"type": "unigram", "vocab_size": vocab_size, "lowercase": lowercase, "sample_fraction": sample_fraction}
    return _load_or_train(folder, settings, source, train, pad_vocab_to_multiple_of, causal, special_tokens)


# SentencePiece's names for its special pieces; an id of -1 is none.
_PIECES = dict(zip(("pad_piece", "unk_piece", "bos_piece", "eos_piece"), SPECIAL, strict=False)) | {
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": 2,
    "eos_id": 3,
    "control_symbols": SPECIAL[4],
}
_CAUSAL_PIECES = {"eos_piece": END, "unk_piece": "<unk>", "eos_id": 0, "unk_id": 1, "pad_id": -1, "bos_id": -1}


def train_char(
    source: Source,
    limit_alphabet: int = 1_000,
    causal: bool = False,
    pad_vocab_to_multiple_of: int = 1,
    sample_fraction: float = 1.0,
    folder: str | Path | None = None,
    special_tokens: str = "text",
) -> Tokenizer:
    """Makes a tokenizer whose tokens are characters (code points): line ends and blanks are characters like others.

    Args:
        source: the documents; read once.
        limit_alphabet: characters in the vocabulary, the most frequent ones; others are unknown.
        causal: as for `train_bpe`; `<unk>` is a special token, too.
        pad_vocab_to_multiple_of: the vocabulary is padded to a multiple of this. The default adds nothing: padding
            would be a large part of so few ids.
        sample_fraction, folder, special_tokens: as for `train_wordpiece`.

    Raises:
        UserError: as for `train_wordpiece`.
    """

    def train(source: Source) -> tokenizers.Tokenizer:
        counts: Counter[str] = Counter()
        for text in _texts(source, sample_fraction, "counting characters"):
            counts.update(text)
        # Equally frequent ones in the order of their code points.
        alphabet = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:limit_alphabet])
        special = (END, "<unk>") if causal else SPECIAL
        vocabulary = {name: number for number, name in enumerate([*special, *alphabet])}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token=special[1]))  # without merges: characters
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([special_token(name) for name in special])
        return backend

    settings = {"type": "char", "limit_alphabet": limit_alphabet, "sample_fraction": sample_fraction}
    return _load_or_train(folder, settings, source, train, pad_vocab_to_multiple_of, causal, special_tokens)


def _load_or_train(
    folder: str | Path | None,
    settings: dict,
    source: Source,
    train: Callable[[Source], tokenizers.Tokenizer],
    pad_vocab_to_multiple_of: int,
    causal: bool = False,
    special_tokens: str = "text",
) -> Tokenizer:
    """Loads the tokenizer in `folder`, or trains one and saves it there."""
    if causal:
        roles = {role: special_token(END) for role in ("bos", "eos", "pad")}
        if settings["type"] != "bpe":  # which knows every byte
            roles["unk"] = special_token("<unk>")
    else:
        roles = {role: special_token(USUAL_NAMES[role][0]) for role in ("pad", "unk", "cls", "sep", "mask")}
        if settings["type"] in ("bpe", "unigram"):
            # Here a blank is part of the token after it: the mask takes it along.
            roles["mask"] = special_token("[MASK]", lstrip=True)

    def made() -> Tokenizer:
        backend = train(WithoutNames(source, roles) if special_tokens == "honor" else source)
        if not causal:
            backend.post_processor = between(backend, "[CLS]", "[SEP]")
        return make_tokenizer(backend, roles, pad_vocab_to_multiple_of, causal, special_tokens)

    if folder is None:
        return made()
    folder = Path(folder)
    settings = {**settings, "causal": causal, "source": source.fingerprint, "special_tokens": special_tokens}
    record = folder / "training.json"
    if not record.exists():
        check_writable(folder)
        tokenizer = made()
        tokenizer.save(folder)
        write_atomically(record, [(json.dumps(settings, indent=2) + "\n").encode()])  # last: the tokenizer is complete
        return tokenizer
    saved = {"special_tokens": "text"} | json.loads(record.read_text("utf-8"))
    differ = [f"{key}={saved.get(key)!r}, not {value!r}" for key, value in settings.items() if saved.get(key) != value]
    if differ:
        raise UserError(
            f"the tokenizer in {folder} was trained with {'; '.join(differ)}",
            hint="Use another output_dir or data.corpus_dir, or delete that folder and the corpus made with it.",
            code="other_tokenizer",
        )
    backend = read_json(folder / "tokenizer.json")
    return make_tokenizer(backend, roles, pad_vocab_to_multiple_of, causal, special_tokens)


class WithoutNames:
    """A source whose documents lack the names of special tokens, so that their characters make no vocabulary."""

    def __init__(self, source: Source, roles: dict[str, tokenizers.AddedToken]):
        self.source = source
        self.names = re.compile("|".join(re.escape(token.content) for token in roles.values()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __iter__(self) -> Iterator[Document]:
        return (document._replace(text=self.names.sub(" ", document.text)) for document in self.source)


def _train(backend: tokenizers.Tokenizer, source: Source, sample_fraction: float, trainer: trainers.Trainer) -> None:
    with one_thread(), ExitStack() as stack:

        def texts() -> Iterator[str]:
            yield from _texts(source, sample_fraction, "reading for the vocabulary")
            stack.enter_context(waiting_for("training the vocabulary"))  # the iterator has ended, the work has not

        backend.train_from_iterator(texts(), trainer)


def _count_words(source: Source, sample_fraction: float) -> Counter[str]:
    """Counts every piece of text between white space."""
    words: Counter[str] = Counter()
    for text in _texts(source, sample_fraction, "counting words"):
        words.update(text.split())
    return words


def _texts(source: Source, sample_fraction: float, what: str) -> Iterator[str]:
    if not 0 < sample_fraction <= 1:
        hint = "Set a fraction of the documents above 0 and at most 1."
        raise UserError(f"{sample_fraction} is out of range", key="sample_fraction", hint=hint)
    limit = int(sample_fraction * 2**64)
    taken = 0
    progress = Progress(what)
    try:
        for document in source:
            progress.add(1, len(document.text))
            # Another seed than that of the validation split, so that the two choices are independent.
            if sample_fraction == 1 or xxhash.xxh3_64_intdigest(document.text.encode(), seed=1) < limit:
                taken += 1
                yield document.text
    finally:
        progress.close()
    if not progress.documents:
        if not hasattr(source, "report"):
            hint = "They are read more than once: give a list, not a generator."
            raise UserError("no documents to train a tokenizer on", hint=hint, code="no_documents")
        require_documents(source, source.report)
    if not taken:
        problem = f"{sample_fraction} selects none of {progress.documents:,} documents"
        raise UserError(problem, key="sample_fraction", hint="Set it higher.")
