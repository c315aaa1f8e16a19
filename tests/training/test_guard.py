import copy
import inspect
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import ranks
from torchrecipes.errors import UserError
from torchrecipes.training import guard as module
from torchrecipes.training.guard import MIN_DEVIATION, Guard

NAN, INF = float("nan"), float("inf")
OPTIMIZERS = {
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "adamw_amsgrad_fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=False),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
}


class Lines(list):
    """Keeps the lines of a guard."""

    __call__ = list.append


class Still:
    """An optimizer of nothing."""

    param_groups = ()

    def step(self):
        pass


def make(**settings):
    guard = Guard(**settings)
    guard.log_fn = Lines()
    return guard


def refused(call, *args, **settings):
    """The text of the error that stops a run."""
    with pytest.raises(UserError) as error:
        call(*args, **settings)
    assert error.value.code == "diverged"
    return str(error.value)


def numbers(line):
    """The numbers in a line: `step 812: loss is nan: step skipped (1 in a row)` has 812 and 1."""
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", line)]


def feed(guard, losses, first=1, norms=None, **look):
    """One step per loss. Returns what `check` said of each."""
    verdicts = []
    for step, loss in enumerate(losses, start=first):
        guard.step(Still(), torch.tensor(loss), torch.tensor(norms[step - first] if norms else 1.0))
        verdicts.append(guard.check(step, **look))
    return verdicts


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def backward(model, bad=None):
    loss = model(torch.linspace(-1, 1, 10).view(2, 5)).pow(2).mean()
    loss.backward()
    if bad is not None:
        next(model.parameters()).grad.view(-1)[0] = bad
    return loss, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def train(make_optimizer, gradients, guarded=True):
    """Weights and optimizer state after a step per entry of `gradients`: None, or a number put into the gradient."""
    model = network()
    optimizer, guard = make_optimizer(model.parameters()), make()
    for step, bad in enumerate(gradients, start=1):
        loss, norm = backward(model, bad)
        if guarded:
            skipped = guard.step(optimizer, loss, norm)
            assert skipped.item() == (bad is not None)
            guard.check(step)
        else:
            optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), optimizer.state_dict()["state"]


def assert_equal(left, right):
    for ours, theirs in zip(left, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_nothing(name, bad):
    with_skips = train(OPTIMIZERS[name], [None, None, bad, bad, None, bad])
    assert_equal(with_skips, train(OPTIMIZERS[name], [None, None, None], guarded=False))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_first_step_changes_nothing(name):
    skipped_first = train(OPTIMIZERS[name], [NAN, None, None])
    assert_equal(skipped_first, train(OPTIMIZERS[name], [None, None], guarded=False))


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is_fine():
    model, guard = network(), make()
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["adamw_fused"](model.parameters())
    loss, norm = backward(model)
    guard.step(optimizer, loss + INF, norm)
    assert_equal([model.state_dict()], [before])
    assert not hasattr(optimizer, "found_inf")


def test_every_skipped_step_is_reported_and_counted():
    guard = make()
    feed(guard, [2.0, NAN, INF, 2.0, 2.0], norms=[1.0, NAN, 1.0, INF, 1.0], first=811)
    assert [numbers(line) for line in guard.log_fn] == [[812, 1], [813, 2], [814, 3]]
    named = [[word for word in ("loss", "gradient norm", "nan", "inf") if word in line] for line in guard.log_fn]
    assert named == [["loss", "gradient norm", "nan"], ["loss", "inf"], ["gradient norm", "inf"]]
    assert guard.metrics() == {"skipped_steps": 3, "spikes": 0, "rollbacks": 0}
    feed(guard, [NAN], first=816)
    assert numbers(guard.log_fn[-1]) == [816, 1]


def test_a_row_of_skipped_steps_stops_the_run():
    guard = make(max_skips=3)
    feed(guard, [1.0, NAN, NAN, 1.0, NAN, NAN])
    text = refused(feed, guard, [NAN], first=7, checkpoint="c/step-4")
    for part in ("step 7", "3 in a row", "steps 5 to 7", "optimizer.lr", "checkpoint.resume=c/step-4"):
        assert part in text
    assert len(guard.log_fn) == 5


def test_the_first_step_that_is_not_finite_stops_where_that_is_set():
    text = refused(feed, make(on_nonfinite="stop"), [1.0], norms=[INF])
    assert "step 1" in text and "gradient norm is inf" in text and "resume" not in text


def test_a_row_of_skipped_steps_rolls_back():
    guard = make(on_nonfinite="rollback", max_skips=2, max_rollbacks=1)
    assert feed(guard, [1.0, NAN, 1.0, NAN, NAN], checkpoint="c") == ["continue"] * 4 + ["rollback"]
    assert numbers(guard.log_fn[-1]) == [5, 2, 1, 1] and " c," in guard.log_fn[-1]
    assert feed(guard, [NAN, 1.0, NAN], first=6, checkpoint="c") == ["continue"] * 3  # the row began anew
    text = refused(feed, guard, [NAN], first=9, checkpoint="c")
    assert "step 9" in text and "max_rollbacks=1" in text and "steps 8 to 9" in text


def test_without_a_checkpoint_there_is_no_rollback():
    guard = make(on_nonfinite="rollback", max_skips=1)
    assert "no checkpoint" in refused(feed, guard, [NAN])


def test_an_older_state_does_not_reset_the_counters():
    guard = make(on_nonfinite="rollback", max_skips=2, max_rollbacks=2, spike_window=8)
    feed(guard, [1.0, 1.1, NAN], checkpoint="c")
    saved = guard.state_dict()
    for rollback in (1, 2):
        first = 10 * rollback
        assert feed(guard, [1.2, NAN, NAN], first=first, checkpoint="c")[-1] == "rollback"
        guard.load_state_dict(saved)
        assert guard.rollbacks == rollback and guard.state_dict()["window"] == pytest.approx([1.0, 1.1])
    assert guard.skipped_steps == 5
    assert "max_rollbacks=2" in refused(feed, guard, [1.2, NAN, NAN], first=30, checkpoint="c")


def test_a_rollback_to_a_checkpoint_amid_skipped_steps_ends_their_row():
    guard = make(on_nonfinite="rollback", max_skips=3)
    feed(guard, [1.0, NAN, NAN])
    amid = guard.state_dict()
    assert amid["skipping"] == [2, 3]
    assert feed(guard, [NAN], first=4, checkpoint="c/3") == ["rollback"]
    guard.load_state_dict(amid)
    assert feed(guard, [NAN, NAN, NAN], first=4, checkpoint="c/3") == ["continue", "continue", "rollback"]


def noisy(count, seed=0):
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2.5 + 0.1 * noise).float().tolist()


def test_a_spike_is_what_the_z_score_says():
    past = noisy(16)
    mean, deviation = statistics.fmean(past), statistics.pstdev(past)
    for zscore, spikes in ((5.9, 0), (6.1, 1), (-9.0, 0)):
        guard = make(spike_window=16)
        feed(guard, [*past, mean + zscore * deviation])
        assert guard.spikes == spikes
    guard = make(spike_window=16)
    feed(guard, [*past, mean + 20 * deviation], first=101)
    (line,) = guard.log_fn
    assert line.startswith("step 117: ") and numbers(line)[-1] == 16
    assert f"{mean + 20 * deviation:.4g}" in line and "20.0" in line and f"{mean:.4g}" in line


def test_only_the_window_counts_and_spikes_are_not_in_it():
    guard = make(spike_window=16)
    feed(guard, [*noisy(40), 9.0, NAN, *noisy(3, seed=1)], norms=[1.0] * 43 + [INF, 1.0])
    kept = [*noisy(40), *noisy(1, seed=1), noisy(3, seed=1)[2]]
    assert list(guard.window) == kept[-16:]
    assert guard.metrics() == {"skipped_steps": 2, "spikes": 1, "rollbacks": 0}


def test_nothing_is_judged_before_half_a_window():
    early, late = make(spike_window=16), make(spike_window=16)
    feed(early, [*noisy(7), 9.0])
    feed(late, [*noisy(8), 9.0])
    assert (early.spikes, late.spikes) == (0, 1)


def test_the_noise_of_a_flat_loss_is_no_spike():
    guard = make(spike_window=16)
    feed(guard, [2.0] * 16 + [2.0 + 5.9 * MIN_DEVIATION])
    assert guard.spikes == 0
    feed(guard, [2.1], first=18)
    assert guard.spikes == 1


@pytest.mark.parametrize("slope", [-0.05, 1e-4, 0.05])
def test_a_smooth_loss_has_no_spikes(slope):
    guard = make()
    feed(guard, [30 + slope * step + 0.02 * math.sin(step) for step in range(400)])
    assert guard.spikes == 0 and len(guard.window) == 128


def test_a_loss_that_settles_higher_becomes_the_window():
    guard = make(spike_window=16)
    feed(guard, [*noisy(16), *[loss + 5 for loss in noisy(9, seed=1)]])
    assert guard.spikes == 8
    assert numbers(guard.log_fn[-1]) == [24, 8]
    assert list(guard.window) == torch.tensor([loss + 5 for loss in noisy(9, seed=1)]).tolist()


def test_a_spike_rolls_back_where_that_is_set():
    guard = make(on_spike="rollback", spike_window=16)
    assert feed(guard, [*noisy(16), 9.0, 2.5], checkpoint="c") == ["continue"] * 16 + ["rollback", "continue"]
    assert guard.metrics() == {"skipped_steps": 0, "spikes": 1, "rollbacks": 1}


def test_spikes_can_be_off():
    guard = make(spike_zscore=None, spike_window=16)
    feed(guard, [*noisy(16), 9.0])
    assert guard.metrics()["spikes"] == 0 and guard.log_fn == []


@pytest.mark.parametrize("stop_at", range(1, 60, 7))
def test_a_resumed_guard_continues_as_if_it_had_never_stopped(stop_at):
    losses = noisy(60)
    for step, loss in {12: NAN, 13: NAN, 14: INF, 25: 9.0, 40: 8.0, 41: 8.5, 42: 8.1, 55: NAN}.items():
        losses[step] = loss
    settings = {"on_nonfinite": "rollback", "max_skips": 2, "on_spike": "log", "spike_window": 6}
    whole, before, after = make(**settings), make(**settings), make(**settings)
    verdicts = feed(whole, losses, checkpoint="c")
    first = feed(before, losses[:stop_at], checkpoint="c")
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    assert first + feed(after, losses[stop_at:], first=stop_at + 1, checkpoint="c") == verdicts
    assert before.log_fn + after.log_fn == whole.log_fn
    assert after.state_dict() == whole.state_dict()
    assert "rollback" in verdicts and whole.spikes >= 4


def test_a_state_of_other_settings_is_continued():
    """What a stopped run is continued with: a smaller window, fewer skips."""
    wide, narrow = make(spike_window=16), make(spike_window=4, max_skips=2)
    feed(wide, [*noisy(20), 9.0, 9.1, 9.0, NAN, NAN, NAN])
    narrow.load_state_dict(wide.state_dict())
    assert list(narrow.window) == noisy(20)[-4:]
    feed(narrow, [9.2, 9.1], first=27)
    assert numbers(narrow.log_fn[-1]) == [27, 4]
    assert narrow.spikes == 4 and list(narrow.window) == pytest.approx([9.0, 9.1, 9.0, 9.2, 9.1][-4:])
    again = make(max_skips=2)
    again.load_state_dict(wide.state_dict())
    assert "steps 24 to 27" in refused(feed, again, [NAN], first=27)


class Copied:
    """Stands for the event of a copy; it knows whether anyone waited for it."""

    waited = False

    def synchronize(self):
        self.waited = True


@pytest.fixture
def like_a_gpu(monkeypatch):
    events = []

    def to_host(values):
        events.append(Copied())
        return values.clone(), events[-1]

    monkeypatch.setattr(module, "_to_host", to_host)
    return events


def test_a_device_is_judged_one_step_late_and_at_once_on_demand(like_a_gpu):
    guard = make(on_nonfinite="rollback", max_skips=2)
    feed(guard, [1.0, NAN], checkpoint="c")
    assert [event.waited for event in like_a_gpu] == [True, False] and guard.log_fn == []
    with pytest.raises(RuntimeError):
        guard.state_dict()
    assert guard.check(2, sync=True) == "continue"
    assert [numbers(line) for line in guard.log_fn] == [[2, 1]]
    assert guard.state_dict()["skipping"] == [2]
    assert feed(guard, [NAN, 1.0, 1.0], first=3, checkpoint="c") == ["continue", "rollback", "continue"]
    assert [numbers(line) for line in guard.log_fn[1:]] == [[3, 2], [4, 2, 1, 3]]
    assert feed(guard, [NAN], first=6, sync=True) == ["continue"]
    assert numbers(guard.log_fn[-1]) == [6, 1]


def test_steps_that_were_not_judged_are_forgotten_with_their_weights(like_a_gpu):
    guard = make(on_nonfinite="rollback", max_skips=1)
    saved = guard.state_dict()
    assert feed(guard, [NAN, NAN], checkpoint="c") == ["continue", "rollback"]
    guard.load_state_dict(saved)
    assert guard.check(2, sync=True) == "continue" and guard.metrics()["skipped_steps"] == 1


class Killed(Exception):
    """The end of a process."""


def run_loop(disk, kill_before=None, steps=30):
    """A run with spikes and NaNs in its data. It saves every 4 steps, into {step: checkpoint}. Returns how it ends."""
    model = network()
    optimizer = OPTIMIZERS["adamw_fused"](model.parameters())
    guard = make(on_nonfinite="rollback", max_skips=2, on_spike="rollback", spike_window=4, max_rollbacks=9)

    def load():
        weights, moments, watched, behind = json_copy(disk[max(disk)])
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        guard.load_state_dict(watched)
        return max(disk), behind

    step, behind = load() if disk else (0, 0)
    while step < steps:
        step += 1
        data = step + behind
        if data == kill_before:
            raise Killed
        loss, norm = backward(model, {6: NAN, 14: NAN, 15: INF, 16: NAN, 17: NAN, 25: NAN}.get(data))
        guard.step(optimizer, loss + 50 if data in (10, 20, 21) else loss, norm)
        optimizer.zero_grad()
        save_now = step % 4 == 0
        if guard.check(step, sync=save_now, checkpoint=f"c/{max(disk)}" if disk else None) == "rollback":
            step, behind = load()[0], data - max(disk)
        elif save_now:
            disk[step] = json_copy((model.state_dict(), optimizer.state_dict(), guard.state_dict(), behind))
    return model.state_dict(), optimizer.state_dict()["state"], guard.state_dict(), behind


def json_copy(checkpoint):
    weights, moments, *state = copy.deepcopy(checkpoint)
    return weights, moments, *json.loads(json.dumps(state, allow_nan=False))


@pytest.mark.parametrize("kill_before", [5, 7, 10, 11, 13, 15, 16, 17, 18, 20, 21, 22, 30])
def test_a_killed_run_with_rollbacks_ends_as_the_one_that_was_not(kill_before):
    whole = run_loop({})
    assert whole[2]["rollbacks"] == 5 and whole[2]["skipped_steps"] == 6
    disk = {}
    with pytest.raises(Killed):
        run_loop(disk, kill_before)
    assert_equal(run_loop(disk), whole)


def test_the_page_shows_the_lines():
    page = (Path(__file__).parents[2] / "docs" / "guard.md").read_text(encoding="utf-8")
    checkpoint = "runs/small/checkpoints/step-00000500"
    single, spike = make(), make(spike_window=128)
    feed(single, [2.0], norms=[INF], first=812)
    feed(spike, [2.412 + 0.3939 * (-1) ** step for step in range(128)], first=4117 - 128)
    feed(spike, [6.903], first=4117)
    rollback = make(on_nonfinite="rollback")
    feed(rollback, [NAN] * 5, first=812, checkpoint=checkpoint)
    shown = [*single.log_fn, *spike.log_fn, *rollback.log_fn[-2:]]
    assert [line for line in shown if f"\n{line}\n" not in page] == []
    defaults = {name: p.default for name, p in inspect.signature(Guard).parameters.items() if name != "dtype"}
    assert dict(re.findall(r"^\| `guard\.(\w+)` \| `?([^`|]+?)`? \|", page, re.MULTILINE)) == {
        name: str(default) for name, default in defaults.items()
    }


@pytest.mark.parametrize(
    "setting",
    [
        {"on_nonfinite": "skpi"},
        {"max_skips": 0},
        {"on_spike": "stop"},
        {"spike_zscore": 0.0},
        {"spike_zscore": NAN},
        {"spike_window": 1},
        {"max_rollbacks": -1},
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting):
    with pytest.raises(UserError) as error:
        Guard(**setting)
    (problem,) = error.value.problems
    assert (problem.code, problem.key) == ("out_of_range", next(iter(setting)))


def sharded_skip():
    """Two ranks, one with a NaN in its shard of the gradient: both skip, and go on as if the step had not been."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    results = []
    for gradients in ([None, NAN, None], [None, None]):
        model = network()
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
        optimizer, guard = OPTIMIZERS["adamw_fused"](model.parameters()), make()
        for step, bad in enumerate(gradients, start=1):
            loss = model(torch.linspace(-1, 1, 10).view(2, 5)).pow(2).mean()
            loss.backward()
            if bad is not None and dist.get_rank() == 1:
                next(model.parameters()).grad.to_local().view(-1)[0] = bad
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
            guard.step(optimizer, loss.detach(), norm)
            guard.check(step)
            optimizer.zero_grad()
        states = [value for state in optimizer.state.values() for value in state.values()]
        values = [*model.parameters(), *states]
        local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
        results.append([value.detach().flatten().tolist() for value in local])
        assert guard.skipped_steps == gradients.count(NAN)
    return results[0] == results[1] and len(results[0]) == 4 + 3 * 4


def test_ranks_with_sharded_weights_skip_together():
    assert ranks.call(sharded_skip) == [True, True]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_but_the_look_of_the_step_before():
    model = network().cuda()
    optimizer, guard = OPTIMIZERS["adamw_fused"](model.parameters()), make()
    for step in range(1, 6):
        bad = NAN if step == 3 else None
        before = [p.detach().clone() for p in model.parameters()]
        loss = model(torch.linspace(-1, 1, 10, device="cuda").view(2, 5)).pow(2).mean()
        loss.backward()
        if bad is not None:
            next(model.parameters()).grad.fill_(bad)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            guard.step(optimizer, loss, norm)
            guard.check(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
        same = all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        assert same == (bad is not None)
        assert guard.skipped_steps == (step > 3)


def test_lines_are_printed(capsys):
    feed(Guard(), [NAN])
    assert numbers(capsys.readouterr().out) == [1, 1]
