"""What a notebook imports. The library below knows nothing of this folder: it can be deleted."""

from dsv3_tutorial.learn.equality import check_equal
from dsv3_tutorial.learn.live import live_seconds
from dsv3_tutorial.learn.notebook import exercise, fails, hint, progress, solution
from dsv3_tutorial.learn.predictions import predict, reveal
from dsv3_tutorial.learn.terms import term
from dsv3_tutorial.learn.widgets import explore

__all__ = [
    "check_equal",
    "exercise",
    "explore",
    "fails",
    "hint",
    "live_seconds",
    "predict",
    "progress",
    "reveal",
    "solution",
    "term",
]
