"""A training run of your choice: what lies on a GPU, what a step is spent on, and what it costs."""

import textwrap
from dataclasses import dataclass
from functools import cache

from matplotlib.figure import Figure

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import decisions, params, plan_text
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.choices import Choices
from dsv3_tutorial.cost.decisions import DECISIONS, Outcome
from dsv3_tutorial.cost.plan import Job, Layout, Plan, PlanError
from dsv3_tutorial.hardware import Chip, Cluster
from dsv3_tutorial.learn.figures import plan_panels, plan_roofline
from dsv3_tutorial.learn.figures.deployment import reached
from dsv3_tutorial.learn.figures.style import INK, figure, finish, note

NOTHING = "nothing"
GRID = {
    "model": ["deepseek-v3", "deepseek-v2", "llama-3.1-405b", "qwen2.5-72b", "moonlight-16b-a3b"],
    "chip": ["a100", "h800", "h20", "h200", "b200", "gb200-nvl72"],
    "gpus": [64, 128, 256, 512, 1024, 2048, 4096, 8192],
    "without": [NOTHING, *DECISIONS],
}
START = {"model": "deepseek-v3", "chip": "h800", "gpus": 2048, "without": NOTHING}
FEW = Choices(
    zeros=(1, 3),
    tps=(1, 2, 8),
    micro_batches=(1,),
    pps=(1, 2, 4, 8, 16, 32),
    eps=(8, 16, 32, 64, 128),
)  # so few that a move takes a moment: a full search finds at most a little more
# Half a sentence for each word of a layout that no lesson before this one is about.
MEANS = {
    "dualpipe": "two streams of micro-batches, each sending behind the other's computing",
    "dualpipev": "DualPipe folded, so that no weights are held twice",
    "zb1p": "1F1B with weight gradients put off into its bubble",
    "ZeRO-1": "the optimizer's state is dealt out",
    "ZeRO-2": "optimizer and gradients are dealt out",
    "ZeRO-3": "optimizer, gradients and weights are dealt out",
    "recomputation selective": "norms, up-projections and SwiGLU run again in the backward",
    "recomputation full": "each layer's forward runs again in the backward",
}
STATE = 14  # bytes a parameter, as `cost.step_memory` has them
_WRAP = 100


@dataclass(frozen=True)
class Answer:
    """A setting's fastest plan and the same with nothing taken back, or why there is none."""

    model: str
    chip: Chip
    gpus: int
    without: str
    plan: Plan | None
    whole: Plan | None
    why: str = ""
    notes: tuple[str, ...] = ()

    @property
    def who(self) -> str:
        """The setting in a few words."""
        name = self.chip.title.removeprefix("NVIDIA ").split()[0]
        left = "" if self.without == NOTHING else f" without {self.without}"
        return f"{self.model}{left} on {self.gpus:,} {name}"

    @property
    def more(self) -> float:
        """Share of GPU hours that the decision saves: what is spent more without it."""
        if self.plan is None or self.whole is None:
            return float("nan")
        return self.plan.gpu_hours / self.whole.gpu_hours - 1


@cache
def answer(
    model: str = "deepseek-v3", chip: str = "h800", gpus: int = 2048, without: str = NOTHING
) -> Answer:
    """The fastest of FEW layouts for 14.8 trillion tokens; nothing is raised for what cannot be."""
    on = reached(hardware.chip(chip))
    setting = (model, on, gpus, without)
    try:
        made = _outcome(model, on, gpus, without)
    except PlanError as error:
        return Answer(*setting, None, None, str(error))
    whole = made if without == NOTHING else _outcome(model, on, gpus, NOTHING)
    why = made.error and made.error + _filled(model, on, gpus)
    return Answer(*setting, made.training, whole.training, why, made.notes)


def _filled(model: str, chip: Chip, gpus: int) -> str:
    """What fills the memory where not even the state from step to step fits; else nothing."""
    parts = params.count(ModelConfig.named(model))
    number, room = parts.total + parts.mtp, Assumptions().usable_memory * chip.memory_bytes
    if STATE * number / gpus <= room:
        return ""
    return (
        f" Each of {number / 1e9:,.0f} billion parameters takes {STATE} bytes: its weight 2, its "
        "gradient 4, the optimizer's master 4 and moments 4. That holds however products are "
        "computed: FP8 shrinks what is multiplied, and none of these."
    )


@cache
def _outcome(model: str, chip: Chip, gpus: int, without: str) -> Outcome:
    removed = () if without == NOTHING else (without,)
    where = (ModelConfig.named(model), Cluster(chip, gpus), Job())
    return decisions.unbuild(*where, removed, target=None, choices=FEW)


def planner(
    model: str = "deepseek-v3", chip: str = "h800", gpus: int = 2048, without: str = NOTHING
) -> Figure:
    """Memory of the fullest GPU, a step by part, and the roofline that its computing meets."""
    found = answer(model, chip, gpus, without)
    if found.plan is None:
        return _refused(found)
    fig, axes = figure(13.5, 4.6, columns=3)
    axes[0].get_gridspec().set_width_ratios([0.75, 1.2, 1.1])
    plan_panels.memory(axes[0], found.plan)
    plan_panels.times(axes[1], found.plan)
    plan_roofline.draw(axes[2], found.plan)
    finish(fig, axes[0], "", "", "GB on the fullest GPU", legend=False)
    finish(fig, axes[1], "", "seconds of a step (hatched: hidden behind computing)", legend=False)
    title = {"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"}
    fig.suptitle(finding(found), **title)
    note(
        fig, f"derived: {plan_text.given(found.plan.job.tokens)} tokens; the fastest of few layouts"
    )
    return fig


def planner_in_words(
    model: str = "deepseek-v3", chip: str = "h800", gpus: int = 2048, without: str = NOTHING
) -> str:
    """The layout, what lies on a GPU, what shows of sending, the cost, and what was changed."""
    found = answer(model, chip, gpus, without)
    if found.plan is None:
        return f"{finding(found)}. {' '.join(found.why.split())}"
    of, layout = found.plan, found.plan.layout
    largest = sorted(of.times, key=of.times.__getitem__, reverse=True)[:3]
    said = [
        f"{finding(found).replace(chr(10), ' ')}. Layout: {_layout(layout)}.",
        f"The fullest GPU holds {of.memory_per_gpu_bytes / 1e9:.1f} of {of.room / 1e9:.1f} GB.",
        f"Of a step most goes to {', '.join(f'{n} ({of.times[n]:.2f} s)' for n in largest)}; "
        f"{sum(of.hidden.values()):.2f} s of sending are hidden.",
        f"The run takes {of.days:,.0f} days, {plan_text.dollars(of.cost_usd)} at "
        f"${of.assume.rent:g} an hour, whatever the chip, and "
        f"{plan_text.energy(of.energy_kwh)} in the GPUs.",
    ]
    return " ".join([*said, *_remarks(found)])


def _layout(of: Layout) -> str:
    """The layout in words, the rarer ones explained; what is not cut is left out."""
    cuts = [f"{of.pp} stages" if of.pp > 1 else "one stage", f"{of.dp} replicas"]
    cuts += [f"experts over {of.ep} GPUs"] if of.ep > 1 else []
    cuts += [f"tensor parallelism over {of.tp}"] if of.tp > 1 else []
    cuts += [of.schedule] if of.pp > 1 else []
    cuts += [f"ZeRO-{of.zero}", of.precision, f"recomputation {of.recompute}"]
    return ", ".join(f"{cut} ({MEANS[cut]})" if cut in MEANS else cut for cut in cuts)


def _remarks(found: Answer) -> list[str]:
    """What this chip lacks, what stands in a decision's place, what the plan is too kind to."""
    said, own = [], hardware.chip(found.chip.name)
    if own.rates.get("fp8") is None:
        said.append("This chip has no FP8, so products run in BF16 either way.")
    if found.plan.mfu > 1:
        said.append("That is above the BF16 peak as products run in FP8.")
    if own.scale_out.bandwidth is None:
        said.append("Nobody publishes this chip's network: InfiniBand as at H800s is assumed.")
    for each in found.notes:
        name, what = each.split(": ", 1)
        said.append(f"Instead of {name}: {what}.")
    for kind in plan_roofline.above_roof(found.plan):
        said.append(f"The plan reckons with more for {kind} than memory can feed.")
    return said


def finding(found: Answer) -> str:
    """The step, its efficiency and cost, what binds, and what was lost without the decision."""
    of = found.plan
    if of is None:
        return f"{found.who}: no plan"
    lost = ""
    if found.without != NOTHING:
        lost = f", {_against(found)}"
    return (
        f"{found.who}: a step takes {of.step_time_s:.2f} s, {of.mfu:.1%} of the BF16 peak;\n"
        f"{plan_text.count(of.gpu_hours)} GPU hours{lost}; {of.bottleneck} binds"
    )


def _against(found: Answer) -> str:
    if found.whole is None:
        return f"and none fits with {found.without}"
    if abs(found.more) < 5e-4:
        return f"as many as with {found.without}"
    than = "more" if found.more > 0 else "fewer"
    return f"{abs(found.more):.1%} {than} than with {found.without}"


def _refused(found: Answer) -> Figure:
    """A plan that cannot be, as words in place of panels."""
    fig, ax = figure(13.5, 2.2)
    said = "\n".join(line for part in found.why.splitlines() for line in textwrap.wrap(part, _WRAP))
    look = {"ha": "center", "va": "center", "fontsize": 12, "color": INK}
    ax.text(0.5, 0.5, said, transform=ax.transAxes, **look)
    ax.set_axis_off()
    finish(fig, ax, finding(found), legend=False)
    return fig
