"""Where a pipeline is cut: contiguous stages, so that the slowest device is as fast as can be."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate


def slowest_stage(costs: list[float], stages: int) -> float:
    """The smallest possible largest sum when costs are cut into `stages` contiguous parts.

    O(stages x n^2). Parts may be empty only where there are fewer costs than stages.
    """
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = sums[:]  # best[i]: the first i costs in one part
    for _ in range(stages - 1):
        best = [
            min((max(best[j], sums[i] - sums[j]) for j in range(i)), default=0.0)
            for i in range(len(sums))
        ]
    return best[-1]


@cache
def cut(costs: tuple[float, ...], stages: int, folded: bool = False) -> tuple[int, ...]:
    """The stages' first units, and the end: stage s holds units [cuts[s], cuts[s + 1]).

    The largest stage is as small as can be, to a relative 1e-6. folded: device d holds stages d
    and stages - 1 - d, and their sum is what counts; then found by filling devices from both ends,
    always the smaller of the two stages first: within one unit of the least.
    """
    sums = tuple(accumulate(costs, initial=0.0))
    fill = _folded if folded else _straight
    low, high = 0.0, sums[-1] * (1 + 1e-9)
    best = fill(sums, stages, high)
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        found = fill(sums, stages, middle)
        low, high, best = (low, middle, found) if found else (middle, high, best)
    return best


def _straight(sums: Sequence[float], stages: int, cap: float) -> tuple[int, ...] | None:
    """Cuts with no stage above the cap, or None: each takes what it can, and leaves one a stage."""
    n, cuts = len(sums) - 1, [0]
    for stage in range(stages):
        start, end, last = cuts[-1], cuts[-1], n - (stages - 1 - stage)
        while end < last and sums[end + 1] - sums[start] <= cap:
            end += 1
        cuts.append(end)
    return tuple(cuts) if cuts[-1] == n else None


def _folded(sums: Sequence[float], stages: int, cap: float) -> tuple[int, ...] | None:
    """As _straight, where device d fills one stage from the front and one from the back."""
    front, back = 0, len(sums) - 1
    fronts, backs = [0], [back]
    for device in range(stages // 2):
        first, last, left = 0.0, 0.0, cap
        spared = stages - 2 * (device + 1)  # units that the stages to come need at least
        while back - front > spared:
            ahead, behind = sums[front + 1] - sums[front], sums[back] - sums[back - 1]
            forward = first <= last if max(ahead, behind) <= left else ahead <= left
            step = ahead if forward else behind
            if step > left:
                break
            left -= step
            first, last = first + step * forward, last + step * (not forward)
            front, back = front + forward, back - (not forward)
        fronts.append(front)
        backs.append(back)
    return (*fronts, *reversed(backs[:-1])) if front == back else None
