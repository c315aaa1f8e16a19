import sys

import pytest


@pytest.fixture(autouse=True)
def forget_what_a_test_made_importable(tmp_path_factory):
    """A recipe that a test writes and loads is a module of this process, and the next test may write another one."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    made = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(made):
            del sys.modules[name]
