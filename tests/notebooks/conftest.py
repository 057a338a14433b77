"""The lessons that the proofs take, and a sample lesson for the tests of the tools themselves."""

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
LESSONS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))

SAMPLE = """
# %% [markdown] id="title"
# # A sample lesson

# %% id="setup"
import matplotlib.pyplot as plt
from ipywidgets import HTML, IntSlider, VBox

# %% [markdown] id="about-the-figure"
# A line, and what it shows.

# %% id="figure"
figure, axes = plt.subplots(figsize=(2, 2))
lines = axes.plot([1, 2, 4])

# %% [markdown] id="about-the-slider"
# A slider.

# %% id="slider"
VBox([IntSlider(3), HTML("three")])

# %% [markdown] id="about-time"
# A live cell prints what no build repeats.

# %% id="clock" tags=["live", "nbval-ignore-output"]
import time

print(time.perf_counter_ns())

# %% [markdown] id="about-words"
# Several writes, which may reach the notebook in one piece or in many.

# %% id="words"
for word in ("one", "two", "three"):
    print(word, flush=True)
"""


def pytest_generate_tests(metafunc):
    if "lesson" in metafunc.fixturenames:
        none = pytest.param(None, id="none", marks=pytest.mark.skip(reason="no lesson is built"))
        lessons = [pytest.param(path, id=path.stem) for path in LESSONS]
        metafunc.parametrize("lesson", lessons or [none])


@pytest.fixture
def built(lesson):
    """One lesson as it is committed."""
    return nbformat.read(lesson, as_version=4)


@pytest.fixture
def sample(tmp_path):
    """A folder like notebooks/, with the source of one small lesson in it."""
    folder = tmp_path / "a folder"
    (folder / "src").mkdir(parents=True)
    (folder / "src/07_sample.py").write_text(SAMPLE.lstrip())
    return folder
