"""What uneven experts cost: the busiest rank sets the pace, and the others wait for it.

M tokens choose K of E experts, E / ranks experts on each rank. Popularity falls down a list like
place ** -skew: 0 is even. Each rank's own arithmetic is run and timed by itself, one after the
other, so no spare core and no network is needed; the sending is left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_tutorial.bench import timing
from dsv3_tutorial.moe.balance import expert_counts, max_violation
from dsv3_tutorial.moe.experts import run_experts
from dsv3_tutorial.moe.placement import in_order, rebalance

TOKENS, EXPERTS, TOP_K, WIDTH, RANKS = 2048, 32, 4, 128, 8
REPEATS = 5


@dataclass(frozen=True)
class Load:
    """One routing on ranks: rows and seconds of each, MaxVio of its experts, and the repair.

    repaired: the busiest rank over the mean once the busiest experts have replicas, counted.
    """

    skew: float
    rows: list[int]
    seconds: list[float]
    max_violation: float
    repaired: float

    @property
    def counted(self) -> float:
        """The busiest rank's rows over the mean: how much longer the layer should take."""
        return max(self.rows) * len(self.rows) / sum(self.rows)

    @property
    def measured(self) -> float:
        """The busiest rank's seconds over the mean: how much longer it does."""
        return max(self.seconds) * len(self.seconds) / sum(self.seconds)

    @property
    def waiting(self) -> float:
        """The share of the time of all ranks that is spent waiting for the busiest, 0 to 1."""
        return 1 - 1 / self.measured

    def __str__(self) -> str:
        return (
            f"skew {self.skew:.1f}: MaxVio {self.max_violation:.2f}, busiest rank "
            f"{self.counted:.2f} x the mean counted, {self.measured:.2f} measured; "
            f"{self.waiting:.0%} of all ranks' time is waiting; {self.repaired:.2f} with replicas"
        )


def load(skew: float = 0.0, ranks: int = RANKS, seed: int = 0, repeats: int = REPEATS) -> Load:
    """Route, count, and time every rank's experts forward and backward. About a second."""
    chosen = routing(skew, seed)
    counts = expert_counts(chosen, EXPERTS)
    rows = counts.view(ranks, -1).sum(dim=1).tolist()  # (ranks,)
    runs = {str(rank): _work(chosen, rank, ranks, seed) for rank in range(ranks)}
    found = timing.compare(runs, repeats=repeats, warmup=1)
    seconds = [found[str(rank)]["median"] for rank in range(ranks)]
    placed = rebalance(counts[None], EXPERTS + ranks, 1, 1, ranks) if ranks > 1 else None
    repaired = (placed or in_order(counts[None], ranks)).imbalance.item()
    return Load(skew, rows, seconds, max_violation(counts).item(), repaired)


def routing(skew: float, seed: int = 0) -> Tensor:
    """(TOKENS, TOP_K) int64: experts drawn without repetition, place r of the list as r ** -skew.

    The list's order is drawn too, or all that is popular would lie on one rank. Gumbel's trick: the
    largest of log p + noise are draws without repetition.
    """
    draw = torch.Generator().manual_seed(seed)
    wanted = -skew * (torch.randperm(EXPERTS, generator=draw) + 1).log()  # (E,)
    noise = torch.rand(TOKENS, EXPERTS, generator=draw).log()
    return (wanted - (-noise).log()).topk(TOP_K).indices


def _work(chosen: Tensor, rank: int, ranks: int, seed: int):
    """A function that runs one rank's experts on the rows that reach it, forward and backward."""
    each = EXPERTS // ranks
    mine = (chosen // each == rank).nonzero(as_tuple=True)
    local = (chosen[mine] - rank * each)[:, None]  # (rows, 1)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(len(local), WIDTH, generator=draw)
    into = torch.randn(each, 2 * WIDTH, WIDTH, generator=draw).requires_grad_()
    back = torch.randn(each, WIDTH, WIDTH, generator=draw).requires_grad_()
    ones = torch.ones(len(local), 1)

    def work() -> None:
        run_experts(x, local, ones, into, back, engine="sorted").sum().backward()
        into.grad = back.grad = None

    return work
