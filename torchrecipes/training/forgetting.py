"""`ForgettingController`: compares evaluations with a baseline, raises the share of replay, or ends the run."""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from torchrecipes.config import Fraction, Positive
from torchrecipes.errors import UserError
from torchrecipes.model_folder import resolve_model_folder

Band = str | float  # `3%` of the baseline's loss, or 0.1 nats


@dataclass
class ForgettingConfig:
    """The config group `forgetting`. A band is a share of the baseline's loss (`3%`) or nats (`0.1`); None: off."""

    set: str = "general"  # the evaluation set whose loss should not rise
    warn: Band | None = "3%"  # above: the verdict is drifting
    raise_replay: Band | None = None  # above: the mixture replays more, from its next block of rows
    stop: Band | None = "15%"  # above: the verdict is forgetting, and the run ends with exit code 4
    baseline: Literal["start", "base"] = "start"  # base: of the first run, where init_from is a run of this recipe
    replay_source: str | None = None  # the part of the mixture that is replayed; None: the one named as the set
    raise_factor: Positive = 1.5  # its weight is multiplied by this, once per evaluation above raise_replay
    max_replay: Fraction = 0.5  # and is never raised above this

    def check(self) -> list[UserError]:
        """Problems of bands that cannot be read, or are not in order."""
        problems, limits = [], {}
        for name in ("warn", "raise_replay", "stop"):
            band = getattr(self, name)
            try:
                limits[name] = None if band is None else read_band(band)
            except UserError as error:
                problems.append(error.under(name))
        order = [(name, *limits[name]) for name in ("warn", "raise_replay", "stop") if limits.get(name)]
        for (low, low_value, low_unit), (high, high_value, high_unit) in itertools.pairwise(order):
            if low_unit == high_unit and low_value > high_value:
                problem = f"{getattr(self, high)} is below {low}={getattr(self, low)}"
                problems.append(UserError(problem, key=high, hint=f"Raise {high}, or lower {low}", code="out_of_range"))
        if self.raise_factor <= 1:
            problems.append(UserError(f"{self.raise_factor} is not above 1", key="raise_factor", code="out_of_range"))
        return problems


def read_band(band: Band) -> tuple[float, Literal["%", "nats"]]:
    """A band as a number and its unit: (3.0, "%") of `3%`, (0.1, "nats") of `0.1`.

    Raises:
        UserError: it is neither, or not above 0 (code `bad_band`).
    """
    text = str(band).strip()
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        hint = "Write 3% for a share of the baseline's loss, or 0.1 for nats; null switches it off"
        raise UserError(f"{band!r} is not a band above 0", hint=hint, code="bad_band")
    return value, "%" if text.endswith("%") else "nats"


def loss_change(loss: float, baseline: float) -> dict[str, float]:
    """The change of a loss against its baseline: `change_percent` of the baseline, and `change_nats`."""
    return {"change_percent": 100 * (loss / baseline - 1), "change_nats": loss - baseline}


def is_beyond(change: Mapping[str, float], band: Band | None) -> bool:
    """Whether a change (as of `loss_change`) is above a band; one that is not a number is above all of them."""
    if band is None:
        return False
    limit, unit = read_band(band)
    return not change["change_percent" if unit == "%" else "change_nats"] <= limit


def verdict(change: Mapping[str, float], bands: ForgettingConfig) -> Literal["kept", "drifting", "forgetting"]:
    """A change (as of `loss_change`) in one word: `forgetting` above `stop`, `drifting` above another band."""
    if is_beyond(change, bands.stop):
        return "forgetting"
    return "drifting" if is_beyond(change, bands.warn) or is_beyond(change, bands.raise_replay) else "kept"


def raised_weights(weights: Mapping[str, float], source: str, factor: float, highest: float) -> dict[str, float]:
    """The weights of a mixture with more of one source: the others share what is left, in their proportions.

    Args:
        weights: of all sources; their sum need not be 1.
        source: its share is multiplied by `factor`, up to `highest`. A share above that stays.
        factor: above 1.
        highest: a share of the mixture.
    """
    total = sum(weights.values())
    share = weights[source] / total
    raised = max(share, min(highest, share * factor))
    others = {name: weight / (total - weights[source]) for name, weight in weights.items() if name != source}
    return {name: raised if name == source else (1 - raised) * others[name] for name in weights}


class ForgettingController:
    """Compares evaluations with those before training, and says what to do about a set that gets worse.

        controller = ForgettingController(ForgettingConfig(set="general", warn="3%", stop="15%"))
        ...  # at step 0, and after every evaluation
        results = controller.compare(step, {"general": {"loss": loss}})
        if controller.judge(step, {"eval/general/loss": loss}) == "stop":
            ...

    All decisions follow from losses that are equal on all ranks, so all decide alike without communication. Its state
    is the baseline; hand it to the `Checkpointer`. An evaluation is judged after its checkpoint is saved, so a run that
    resumes there judges it again, with the same result.

    Replay against forgetting: Ibrahim et al. 2024, 2403.08763, section 4; Scialom et al. 2022, 2205.12393.

    Args:
        bands: the config group; None: compares and judges nothing.
        base: the baseline of the run that this one starts from: see `stored_baseline`. Its sets are not measured anew.
        sets: what the losses of each set are measured on. An entry of `base` that was measured on something else does
            not count.

    Attributes:
        baseline: (loss, what it was measured on) by set.
        log_fn: prints a line.
    """

    def __init__(
        self,
        bands: ForgettingConfig | None,
        base: Mapping[str, Sequence] | None = None,
        sets: Mapping[str, str] | None = None,
    ):
        self.bands, self.sets = bands, dict(sets or {})
        self.log_fn: Callable[[str], object] = partial(print, flush=True)
        if bands and sets and bands.set not in sets:
            raise UserError(
                f"{bands.set} is not one of the evaluation sets: {', '.join(sets)}",
                key="forgetting.set",
                hint="Name one of them, or set forgetting=null.",
                code="unknown_set",
            )
        self.baseline: dict[str, tuple[float, str]] = {}
        if bands and bands.baseline == "base":
            same = {
                name: loss for name, (loss, measured_on) in (base or {}).items() if self.sets.get(name) == measured_on
            }
            self.baseline = {name: (loss, self.sets[name]) for name, loss in same.items()}

    def compare(self, step: int, results: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Adds to an evaluation its change against the baseline, which the evaluation of step 0 is.

        Args:
            step: of the evaluation.
            results: metrics by set, among them `loss`.

        Returns:
            The same, with `change_percent` and `change_nats`, but for a set without a baseline.
        """
        if step == 0:
            for name, values in results.items():
                self.baseline.setdefault(name, (values["loss"], self.sets.get(name, "")))
        return {
            name: {**values, **(loss_change(values["loss"], self.baseline[name][0]) if name in self.baseline else {})}
            for name, values in results.items()
        }

    def judge(self, step: int, metrics: Mapping[str, float]) -> Literal["continue", "raise_replay", "stop"]:
        """Prints the verdict on an evaluation, and returns what follows from it.

        Args:
            step: of the evaluation. Step 0 is not judged.
            metrics: as in metrics.jsonl: `eval/<set>/loss` is the one that counts.

        Returns:
            `raise_replay`: the caller sets the weights of the mixture to `raised(weights)`; `stop`: it ends the run.
        """
        bands = self.bands
        if bands is None or step == 0 or bands.set not in self.baseline:
            return "continue"
        change = loss_change(metrics[f"eval/{bands.set}/loss"], self.baseline[bands.set][0])
        text = f"step {step}: {bands.set} {change['change_percent']:+.1f} % ({change['change_nats']:+.3f} nats)"
        above = [name for name in ("stop", "raise_replay", "warn") if is_beyond(change, getattr(bands, name))]
        limit = f", above {above[0]} ({getattr(bands, above[0])})" if above else ""
        self.log_fn(f"{text}: {verdict(change, bands)}{limit}")
        return "stop" if "stop" in above else "raise_replay" if "raise_replay" in above else "continue"

    def raised(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The weights of a mixture with more replay, by the rule of `raised_weights`; prints the change."""
        source = self.bands.replay_source or self.bands.set
        raised = raised_weights(weights, source, self.bands.raise_factor, self.bands.max_replay)
        before = weights[source] / sum(weights.values())
        more = f"{before:.1%} -> {raised[source]:.1%} from the next block of rows"
        self.log_fn(f"replay of {source}: {more if raised[source] > before else f'{before:.1%} stays, the maximum'}")
        return raised

    def metrics(self, weights: Mapping[str, float]) -> dict[str, float]:
        """`replay_share`, of a mixture with these weights; {} where nothing is replayed."""
        source = self.bands and (self.bands.replay_source or self.bands.set)
        return {"replay_share": weights[source] / sum(weights.values())} if source in weights else {}

    def check_mixture(self, weights: Mapping[str, float] | None) -> None:
        """Checks that there is something to raise.

        Args:
            weights: of the mixture's sources; None or {}: the training text is no mixture.

        Raises:
            UserError: `raise_replay` is set, and the source is not part of the mixture, or its weight is 0 (code
                `no_replay`).
        """
        if self.bands is None or self.bands.raise_replay is None:
            return
        source, weights = self.bands.replay_source or self.bands.set, weights or {}
        if not weights.get(source):
            parts = f"the mixture has {', '.join(weights)}" if weights else "the training text is no mixture"
            raise UserError(
                f"there is no replay of {source} to raise: {'its weight is 0' if source in weights else parts}",
                key="forgetting.raise_replay",
                hint="Add it to data.source, name another part in forgetting.replay_source, or set "
                "forgetting.raise_replay=null.",
                code="no_replay",
            )

    def state_dict(self) -> dict:
        """The baseline."""
        return {"baseline": {name: list(entry) for name, entry in self.baseline.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Restores a `state_dict()`."""
        self.baseline = {name: (loss, measured_on) for name, (loss, measured_on) in state["baseline"].items()}


def stored_baseline(init_from: str | Path) -> dict[str, Sequence]:
    """The baseline in the checkpoint that a run starts from; {}: it is not a checkpoint of a run with a controller.

    Args:
        init_from: a checkpoint, a run's folder or a Hugging Face folder.
    """
    try:
        state = json.loads((resolve_model_folder(init_from) / "state.json").read_bytes())
        return state["state"]["forgetting"]["baseline"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
