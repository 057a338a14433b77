"""What the planner's grid holds: the answers to the tasks set over it, computed and not stored."""

from collections.abc import Sequence

from dsv3_tutorial.learn.figures.planner import GRID, NOTHING, answer

NETWORK = ("scale up", "scale out")


def smallest_cluster(
    model: str = "deepseek-v3", chip: str = "h800", without: str = NOTHING
) -> int | None:
    """The fewest GPUs of the grid on which the model can be trained; None: not on any."""
    fitting = (gpus for gpus in GRID["gpus"] if answer(model, chip, gpus, without).plan)
    return next(fitting, None)


def network_binds(
    model: str = "deepseek-v3",
    chip: str = "h800",
    gpus: Sequence[int] = tuple(GRID["gpus"]),
    without: Sequence[str] = tuple(GRID["without"]),
) -> list[tuple[int, str]]:
    """(GPUs, what is taken back) where more bandwidth of a link would buy most."""
    return [
        (many, left)
        for many in gpus
        for left in without
        if (of := answer(model, chip, many, left).plan) and of.bottleneck in NETWORK
    ]


def fp8_saves(
    model: str = "deepseek-v3", gpus: int = 2048, chips: Sequence[str] = tuple(GRID["chip"])
) -> dict[str, float]:
    """By chip: the share of GPU hours that are spent more in BF16, least first."""
    found = {chip: answer(model, chip, gpus, "fp8") for chip in chips}
    known = {chip: each.more for chip, each in found.items() if each.plan and each.whole}
    return dict(sorted(known.items(), key=lambda pair: pair[1]))
