"""Finds evaluations whose accuracy is no better than that of a constant prediction."""

import math
from collections.abc import Mapping

DEVIATIONS = 2  # standard deviations of a share of so many targets that are no difference


def kinds_at_baseline(values: Mapping[str, float]) -> list[str] | None:
    """What of an evaluation is at its unigram baseline.

    An accuracy is at its baseline p where it is at most p + 2 sqrt(p (1 - p) / n) over n targets. That of targets which
    the input does not show counts, since a model may copy the others and learn nothing else. Beside that of all targets
    the one of the kind with the most targets is judged, among kinds that are more than one token: a model of characters
    that finds every dot and nothing else is above the baseline of all targets.

    Args:
        values: `accuracy`, `unigram_accuracy` and `targets`, perhaps also `hidden_accuracy`, `accuracy/letter` and so
            on: see `evaluate_mlm`.

    Returns:
        "" for all targets, and the name of that kind; [] where neither is at its baseline; None where there is nothing
        to judge: no target, or no baseline.
    """
    if not values.get("targets") or "unigram_accuracy" not in values:
        return None
    kinds = [name.partition("/")[2] for name in values if name.startswith("unigram_accuracy/")]
    largest = max(kinds, key=lambda kind: values[f"targets/{kind}"], default="")
    return [kind for kind in dict.fromkeys(("", largest)) if _is_at_baseline(values, kind and f"/{kind}")]


def _is_at_baseline(values: Mapping[str, float], suffix: str) -> bool:
    baseline, targets = (values[f"{name}{suffix}"] for name in ("unigram_accuracy", "targets"))
    return values[_accuracy(values, suffix)] <= baseline + DEVIATIONS * math.sqrt(baseline * (1 - baseline) / targets)


def _accuracy(values: Mapping[str, float], suffix: str) -> str:
    """The name of the accuracy that counts: of the targets that the input does not show, where it shows some."""
    hidden = f"hidden_accuracy{suffix}"
    return hidden if hidden in values else f"accuracy{suffix}"


def baseline_warning(name: str, values: Mapping[str, float], kinds: list[str], evaluations: int) -> str:
    """The warning about an evaluation set, `name`, where `kinds` (of `kinds_at_baseline`) stay at their baselines."""
    suffix = kinds[0] and f"/{kinds[0]}"
    accuracy, baseline = _accuracy(values, suffix), values[f"unigram_accuracy{suffix}"]
    meaning = "The model predicts the most frequent tokens, whatever their context."
    if suffix:
        meaning = f"Of the {kinds[0]}s the model predicts only the most frequent; it has learned other characters."
    return (
        f"warning: {name}: {accuracy} {values[accuracy]:.3f} is not above its unigram baseline {baseline:.3f}, for "
        f"{evaluations} evaluations. {meaning} That is normal early in a run. If it stays so, check the learning "
        'rate, the masks and labels of a collator or loss of your own, and the text: "The loss does not fall" in '
        "docs/troubleshooting.md. log.baseline_evaluations sets when this is said; null: never"
    )
