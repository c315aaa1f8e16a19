"""Generated-name (DGA) detection: a fine-tuned encoder against logistic regression on character n-grams, in one run.

    python benchmarks/dga.py --csv dga_vs_legit.csv --init-from runs/domain_bert [--names top_domains.txt]

The file has the columns kind (dga or legit), family and domain. A name is in the test set where
`int(hashlib.md5(name).hexdigest(), 16) % 5 == 0`; all others train, a tenth of them to choose the checkpoint and the
temperature. The encoder learns the families, as the config has it, and a name is as probably generated as it is of none
of the legit ones; `data.source.label=kind` trains on legit and dga alone. The regression (scikit-learn, C=1 and C=10)
sees counts or TF-IDF of 1- to 4-grams of the name and fits all training names: legit and dga, and once the families.

`--init-from` is a run of mlm_pretrain, `--names` the list it was trained on: the test names on it are counted and left
out of a second figure. Further arguments are overrides of the
config `domain_bert/dga_detection`, as in `epochs=5`.
"""

import argparse
import csv
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from torchrecipes.evaluation.classification import classification_metrics

CONFIG = "domain_bert/dga_detection"


def main() -> None:
    """Print a line per model, then the recall of every family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", required=True)
    parser.add_argument("--init-from", help="a run of mlm_pretrain")
    parser.add_argument("--names", help="the list that the encoder was trained on")
    parser.add_argument("--model", help="the folder of a classifier that this trained before: only evaluate it")
    parser.add_argument("--json", help="write the figures here")
    args, overrides = parser.parse_known_args()
    with open(args.csv, encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    train, test = ([row for row in rows if is_test(row["domain"]) is part] for part in (False, True))
    print(f"{len(train):,} names to train on, {len(test):,} to test: {sum(map(is_generated, test)):,} generated")
    listed = set(Path(args.names).read_text("utf-8").split()) if args.names else set()
    scores = regressions(train, test)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(args.model) if args.model else fine_tune(train, Path(work), args.init_from, overrides)
        scores["fine-tuned encoder"] = classify(folder, test, legit_families(train))
    figures = {name: report(name, found, test, listed) for name, found in scores.items()}
    recalls(scores, test)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")


def is_test(name: str) -> bool:
    return int(hashlib.md5(name.encode()).hexdigest(), 16) % 5 == 0


def is_generated(row: dict[str, str]) -> bool:
    return row["kind"] == "dga"


def legit_families(rows: list[dict]) -> set[str]:
    return {row["family"] for row in rows if not is_generated(row)}


def generated(probabilities: np.ndarray, names: list[str], legit: set[str]) -> np.ndarray:
    """The probability that a name is generated, from those of all labels."""
    return 1 - probabilities[:, [name in legit | {"legit"} for name in names]].sum(1, dtype=np.float64)


def regressions(train: list[dict], test: list[dict]) -> dict[str, np.ndarray]:
    """The probability that each test name is generated, by the vectors and by C."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    found, legit = {}, legit_families(train)
    for name, kind, strength, label in (
        ("counts", CountVectorizer, 1, "kind"),
        ("counts", CountVectorizer, 10, "kind"),
        ("TF-IDF", TfidfVectorizer, 1, "kind"),
        ("TF-IDF", TfidfVectorizer, 10, "kind"),
        ("counts", CountVectorizer, 1, "family"),
    ):
        vectorizer = kind(analyzer="char", ngram_range=(1, 4), dtype=np.float32)
        solver = "liblinear" if label == "kind" else "lbfgs"
        model = LogisticRegression(C=strength, max_iter=300, solver=solver)
        model.fit(vectorizer.fit_transform([row["domain"] for row in train]), [row[label] for row in train])
        begin = time.perf_counter()
        probabilities = model.predict_proba(vectorizer.transform([row["domain"] for row in test]))
        seconds = time.perf_counter() - begin
        found[f"regression, {name}, C={strength}, {label}"] = generated(probabilities, list(model.classes_), legit)
    print(f"regression: {len(test) / seconds:,.0f} names/s")
    return found


def fine_tune(train: list[dict], work: Path, init_from: str, overrides: list[str]) -> Path:
    """Runs the recipe on the training names; returns the folder of the result."""
    with open(work / "train.csv", "w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, train[0])
        writer.writeheader()
        writer.writerows(train)
    command = [sys.executable, "-m", "torchrecipes.cli.main", "run", "classify_finetune", "--config", CONFIG]
    command += [f"data.source.path={work / 'train.csv'}", f"output_dir={work / 'run'}"]
    scratch = ["init_from=null", "tokenizer=torchrecipes.data.domains.domain_tokenizer"]
    scratch += ["model=torchrecipes.models.domain_bert", "model.size=tiny"]
    command += [f"init_from={init_from}"] if init_from else scratch
    begin = time.perf_counter()
    subprocess.run([*command, *overrides], check=True)
    print(f"fine-tuned in {time.perf_counter() - begin:.0f} s")
    return work / "run" / "model"


def classify(folder: Path, test: list[dict], legit: set[str]) -> np.ndarray:
    """The probability that each test name is generated."""
    from torchrecipes.data.tokenizers import load_tokenizer
    from torchrecipes.evaluation import TextClassifier
    from torchrecipes.models import load_classifier
    from torchrecipes.training.precision import autocast

    model, tokenizer = load_classifier(folder), load_tokenizer(folder)
    names = [row["domain"] for row in test]
    print(f"fine-tuned encoder: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    for dtype in (torch.bfloat16, torch.float32):
        classifier = TextClassifier(model, tokenizer, autocast=partial(autocast, torch.device("cpu"), dtype))
        classifier.logits(names)  # warm
        begin = time.perf_counter()
        logits = classifier.logits(names * 5)[: len(names)]
        print(f"  {5 * len(names) / (time.perf_counter() - begin):,.0f} names/s in {dtype}")
    probabilities = model.labels.probabilities(torch.from_numpy(logits)).double().numpy()
    return generated(probabilities, model.label_names, legit)


def report(name: str, found: np.ndarray, test: list[dict], listed: set[str]) -> dict[str, float]:
    """Prints and returns the figures of a model; of the names that are not listed, too."""
    figures = metrics(found, test)
    line = ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
    print(f"{name}: {line}")
    if listed:
        kept = [number for number, row in enumerate(test) if row["domain"] not in listed]
        rest = metrics(found[kept], [test[number] for number in kept])
        shown = f"accuracy {rest['accuracy']:.4f}, auc {rest['auc']:.4f}"
        print(f"  without {len(test) - len(kept)} names of the list: {shown}")
        figures |= {f"unlisted/{key}": value for key, value in rest.items()}
    return figures


def metrics(found: np.ndarray, test: list[dict]) -> dict[str, float]:
    """Accuracy, AUC, log loss and calibration error of probabilities."""
    found = np.clip(found, 1e-9, 1 - 1e-9)
    logits = np.log(np.stack([1 - found, found], axis=1))
    labels = np.array(list(map(is_generated, test))).astype(np.int64)
    results = classification_metrics(logits, labels)
    return {key: results[key] for key in ("accuracy", "auc", "log_loss", "ece")}


def recalls(scores: dict[str, np.ndarray], test: list[dict]) -> None:
    """Prints which share of every family is recognized, by the best regression and by the encoder."""
    regression = max(
        (name for name in scores if name.startswith("regression")), key=lambda n: metrics(scores[n], test)["auc"]
    )
    families = np.array([row["family"] for row in test])
    right = {
        name: (scores[name] > 0.5) == np.array(list(map(is_generated, test)))
        for name in (regression, "fine-tuned encoder")
    }
    print(f"recall of every family: {', '.join(right)}")
    for family in sorted(set(families)):
        chosen = families == family
        shares = "  ".join(f"{found[chosen].mean():.3f}" for found in right.values())
        print(f"  {family:14} {chosen.sum():4}  {shares}")


if __name__ == "__main__":
    main()
