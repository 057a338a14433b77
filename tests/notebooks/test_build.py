"""The build repeats itself, keeps what it must keep, and refuses what no lesson may be."""

import base64

import build
import nbformat
import pytest
from outputs import WIDGET, plain, without_stamps

pytestmark = pytest.mark.notebooks


def paths(folder):
    return folder / "src/07_sample.py", folder / "07_sample.ipynb"


def cell(path, name):
    """A cell of a notebook file, by its id."""
    return next(c for c in nbformat.read(path, as_version=4).cells if c.id == name)


def test_two_builds_are_byte_identical_and_an_unchanged_lesson_is_left_alone(sample, capsys):
    _, target = paths(sample)
    assert build.main(["--folder", str(sample)]) == 0
    first = target.read_bytes()
    assert "live cell clock" in capsys.readouterr().out
    assert build.main(["--folder", str(sample), "--all"]) == 0
    assert target.read_bytes() == first, "the live cell too: it keeps the output it had"
    assert build.main(["--folder", str(sample)]) == 0
    assert "unchanged" in capsys.readouterr().out
    assert build.main(["--folder", str(sample), "--live"]) == 0
    changed = [c.id for c in nbformat.reads(first.decode(), 4).cells if c != cell(target, c.id)]
    assert changed == ["clock"]


def test_a_built_lesson_holds_no_stamp_widget_state_or_python_version(sample):
    source, target = paths(sample)
    build.build(source, target)
    text = target.read_text()
    assert WIDGET not in text and "widgets" not in nbformat.read(target, 4).metadata
    assert cell(target, "slider").outputs[0].data["text/plain"]
    figure = [o for o in cell(target, "figure").outputs if "image/png" in o.get("data", {})]
    assert b"Matplotlib" not in base64.b64decode(figure[0].data["image/png"])
    assert cell(target, "words").outputs[0].text == "one\ntwo\nthree\n"
    assert nbformat.read(target, 4).metadata.language_info == {"name": "python"}


def test_stripping_a_picture_leaves_the_picture():
    import io

    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(1, 1))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    thin = without_stamps(file.getvalue())
    assert b"Software" in file.getvalue() and b"Software" not in thin
    assert (plt.imread(io.BytesIO(thin)) == plt.imread(io.BytesIO(file.getvalue()))).all()
    with pytest.raises(ValueError, match="Not a PNG"):
        plain(nbformat.from_dict({"data": {"image/png": base64.b64encode(b"GIF89a").decode()}}))


@pytest.mark.parametrize(
    ("was", "becomes", "complaint"),
    [
        ('id="setup"', 'id="title"', "'title' stands twice"),
        (' id="figure"', "", "has no id"),
        ("# A slider.", "", "'about-the-slider' is empty"),
        ('id="words"', 'id="words" tags=["nbval-skip"]', "skipped without saying why"),
        ("import time", "1 / 0", "ZeroDivisionError"),
        ("lines = axes.plot", "axes.plot", "figure: its output holds an address"),
        ('print(word, flush=True)', 'print(("x" * 99 + "\\n") * 3000)', "does not render"),
    ],
)  # fmt: skip
def test_a_bad_source_is_refused_and_the_old_lesson_stays(sample, capsys, was, becomes, complaint):
    source, target = paths(sample)
    target.write_text(nbformat.writes(nbformat.v4.new_notebook()))
    before, good = target.read_bytes(), source.read_text()
    assert was in good
    source.write_text(good.replace(was, becomes))
    assert build.main(["--folder", str(sample), "--all"]) == 1
    assert complaint in capsys.readouterr().out
    assert target.read_bytes() == before
    assert not [path for path in sample.iterdir() if path.suffix == ".new"]


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("A slider.", "A knob."),
        ('id="words"', 'id="other-words"'),
        ('tags=["live", "nbval-ignore-output"]', 'tags=["live"]'),
        ("IntSlider(3)", "IntSlider(4)"),
    ],
)
def test_check_sees_every_difference_between_source_and_lesson(sample, capsys, was, becomes):
    source, target = paths(sample)
    nbformat.write(build.read_source(source), target)
    assert build.main(["--check", "--folder", str(sample)]) == 0
    source.write_text(source.read_text().replace(was, becomes))
    assert build.main(["--check", "--folder", str(sample)]) == 1
    assert "stale" in capsys.readouterr().out
