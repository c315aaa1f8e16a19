"""GPUs are hidden from the tests, which run alike on any machine; `pytest -m gpu` runs those that are about a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
KNOWN_MODULES = set(sys.modules)  # that no test wrote


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks torch; processes that tests start inherit it
    # They would compile the library's 300 files each, a third of a second. In this process modules are written and
    # loaded again within a second, which bytecode cannot tell apart.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and pytest -m gpu")


@pytest.fixture(autouse=True)
def forget_modules_that_a_test_wrote(tmp_path_factory):
    """A recipe that a test writes and loads is a module of this process, and the next test may write another one."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    made = str(tmp_path_factory.getbasetemp())
    for name in sys.modules.keys() - KNOWN_MODULES:  # to look at thousands after every test took milliseconds
        if str(getattr(sys.modules[name], "__file__", "")).startswith(made):
            del sys.modules[name]
        else:
            KNOWN_MODULES.add(name)


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder with the package as pip installs it from its wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=CHECKOUT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        "site",
        str(wheel),
    ]
    subprocess.run(install, cwd=folder, check=True)
    return folder / "site"
