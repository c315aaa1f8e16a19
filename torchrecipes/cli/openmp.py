"""How the threads of one operation wait for each other: spinning is quick to continue, and keeps a core from others.

libgomp, the OpenMP of PyTorch's Linux wheels, spins for milliseconds by default. Where another process takes the core
of one thread, the others spin meanwhile. It reads the environment when it is loaded: set it before torch is imported.
"""

import os

SPIN_COUNT = "10000"  # checks before a thread sleeps; measured with benchmarks/busy_neighbour.py


def spin_briefly() -> None:
    """For training: threads sleep soon if another process holds one of them up, and hardly ever if none does."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def wait_without_spinning() -> None:
    """For inference: threads sleep at once.

    A token of a small model takes a thousand short operations, and threads spin between them: on two cores that two
    other processes used as well, that was 8 tokens per second instead of 330.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
