"""Finding the name that a look-alike passes for, among 100,000: an embedding model against edit distance and n-grams.

    python benchmarks/lookalikes.py --names top_domains.txt --model runs/lookalikes/model [--queries 500]

The queries are look-alikes of names that the config `domain_bert/lookalikes` leaves out of training, from other seeds;
the candidates are these names and others, chosen by a hash. A look-alike that is a name of the list is left out.

| system          | what is compared                                                                     |
|-----------------|--------------------------------------------------------------------------------------|
| model           | cosine of embeddings                                                                 |
| Levenshtein, OSA| edit distance (rapidfuzz); OSA counts a transposition as one edit (Damerau)          |
| ..., decoded    | the same with queries whose punycode is decoded and whose letters are made Latin     |
| n-grams         | cosine of TF-IDF vectors of 1- to 3-grams of characters (scikit-learn)               |

Names at the same distance count as in random order. Names per second are queries searched; for the model with
`candidates` embedded before, and embedding alone.
"""

import argparse
import json
import time
import unicodedata
from collections.abc import Callable
from functools import partial

import numpy as np

from torchrecipes.data.domains import domain_names, domain_texts, lookalike_pairs

KINDS = ("homoglyph", "typo", "combo")


def main() -> None:
    """Print a line per system and kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", required=True)
    parser.add_argument("--model", help="the folder of a trained embedding model; without it only the baselines")
    parser.add_argument("--queries", type=int, default=500, help="of each kind")
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1000, help="of the look-alikes")
    parser.add_argument("--only", nargs="*", help="systems")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    source = domain_names(path=args.names)
    names = [document.text for document in source]
    tests = {example.texts[0] for example in domain_texts(source, "test")}
    candidates = sorted(names, key=lambda name: name not in tests)[: args.candidates]
    number = {name: place for place, name in enumerate(candidates)}
    print(f"{len(candidates):,} candidates, {len(tests):,} of them held out")
    tasks = {}
    for kind in KINDS:
        pairs = lookalike_pairs(source, kind, max_pairs=args.queries, seed=args.seed)
        found = [example.texts[:2] for example in pairs]
        tasks[kind] = ([query for query, _ in found], np.array([number[name] for _, name in found]))
    figures = {}
    for system, prepare in systems(args.model).items():
        if args.only and system not in args.only:
            continue
        search = prepare(candidates)
        for name, change in ((system, str), (f"{system}, decoded", latin)):
            for kind, (queries, truth) in tasks.items():
                begin = time.perf_counter()
                scores = search(list(map(change, queries)))
                seconds = time.perf_counter() - begin
                found = ranking(scores, truth) | {"queries_per_second": len(queries) / seconds}
                figures[f"{name}/{kind}"] = found
                shown = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
                print(f"{name:20} {kind:10} {len(queries)} queries: {shown}", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


def ranking(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Recall and MRR of the true candidates; equal scores count as in random order.

    Args:
        scores: `[Q, C]`, higher is better.
        truth: `[Q]`, the true candidate of each query.
    """
    own = scores[np.arange(len(truth)), truth][:, None]
    better, equal = (scores > own).sum(1), (scores == own).sum(1)
    recalls = {f"recall@{k}": float(np.clip((k - better) / equal, 0, 1).mean()) for k in (1, 10)}
    ranks = [(1 / np.arange(b + 1, b + e + 1)).mean() for b, e in zip(better, equal, strict=True)]
    return recalls | {"mrr": float(np.mean(ranks))}


def systems(model: str | None) -> dict[str, Callable]:
    """From candidates to a function from queries to scores, by name."""
    found = {"Levenshtein": edit_distance("Levenshtein"), "OSA": edit_distance("OSA")}
    return found | {"n-grams": n_grams} | ({"model": partial(embeddings, model)} if model else {})


def edit_distance(name: str) -> Callable:
    from rapidfuzz import distance, process

    def prepare(candidates: list[str]) -> Callable:
        options = {"scorer": getattr(distance, name).distance, "dtype": np.uint8}
        return lambda queries: -process.cdist(queries, candidates, **options).astype(np.int16)

    return prepare


def latin(name: str) -> str:
    """The name in Unicode, without marks, and Latin letters for those of other scripts that look like them."""
    import idna
    from confusable_homoglyphs.confusables import confusables_data

    if "xn--" not in name:
        return name
    letters = [c for c in unicodedata.normalize("NFD", idna.decode(name)) if not unicodedata.combining(c)]
    for place, letter in enumerate(letters):
        alike = [entry["c"] for entry in confusables_data.get(letter, ()) if not letter.isascii()]
        letters[place] = next((c for c in alike if c.isascii() and c.isalnum() and c.islower()), letter)
    return "".join(letters)


def n_grams(candidates: list[str]) -> Callable:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True, dtype=np.float32)
    vectors = vectorizer.fit_transform(candidates).T.tocsr()
    return lambda queries: (vectorizer.transform(queries) @ vectors).toarray()


def embeddings(folder: str, candidates: list[str]) -> Callable:
    from torchrecipes.data.tokenizers import load_tokenizer
    from torchrecipes.evaluation import TextEncoder
    from torchrecipes.models import load_embedding_model

    model = load_embedding_model(folder)
    encoder = TextEncoder(model, load_tokenizer(folder))
    begin = time.perf_counter()
    vectors = unit(encoder.encode(candidates))
    seconds = time.perf_counter() - begin
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"model: {size:,} parameters, {len(candidates) / seconds:,.0f} names/s embedded, {vectors.shape[1]} dimensions"
    )
    return lambda queries: unit(encoder.encode(queries)) @ vectors.T


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
