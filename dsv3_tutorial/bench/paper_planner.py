"""The planner's predictions of published runs, as rows beside all the other numbers."""

from dsv3_tutorial.bench.paper_verdict import NEAR, Reproduced, check
from dsv3_tutorial.cost import validation

LEFT_OUT = "too fast: peaks, bytes and single kernels leave out what can only slow a step"


def checks() -> list[Reproduced]:
    """Each with the error that `cost.validation` states for it.

    Some of the rows also follow by arithmetic from others; there the shorter way stands in the
    long table, and this one beside it.
    """
    found = []
    for one in validation.checks():
        off, why = validation.STATED[one.row.id], LEFT_OUT if abs(one.off) > NEAR else ""
        how = one.how.removeprefix("the planner, ")
        found.append(check(one.row.id, one.computed, how, "planner", off, why))
    return found
