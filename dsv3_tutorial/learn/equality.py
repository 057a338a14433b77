"""Saying that something was computed elsewhere, and is the same."""

from typing import Any


def check_equal(title: str, got: Any, expected: Any, below: float = 1e-10) -> None:
    """Print whether tensors agree to `below`, relative to the largest number; else by how much not.

    got, expected: one tensor each, or dicts of them with equal keys in `got`.
    """
    pairs = [(got[k], expected[k]) for k in got] if isinstance(got, dict) else [(got, expected)]
    error = max((mine - whole).abs().max() / whole.abs().max() for mine, whole in pairs)
    if error < below:
        print(f"{title}: equal to one process, error < {below:g}")
    else:
        print(f"{title}: NOT equal to one process, off by {float(error):.2g} of the largest number")
