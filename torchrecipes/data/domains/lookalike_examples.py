"""Examples of look-alikes: `LookalikeCollator` makes new ones for every batch, `lookalike_pairs` a fixed set to search.

Equal texts of a batch have equal hashes, so that a loss does not take the same name for a negative. Two true names that
pass for each other (`amazon.com`, `amazon.net`) are negatives nevertheless; among the names of a batch they are rare.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xxhash

from torchrecipes.data.domains.encoding import CHARACTER_OF, CLS, IN_NAME, SEP, TOKEN_OF
from torchrecipes.data.domains.lookalike_names import checked_kinds, lookalike, public_suffix
from torchrecipes.data.examples.block import ExampleBlock
from torchrecipes.data.examples.example import Example, ExampleSource, TextRecords
from torchrecipes.data.sources.records import Document, ReadStats, Source
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

if TYPE_CHECKING:
    from torchrecipes.data.batching import Batch
    from torchrecipes.models import LateInteraction

Part = Literal["train", "test", "all"]
TOKEN_OF_MARKED = TOKEN_OF.copy()  # of names between < and >
TOKEN_OF_MARKED[list(b"<>")] = CLS, SEP
PART_SEED = 1  # of the hash that divides names: not that of other splits


class LookalikeCollator:
    """Pairs of a look-alike, the query, and the name that it passes for, from examples of one name each.

    A look-alike is a pure function of the name, the kinds and the example's key: new in every epoch, the same on any
    number of ranks and after a resume.

    Args:
        tokenizer: one of domain names.
        kinds: how often each kind of `lookalikes` is drawn, relative to the others; None: all equally.
        include_prompt: False: pooling leaves out the tokens of a text's prompt.
        late_interaction: those settings of the model. None: it pools texts.

    Raises:
        UserError: the tokenizer is one of text (code `not_domain_names`), or `kinds` are no weights (`invalid_value`).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        kinds: Mapping[str, float] | None = None,
        *,
        include_prompt: bool = True,
        late_interaction: "LateInteraction | None" = None,
    ):
        from torchrecipes.data.batching.pairs import PairCollator  # it imports torch

        if tokenizer.domain is None:
            hint = "Use torchrecipes.data.domains.domain_tokenizer, or init_from=RUN of a model of domain names."
            raise UserError("look-alikes need a tokenizer of domain names", hint=hint, code="not_domain_names")
        self.domain, self.kinds = tokenizer.domain, checked_kinds(kinds)
        self.pairs = PairCollator(tokenizer, include_prompt=include_prompt, late_interaction=late_interaction)

    def batch(self, rows: Any, numbers: np.ndarray, keys: np.ndarray, step: int = 1) -> "Batch":
        """Reads names and packs them with a look-alike each.

        Args:
            rows: `ExampleRows`, or other rows with `examples`.
            numbers: `[n]`, the examples' numbers; -1 is left out.
            keys: `[n]` uint64, one of (seed, epoch, number) each.
            step: the optimizer step, not used.

        Raises:
            UserError: an example has several texts (code `several_texts`).
        """
        block = self.with_lookalikes(rows.examples(numbers), keys[numbers >= 0], rows.seq_len)
        return self.pairs.batch(_Examples(block, rows.source_names), numbers, keys, step)

    def example_batch(self, num_rows: int, seq_len: int) -> "Batch":
        """A batch of `num_rows` pairs of made-up tokens: for estimates and trial steps."""
        return self.pairs.example_batch(num_rows, seq_len)

    def with_lookalikes(self, block: ExampleBlock, keys: np.ndarray, seq_len: int) -> ExampleBlock:
        """The examples with a look-alike before their text.

        Args:
            block: n examples of one text.
            keys: `[n]` uint64.
            seq_len: tokens of a text at most; a look-alike has no more.

        Raises:
            UserError: an example has several texts (code `several_texts`).
        """
        if block.example_texts.shape[1] != 1:
            problem = f"look-alikes are made of one name, and these examples have {block.example_texts.shape[1]} texts"
            hint = "Use torchrecipes.data.domains.domain_texts or torchrecipes.data.examples.raw_texts as source."
            raise UserError(problem, key="data.source", hint=hint, code="several_texts")
        if block.prompt_lengths.any():
            problem, hint = "a prompt before a name would be part of the name", "Leave out embedding.prompts."
            raise UserError(problem, key="embedding.prompts", hint=hint, code="prompt")
        count, made = len(block.text_lengths), []
        keys_of_texts = np.empty_like(keys)
        keys_of_texts[block.example_texts[:, 0]] = keys
        for (name, suffix), key in zip(self._names(block), keys_of_texts.tolist(), strict=True):
            found = lookalike(name, suffix, self.kinds, key, max_length=seq_len - 2)
            made.append(name if found is None else found.name)
        marked = "".join([f"<{name}>" for name in made]).encode()
        lengths = np.array([len(name) + 2 for name in made], np.int64)
        hashes = np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in made], np.uint64).view(np.int64)
        return block._replace(
            tokens=np.concatenate(
                [TOKEN_OF_MARKED[np.frombuffer(marked, np.uint8)].astype(block.tokens.dtype), block.tokens]
            ),
            text_lengths=np.concatenate([lengths, block.text_lengths]),
            second_starts=np.concatenate([lengths, block.second_starts]),
            text_hashes=np.concatenate([hashes, block.text_hashes]),
            prompt_lengths=np.concatenate([block.prompt_lengths] * 2),
            example_texts=np.concatenate([block.example_texts, block.example_texts + count], axis=1),
        )

    def _names(self, block: ExampleBlock) -> Iterator[tuple[str, str]]:
        """Every text and its public suffix."""
        characters, lengths = CHARACTER_OF[block.tokens[IN_NAME[block.tokens]]], block.text_lengths - 2
        starts = self.domain.suffix_starts(characters, lengths).tolist()
        text, end = characters.tobytes().decode("ascii"), 0
        for length, start in zip(lengths.tolist(), starts, strict=True):
            yield text[end : end + length], text[end + start : end + length]
            end += length


class _Examples(NamedTuple):
    """Rows that are one block of examples."""

    block: ExampleBlock
    source_names: Sequence[str]

    def examples(self, numbers: np.ndarray) -> ExampleBlock:  # noqa: ARG002
        return self.block


def domain_texts(names: Source, part: Part = "all", test_share: float = 0.01) -> ExampleSource:
    """Domain names as texts to embed, an example each.

    Args:
        names: `domain_names` or `synthetic_names`.
        part: `train` leaves out the names that `lookalike_pairs` searches for, `test` is these.
        test_share: of the names that are `test`, chosen by a hash of the name.

    Raises:
        UserError: an unknown part, or a share outside (0, 1) (code `invalid_value`).
    """
    records = TextRecords(_PartOfNames(names, part, test_share))
    return ExampleSource(records, "texts", ("text",), settings=(part, test_share))


def lookalike_pairs(
    names: Source,
    kind: Literal["homoglyph", "typo", "combo"] | None = None,
    *,
    part: Part = "test",
    test_share: float = 0.01,
    max_pairs: int | None = None,
    seed: int = 0,
) -> ExampleSource:
    """Look-alikes with the names that they pass for, to evaluate a search among all names.

    The names without a pair are the negatives of the pair before them, so that `torchrecipes.evaluation.Retrieval`
    searches all of them. A look-alike that is one of the names is left out: nobody could say which one is meant.

    Args:
        names: `domain_names` or `synthetic_names`; held in memory.
        kind: of `lookalikes`. None: all, equally often.
        part, test_share: which names are passed for, see `domain_texts`.
        max_pairs: pairs at most, of the first names. None: all.
        seed: of the look-alikes. Those of training are others.

    Raises:
        UserError: an argument is out of range (code `invalid_value`).
    """
    kinds = checked_kinds(None if kind is None else {kind: 1.0})
    records = _PairRecords(names, kinds, _PartOfNames(names, part, test_share), max_pairs, seed)
    columns = ("query", "positive", "negative")
    return ExampleSource(records, "pairs", columns, settings=(records.kinds, part, test_share, max_pairs, seed))


class _PartOfNames:
    """The documents of a source that are of a part."""

    def __init__(self, source: Source, part: Part, test_share: float):
        if part not in ("train", "test", "all"):
            hint = "Set train, test or all."
            raise UserError(f"there is no part '{part}'", key="part", hint=hint, code="invalid_value")
        if not 0 < test_share < 1:
            problem = f"{test_share} is not between 0 and 1"
            raise UserError(problem, key="test_share", hint="0.01 is a good choice.", code="invalid_value")
        self.source, self.part, self._end = source, part, int(test_share * 2**64)
        self.name, self.num_bytes, self.fingerprint = source.name, source.num_bytes, source.fingerprint

    @property
    def report(self) -> ReadStats:
        return self.source.report

    def holds(self, name: str) -> bool:
        is_test = xxhash.xxh3_64_intdigest(name.encode(), PART_SEED) < self._end
        return self.part == "all" or is_test == (self.part == "test")

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Document]:
        documents = iter(self.source) if position is None else self.source.read(position)
        return (document for document in documents if self.holds(document.text))

    def position(self) -> dict[str, Any] | None:
        return self.source.position() if hasattr(self.source, "position") else None


class _PairRecords:
    """Examples of a look-alike, its name and the names up to the next one."""

    def __init__(self, source: Source, kinds: dict[str, float], part: _PartOfNames, max_pairs: int | None, seed: int):
        self.source, self.kinds, self.part, self.max_pairs, self.seed = source, kinds, part, max_pairs, seed
        self.name, self.num_bytes, self.fingerprint = source.name, source.num_bytes, source.fingerprint

    @property
    def report(self) -> ReadStats:
        return self.source.report

    def read(self, position: dict[str, Any] | None = None) -> Iterator[Example]:  # noqa: ARG002, there are none
        documents = list(self.source)
        known, made = {document.text for document in documents}, 0
        texts, first, origin = [], [], ""  # of the example; the names before the first pair are its negatives, too
        for name, source in documents:
            found = None
            if self.part.holds(name) and made != self.max_pairs:
                key = xxhash.xxh3_64_intdigest(name.encode(), self.seed)
                found = lookalike(name, public_suffix(name), self.kinds, key)
            if found is None or found.name in known:
                (texts or first).append(name)
                continue
            if texts:
                yield Example(tuple(texts), source=origin)
            texts, first, origin = [found.name, name, *first], [], source
            made += 1
        if texts:
            yield Example(tuple(texts), source=origin)
