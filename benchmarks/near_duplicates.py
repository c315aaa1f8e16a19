"""Cleaning and near-duplicate removal: documents per second, memory, recall and precision, beside two libraries.

    python benchmarks/near_duplicates.py --merge-documents 1000000 --data ../shared/data --json cleaning.json

Documents are made on the spot: words with the frequencies of Zipf's law, lengths log-normal with a median of 150
words. A tenth are copies of earlier ones with some words changed, so that their exact Jaccard similarity of word
5-grams, which is computed from sets of strings, lies anywhere between 0.4 and 1. The peers see the first
`--peer-documents` of the same documents, in the way their documentation shows, and everything runs in one process.
`memory` is the peak of anonymous memory (what files on disk back is not counted) beyond that of the imports, in a
process of its own. Needs the extra `dev`, `datasketch` and `rensa`.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

STOP_WORDS = ["the", "of", "and", "to", "that", "with", "have", "be"]
HEURISTICS = ["c4", "boilerplate_lines", "gopher_quality", "gopher_repetition"]
STEPS = {
    "default steps": [],
    "heuristics, too": ["normalize", *HEURISTICS, "exact_duplicates", "near_duplicates"],
    "language alone": ["language", "language.keep=[en, de, la]"],
}


def make_documents(path: Path, count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Write `count` documents as JSON lines, and return the pairs (original, copy)."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    vocabulary = np.array(["".join(rng.choice(letters[:20], rng.integers(2, 10))) for _ in range(50_000)])
    vocabulary[: len(STOP_WORDS)] = STOP_WORDS
    shares = np.cumsum(1 / (np.arange(len(vocabulary)) + 2.7))  # Zipf's law with Mandelbrot's shift
    shares /= shares[-1]
    kept, planted = [], []
    with path.open("w") as file:
        for number in range(count):
            if len(kept) > 100 and rng.random() < 0.1:
                original, words = kept[rng.integers(0, len(kept))]
                words = words.copy()
                changes = rng.integers(0, max(2, len(words) // 12))
                words[rng.integers(0, len(words), changes)] = vocabulary[rng.integers(0, 50_000, changes)]
                planted.append((original, number))
            else:
                length = int(np.clip(rng.lognormal(5.0, 0.8), 20, 5_000))
                words = vocabulary[np.searchsorted(shares, rng.random(length))]
                kept = [*kept[-5_000:], (number, words)]
            sentences = [" ".join(words[at : at + 12]) + "." for at in range(0, len(words), 12)]
            file.write(
                json.dumps({"text": "\n".join(" ".join(sentences[at : at + 5]) for at in range(0, len(sentences), 5))})
                + "\n"
            )
    return planted


def ngrams(text: str, n: int = 5) -> list[str]:
    """The word n-grams of a text."""
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[at : at + n]) for at in range(max(1, len(words) - n + 1))]


def exact_jaccard(first: str, second: str) -> float:
    """The Jaccard similarity of the sets of 5-grams."""
    one, other = set(ngrams(first)), set(ngrams(second))
    return len(one & other) / len(one | other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--peer-documents", type=int, default=10_000)
    parser.add_argument("--merge-documents", type=int, default=0, help="of random signatures, for memory alone")
    parser.add_argument("--data", help="also clean the texts in this folder")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted = make_documents(folder / "made.jsonl", args.documents)
        size = (folder / "made.jsonl").stat().st_size
        print(f"{args.documents:,} documents, {size / 1e6:,.0f} MB, {len(planted):,} planted copies")
        for label, steps in STEPS.items():
            results[f"clean, {label}"] = run_child("clean", folder / "made.jsonl", folder / label, args.workers, *steps)
        results["quality"] = quality(folder, planted)
        results |= peers(folder / "made.jsonl", args.peer_documents, planted)
        if args.data:
            (folder / "shared").mkdir()
            for number, path in enumerate(sorted(Path(args.data).rglob("*.jsonl"))):
                if "bad" not in path.parts and "pairs" not in path.parts:
                    shutil.copy(path, folder / "shared" / f"{number}.jsonl")
            for label, steps in STEPS.items():
                output = folder / f"shared, {label}"
                results[f"clean {args.data}, {label}"] = run_child("clean", folder / "shared", output, 0, *steps)
        if args.merge_documents:
            results["merge"] = run_child("merge", folder, args.merge_documents)
    for label, figures in results.items():
        print(f"{label:<32} " + "  ".join(f"{key} {value:,.4g}" for key, value in figures.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2))


def run_child(*words) -> dict[str, float]:
    """Run this file's `child` in a process of its own."""
    command = [sys.executable, __file__, "--child", *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(what: str, *words: str) -> None:
    """Clean, or join random signatures, and print the figures."""
    import torchrecipes.data.cleaning  # noqa: F401, torch, too: memory is measured beyond it

    before, peak, running = anonymous(), [0], True

    def sample():
        while running:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.01)

    thread = threading.Thread(target=sample, daemon=True)
    figures = {"clean": child_clean, "merge": child_merge}[what](*words, start=thread.start)
    running = False
    print(json.dumps(figures | {"memory MB": (peak[0] - before) / 1e6}))


def child_clean(source: str, output: str, workers: str, *steps: str, start) -> dict[str, float]:
    from torchrecipes.data.cleaning import clean
    from torchrecipes.data.cleaning.steps import DEFAULT_STEPS, read_steps
    from torchrecipes.data.sources import files

    text = files(source, on_bad_record="skip")
    start()
    begin = time.perf_counter()
    report = clean(text, output, read_steps(steps or DEFAULT_STEPS), workers=int(workers))
    seconds = time.perf_counter() - begin
    return {
        "documents/s": report["documents"] / seconds,
        "MB/s": report["characters"] / seconds / 1e6,
        "seconds": seconds,
        "documents": report["documents"],
        "removed": report["documents"] - report["kept_documents"],
    }


def child_merge(folder: str, documents: str, start) -> dict[str, float]:
    from torchrecipes.data.cleaning import find_duplicates
    from torchrecipes.data.cleaning.duplicates import PieceFiles, sort_keys
    from torchrecipes.data.cleaning.signatures import band_keys

    rng, pieces, size = np.random.default_rng(0), [], 8_192
    for number in range(int(documents) // size):
        signatures = rng.integers(0, 1 << 63, (size, 128), np.uint64)
        signatures[1::10] = signatures[0::10][: len(signatures[1::10])]  # a tenth are near duplicates
        keys, order = sort_keys(band_keys(signatures))
        high, hash_order = sort_keys(rng.integers(0, 1 << 63, (1, size), np.uint64))
        arrays = {
            "signatures": signatures, "bands": keys, "band_order": order,
            "hashes": np.concatenate([high, high]), "hash_order": hash_order,
        }  # fmt: skip
        for name, array in arrays.items():
            np.save(f"{folder}/m{number}.{name}.npy", array)
        pieces.append(PieceFiles(size, Path(f"{folder}/m{number}")))
    disk = sum(path.stat().st_size for path in Path(folder).glob("m*.npy"))
    del signatures, keys, order, arrays
    start()
    begin = time.perf_counter()
    clusters = find_duplicates(pieces)
    seconds = time.perf_counter() - begin
    count = len(clusters.first)
    removed = int((clusters.first != np.arange(count)).sum())
    return {"documents/s": count / seconds, "documents": count, "removed": removed, "disk bytes/document": disk / count}


def quality(folder: Path, planted: list[tuple[int, int]]) -> dict[str, float]:
    """Recall and precision of the planted copies that were removed, against their exact similarity to the originals."""
    texts = [json.loads(line)["text"] for line in (folder / "made.jsonl").open()]
    exact = np.array([exact_jaccard(texts[one], texts[other]) for one, other in planted])
    kept = kept_lines(folder / "default steps")
    gone = np.array([other + 1 not in kept for _, other in planted])
    copies = {other for _, other in planted}
    others = sum(number + 1 not in kept for number in range(len(texts)) if number not in copies)
    return scores(exact, gone) | {"others removed": others}


def scores(exact: np.ndarray, gone: np.ndarray) -> dict[str, float]:
    return {
        "recall at 0.8": gone[exact >= 0.8].mean(),
        "recall at 0.85": gone[exact >= 0.85].mean(),
        "precision at 0.8": (exact[gone] >= 0.8).mean(),
        "precision at 0.75": (exact[gone] >= 0.75).mean(),
    }


def kept_lines(output: Path) -> set[int]:
    """The numbers of the lines that were kept."""
    from torchrecipes.data.cleaning.output import read_lines

    lines = [json.loads(line) for file in (output / "documents").iterdir() for line in read_lines(file)]
    return {int(document["source"].rsplit(":", 1)[1]) for document in lines}


def peers(path: Path, count: int, planted: list[tuple[int, int]]) -> dict[str, dict[str, float]]:
    """Signatures alone, and the loop over `datasketch.MinHashLSH`, on the first `count` documents."""
    from datasketch import MinHash, MinHashLSH
    from rensa import RMinHash

    from torchrecipes.data.cleaning import estimated_jaccard, minhash

    with path.open() as file:
        texts = [json.loads(next(file))["text"] for _ in range(count)]
    planted = [pair for pair in planted if max(pair) < count]
    exact = np.array([exact_jaccard(texts[one], texts[other]) for one, other in planted])
    minhash(texts[:100])

    def ours(texts):
        return minhash(texts)

    def datasketch(texts):
        found = []
        for text in texts:
            one = MinHash(num_perm=128)
            one.update_batch([ngram.encode() for ngram in ngrams(text)])
            found.append(one)
        return found

    def rensa(texts):
        found = []
        for text in texts:
            one = RMinHash(num_perm=128, seed=42)
            one.update(ngrams(text))
            found.append(one)
        return found

    def jaccard(one, other):
        return float(estimated_jaccard(one, other)) if isinstance(one, np.ndarray) else one.jaccard(other)

    results = {}
    for name, make in {"ours": ours, "datasketch": datasketch, "rensa": rensa}.items():
        begin = time.perf_counter()
        signatures = make(texts)
        seconds = time.perf_counter() - begin
        estimates = np.array([jaccard(signatures[one], signatures[other]) for one, other in planted])
        error = np.sqrt(((estimates - exact) ** 2).mean())
        results[f"signatures, {name}"] = {"documents/s": count / seconds, "error of the estimate": error}
    begin = time.perf_counter()
    index, gone = MinHashLSH(threshold=0.8, num_perm=128), set()
    for number, signature in enumerate(datasketch(texts)):
        if index.query(signature):
            gone.add(number)
        else:
            index.insert(str(number), signature)
    seconds = time.perf_counter() - begin
    flags = np.array([other in gone for _, other in planted])
    results["datasketch, MinHashLSH loop"] = {"documents/s": count / seconds} | scores(exact, flags)
    return results


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
