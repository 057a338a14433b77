"""The layouts that a search may try: what is allowed of each field, and what divides."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.comm_moe import SCHEMES
from dsv3_tutorial.cost.layout import PRECISIONS, RECOMPUTE, Job, Layout, PlanError
from dsv3_tutorial.cost.schedule import SCHEDULES
from dsv3_tutorial.hardware import Cluster


@dataclass(frozen=True)
class Choices:
    """What is allowed of each field of a layout; dp follows from the number of GPUs.

    pps and eps None: all that divide. GPipe is left out, as 1F1B has its bubble and keeps less.
    Raises PlanError for a field that allows nothing or what no layout can have.
    """

    schedules: tuple[str, ...] = ("1f1b", "zb1p", "dualpipe", "dualpipev")
    precisions: tuple[str, ...] = PRECISIONS
    dispatches: tuple[str, ...] = ("two_stage", "deduplicated", "flat")
    recomputes: tuple[str, ...] = RECOMPUTE
    zeros: tuple[int, ...] = (1, 2, 3)
    tps: tuple[int, ...] = (1, 2, 4, 8)
    micro_batches: tuple[int, ...] = (1, 2, 4)
    pps: tuple[int, ...] | None = None
    eps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        wrong = [f"{f.name} is empty" for f in fields(self) if getattr(self, f.name) == ()]
        for name, allowed in _WORDS.items():
            unknown = [value for value in getattr(self, name) if value not in allowed]
            wrong += [f"{name} has {value!r}" for value in unknown]
        for name in ("tps", "micro_batches", "pps", "eps"):
            wrong += [f"{name} has {v!r}" for v in getattr(self, name) or () if not _whole(v)]
        if wrong:
            raise PlanError(
                f"Nothing can be searched: {'; '.join(wrong)}. No layout would be left, or none "
                "that exists. Change what is named."
            )

    def only(self, **allowed: tuple) -> "Choices":
        """The same with some fields allowed other values."""
        return replace(self, **allowed)

    def skeletons(self, cfg: ModelConfig, cluster: Cluster, job: Job) -> Iterator[Layout]:
        """Every way to divide cluster, model and step, in the first allowed of all else."""
        for pp in self.pps or range(1, cfg.num_hidden_layers + 1):
            if cluster.gpus % pp or pp > cfg.num_hidden_layers:
                continue
            for tp, micro_batch in product(self.tps, self.micro_batches):
                dp, left = divmod(cluster.gpus // pp, tp)
                if left or job.sequences % (dp * micro_batch):
                    continue
                for ep, schedule in product(self._eps(cfg, dp * tp), self._schedules(pp)):
                    yield Layout(
                        *(pp, dp, ep, tp, micro_batch, schedule),
                        *(self.zeros[0], self.precisions[0], self.recomputes[0]),
                        self.dispatches[0],
                    )

    def _eps(self, cfg: ModelConfig, ranks: int) -> list[int]:
        experts = cfg.n_routed_experts
        if experts is None:
            return [1]
        allowed = self.eps or divisors(experts)
        return [ep for ep in allowed if experts % ep == 0 and ranks % ep == 0]

    def _schedules(self, pp: int) -> tuple[str, ...]:
        """Without a pipeline every schedule is the same."""
        return self.schedules if pp > 1 else self.schedules[:1]


def divisors(n: int) -> list[int]:
    """All whole numbers that divide n, in order."""
    low = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*low, *(n // i for i in low)})


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_WORDS = {
    "schedules": tuple(SCHEDULES),
    "precisions": PRECISIONS,
    "dispatches": SCHEMES,
    "recomputes": RECOMPUTE,
    "zeros": (0, 1, 2, 3),
}
