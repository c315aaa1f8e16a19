import json
import sys

import pytest

from torchrecipes.cli.main import main


def write(folder, steps=20, evaluation=True, end=""):
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "loss": 5 / step, "lr": 1e-3, "tokens_per_second": 100.0}) + "\n")
            if evaluation and step % 5 == 0:
                values = {"loss": 4 / step, "accuracy": step / 30, "unigram_loss": 3.0, "unigram_accuracy": 0.1}
                line = {"step": step} | {f"eval/validation/{key}": value for key, value in values.items()}
                file.write(json.dumps(line) + "\n")
        file.write(end)
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, looked at before they are closed."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    return kept


def test_one_run_is_drawn_into_its_folder(tmp_path, figures, capsys):
    run = write(tmp_path / "first")
    assert main(["plot", str(run)]) == 0
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(run / "loss.png") in capsys.readouterr().out
    loss, accuracy, rate, speed = figures[0].axes
    curves = {line.get_label(): list(line.get_ydata()) for line in loss.get_lines()}
    assert curves["first, training"] == [5 / step for step in range(1, 21)]
    assert curves["first, validation"] == [4 / step for step in (5, 10, 15, 20)]
    assert [3.0] * 4 in curves.values()
    assert len(accuracy.get_lines()) >= 2 and len(rate.get_lines()) == len(speed.get_lines()) == 1


def test_several_runs_are_drawn_into_one_picture(tmp_path, figures):
    runs = [write(tmp_path / name, evaluation=name != "plain") for name in ("a/same", "b/same", "plain")]
    output = tmp_path / "new" / "compared.svg"
    assert main(["plot", *map(str, runs), "-o", str(output)]) == 0
    assert "<svg" in output.read_text()
    labels = {line.get_label() for line in figures[0].axes[0].get_lines()}
    assert {f"{runs[0]}, training", f"{runs[1]}, training", "plain, training"} <= labels


def test_the_accuracy_by_kind_of_character_is_a_panel(tmp_path, figures):
    run = write(tmp_path / "names")
    with (run / "metrics.jsonl").open("a") as file:
        for step in (10, 20):
            values = {
                "accuracy/letter": step / 50,
                "trigram_accuracy/letter": 0.3,
                "loss/letter": 2.0,
                "accuracy/dot": 1.0,
            }
            file.write(json.dumps({"step": step} | {f"eval/validation/{k}": v for k, v in values.items()}) + "\n")
    assert main(["plot", str(run)]) == 0
    _, _, _, _, kinds = figures[0].axes
    curves = {line.get_label(): list(line.get_ydata()) for line in kinds.get_lines()}
    assert curves["names, validation, letter"] == [0.2, 0.4] and curves["names, validation, dot"] == [1.0, 1.0]
    assert [0.3, 0.3] in curves.values()


def test_the_loss_by_position_before_and_after_is_a_panel(tmp_path, figures):
    run = write(tmp_path / "long")
    for step, losses in ((0, (3.0, 5.0)), (10, (2.5, 3.5)), (20, (2.0, 2.5))):
        line = {"step": step} | dict(zip(("eval/books/loss/0-63", "eval/books/loss/64-127"), losses, strict=True))
        line["eval/books/loss/letter"] = 1.0  # of a kind of character: no position
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert main(["plot", str(run)]) == 0
    curves = {line.get_label(): line for line in figures[0].axes[4].get_lines()}
    assert list(curves["long, books, before"].get_ydata()) == [3.0, 5.0]
    assert list(curves["long, books, after"].get_ydata()) == [2.0, 2.5]
    assert list(curves["long, books, after"].get_xdata()) == [31.5, 95.5]


def test_a_truncated_line_is_skipped(tmp_path, figures, capsys):
    run = write(tmp_path / "run", end='{"step": 21, "lo')
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    assert main(["plot", str(run / "metrics.jsonl")]) == 0
    assert "metrics.jsonl:25" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["nothing there", "empty", "other", "no matplotlib", "unknown format"])
def test_mistakes_are_one_message(tmp_path, monkeypatch, capsys, case):
    run = tmp_path / "run"
    arguments = ["plot", str(run)]
    if case == "empty":
        run.mkdir()
        (run / "metrics.jsonl").touch()
    elif case == "other":
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "reward": 2.0}\n')
    elif case != "nothing there":
        write(run)
    if case == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    if case == "unknown format":
        arguments += ["-o", str(tmp_path / "loss.txt")]
    assert main(arguments) == 2
    expected = {
        "nothing there": str(run),
        "empty": "metrics.jsonl",
        "other": "metrics.jsonl",
        "no matplotlib": "pip install matplotlib",
        "unknown format": "loss.txt",
    }
    err = capsys.readouterr().err
    assert expected[case] in err and "Traceback" not in err


def test_a_name_without_a_suffix_gets_one(tmp_path, figures, capsys):
    assert main(["plot", str(write(tmp_path / "run")), "-o", str(tmp_path / "picture")]) == 0
    assert str(tmp_path / "picture.png") in capsys.readouterr().out and (tmp_path / "picture.png").exists()
