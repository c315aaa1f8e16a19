"""`ExampleBlock`: n examples that were read, with the tokens of their N texts."""

from typing import NamedTuple

import numpy as np


class ExampleBlock(NamedTuple):
    """n examples of N texts. Texts that an example does not have take no place.

    Attributes:
        tokens: unsigned integers, 1-D: the tokens of the texts, one text after the other.
        text_lengths: `[N]` int64, at least 1.
        second_starts: `[N]` int64: where the second sentence begins in a text that is a pair of sentences; the length
            of the text where there is none.
        text_hashes: `[N]` int64, of the raw text without its prompt.
        prompt_lengths: `[N]` int64: tokens at the start of a text that come from its prompt; with a prompt, a `[CLS]`
            before it counts too.
        example_texts: `[n, k]` int64: the place of each text of an example among the N, -1 where it has none.
        values: `[n, C]` float32, the scores; None where there are none.
        labels: `[n]` int64 (classes), `[n, L]` float32 (several labels) or `[n]` float32 (regression); None.
        source_ids: `[n]` int64: the number of the dataset that an example is from; None where there is one.
    """

    tokens: np.ndarray
    text_lengths: np.ndarray
    second_starts: np.ndarray
    text_hashes: np.ndarray
    prompt_lengths: np.ndarray
    example_texts: np.ndarray
    values: np.ndarray | None = None
    labels: np.ndarray | None = None
    source_ids: np.ndarray | None = None
