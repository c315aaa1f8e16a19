"""The documentation site builds without warnings and without other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # Strict: a broken link or anchor, a page outside the nav and a name that the API reference cannot find are errors.
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    return folder


def test_pages_load_nothing_from_other_hosts(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"""<(?:script|img|link)[^>]*(?:src|href)=["']?(https?:[^"'> ]+)""", text) == [], page.name


def test_reference_covers_every_subpackage_and_recipe(site):
    written = {path.relative_to(site / "reference").as_posix() for path in (site / "reference").rglob("*.html")}
    recipes = {f"config/{path.stem}.html" for path in (ROOT / "recipes").glob("*.py")}
    subpackages = {f"api/{name}.html" for name in ("models", "losses", "optim", "modules")}
    assert recipes | subpackages | {"cli.html"} <= written
