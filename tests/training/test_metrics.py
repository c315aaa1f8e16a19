import json
import math
import sys
import types
from typing import ClassVar

import pytest
import torch

from tests import ranks
from torchrecipes.config import Component
from torchrecipes.errors import UserError
from torchrecipes.training import LogConfig, MetricLogger, sum_over_ranks
from torchrecipes.training import metrics as module
from torchrecipes.training.loggers import TensorBoard, WandB
from torchrecipes.training.run import Run


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def make(folder, options=None, **changes):
    run = Run(folder, torch.device("cpu"))
    return MetricLogger(run, options, max_steps=10, **({"tokens_per_step": 100.0} | changes))


def log(metrics, step, loss=1.0, targets=1, grad_norm=1.0, **more):
    """A step with this loss, logged."""
    metrics.update({"loss": torch.tensor(loss * targets)}, targets)
    return metrics.log(step, lr=1e-3, grad_norm=torch.tensor(grad_norm), **more)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_is_the_mean_over_targets_whatever_the_micro_batches(tmp_path):
    metrics = make(tmp_path)
    for loss_sum, targets in ((10.0, 4), (2.0, 1), (30.0, 5)):
        metrics.update({"loss": torch.tensor(loss_sum), "mine": torch.tensor(loss_sum / 2)}, targets)
    line = metrics.log(2, lr=1e-3, grad_norm=torch.tensor(2.5))
    assert line["loss"] == pytest.approx(42 / 10) and line["perplexity"] == pytest.approx(math.exp(4.2))
    assert line["mine"] == pytest.approx(2.1)
    assert line["grad_norm"] == 2.5 and line["lr"] == 1e-3 and line["tokens"] == 200
    assert log(metrics, 3, loss=1.0, targets=3)["loss"] == 1.0
    assert lines(tmp_path)[0]["loss"] == pytest.approx(4.2)


def test_a_skipped_step_is_not_in_the_mean(tmp_path):
    metrics = make(tmp_path)
    metrics.update({"loss": torch.tensor(6.0)}, 2, torch.tensor(0.0))
    metrics.update({"loss": torch.tensor(math.nan)}, 2, torch.tensor(1.0))
    assert metrics.log(2, lr=1e-3, grad_norm=torch.tensor(1.0))["loss"] == 3.0
    metrics.update({"loss": torch.tensor(math.inf)}, 2, torch.tensor(1.0))
    assert math.isnan(metrics.log(3, lr=1e-3, grad_norm=torch.tensor(1.0))["loss"])
    metrics.update({"loss": torch.tensor(6.0)}, 2, torch.tensor(1.0))  # only its gradients overflowed
    assert metrics.log(4, lr=1e-3, grad_norm=torch.tensor(math.inf))["loss"] == 3.0


def test_the_loss_of_a_source_is_the_mean_over_its_own_targets(tmp_path):
    metrics = make(tmp_path)
    for loss, targets in ((3.0, 2.0), (5.0, 6.0)):
        sources = {"loss/a": loss, "loss/b": 0.0, "targets/a": targets, "targets/b": 0.0, "loss/own": 4.0}
        sources |= {"class_loss": loss, "targets/class_loss": targets, "rare": 0.0, "targets/rare": 0.0, "sum": 2.0}
        sources |= {"loss/loss": loss, "targets/loss": targets}  # a source may have any name
        metrics.update({name: torch.tensor(value) for name, value in ({"loss": 9.0} | sources).items()}, 10)
    line = metrics.log(2, lr=1e-3, grad_norm=torch.tensor(1.0))
    assert line["loss"] == pytest.approx(18 / 20) and line["loss/a"] == pytest.approx(8 / 8)
    assert line["loss/own"] == pytest.approx(8 / 20)  # without targets of its own it is any other sum
    assert line["class_loss"] == line["loss/loss"] == pytest.approx(8 / 8) and line["sum"] == pytest.approx(4 / 20)
    absent = {"loss/b", "rare"} | {f"targets/{name}" for name in ("a", "b", "class_loss", "rare", "loss")}
    assert not absent & line.keys()


def test_values_that_come_later_and_lists_are_logged(tmp_path):
    line = log(make(tmp_path), 1, expert_load=[0.25, 0.75], skipped_steps=0)
    assert line["expert_load"] == [0.25, 0.75] and lines(tmp_path)[0]["expert_load"] == [0.25, 0.75]
    assert line["skipped_steps"] == 0


def test_micro_batches_are_added_up():
    parts = [{"loss": torch.tensor(1.0), "aux": torch.tensor(0.5, dtype=torch.bfloat16)} for _ in range(3)]
    assert sum_over_ranks(parts) == {"loss": 3.0, "aux": 1.5}


SUMS = """
import torch, torch.distributed as dist
from torchrecipes.error_file import hard_exit
from torchrecipes.training import sum_over_ranks
dist.init_process_group("gloo")
part = {"loss": torch.tensor(1.0 + dist.get_rank()), "aux": torch.tensor(2.0)}
print({name: value.item() for name, value in sum_over_ranks([part, part]).items()})
hard_exit(0)
"""


def test_ranks_are_added_up(tmp_path):
    (tmp_path / "script.py").write_text(SUMS)
    assert ranks.run(tmp_path / "script.py", 2) == ["{'loss': 6.0, 'aux': 8.0}\n"] * 2


def test_rates_leave_out_pauses_and_the_first_step(tmp_path, clock, capsys):
    metrics = make(tmp_path, flops_per_token=6.0, peak_flops=1200.0)
    with metrics.begin_step():
        clock.now += 30  # the first step compiles: it is reported apart, and not in the rates
    for _ in range(2):
        with metrics.begin_step():
            clock.now += 0.5
        clock.now += 1.5
    with metrics.exclude_time():
        clock.now += 60
    line = log(metrics, 3)
    assert "30.0 s" in capsys.readouterr().out
    assert line["tokens_per_second"] == pytest.approx(200 / 4)
    assert line["data_wait_fraction"] == pytest.approx(1 / 4)
    assert line["mfu"] == pytest.approx(50 * 6 / 1200)
    assert line["eta_s"] == pytest.approx(7 * 2.0)
    assert line["peak_memory_gib"] > 0


def test_nonfinite_numbers_are_null_in_the_file(tmp_path):
    line = log(make(tmp_path), 1, loss=math.nan, grad_norm=math.inf)
    assert math.isnan(line["loss"]) and math.isinf(line["grad_norm"])
    (written,) = lines(tmp_path)
    assert written["loss"] is None and written["loss_nonfinite"] == "nan"
    assert written["grad_norm"] is None and written["grad_norm_nonfinite"] == "inf"


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    with make(tmp_path) as metrics:
        for step in range(1, 7):
            log(metrics, step)
            assert metrics.log_eval(step, {"validation": {"loss": 1.0}}) == {"eval/validation/loss": 1.0}
            metrics.log_samples(step, [types.SimpleNamespace(prompt="a", text=" b")])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": null}\n[]\n{"step": 7, "lo')  # a crash
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\x00")  # a power cut
    with make(tmp_path, first_step=5) as metrics:
        assert [line["step"] for line in lines(tmp_path)] == [1, 1, 2, 2, 3, 3, 4, 4]
        samples = (tmp_path / "samples.jsonl").read_text().splitlines()
        assert json.loads(samples[-1]) == {"step": 4, "prompt": "a", "text": " b"} and len(samples) == 4
        assert log(metrics, 5)["tokens"] == 500
    with make(tmp_path):
        assert lines(tmp_path) == [] and (tmp_path / "samples.jsonl").read_text() == ""


def test_a_rollback_removes_the_lines_after_its_step(tmp_path, clock):
    with make(tmp_path) as metrics:
        for step in range(1, 5):
            clock.now += 1
            log(metrics, step)
        metrics.update({"loss": torch.tensor(9.0)}, 1)  # of a step that is given up
        metrics.truncate_after(2)
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        clock.now += 2
        line = log(metrics, 3)
        assert line["loss"] == 1.0 and line["tokens_per_second"] == 50
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_an_evaluation_of_nothing_leaves_no_line(tmp_path):
    with make(tmp_path) as metrics:
        assert metrics.log_eval(3, {}) == {} and not metrics.is_evaluated(3)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_evaluations_are_read_again_unless_the_run_rolled_back_before_them(tmp_path):
    values = {"general": {"loss": 2.5, "perplexity": math.inf}, "domain": {"loss": math.nan, "perplexity": 1.0}}
    with make(tmp_path) as metrics:
        assert metrics.evaluation(2) == {}
        named = metrics.log_eval(2, values)
        metrics.log_eval(4, values)
        assert metrics.evaluation(2) == named and metrics.evaluation(4) == named
        metrics.truncate_after(3)
        assert metrics.evaluation(4) == {}
    with make(tmp_path, first_step=3) as metrics:
        read = metrics.evaluation(2)
        assert read.keys() == named.keys() and metrics.is_evaluated(2) and not metrics.is_evaluated(4)
        assert read["eval/general/perplexity"] == math.inf and math.isnan(read["eval/domain/loss"])


def test_a_long_step_shows_its_progress(tmp_path, clock, capsys):
    metrics = make(tmp_path)
    with metrics.begin_step():
        pass
    for _ in metrics.track(range(5)):
        clock.now += 20
    assert capsys.readouterr().out.splitlines() == ["step 1: micro-batch 2 of 5", "step 1: micro-batch 4 of 5"]
    for _ in metrics.track(range(3)):
        clock.now += 5
    assert capsys.readouterr().out == ""


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    with make(tmp_path) as metrics:
        log(metrics, 1, loss=2.5, targets=2, grad_norm=0.5)
        metrics.log_eval(1, {"validation": {"loss": 2.0, "accuracy": 0.25}})
    out = capsys.readouterr().out
    assert "step 1/10: loss 2.500, lr 1.0e-03, grad_norm 0.50" in out and "left" in out
    assert "step 1: validation loss 2.000, accuracy 0.250" in out
    assert lines(tmp_path)[1] == {"step": 1, "eval/validation/loss": 2.0, "eval/validation/accuracy": 0.25}


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with make(tmp_path, first_step=4) as metrics:
        log(metrics, 5, loss=2.5)
        assert metrics.bar.n == 5 and metrics.bar.initial == 3
        assert "loss 2.500" in metrics.bar.postfix and "left" in metrics.bar.postfix
    assert "step 5/10" not in capsys.readouterr().out


class Kept:
    """A logger that keeps what it gets."""

    made: ClassVar[list["Kept"]] = []

    def __init__(self, output_dir):
        self.output_dir, self.logged, self.closed = output_dir, [], False
        self.made.append(self)

    def log(self, values, step):
        self.logged.append((step, values))

    def close(self):
        self.closed = True


def test_loggers_get_every_line(tmp_path):
    component = Component(f"{__name__}.Kept")
    with make(tmp_path, LogConfig(loggers=[component])) as metrics:
        log(metrics, 1, grad_norm=0.5)
        metrics.log_eval(1, {"validation": {"loss": 2.0}})
    logger = Kept.made.pop()
    assert [step for step, _ in logger.logged] == [1, 1] and logger.closed and logger.output_dir == str(tmp_path)
    assert logger.logged[0][1]["grad_norm"] == 0.5 and logger.logged[1][1]["eval/validation/loss"] == 2.0


def test_tensorboard_reads_what_was_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoard(output_dir=str(tmp_path))
    for step in (1, 2):
        logger.log({"step": step, "loss": 3.0 / step}, step)
    logger.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 1.5)]
    assert events.Tags()["scalars"] == ["loss"]


def test_a_resumed_run_continues_its_wandb_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((values, step))

        def finish(self):
            calls.append("finish")

    fake = types.SimpleNamespace(init=lambda **arguments: (calls.append(arguments), Run())[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        logger = WandB("my-project", output_dir=str(tmp_path / "run"))
    logger.log({"loss": 1.0}, 7)
    logger.close()
    first, second, logged, end = calls
    assert (
        first == second and first["project"] == "my-project" and first["name"] == "run" and first["resume"] == "allow"
    )
    assert logged == ({"loss": 1.0}, 7) and end == "finish"


@pytest.mark.parametrize(
    ("module_name", "package", "make_logger"),
    [
        ("wandb", "wandb", lambda: WandB("p", output_dir="r")),
        ("torch.utils.tensorboard", "tensorboard", lambda: TensorBoard(output_dir="r")),
    ],
)
def test_a_missing_package_is_named_with_the_command(monkeypatch, module_name, package, make_logger):
    monkeypatch.setitem(sys.modules, module_name, None)
    with pytest.raises(UserError) as error:
        make_logger()
    assert error.value.code == "missing_package" and f"pip install {package}" in error.value.hint


def test_a_reader_of_the_output_that_has_gone_costs_no_step(tmp_path, monkeypatch):
    class Gone:
        """What `| tee` leaves when Ctrl+C has ended it, before the run has saved."""

        def write(self, _):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stdout", Gone())
    with make(tmp_path) as metrics:
        log(metrics, 1)
        metrics.log_eval(1, {"validation": {"loss": 2.0}})
    assert len(lines(tmp_path)) == 2
