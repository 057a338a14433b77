"""What a search says in words: why the winner won, or which number keeps every layout out."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from dsv3_tutorial.cost.layout import PlanError
from dsv3_tutorial.cost.plan import Plan
from dsv3_tutorial.cost.search_space import Space
from dsv3_tutorial.hardware import Cluster

_SHOWN = 3  # parts of a step named in a sentence
GB = 1e-9
_TRIED = 3  # larger clusters that are searched
_NEAR = 64  # GPUs more or less that are looked at for a number that divides


def why(space: Space, won: Plan, others: Mapping[str, Plan | None]) -> Iterator[str]:
    """A sentence on each field: what the best plan with another value of it would cost."""
    for name, other in others.items():
        mine = f"{name} {getattr(won.layout, name)}"
        if other is None:
            yield f"{mine}: no layout with another {name} is allowed, divides and fits"
            continue
        theirs = f"{name} {getattr(other.layout, name)}"
        lost = other.step_time_s - won.step_time_s
        if lost < 5e-4:
            yield f"{mine}: {theirs} takes as long"
            continue
        yield f"{mine}: the best with {theirs} takes {lost:.2f} s more ({_changes(won, other)})"


def _changes(won: Plan, other: Plan) -> str:
    """The parts that change most, and which other fields that plan needs."""
    by_part = {part: other.times[part] - won.times[part] for part in won.times}
    shown = sorted(by_part, key=lambda part: -abs(by_part[part]))[:_SHOWN]
    said = [f"{part} {by_part[part]:+.2f} s" for part in shown if abs(by_part[part]) >= 5e-3]
    moved = [
        f"{name} {value}"
        for name, value in vars(other.layout).items()
        if name != "dp" and value != getattr(won.layout, name)
    ]
    return ", ".join(said) + f"; it has {', '.join(moved)}"


def impossible(space: Space) -> PlanError:
    """Why nothing was found, and which number would change it: GPUs, memory, sequences."""
    least, chip = space.smallest(), space.cluster.chip
    if least is None and space.least_state <= space.room:
        return _undivided(space)
    needed = least.memory_per_gpu_bytes if least else space.least_state
    if least:
        part = max(least.memory, key=least.memory.__getitem__)
        what = (
            f"the smallest of {len(space.priced)} holds {needed * GB:.1f} GB on a GPU, "
            f"{least.memory[part] * GB:.1f} of them {part} ({_words(least)})"
        )
    else:
        what = (
            f"weights, gradients and optimizer, dealt out evenly, are {needed * GB:.1f} GB on each "
            "GPU, before any activation"
        )
    need = math.ceil(needed / space.assume.usable_memory * GB)
    return PlanError(
        f"No layout of this model fits on {space.cluster.gpus} {chip.title}: {what}; "
        f"{space.room * GB:.1f} GB can be used. Such a run ends before its first step. "
        f"{_enough(space)}Or take chips of {need} GB or more, or a smaller model."
    )


def _undivided(space: Space) -> PlanError:
    chip = space.cluster.chip
    if lacks := [n for n in ("memory_bytes", "memory_bandwidth") if getattr(chip, n) is None]:
        return PlanError(
            f"{chip.title} has no {' and no '.join(lacks)}: nobody can say what fits or how long a "
            "step takes. Give it in a cluster file."
        )
    listed = "; ".join(f"{reason} ({n} layouts)" for reason, n in space.problems.most_common(3))
    sizes = f"{space.job.sequences} sequences over {space.cluster.gpus} GPUs"
    return PlanError(
        f"No layout of this model divides on {space.cluster.gpus} {space.cluster.chip.title}: "
        f"{listed or sizes}. No GPU would have a whole part. {_sizes_that_divide(space)}"
    )


def _words(found: Plan) -> str:
    layout = found.layout
    sizes = f"pp {layout.pp}, dp {layout.dp}, ep {layout.ep}, tp {layout.tp}"
    return f"{sizes}, {layout.schedule}, zero {layout.zero}, {layout.precision}"


def _enough(space: Space) -> str:
    """The first doubling of the cluster on which something fits, as a sentence."""
    gpus, tried = space.cluster.gpus, 0
    while tried < _TRIED:
        gpus *= 2
        other = replace(
            space, cluster=Cluster(space.cluster.chip, gpus), priced={}, problems=Counter()
        )
        if other.least_state > other.room:
            continue
        tried += 1
        try:
            if other.fastest():
                return f"{gpus} GPUs would do. "
        except ValueError:  # a link of that cluster has no known rate
            return "More of these GPUs are joined by a link of unknown rate. "
    return f"Not even {gpus} GPUs would do. "


def _sizes_that_divide(space: Space) -> str:
    """The nearest numbers of GPUs for which a layout divides."""
    gpus, found = space.cluster.gpus, []
    for step in (-1, 1):
        for distance in range(1, _NEAR + 1):
            n = gpus + step * distance
            if n < 1:
                break
            other = Cluster(space.cluster.chip, n)
            layouts = space.choices.skeletons(space.cfg, other, space.job)
            if any(not one.problems(space.cfg, other, space.job) for one in layouts):
                found.append(str(n))
                break
    return (
        f"Take {' or '.join(found)} GPUs, or another number of sequences a step."
        if found
        else ("Take another number of sequences a step, or a model whose sizes divide.")
    )
