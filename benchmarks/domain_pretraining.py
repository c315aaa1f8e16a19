"""Masked characters of domain names: a model trained for some minutes, against unigrams, trigrams and 5-grams.

    python benchmarks/domain_pretraining.py names.txt [--minutes 10] [--output FOLDER] [--json FILE] [key=value ...]

Trains with the recipe `mlm_pretrain` and the config `domain_bert/quickstart`, with a model of 2 x 192 and steps of 8
rows, and one name in 50 held out by a hash; further arguments are overrides of the config. Then it measures all the
held-out names, with `--draws` draws of 30 % of the characters before the public suffix. All of these become [MASK], so
that none is there to copy, and the suffix is shown. The n-grams are those of the training names; they see the true
characters to the left, the model sees both sides, with the masks in them, and where the suffix starts, which shows
where most dots are: compare letters.
"""

import argparse
import itertools
import json
import math
import tempfile
from contextlib import nullcontext
from pathlib import Path

from torchrecipes.checkpoint.find import find_checkpoint
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import load
from torchrecipes.config.catalog import find_config, find_recipe
from torchrecipes.data import evaluation_batches, load_text
from torchrecipes.data.domains import DomainCollator
from torchrecipes.evaluation import evaluate_mlm, mlm_baseline
from torchrecipes.models import load_hf

RECIPE, CONFIG = "mlm_pretrain", "domain_bert/quickstart"
MODEL = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
SETTINGS = ["data.validation_fraction=0.02", "checkpoint.keep_last=1", "lr_scheduler.min_lr_ratio=0.01"]
SETTINGS += ["global_batch_size=8", "micro_batch_size=8", *(f"model.{key}={value}" for key, value in MODEL.items())]
ROWS_PER_BATCH = 8
COLUMNS = {"unigram": "unigram_", "trigram": "trigram_", "5-gram": "fivegram_", "model": ""}


def main() -> None:
    """Train, evaluate, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", help="a file, a folder or a pattern: see torchrecipes.data.domains.domain_names")
    parser.add_argument("--minutes", type=float, default=10, help="of training (default: %(default)s)")
    parser.add_argument("--output", help="the run's folder; a run that is there continues (default: a temporary one)")
    parser.add_argument("--draws", type=int, default=8, help="of masks, in the evaluation (default: %(default)s)")
    parser.add_argument("--json", help="write the figures here")
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(args, args.output or folder, overrides)
    print(table(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")


def run(args: argparse.Namespace, output_dir: str, overrides: list[str]) -> dict[str, float]:
    """Trains a model and returns the metrics of `evaluate_mlm`."""
    source = f"{{_component_: torchrecipes.data.domains.domain_names, path: '{args.names}'}}"
    settings = [f"output_dir={output_dir}", f"data.source={source}", f"max_minutes={args.minutes}", *SETTINGS]
    recipe = load_recipe(find_recipe(RECIPE))
    config = load(recipe.Config, find_config(CONFIG), [*settings, *overrides], recipe=find_recipe(RECIPE))
    recipe.main(config)
    text = load_text(config, causal=False)
    rows, tokenizer = text.eval_sets["validation"], text.tokenizer
    baseline = mlm_baseline(rows.corpus, tokenizer, text.train_corpora("validation"))
    collator = DomainCollator(tokenizer, config.mlm_probability, mask_all=True, suffix_probability=0)
    draws = (evaluation_batches(rows, collator, ROWS_PER_BATCH, name=f"draw {i}") for i in range(args.draws))
    model = load_hf(find_checkpoint(output_dir)[0])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {rows.corpus.num_documents:,} names held out")
    batches = itertools.chain.from_iterable(draws)
    return evaluate_mlm(model, batches, tokenizer.unpadded_vocab_size, baseline, nullcontext)


def table(figures: dict[str, float]) -> str:
    """Loss, perplexity and accuracy by kind of character, as Markdown."""
    kinds = [name.removeprefix("loss/") for name in figures if name.startswith("loss/")]
    lines = [f"| characters | targets | metric | {' | '.join(COLUMNS)} |", f"|---|--:|---|{'--:|' * len(COLUMNS)}"]
    for kind, suffix in [("all", ""), *((kind, f"/{kind}") for kind in kinds)]:
        losses = [figures[f"{prefix}loss{suffix}"] for prefix in COLUMNS.values()]
        accuracies = [figures.get(f"{prefix}accuracy{suffix}") for prefix in COLUMNS.values()]
        cells = {
            "loss (nats)": [f"{loss:.3f}" for loss in losses],
            "perplexity": [f"{math.exp(loss):.2f}" for loss in losses],
            "top-1 accuracy": ["" if accuracy is None else f"{accuracy:.1%}" for accuracy in accuracies],
        }
        for metric, values in cells.items():
            lines.append(f"| {kind} | {figures[f'targets{suffix}']:,} | {metric} | {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
