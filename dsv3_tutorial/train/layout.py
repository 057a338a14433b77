"""How a run is spread over the ranks that torchrun has started: asked for, and written down."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.parallel.meeting import world_size
from dsv3_tutorial.parallel.mesh import SCHEDULES, Layout
from dsv3_tutorial.train.recipe import Recipe

SPREAD = "all under torchrun; dp x tp x pp are its ranks"
OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("dp", int, f"replicas that share a batch ({SPREAD}; dp: what is left)"),
    ("ep", int, "ways the experts of a layer are split, among those replicas (1)"),
    ("tp", int, "ways heads and widths are split (1)"),
    ("pp", int, "stages that the layers are split into (1)"),
    ("zero", int, "what replicas share out: 0 nothing, 1 moments, 3 all (FSDP2; alone with dp)"),
    ("pp_schedule", str, f"of a pipeline's micro-batches: {', '.join(SCHEDULES)} (1f1b)"),
)
NAMES = tuple(name for name, _, _ in OPTIONS)


def spread(asked: Mapping[str, Any], world: int) -> Layout:
    """The layout that options ask for on `world` ranks; it need not be possible.

    Without any option every rank is a replica, and FSDP2 shards what they all hold. With ep, tp or
    pp the default is ZeRO-1, as DeepSeek-V3 had it.
    """
    given = {{"pp_schedule": "schedule"}.get(name, name): asked[name] for name in asked}
    ways = [given.get(name, 1) for name in ("ep", "tp", "pp")]
    if "dp" not in given and all(type(n) is int and n > 0 for n in ways):
        given["dp"] = max(1, world // (ways[1] * ways[2]))
    alone = 0 if given.get("dp") == 1 else 1
    given.setdefault("zero", 3 if alone and ways == [1, 1, 1] else alone)
    return Layout(**given)


def chosen(
    asked: Mapping[str, Any], before: Layout | None, config: ModelConfig, recipe: Recipe
) -> tuple[Layout, list[str]]:
    """The layout for the ranks that there are, and why it is not possible; [] if it is.

    What is asked for now, else `before`, which the run was begun with, else replicas.
    """
    world = world_size()
    layout = before if before is not None and not asked else spread(asked, world)
    wrong = list(problems(layout, world, config, recipe))
    if wrong and layout is before:
        wrong.append("the run was begun so: give --dp, --ep, --tp or --pp to go on otherwise")
    return layout, wrong


def written(layout: Any) -> Layout:
    """The layout that `run.json` holds. Raises TypeError for what is none."""
    if not isinstance(layout, dict) or layout.keys() - {field.name for field in fields(Layout)}:
        raise TypeError("no layout")
    return Layout(**layout)


def problems(layout: Layout, world: int, config: ModelConfig, recipe: Recipe) -> Iterator[str]:
    """Why this run cannot be laid out so, a line a reason."""
    wrong = layout.check(world, config)
    yield from wrong
    if wrong:
        return
    parts = layout.dp * recipe.micro_batches
    if recipe.batch % parts:
        yield f"batch = {recipe.batch}: {layout.dp} ranks of {recipe.micro_batches} micro-batches"
    if recipe.precision.startswith("fp8") and layout.tp > 1:
        yield (
            f"precision = {recipe.precision} with tp = {layout.tp}: a cut through a weight is a "
            "cut through its 128 x 128 blocks, whose scales would be others. Take bf16, or tp = 1"
        )
    if layout.pp > 1:
        from dsv3_tutorial.train import pipelined  # its schedules, which other runs do without

        yield from pipelined.problems(config, recipe, layout)


def job() -> str | None:
    """torchrun's name for this job, the same after each of its restarts; None outside it."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def restarted(run_file: Path) -> bool:
    """Whether the run in the folder was begun by this very job, in an earlier life of its ranks.

    They go on from the last checkpoint without --resume; a run that another job has begun is left
    alone. Where torchrun has no name for its jobs ("none"), its count of restarts must do.
    """
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if job() is None or (job() == "none" and life == "0"):
        return False
    try:
        return json.loads(run_file.read_text(encoding="utf-8")).get("job") == job()
    except (OSError, ValueError, AttributeError):
        return False


def to_dict(layout: Layout) -> dict[str, Any]:
    """Plain values, which `written` reads."""
    return asdict(layout)
