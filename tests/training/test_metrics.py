import json
import math
import sys
import types

import pytest
import torch

from torchrecipes.errors import UserError
from torchrecipes.training import metrics as module
from torchrecipes.training.loggers import TensorBoard, WandB
from torchrecipes.training.metrics import MetricLogger

CPU = torch.device("cpu")


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def make(folder, **changes):
    return MetricLogger(folder, 10, device=CPU, **({"tokens_per_step": 100.0} | changes))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_is_the_mean_over_targets_whatever_the_micro_batches(tmp_path):
    metrics = make(tmp_path)
    for loss_sum, targets in ((10.0, 4), (2.0, 1), (30.0, 5)):
        metrics.update(torch.tensor(loss_sum), targets)
    line = metrics.log(2, lr=1e-3, grad_norm=torch.tensor(2.5))
    assert line["loss"] == pytest.approx(42 / 10) and line["perplexity"] == pytest.approx(math.exp(4.2))
    assert line["grad_norm"] == 2.5 and line["lr"] == 1e-3 and line["tokens"] == 200
    metrics.update(torch.tensor(3.0), 3)
    assert metrics.log(3, lr=1e-3, grad_norm=torch.tensor(1.0))["loss"] == 1.0
    assert lines(tmp_path)[0]["loss"] == pytest.approx(4.2)


def test_rates_leave_out_pauses_and_the_first_step_and_tell_waiting(tmp_path, clock, capsys):
    metrics = make(tmp_path, flops_per_token=6.0, peak_flops=1200.0)
    with metrics.begin_step():
        clock.now += 30  # the first step compiles: it is told, and not in the rates
    for _ in range(2):
        with metrics.begin_step():
            clock.now += 0.5
        clock.now += 1.5
    with metrics.exclude_time():
        clock.now += 60
    line = metrics.log(3, lr=1e-3, grad_norm=torch.tensor(1.0))
    assert "first step: 30.0 s, peak memory" in capsys.readouterr().out
    assert line["tokens_per_second"] == pytest.approx(200 / 4)
    assert line["data_wait_fraction"] == pytest.approx(1 / 4)
    assert line["mfu"] == pytest.approx(50 * 6 / 1200)
    assert line["eta_s"] == pytest.approx(7 * 2.0)
    assert line["peak_memory_gib"] > 0


def test_what_is_not_finite_is_null_in_the_file_and_itself_in_the_line(tmp_path):
    metrics = make(tmp_path)
    metrics.update(torch.tensor(math.nan), 1)
    line = metrics.log(1, lr=1e-3, grad_norm=torch.tensor(math.inf))
    assert math.isnan(line["loss"]) and math.isinf(line["grad_norm"])
    (written,) = lines(tmp_path)
    assert written["loss"] is None and written["loss_nonfinite"] == "nan"
    assert written["grad_norm"] is None and written["grad_norm_nonfinite"] == "inf"


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    with make(tmp_path) as metrics:
        for step in range(1, 7):
            metrics.log(step, lr=1e-3, grad_norm=torch.tensor(1.0))
            metrics.log_eval(step, "validation", {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": null}\n[]\n{"step": 7, "lo')  # a crash
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\x00")  # a power cut
    with make(tmp_path, first_step=5) as metrics:
        assert [line["step"] for line in lines(tmp_path)] == [1, 1, 2, 2, 3, 3, 4, 4]
        assert metrics.log(5, lr=1e-3, grad_norm=torch.tensor(1.0))["tokens"] == 500
    with make(tmp_path):
        assert lines(tmp_path) == []


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    with make(tmp_path) as metrics:
        metrics.update(torch.tensor(5.0), 2)
        metrics.log(1, lr=1e-3, grad_norm=torch.tensor(0.5))
        metrics.log_eval(1, "validation", {"loss": 2.0, "accuracy": 0.25})
    out = capsys.readouterr().out
    assert "step 1/10: loss 2.500, lr 1.0e-03, grad_norm 0.50" in out and "left" in out
    assert "step 1: validation loss 2.000, accuracy 0.250" in out
    assert lines(tmp_path)[1] == {"step": 1, "eval/validation/loss": 2.0, "eval/validation/accuracy": 0.25}


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with make(tmp_path, first_step=4) as metrics:
        metrics.update(torch.tensor(5.0), 2)
        metrics.log(5, lr=1e-3, grad_norm=torch.tensor(0.5))
        assert metrics.bar.n == 5 and metrics.bar.initial == 3
        assert "loss 2.500" in metrics.bar.postfix and "left" in metrics.bar.postfix
    assert "step 5/10" not in capsys.readouterr().out


def test_writers_get_every_line(tmp_path):
    class Writer:
        logged, closed = [], False

        def log(self, values, step):
            self.logged.append((step, values))

        def close(self):
            self.closed = True

    logger = Writer()
    with make(tmp_path, loggers=[logger]) as metrics:
        metrics.log(1, lr=1e-3, grad_norm=torch.tensor(0.5))
        metrics.log_eval(1, "validation", {"loss": 2.0})
    assert [step for step, _ in logger.logged] == [1, 1] and logger.closed
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


def test_wandb_is_told_project_folder_and_an_id_that_a_resumed_run_shares(tmp_path, monkeypatch):
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


@pytest.mark.parametrize(("module_name", "make_writer"), [("wandb", lambda: WandB("p", output_dir="r"))])
def test_a_missing_package_is_named_with_the_command(monkeypatch, module_name, make_writer):
    monkeypatch.setitem(sys.modules, module_name, None)
    with pytest.raises(UserError, match=f"pip install {module_name}"):
        make_writer()


def test_a_missing_tensorboard_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        TensorBoard(output_dir="r")


def test_a_reader_of_the_output_that_has_gone_costs_no_step(tmp_path, monkeypatch):
    class Gone:
        """What `| tee` leaves when Ctrl+C has ended it, before the run has saved."""

        def write(self, _):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stdout", Gone())
    with make(tmp_path) as metrics:
        metrics.log(1, lr=1e-3, grad_norm=torch.tensor(0.5))
        metrics.log_eval(1, "validation", {"loss": 2.0})
    assert len(lines(tmp_path)) == 2
