"""`benchmarks/data.py` runs: packing, which needs no peer, with small sizes."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "data.py"


def test_packing_is_measured(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", "--only", "packing", "--json", str(tmp_path / "out.json")])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    figures = json.loads((tmp_path / "out.json").read_text())["packing"]
    assert len(figures) == 6 and all(0.9 < found["fill"] <= 1 for found in figures.values())
