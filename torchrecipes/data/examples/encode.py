"""`ExampleEncoder`: tokens of examples, with prompts, cut to a maximum length as `transformers` cuts them.

1. Texts are tokenized without special tokens, many at a time; the special tokens around them are put there from a
   template, which is taken from what the tokenizer's post-processor makes of a probe.
2. A text that is too long loses its end. Of two sentences in one text the longer one is cut first (`longest_first`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from torchrecipes.config.suggest import did_you_mean
from torchrecipes.data.examples.example import Example
from torchrecipes.data.tokenizers.tokenizer import Tokenizer
from torchrecipes.errors import UserError

PASSAGE_NAMES = ("passage", "document")  # keys of prompts for what is not the query


@dataclass
class EncodedExamples:
    """Tokens of examples, one after the other.

    Attributes:
        tokens: uint16 or uint32, those of all texts.
        text_lengths: int64 `[T]`.
        second_starts: int32 `[T]`, where the second sentence begins in its text; the text's length where there is none.
        text_hashes: int64 `[T]`, xxh3 of the texts without prompts.
        example_texts: int64 `[E]`, texts of every example.
        truncated: bool `[T]`.
        kept: bool, of every example that was given; the others have a text without tokens of its own.
    """

    tokens: np.ndarray
    text_lengths: np.ndarray
    second_starts: np.ndarray
    text_hashes: np.ndarray
    example_texts: np.ndarray
    truncated: np.ndarray
    kept: np.ndarray


class ExampleEncoder:
    """Tokenizes examples.

    Args:
        tokenizer: makes the tokens.
        kind: that of the source.
        columns: those of the source. Two of a `labeled` source make one text of two sentences.
        max_length: tokens of a text at most, special ones included.
        prompts: what is written before a text: by column, or `query` and `passage` (of `pairs`, all but the query), or
            `""` for the texts of the other kinds.

    Attributes:
        tokenizer: see above.
        prompts: the prompt of every column.
        prompt_lengths: tokens of the prompt of every column, the special ones before it included, as
            `sentence-transformers` counts them; 0 where there is none. Two sentences in one text are one column.
        dtype: of the tokens: uint16 or uint32.

    Raises:
        UserError: a prompt of no column (code `unknown_prompt`), or `max_length` leaves no room (`invalid_value`).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        kind: str,
        columns: Sequence[str],
        max_length: int,
        prompts: dict[str, str] | None = None,
    ):
        self.tokenizer, self.backend = tokenizer, tokenizer.text_backend
        self.is_pair = kind == "labeled" and len(columns) == 2
        self.max_length = max_length
        self.dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
        self.prompts = _prompts(kind, columns, prompts or {})
        self.before, self.between, self.after = self._template()
        least = len(self.before + self.between + self.after) + 1 + self.is_pair
        if max_length < least:
            problem, hint = f"{max_length} tokens leave no room for a text", f"Set {least} or more."
            raise UserError(problem, key="seq_len", hint=hint, code="invalid_value")
        # Of a text of two sentences only the first one's prompt is at its beginning.
        prompts_at_start = self.prompts[:1] if self.is_pair else self.prompts
        self.prompt_lengths = tuple(self._prompt_length(prompt) for prompt in prompts_at_start)
        least += max(len(self._content(prompt)) if prompt else 0 for prompt in prompts_at_start)
        if max_length < least:
            problem = f"{max_length} tokens leave no room for a text after its prompt"
            raise UserError(problem, key="seq_len", hint=f"Set {least} or more.", code="invalid_value")

    def encode(self, examples: Sequence[Example]) -> EncodedExamples:
        """Return the tokens of some examples; threads may call this at the same time."""
        texts = [self._with_prompt(text, column) for example in examples for column, text in enumerate(example.texts)]
        ids = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        flat: list[int] = []
        lengths, seconds, hashes, counts, truncated, kept = [], [], [], [], [], []
        position = 0
        for example in examples:
            own = ids[position : position + len(example.texts)]
            position += len(own)
            kept.append(all(own))
            if not kept[-1]:
                continue
            own_hashes = [xxhash.xxh3_64_intdigest(text.encode()) for text in example.texts]
            if self.is_pair:
                pieces = [self._pair(*own)]
                own_hashes = [hash_of(own_hashes)]
            else:
                pieces = [self._single(one) for one in own]
            for text, second, is_cut in pieces:
                flat += text
                lengths.append(len(text))
                seconds.append(second)
                truncated.append(is_cut)
            hashes += own_hashes
            counts.append(len(pieces))
        return EncodedExamples(
            np.array(flat, self.dtype),
            np.array(lengths, np.int64),
            np.array(seconds, np.int32),
            np.array(hashes, np.uint64).view(np.int64),
            np.array(counts, np.int64),
            np.array(truncated, bool),
            np.array(kept, bool),
        )

    def _with_prompt(self, text: str, column: int) -> str:
        prompt = self.prompts[min(column, len(self.prompts) - 1)]
        return prompt + text if prompt else text

    def _single(self, ids: list[int]) -> tuple[list[int], int, bool]:
        room = self.max_length - len(self.before) - len(self.after)
        tokens = self.before + ids[:room] + self.after
        return tokens, len(tokens), len(ids) > room

    def _pair(self, first: list[int], second: list[int]) -> tuple[list[int], int, bool]:
        room = self.max_length - len(self.before) - len(self.between) - len(self.after)
        is_cut = len(first) + len(second) > room
        if is_cut:
            # As `truncate_encodings` of the tokenizers library.
            short, long = sorted((len(first), len(second)))
            long = short if short > room else max(short, room - short)
            if short + long > room:
                short = room // 2
                long = short + room % 2
            ends = (long, short) if len(first) > len(second) else (short, long)
            first, second = first[: ends[0]], second[: ends[1]]
        start = len(self.before) + len(first) + len(self.between)
        return self.before + first + self.between + second + self.after, start, is_cut

    def _template(self) -> tuple[list[int], list[int], list[int]]:
        """Return the special tokens before a text, between two sentences of one, and after it."""
        # Any text will do that has tokens; not every vocabulary has every letter.
        some = next(text for text in ("a", "0", ".", *self.backend.get_vocab()) if self._content(text))
        probe = self.backend.encode(some, some if self.is_pair else None)
        text = [number for number, sequence in enumerate(probe.sequence_ids) if sequence is not None]
        first = [number for number in text if probe.sequence_ids[number] == 0]
        between = probe.ids[first[-1] + 1 : text[len(first)]] if self.is_pair else []
        return probe.ids[: text[0]], between, probe.ids[text[-1] + 1 :]

    def _prompt_length(self, prompt: str) -> int:
        if not prompt:
            return 0
        return len(self.before) + len(self._content(prompt)) + max(len(self.after) - 1, 0)

    def _content(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids


def hash_of(hashes: Sequence[int]) -> int:
    """Return one 64-bit hash of several, in their order."""
    return xxhash.xxh3_64_intdigest(b"".join(value.to_bytes(8, "little") for value in hashes))


def _prompts(kind: str, columns: Sequence[str], prompts: dict[str, str]) -> tuple[str, ...]:
    valid = [*columns, "query", *PASSAGE_NAMES, ""]
    for name in prompts:
        if name not in valid:
            hint = did_you_mean(name, [name for name in valid if name], "Prompts are of")
            raise UserError(f"there are no texts '{name}'", key=f"prompts.{name}", hint=hint, code="unknown_prompt")
    found = []
    for number, column in enumerate(columns):
        names = (column, *(("query",) if number == 0 else PASSAGE_NAMES)) if kind == "pairs" else (column, "")
        found.append(next((prompts[name] for name in names if name in prompts), ""))
    return tuple(found)
