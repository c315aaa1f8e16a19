import json
import math

import pytest

from torchrecipes.errors import UserError
from torchrecipes.training.forgetting import (
    ForgettingConfig,
    ForgettingController,
    is_beyond,
    loss_change,
    raised_weights,
    read_band,
    stored_baseline,
    verdict,
)


def controller(**bands):
    made = ForgettingController(ForgettingConfig(**bands), sets={"general": "g", "domain": "d"})
    made.printed = []
    made.log_fn = made.printed.append
    compare(made, 0, general=2.0, domain=5.0)
    return made


def compare(made, step, **losses):
    results = made.compare(step, {name: {"loss": loss, "accuracy": 0.5} for name, loss in losses.items()})
    assert all(values.pop("accuracy") == 0.5 for values in results.values())
    return {name: {key: values[key] for key in values if key != "loss"} for name, values in results.items()}


def judge(made, step, loss):
    return made.judge(step, {"eval/general/loss": loss, "eval/domain/loss": 1.0})


@pytest.mark.parametrize(
    ("band", "value"), [("3%", (3.0, "%")), ("2.5 %", (2.5, "%")), ("0.1", (0.1, "nats")), (0.25, (0.25, "nats"))]
)
def test_bands_are_shares_or_nats(band, value):
    assert read_band(band) == value


@pytest.mark.parametrize("band", ["3percent", "%", "-1%", 0, "nan", "inf%"])
def test_other_bands_are_refused(band):
    with pytest.raises(UserError) as error:
        read_band(band)
    assert error.value.code == "bad_band"


def test_the_change_is_against_step_0():
    made = controller()
    changes = compare(made, 200, general=2.1, domain=4.0, added_later=3.0)
    assert changes["general"] == pytest.approx({"change_percent": 5.0, "change_nats": 0.1})
    assert changes["domain"] == pytest.approx({"change_percent": -20.0, "change_nats": -1.0})
    assert changes["added_later"] == {}


def test_verdicts():
    bands = ForgettingConfig(warn="3%", raise_replay=None, stop=0.3)
    by_loss = {loss: verdict(loss_change(loss, 2.0), bands) for loss in (1.0, 2.05, 2.07, 2.29, 2.31, math.nan)}
    expected = ["kept", "kept", "drifting", "drifting", "forgetting", "forgetting"]
    assert list(by_loss.values()) == expected
    off = ForgettingConfig(warn=None, stop=None)
    assert verdict(loss_change(9.0, 2.0), off) == "kept" and not is_beyond(loss_change(9.0, 2.0), None)


def test_a_planted_rise_warns_raises_the_replay_and_stops():
    made = controller(warn="3%", raise_replay="5%", stop="15%")
    decisions = [judge(made, step, loss) for step, loss in enumerate([2.0, 2.04, 2.08, 2.12, 2.4], 0)]
    assert decisions == ["continue", "continue", "continue", "raise_replay", "stop"]
    verdicts = [next(word for word in ("kept", "drifting", "forgetting") if word in line) for line in made.printed]
    assert verdicts == ["kept", "drifting", "drifting", "forgetting"]
    assert judge(controller(warn="3%", stop=None), 9, 99.0) == "continue"
    assert judge(ForgettingController(None), 9, 99.0) == "continue"


def test_a_loss_that_is_not_a_number_stops():
    assert judge(controller(), 5, math.nan) == "stop"


def test_more_replay_leaves_the_others_in_proportion():
    weights = {"domain": 3, "code": 1, "general": 1}
    raised = raised_weights(weights, "general", 1.5, 0.5)
    assert raised == pytest.approx({"domain": 0.525, "code": 0.175, "general": 0.3})
    assert list(raised) == list(weights)
    for _ in range(9):
        raised = raised_weights(raised, "general", 1.5, 0.5)
    assert raised == pytest.approx({"domain": 0.375, "code": 0.125, "general": 0.5})
    assert raised_weights({"domain": 0.2, "general": 0.8}, "general", 1.5, 0.5)["general"] == 0.8


def test_there_must_be_replay_to_raise():
    made = controller(raise_replay="5%")
    for weights in (None, {}, {"domain": 1.0}, {"domain": 1.0, "general": 0.0}):
        with pytest.raises(UserError) as error:
            made.check_mixture(weights)
        assert (error.value.code, error.value.key) == ("no_replay", "forgetting.raise_replay")
    made.check_mixture({"domain": 0.8, "general": 0.2})
    controller().check_mixture(None)
    with pytest.raises(UserError) as error:
        ForgettingController(ForgettingConfig(set="generel"), sets={"general": "g"})
    assert error.value.code == "unknown_set"


def test_a_resumed_controller_has_the_baseline_of_step_0():
    resumed = ForgettingController(ForgettingConfig())
    resumed.load_state_dict(json.loads(json.dumps(controller().state_dict())))
    assert compare(resumed, 200, general=2.1)["general"]["change_nats"] == pytest.approx(0.1)
    assert resumed.state_dict() == controller().state_dict()


def test_the_baseline_of_the_first_run_is_passed_on(tmp_path):
    assert stored_baseline(_folder(tmp_path / "hub")) == {}
    folder = _folder(tmp_path / "run" / "checkpoints" / "step-00000004")
    (folder / "state.json").write_text(json.dumps({"state": {"forgetting": controller().state_dict()}}))
    base = stored_baseline(folder)

    sets = {"general": "g", "domain": "other rows"}
    second = ForgettingController(ForgettingConfig(baseline="base"), base, sets)
    changes = compare(second, 0, general=2.2, domain=4.0)
    assert changes["general"]["change_percent"] == pytest.approx(10.0)
    assert changes["domain"]["change_nats"] == 0.0  # measured on other rows: a new baseline
    fresh = ForgettingController(ForgettingConfig(baseline="start"), base, sets)
    assert compare(fresh, 0, general=2.2)["general"]["change_percent"] == 0.0


def test_bands_out_of_order_are_all_reported():
    problems = ForgettingConfig(warn="9%", raise_replay="5%", stop="x", raise_factor=0.5).check()
    assert sorted((problem.key, problem.code) for problem in problems) == [
        ("raise_factor", "out_of_range"), ("raise_replay", "out_of_range"), ("stop", "bad_band"),
    ]  # fmt: skip
    assert ForgettingConfig(warn="9%", stop=0.1).check() == []  # units that only a baseline can compare


def _folder(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path
