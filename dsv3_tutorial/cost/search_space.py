"""All layouts of one question: how fast each can be at best, priced where that is fast enough.

The promising ones come first. A layout's bound is what its mean stage takes; once that is the least
of all, the layout is priced, and its bound becomes the step without what ZeRO changes.
"""

import heapq
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import stage_links, stage_step, stage_time, stage_work
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.choices import Choices
from dsv3_tutorial.cost.layout import RECOMPUTE, Job, Layout
from dsv3_tutorial.cost.memory import TrainingBytes
from dsv3_tutorial.cost.plan import Plan, plan
from dsv3_tutorial.hardware import Cluster

NO_ROOM = "does not fit in memory"
SLOWER = "divides, and is slower however little it recomputes"
_SURE = 1 - 1e-9  # bounds are sums in another order than a step's


@dataclass
class Space:
    """The question of a search, and the layouts that it has priced so far."""

    cfg: ModelConfig
    cluster: Cluster
    job: Job
    assume: Assumptions
    choices: Choices
    violation: float = 0.0
    priced: dict[Layout, Plan] = field(default_factory=dict)
    problems: Counter = field(default_factory=Counter)

    def price(self, layout: Layout) -> Plan:
        """The plan of a layout that divides, with the load that its experts have there."""
        if layout not in self.priced:
            what = (self.cfg, self.cluster, self.job, layout, self._assumed(layout))
            self.priced[layout] = plan(*what)
        return self.priced[layout]

    def fastest(self, name: str = "", other_than: object = None) -> Plan | None:
        """The best plan that fits; with a field's name, of those where the field is another."""
        if self.least_state > self.room:
            return None
        waiting = self._bounds[:]  # sorted, so a heap already
        known = [p for p in self._seen() if not name or getattr(p.layout, name) != other_than]
        found = min(known, key=order, default=None)
        while waiting:
            bound, number, skeleton = heapq.heappop(waiting)
            if found and bound > found.step_time_s:
                break
            layouts = self._fillings(skeleton, name, other_than)
            if not layouts:
                continue
            priced = self._least(skeleton)
            if priced > bound:  # not the most promising any more, perhaps
                heapq.heappush(waiting, (priced, number, skeleton))
                continue
            for tried in map(self.price, self._until_one_fits(layouts)):
                if tried.fits and (found is None or order(tried) < order(found)):
                    found = tried
        return found

    def _seen(self) -> list[Plan]:
        """The plans that were found to fit."""
        return [p for p in self.priced.values() if "memory" in vars(p) and p.fits]

    @property
    def room(self) -> float:
        """Bytes of a GPU that may be used."""
        return self.assume.usable_memory * (self.cluster.chip.memory_bytes or 0)

    @cached_property
    def least_state(self) -> float:
        """Bytes of weights, gradients and optimizer on a GPU if all of them were dealt out."""
        units = stage_work.parts(self.cfg, self.job.seq_len, bool(self.assume.mtp))
        numbers = sum(unit.dense + unit.experts for unit in units)
        return numbers * TrainingBytes().total / self.cluster.gpus * _SURE

    def smallest(self) -> Plan | None:
        """Of the layouts priced the one that holds least on a GPU; None where nothing divides."""
        return min(self.priced.values(), key=lambda p: p.memory_per_gpu_bytes, default=None)

    def refusals(self) -> dict[str, int]:
        """Why layouts were not taken, and how many."""
        looked = [p for p in self.priced.values() if "memory" in vars(p)]
        found = Counter(self.problems)
        found[NO_ROOM] = sum(not p.fits for p in looked)
        skeletons = {_skeleton(p.layout) for p in looked}
        found[SLOWER] = sum(_skeleton(one) not in skeletons for _, _, one in self._bounds)
        return {reason: number for reason, number in found.most_common() if number}

    def _assumed(self, layout: Layout) -> Assumptions:
        above = above_mean(self.cfg, layout.ep, self.violation)
        if not above:
            return self.assume
        return replace(self.assume, expert_load=self.assume.expert_load + above)

    @cached_property
    def _bounds(self) -> list[tuple[float, int, Layout]]:
        """(seconds that no filling brings below, number, layout) of all that divide, sorted."""
        found = []
        rates = self.cluster.chip.rates
        known = [p for p in self.choices.precisions if rates.get(p)] or self.choices.precisions
        for skeleton in self.choices.skeletons(self.cfg, self.cluster, self.job):
            for precision in known:
                layout = replace(skeleton, precision=precision, recompute=self._recomputes[0])
                if wrong := layout.problems(self.cfg, self.cluster, self.job):
                    self.problems[_kind(wrong[0])] += 1
                    continue
                layout = replace(layout, dispatch=self._quickest(layout, self.choices.dispatches))
                found.append((self._mean(layout), len(found), layout))
        return sorted(found, key=lambda entry: entry[:2])

    def _mean(self, layout: Layout) -> float:
        """Seconds that the mean stage computes and sends tokens to experts: a part of any step."""
        what = (self.cfg, self.cluster, self.job, layout, self._assumed(layout))
        timing = stage_step.Timing.of(*what)
        units = stage_work.parts(self.cfg, self.job.seq_len, bool(self.assume.mtp))
        mean = stage_step.total(units, layout.stages)
        now = (timing.rates, layout, timing.tokens, timing.exchange, timing.load)
        number = layout.micro_batches(self.job) * layout.stages // layout.pp
        sms = self.assume.communication_sms
        times, _ = stage_step.computing(stage_time.chunk(mean, *now), number, layout, sms)
        return sum(times.values()) * _SURE

    def _least(self, layout: Layout) -> float:
        """The same from the layout's price: its step without what ZeRO changes."""
        found = self.price(layout)
        sent = found.times["gradients"] + found.times["optimizer"]
        return (found.step_time_s - sent) * _SURE

    @cached_property
    def _recomputes(self) -> list[str]:
        """Those allowed, from what computes least again."""
        return sorted(self.choices.recomputes, key=RECOMPUTE.index)

    def _fillings(self, skeleton: Layout, name: str, other_than: object) -> list[list[Layout]]:
        """For each ZeRO stage the skeleton in every recomputation, from the least one on."""
        allowed = {
            "zero": self.choices.zeros,
            "recompute": self._recomputes,
            "dispatch": self.choices.dispatches,
        }
        if name in allowed:
            allowed[name] = [value for value in allowed[name] if value != other_than]
        elif name and getattr(skeleton, name) == other_than:
            return []
        if not all(allowed.values()):
            return []
        scheme = self._quickest(skeleton, allowed["dispatch"])
        return [
            [replace(skeleton, zero=z, recompute=r, dispatch=scheme) for r in allowed["recompute"]]
            for z in allowed["zero"]
        ]

    def _until_one_fits(self, fillings: list[list[Layout]]) -> Iterator[Layout]:
        for layouts in fillings:
            for layout in layouts:
                yield layout
                if self.price(layout).fits:
                    break

    def _quickest(self, layout: Layout, schemes: tuple[str, ...]) -> str:
        """The scheme whose dispatch and combine take least; the first of equals."""
        return min(schemes, key=lambda scheme: self._exchange(replace(layout, dispatch=scheme)))

    def _exchange(self, layout: Layout) -> float:
        key = (layout.ep, layout.tp, layout.micro_batch, layout.precision, layout.dispatch)
        if key not in self._exchanges:
            links = stage_links.network(self.cluster, self.assume.links)
            tokens = self.job.seq_len * layout.micro_batch / layout.tp
            seconds = stage_links.exchange_seconds(self.cfg, layout, links, tokens)
            self._exchanges[key] = sum(seconds)
        return self._exchanges[key]

    @cached_property
    def _exchanges(self) -> dict[tuple, float]:
        return {}


def above_mean(cfg: ModelConfig, ep: int, violation: float) -> float:
    """How much a GPU's load rises above the mean where single experts' does by `violation`.

    Over the square root of its experts, as if their loads were independent: an assumption.
    """
    return violation / math.sqrt(cfg.n_routed_experts / ep) if violation else 0.0


def order(found: Plan) -> tuple:
    """What is better comes first: the shorter step, then what holds less, then by name."""
    return (found.step_time_s, found.memory_per_gpu_bytes, str(found.layout))


def _skeleton(layout: Layout) -> tuple:
    sizes = (layout.pp, layout.dp, layout.ep, layout.tp, layout.micro_batch)
    return (*sizes, layout.schedule, layout.precision)


def _kind(problem: str) -> str:
    """A problem without its numbers and without the advice."""
    return re.sub(r"\b\d+", "n", re.split(r"[:;]", problem)[0])
