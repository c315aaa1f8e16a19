"""Classification against transformers, in one run on one machine: training, prediction, and a frozen encoder.

    python benchmarks/classification.py --train sst2/train.tsv --test sst2/test.tsv --model FOLDER [--examples 2000]

Both train the same encoder with a new head on the same examples, with the same batch size, learning rate and number of
steps, in fp32 (or bf16 with --bf16), and classify the test texts. Files are lines of text, tab, number of the label.

| line          | ours                                            | transformers                          |
|---------------|-------------------------------------------------|---------------------------------------|
| train         | packed texts, `Loader`, plain loop              | `Trainer`, padded to the longest      |
| predict       | `TextClassifier`                                | `pipeline`, batches of 32             |
| epoch         | `all`, and `classifier` on features of the cache | -                                     |
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from torchrecipes.data import LabeledCollator, Loader
from torchrecipes.data.batching.example_rows import ExampleRows
from torchrecipes.data.examples import labeled_texts, prepare_examples
from torchrecipes.data.tokenizers import load_tokenizer
from torchrecipes.evaluation import TextClassifier
from torchrecipes.models import SequenceClassifier, load_hf_weights, meta_classifier_from_hf, save_hf
from torchrecipes.optim import adamw, linear
from torchrecipes.training import FeatureCache, set_trainable
from torchrecipes.training.precision import autocast
from torchrecipes.training.run import Run

CPU = torch.device("cpu")


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", required=True, help="folder of an encoder")
    parser.add_argument("--examples", type=int, default=2000, help="of the training file, and test texts to predict")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", choices=("train", "predict", "frozen"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = examples(args, work)
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        if args.only in (None, "train"):
            ours, seconds = train(args, rows, dtype)
            show("train, ours", rows.num_rows, seconds)
            save_hf(ours, work / "ours", load_tokenizer(args.model))
            theirs, seconds = train_there(args, work)
            show("train, transformers.Trainer", args.examples, seconds)
            theirs.save_pretrained(work / "theirs")
        if args.only in (None, "predict"):
            if not (work / "ours").exists():
                save_hf(loaded(args), work / "ours", load_tokenizer(args.model))
            predict(args, work, dtype)
        if args.only in (None, "frozen"):
            frozen(args, rows, work, dtype)


def examples(args: argparse.Namespace, work: Path) -> ExampleRows:
    """Tokenize the first examples."""
    columns = {"columns": ["text", "label"], "max_examples": args.examples}
    source, tokenizer = labeled_texts(args.train, **columns), load_tokenizer(args.model)
    corpus, _ = prepare_examples(work / "corpus", source, tokenizer, max_length=args.max_length, task="single_label")
    return ExampleRows(corpus, args.max_length, tokenizer.pad_id)


def loaded(args: argparse.Namespace) -> SequenceClassifier:
    """The encoder with a new head."""
    model = meta_classifier_from_hf(args.model, num_labels=2).to_empty(device="cpu")
    load_hf_weights(model, args.model)
    return model.train()


def train(
    args: argparse.Namespace,
    rows: ExampleRows,
    dtype: torch.dtype,
    trainable: str = "all",
    cache: FeatureCache | None = None,
    model: SequenceClassifier | None = None,
) -> tuple[SequenceClassifier, float]:
    """One epoch, a loop as in the recipe; and its seconds."""
    model = model or loaded(args)
    set_trainable(model, trainable)
    steps = rows.num_rows // args.batch_size
    optimizer = adamw(model, lr=args.lr)
    schedule = linear(optimizer, max_steps=steps, warmup_ratio=0.1, min_lr_ratio=0.0)
    collator = cache or LabeledCollator(load_tokenizer(args.model))
    sizes = {"global_batch_size": args.batch_size, "micro_batch_size": args.batch_size}
    loader = Loader(rows, collator, seed=0, **sizes)
    begin = time.perf_counter()
    for _ in range(steps):
        for batch in loader.next_step():
            with autocast(CPU, dtype):
                loss = F.cross_entropy(model.classify(batch), batch.examples.labels)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, time.perf_counter() - begin


def read(file: str, most: int) -> tuple[list[str], list[int]]:
    """The texts and labels of a file."""
    with open(file, encoding="utf-8", newline="") as lines:
        rows = [row for row, _ in zip(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), range(most))]  # noqa: B905
    return [row[0] for row in rows], [int(row[1]) for row in rows]


def train_there(args: argparse.Namespace, work: Path):
    """One epoch by `transformers.Trainer`, and its seconds."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    texts, labels = read(args.train, args.examples)
    encoded = tokenizer(texts, truncation=True, max_length=args.max_length)
    items = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "label": label}
        for ids, label in zip(encoded["input_ids"], labels, strict=True)
    ]
    options = TrainingArguments(
        output_dir=str(work / "trainer"),
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=1,
        learning_rate=args.lr,
        warmup_steps=args.examples // args.batch_size // 10,
        weight_decay=0.01,
        bf16=args.bf16,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=options, train_dataset=items, processing_class=tokenizer)
    return model, trainer.train().metrics["train_runtime"]


def predict(args: argparse.Namespace, work: Path, dtype: torch.dtype) -> None:
    """Classify the test texts with each system's own model, and with ours by both."""
    from transformers import AutoTokenizer, pipeline

    from torchrecipes.models import load_classifier

    texts, labels = read(args.test, args.examples)
    classify = TextClassifier(
        load_classifier(work / "ours"),
        load_tokenizer(work / "ours"),
        max_length=args.max_length,
        autocast=lambda: autocast(CPU, dtype),
    )
    found = timed("predict, ours", len(texts), lambda: classify.logits(texts))
    print(f"  accuracy {np.mean(found.argmax(1) == labels):.4f}")
    tokenizer = AutoTokenizer.from_pretrained(work / "ours", model_max_length=args.max_length)
    their = {"tokenizer": tokenizer, "device": "cpu", "dtype": dtype}
    pipe = pipeline("text-classification", str(work / "ours"), **their)
    there = timed("predict, pipeline", len(texts), lambda: pipe(texts, batch_size=32, truncation=True))
    names = classify.model.label_names
    same = np.mean([names[i] == row["label"] for i, row in zip(found.argmax(1), there, strict=True)])
    print(f"  the same label for {same:.2%} of the texts")
    if (work / "theirs").exists():
        pipe = pipeline("text-classification", str(work / "theirs"), **their)
        rows = pipe(texts, batch_size=32, truncation=True)
        numbers = [int(row["label"].rpartition("_")[2]) for row in rows]
        print(f"  accuracy of what Trainer trained {np.mean(np.array(numbers) == labels):.4f}")


def frozen(args: argparse.Namespace, rows: ExampleRows, work: Path, dtype: torch.dtype) -> None:
    """An epoch of everything, and of the head on features."""
    _, everything = train(args, rows, dtype)
    model, cache = loaded(args), FeatureCache(LabeledCollator(load_tokenizer(args.model)))
    set_trainable(model, "classifier")
    timed("features, once", rows.num_rows, lambda: cache.fill(model, [rows], Run(work, CPU, dtype)))
    _, head = train(args, rows, dtype, "classifier", cache, model)
    print(f"epoch: all {everything:.2f} s, classifier {head:.3f} s: {everything / head:.0f} times faster")


def timed(name: str, count: int, function: Callable):
    """Call it, and print texts per second."""
    begin = time.perf_counter()
    result = function()
    show(name, count, time.perf_counter() - begin)
    return result


def show(name: str, count: int, seconds: float) -> None:
    """Print texts per second."""
    print(f"{name}: {count / seconds:,.0f} texts/s ({seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
