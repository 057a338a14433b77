"""The clinic's charts: a patient's curves over the band of the healthy runs, its name hidden."""

import numpy as np
from matplotlib.figure import Figure

from dsv3_tutorial.bench import clinic
from dsv3_tutorial.bench.clinic_cases import CASES, named
from dsv3_tutorial.learn.figures.style import IDLE, SERIES, figure, finish

COLUMNS = {
    "loss": "bits per byte",
    "grad_norm": "gradient norm",
    "max_violation": "MaxVio",
    "zero_fraction": "zero gradients",
}
SMOOTHED = 10  # steps: a curve is the mean of so many


def chart(patient: str) -> Figure:
    """Four columns of one patient's two runs, over the range of the healthy ones."""
    runs = clinic.load(clinic.charts()[patient])
    healthy = [run for case in CASES if not case.sick for run in clinic.load(case.name)]
    fig, axes = figure(9, 5.4, rows=2, columns=2)
    for ax, (column, label) in zip(axes.flat, COLUMNS.items(), strict=True):
        well = np.stack([_smooth(getattr(run, column)) for run in healthy])
        steps = np.arange(well.shape[1]) + SMOOTHED
        ax.fill_between(steps, well.min(0), well.max(0), color=IDLE, label="healthy runs")
        for run, colour in zip(runs, SERIES[:2], strict=True):
            name = f"patient {patient}, seed {run.seed}"
            ax.plot(steps, _smooth(getattr(run, column)), color=colour, linewidth=1.3, label=name)
        finish(fig, ax, "", f"steps (means of {SMOOTHED})", label, legend=False)
    axes[0, 0].plot(
        runs[0].held_out_at, runs[0].held_out, "D", color="#000000", label="held out, seed 0"
    )
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    ends = [f"{np.mean(run.loss[-SMOOTHED:]):.2f}" for run in runs]
    title = f"Patient {patient}: {' and '.join(ends)} bits per byte at the end"
    fig.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    return fig


def chart_in_words(patient: str) -> str:
    """What may be said beside the curves: the symptom."""
    return named(clinic.charts()[patient]).symptom


def diagnoses() -> None:
    """Print what a patient can have, in an order that tells nothing."""
    for title in sorted(case.title for case in CASES):
        print("-", title)


def key(patient: str) -> None:
    """Print what the patient has, and what shows it."""
    case = named(clinic.charts()[patient])
    print(f"{patient}: {case.title}.\n{case.explanation}")


def _smooth(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
