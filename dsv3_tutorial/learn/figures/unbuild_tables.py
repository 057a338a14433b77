"""V3 with some of its decisions: its price, the orders to make them in, what the bars rest on."""

from collections.abc import Collection
from functools import cache
from itertools import permutations

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import calibration, decisions
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.choices import Choices
from dsv3_tutorial.cost.decisions import DECISIONS, Outcome
from dsv3_tutorial.cost.plan import Job
from dsv3_tutorial.learn.figures.planner import FEW
from dsv3_tutorial.learn.figures.unbuild import CHOICES, NONE, rate, unbuilt

GROUPS = {
    "memory": frozenset({"mla"}),
    "compute": frozenset({"fp8"}),
    "parallelism": frozenset({"node-limit", "dedup", "dualpipe", "bias"}),
}


def price(kept: Collection[str]) -> float:
    """Thousand GPU hours of training V3 with these decisions alone; infinite where none fits."""
    return _kept(frozenset(kept)).gpu_hours / 1e3


def orders(kv_heads: int | None = None) -> None:
    """Print three groups of decisions, made in every order: hours and service after each step.

    kv_heads: key-value heads of what stands in MLA's place; None: all 128.
    """
    print(f"in MLA's place: {f'GQA, {kv_heads} groups' if kv_heads else 'MHA, 128 heads'}")
    steps = ("no decision", "the first", "the second", "the third")
    print(f"{'':34}" + "".join(f"{step:>15}" for step in steps))
    print(f"{'in the order':34}" + f"{'hours served':>15}" * len(steps))
    for order in permutations(GROUPS):
        made = [frozenset().union(*(GROUPS[name] for name in order[:n])) for n in range(4)]
        found = [_kept(some, kv_heads) for some in made]
        cells = (f"{of.gpu_hours / 1e3:>8,.0f}{rate(of):>7}" for of in found)
        print(f"{', '.join(order):34}" + "".join(cells))


def groups() -> None:
    """Print what the groups of `orders` hold, and what its numbers are."""
    for name, held in GROUPS.items():
        print(f"{name}: {', '.join(each for each in DECISIONS if each in held)}")
    left = [each for each in DECISIONS if not any(each in held for held in GROUPS.values())]
    print(f"left out of all three: {', '.join(left)}")
    print("hours: thousand GPU hours of training; served: tokens/s and GPU")


def against_gqa() -> None:
    """Print V3 with MLA, and with full heads or 8 key-value heads in its place."""
    print(
        f"{'attention':30}{'activated':>12}{'thousand GPU-hours':>20}{'served tokens/s, GPU':>22}"
    )
    every = frozenset(DECISIONS)
    kinds = {
        "MLA (V3)": _kept(every),
        "MHA, 128 key-value heads": _kept(every - {"mla"}),
        "GQA, 8 key-value heads": _kept(every - {"mla"}, 8),
    }
    for name, of in kinds.items():
        if of.training is None:
            print(f"{name:30}{NONE:>12}")
            continue
        numbers = f"{of.training.parameters.activated / 1e9:>10.1f} B{of.gpu_hours / 1e3:>20,.0f}"
        print(f"{name:30}{numbers}{rate(of):>22}")
    print("all else as in V3; what the models would have learnt is not priced")


def rests_on(names: Collection[str] = ("fp8", "mla", "dualpipe", "mtp")) -> None:
    """Print some removal bars again, with other layouts allowed and with other FP8 kernels."""
    earlier = Assumptions(fp8_products=calibration.fp8_products(earlier=True))
    planners = {
        "as in the picture": (CHOICES, Assumptions()),
        "FP8 kernels before DeepGEMM": (CHOICES, earlier),
        "tensor parallelism allowed": (FEW, Assumptions()),
        "both": (FEW, earlier),
    }
    heads = "".join(f"{name:>10}" for name in names)
    print(f"{'thousand GPU-hours saved':30}{heads}   BF16 recomputes")
    for said, how in planners.items():
        whole = _without(None, *how).gpu_hours
        saved = (f"{(_without(name, *how).gpu_hours - whole) / 1e3:>+10.0f}" for name in names)
        plain = _without("fp8", *how).training
        print(f"{said:30}{''.join(saved)}   {plain.layout.recompute if plain else NONE}")


@cache
def _kept(kept: frozenset[str], kv_heads: int | None = None) -> Outcome:
    """V3 on its cluster with these decisions alone, on the fastest of few layouts."""
    removed = frozenset(DECISIONS) - kept
    if "mla" not in removed:
        kv_heads = None
    if kv_heads is None and removed in (known := unbuilt().outcomes):
        return known[removed]
    return decisions.unbuild(*_where(), removed, choices=CHOICES, kv_heads=kv_heads)


def _without(name: str | None, choices: Choices, assume: Assumptions) -> Outcome:
    """V3 trained without one decision, or with all; no service is planned."""
    removed = (name,) if name else ()
    return decisions.unbuild(*_where(), removed, assume, None, choices=choices)


def _where() -> tuple:
    return ModelConfig.named("deepseek-v3"), hardware.cluster("h800:2048"), Job()
