"""V3's step as the planner predicts it, taken apart, beside the step that its authors measured."""

from functools import cache

from matplotlib.figure import Figure

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import step_time, validation
from dsv3_tutorial.cost.plan import Job, Layout, Plan, plan
from dsv3_tutorial.hardware import Cluster
from dsv3_tutorial.learn.figures.step_parts import COLOURS, stack
from dsv3_tutorial.learn.figures.style import (
    COMPUTE,
    IDLE,
    SERIES,
    figure,
    finish,
    note,
)

OPERATIONS = {
    "forward": COMPUTE,
    "backward": COLOURS["attention"],
    "forward and backward overlapped": SERIES[3],
    "bubble": IDLE,
    "optimizer": COLOURS["optimizer"],
    "all else": COLOURS["uneven stages"],
}
HIDES = {
    "products": "nothing: it is what hides",
    "attention": "nothing: it is what hides",
    "memory traffic": "nothing: it is what hides",
    "recomputation": "nothing: it is what hides",
    "dispatch": "another micro-batch's computing",
    "combine": "another micro-batch's computing",
    "tensor parallel": "nothing: it is waited for",
    "pipeline sends": "computing, once the pipeline is full",
    "bubble": "nothing: it is waiting",
    "uneven stages": "nothing: it is waiting",
    "gradients": "computing, from ZeRO-2 on",
    "optimizer": "nothing: it comes last",
}
# The validation's rows in words; a run that was printed in several units is not repeated in all.
VALIDATED = {
    "V3: a step, s": "step_time.mpft.step",
    "V3: MFU of the BF16 peak, %": "step_time.mpft.mfu_causal",
    "V3: pre-training, thousand GPU-hours": "training_cost.pre_training_hours",
    "V2: thousand GPU-hours a trillion tokens": "v2.hours_per_trillion",
    "67B: thousand GPU-hours a trillion tokens": "v2.hours_per_trillion_67b",
    "Llama 3.1 405B, 8,192 H100: TFLOP/s a GPU": "llama3.tflops_8192",
    "Llama 3.1 405B, 16,384 H100: TFLOP/s a GPU": "llama3.tflops_16384",
}
_LEAST = 1.0  # seconds of a bar that a label fits into


@cache
def reported() -> Plan:
    """V3 as its report lays it out: on as many H800 as it says."""
    gpus = int(paper.row("training_cost.gpus").value)
    cluster = Cluster(hardware.chip("h800"), gpus)
    return plan(ModelConfig.named("deepseek-v3"), cluster, Job(), Layout.read("deepseek-v3"))


def predicted_step(of: Plan | None = None) -> Figure:
    """The measured step, ours in the same rows, ours by what it is spent on, and what is hidden.

    of: a plan of V3 on 2,048 H800; None: in its report's layout. The rows are left out for a plan
    that overlaps nothing, as they are DualPipe's.
    """
    of = of or reported()
    lanes = {"table 4:\nmeasured": (measured(), OPERATIONS, "")}
    if of.layout.overlaps:
        lanes["predicted:\nsame rows"] = (operations(of), OPERATIONS, "")
    lanes["predicted:\nspent on"] = (of.times, COLOURS, "")
    lanes["sent behind\ncomputing"] = (of.hidden, COLOURS, "////")
    fig, ax = figure(12, 1.3 + 1.05 * len(lanes))
    for lane, (parts, colours, hatch) in enumerate(lanes.values()):
        stack(ax, lane, parts, colours, _LEAST, hatch)
    ax.set_yticks(range(len(lanes)), list(lanes))
    ax.set_ylim(len(lanes) - 0.35, -0.45)
    ax.set_xlim(0, 1.02 * max(sum(parts.values()) for parts, *_ in lanes.values()))
    ax.grid(False, axis="y")
    finish(fig, ax, finding(of), "seconds of a step", legend=False)
    note(fig, "measured: ISCA 2025, table 4; predicted: no number is fitted to it")
    return fig


def finding(of: Plan) -> str:
    """The predicted step, what was measured, and the error."""
    told = step_time.printed("step")
    off = of.step_time_s / told - 1
    hidden = sum(of.hidden.values())
    return (
        f"A step is predicted at {of.step_time_s:.2f} s and was measured at {told:.2f} s: "
        f"{off:+.1%};\nbehind its computing {hidden:.2f} s of sending are hidden"
    )


def measured() -> dict[str, float]:
    """Table 4's rows; the two parts of the backward together."""
    rows = {part: step_time.printed(part) for part in step_time.PARTS}
    return {
        "forward": rows["forward"],
        "backward": rows["backward_input"] + rows["backward_weight"],
        "forward and backward overlapped": rows["overlapped"],
        "bubble": rows["bubble"],
        "optimizer": rows["optimizer"],
    }


def operations(of: Plan) -> dict[str, float]:
    """Our step in table 4's rows, from the mean stage; "all else" is what they have no row for.

    Raises ValueError for a schedule that overlaps nothing.
    """
    if not of.layout.overlaps:
        raise ValueError(
            f"{of.layout.schedule} overlaps no forward with a backward, so table 4's rows do not "
            "describe it. Take a plan in dualpipe."
        )
    ours = {part: seconds for part, seconds, _ in validation.beside_table_4(of)}
    rows = {
        "forward": ours["forward"],
        "backward": ours["backward"],
        "forward and backward overlapped": ours["overlapped"],
        "bubble": of.times["bubble"],
        "optimizer": ours["optimizer"],
    }
    return {**rows, "all else": max(0.0, of.step_time_s - sum(rows.values()))}


def validation_table() -> None:
    """Print what a plan predicts of published runs, what was printed of them, and the error."""
    print(f"{'':44}{'printed':>10}{'planned':>10}{'off':>9}")
    checks = {one.row.id: (one.row.value, one.computed) for one in validation.checks()}
    step = "step_time.mpft.step"
    for name, of in VALIDATED.items():
        _beside(name, *checks[of])
        if of == step:
            earlier = validation.as_trained().step_time_s
            _beside("    with FP8 kernels from before DeepGEMM", checks[of][0], earlier)
    print(
        "too fast is less of seconds and hours (-), and more of MFU and TFLOP/s (+); no number is"
    )
    print("fitted to these rows, and V3's first lines are one run in three units")


def _beside(name: str, printed: float, planned: float) -> None:
    print(f"{name:44}{_short(printed):>10}{_short(planned):>10}{planned / printed - 1:>+9.1%}")


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.1f}"


def parts_table(of: Plan | None = None) -> None:
    """Print each part's seconds that show, their share, those hidden, and what could hide them."""
    of = of or reported()
    print(f"{'part':<18}{'seconds':>9}{'share':>8}{'hidden':>9}  what hides it")
    for part, seconds in of.times.items():
        hidden = of.hidden.get(part, 0.0)
        share = seconds / of.step_time_s
        print(f"{part:<18}{seconds:>9.2f}{share:>8.1%}{hidden:>9.2f}  {HIDES.get(part, '')}")
    print(f"{'all':<18}{of.step_time_s:>9.2f}{1:>8.1%}{sum(of.hidden.values()):>9.2f}")
