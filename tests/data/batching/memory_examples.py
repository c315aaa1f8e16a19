"""Examples in memory, read as an `ExampleCorpus` reads them from disk."""

from functools import partial
from types import SimpleNamespace

import numpy as np

from torchrecipes.data.examples import ExampleBlock
from torchrecipes.data.tokenizers import Tokenizer

PAD = 0
TOKENIZER = SimpleNamespace(pad_id=PAD, unpadded_vocab_size=1000, domain=None)
TOKENIZER.token_type_ids = partial(Tokenizer.token_type_ids, TOKENIZER)


class MemoryExamples:
    """Examples given as lists of token lists; the prompt of column c has `prompts[c]` tokens."""

    def __init__(self, examples, *, values=None, labels=None, prompts=(), second_starts=None, name="made"):
        self.texts, self.values, self.labels, self.prompts = examples, values, labels, prompts
        self.second_starts = second_starts
        self.num_examples, self.fingerprint = len(examples), name
        self.texts_per_example = max((len(texts) for texts in examples), default=0)
        self.example_lengths = np.array([sum(map(len, texts)) for texts in examples], dtype=np.int64)

    def read(self, numbers):
        texts, columns, seconds = [], [], []
        example_texts = np.full((len(numbers), self.texts_per_example), -1)
        for row, number in enumerate(numbers.tolist()):
            for column, text in enumerate(self.texts[number]):
                example_texts[row, column] = len(texts)
                texts.append(text)
                columns.append(column)
                seconds.append(len(text) if self.second_starts is None else self.second_starts[number])
        prompts = np.array([*self.prompts, *[0] * 20])
        return ExampleBlock(
            tokens=np.array([token for text in texts for token in text], dtype=np.uint16),
            text_lengths=np.array([len(text) for text in texts], dtype=np.int64),
            second_starts=np.array(seconds, dtype=np.int64),
            text_hashes=np.array([hash(tuple(text)) for text in texts], dtype=np.int64),
            prompt_lengths=prompts[np.array(columns, dtype=np.int64)],
            example_texts=example_texts,
            values=None if self.values is None else self.values[numbers],
            labels=None if self.labels is None else self.labels[numbers],
        )


def random_examples(num_examples, seed=0, *, least=1, most=3, longest=40, **options):
    """Examples of `least` to `most` texts of 2 to `longest` tokens, no two texts equal."""
    rng = np.random.default_rng(seed)
    examples = [
        [[1, *rng.integers(10, 1000, rng.integers(1, longest)).tolist()] for _ in range(rng.integers(least, most + 1))]
        for _ in range(num_examples)
    ]
    return MemoryExamples(examples, **options)
