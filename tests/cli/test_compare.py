"""`compare` on the files of runs that a test writes."""

import json
import math
import re

import pytest
import yaml

from torchrecipes.cli.compare import compare_runs, mark_pareto_front, to_html
from torchrecipes.cli.main import main as tune
from torchrecipes.errors import UserError


def write_run(folder, losses, *, init_from="models/base", best=None, lr=3e-5, replay=0.3, **config):
    """`losses`: step -> (domain, general)."""
    (folder / "checkpoints").mkdir(parents=True)
    lines = [
        {"step": step, "eval/domain/loss": domain, "eval/general/loss": general, "eval/domain/perplexity": 1.0}
        for step, (domain, general) in losses.items()
    ]
    lines.append({"step": max(losses), "loss": 1.0, "lr": lr})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "init_from": str(init_from),
        "optimizer": {"_component_": "torchrecipes.optim.adamw", "lr": lr},
        "data": {"source": {"replay_ratio": replay}},
        "forgetting": {"set": "general", "warn": "3%", "stop": "15%"},
    } | config
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if best is not None:
        (folder / "checkpoints" / "best.json").write_text(json.dumps({"checkpoint": f"step-{best:08d}"}))
    return folder


@pytest.fixture
def tree(tmp_path):
    """The three stages of a real adaptation, in small: a foundation and two branches from it."""
    root = tmp_path / "security"
    foundation = write_run(root / "foundation", {0: (5.0, 2.0), 100: (4.0, 1.98), 200: (3.9, 2.01)}, best=100)
    start = foundation / "checkpoints" / "step-00000100"
    write_run(root / "a_wide", {0: (4.0, 1.98), 50: (3.5, 2.04)}, init_from=start, lr=5e-5, replay=0.2)
    write_run(root / "b_fast", {0: (4.0, 1.98), 50: (3.6, 2.4)}, init_from=foundation, lr=7e-5, replay=0)
    (root / "corpus").mkdir()
    return root


def test_changes_are_against_the_model_before_the_first_stage(tree, capsys):
    rows = {row.name: row for row in compare_runs([tree], None)}
    assert list(rows) == ["foundation", "a_wide", "b_fast"]  # a start before what starts from it
    assert {name: round(row.gain, 3) for name, row in rows.items()} == {"foundation": 20, "a_wide": 30, "b_fast": 28}
    assert {name: round(row.forgotten, 3) for name, row in rows.items()} == {
        "foundation": -1, "a_wide": 2, "b_fast": 20,
    }  # fmt: skip
    assert [row.verdict for row in rows.values()] == ["kept", "kept", "forgetting"]
    assert [(row.at, row.is_best) for row in rows.values()] == [(100, True), (50, False), (50, False)]
    assert [row.start for row in rows.values()] == ["base", "foundation", "foundation"]
    assert [row.on_front for row in rows.values()] == [True, True, False]
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("5.000", "-30.0 %", "+0.040", "a_wide*", "20 %", "5e-05"))
    assert f"{math.exp(3.5):.4g}" in printed


def test_the_files_hold_what_is_printed(tree, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert tune(["compare", str(tree), "-o", str(tmp_path / "report")]) == 0
    markdown, page = [(tmp_path / "report" / f"compare.{kind}").read_text() for kind in ("md", "html")]
    printed = capsys.readouterr().out
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert lines and all(line in printed for line in lines)
    assert (tmp_path / "report" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page and page.count("<table>") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # needs no other file
    compare_runs([tree], None)
    assert (tree / "compare.md").read_text() == markdown


def test_names_are_escaped_in_the_page(tree):
    rows = compare_runs([tree], None)
    rows[0].name = "<script>"
    assert "<script>" not in to_html(rows, "A & B", ["x < y"], None)


def test_ties_are_both_on_the_front(tree):
    rows = compare_runs([tree / "foundation", tree / "foundation"], None)
    mark_pareto_front(rows)
    assert [row.on_front for row in rows] == [True, True]


def test_a_run_that_went_too_far_after_its_best_step_says_so(tmp_path, capsys):
    run = write_run(tmp_path / "run", {0: (5.0, 2.0), 10: (4.0, 2.02), 20: (3.0, 2.5)}, best=10)
    (row,) = compare_runs([run], None)
    assert (row.verdict, row.end_verdict) == ("kept", "forgetting")
    assert "kept, then forgetting" in capsys.readouterr().out


def test_other_sets_by_name(tmp_path):
    run = write_run(tmp_path / "run", {0: (5.0, 2.0), 10: (4.0, 2.0)}, forgetting=None)
    (row,) = compare_runs([run], None, domain="general", general="domain")
    assert row.forgotten == pytest.approx(-20)


def test_runs_without_such_evaluations(tree, tmp_path, capsys):
    plain = tree / "base"
    plain.mkdir()
    (plain / "config.yaml").write_text("seed: 0\n")
    (plain / "metrics.jsonl").write_text('{"step": 0, "eval/validation/loss": 3.0}\n{"step": 1, "loss": 2.0}\n')
    assert len(compare_runs([tree], None)) == 3  # of a folder of stages it is left out
    assert "base" in capsys.readouterr().out
    for folders, code in (([plain], "no_named_evaluations"), ([tmp_path / "none"], "not_found"),
                          ([tree / "corpus"], "not_found")):  # fmt: skip
        with pytest.raises(UserError) as error:
            compare_runs(folders, None)
        assert error.value.code == code
    assert tune(["compare", str(plain)]) == 2
