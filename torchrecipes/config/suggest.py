"""Suggests the closest valid name."""

import difflib
from collections.abc import Iterable


def closest(name: str, valid: Iterable[str]) -> str | None:
    """Return the name in `valid` that `name` most likely misspells, or None where nothing is near."""
    spelled = {candidate.lower().replace("-", "_"): candidate for candidate in valid}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), spelled, n=1, cutoff=0.5)
    return spelled[found[0]] if found else None


def did_you_mean(name: str, valid: Iterable[str], otherwise: str = "Valid here") -> str:
    """Return the hint for a wrong `name`: the closest of `valid`, or all of them after `otherwise`."""
    valid = sorted(valid)
    near = closest(name, valid)
    if near:
        return f"Did you mean '{near}'?"
    if not valid:
        return f"{otherwise}: nothing"
    return f"{otherwise}: {', '.join(valid[:40])}" + (", ..." if len(valid) > 40 else "")
