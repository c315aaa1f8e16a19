"""Encoders for tests: embeddings that follow from the text alone."""

import numpy as np
import xxhash


class HashEncoder:
    """A random vector for every text; `coarse` gives few values, so that scores tie."""

    def __init__(self, width=16, coarse=False, prompts=()):
        self.width, self.coarse, self.prompts, self.calls = width, coarse, dict(prompts), []

    def encode(self, texts, prompt=""):
        self.calls.append((prompt, len(texts)))
        texts = [self.prompts.get(prompt, "") + text for text in texts]
        vectors = [
            np.random.default_rng(xxhash.xxh3_64_intdigest(text.encode())).normal(size=self.width) for text in texts
        ]
        vectors = np.array(vectors).reshape(len(texts), self.width)
        return (vectors > 0.8 if self.coarse else vectors).astype(np.float32)
