"""Where groups and sums go when a node has fast links and the rest has not."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_tutorial.cost.sharding import bytes_across, place_groups
from dsv3_tutorial.learn.exercises.parallel.lockstep import Together, compared, together
from dsv3_tutorial.learn.exercises.parallel.ring import inputs
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


@dataclass(frozen=True, eq=False)
class Placed:
    """An answer, and the bytes between nodes that it leaves: None where it is no order."""

    order: object
    across: float | None


def _run(function, sizes: dict, traffic: dict, gpus_per_node: int) -> Placed:
    order = function(dict(sizes), dict(traffic), gpus_per_node)
    if not isinstance(order, tuple | list) or sorted(map(str, order)) != sorted(sizes):
        return Placed(order, None)
    return Placed(order, bytes_across(order, sizes, traffic, gpus_per_node))


def _compare(got: Placed, expected: Placed) -> str | None:
    if got.across is None or expected.across is None:
        wrong = "return a tuple or list that holds the name of every group once"
        return None if got.across is expected.across else wrong
    if got.across == expected.across:
        return None
    return (
        f"{' inside '.join(map(str, got.order))} leaves {got.across:,} bytes between nodes, the "
        f"budget is {expected.across:,}"
    )


def _groups(gpus_per_node: int, **groups: tuple[int, float]):
    return lambda: (
        {name: size for name, (size, _) in groups.items()},
        {name: int(sent) for name, (_, sent) in groups.items()},
        gpus_per_node,
    )


def _by(key, reverse=False):
    return lambda sizes, traffic, gpus_per_node: tuple(
        sorted(sizes, key=lambda name: key(name, sizes, traffic), reverse=reverse)
    )


def _fixed(*order: str):
    def place(sizes, traffic, gpus_per_node):
        return (*(name for name in order if name in sizes), *(n for n in sizes if n not in order))

    return place


def _fitting(sizes, traffic, gpus_per_node):
    heaviest = sorted(sizes, key=lambda name: -traffic[name])
    inside, extent = [], 1
    for name in heaviest:
        if extent * sizes[name] <= gpus_per_node:
            inside, extent = [*inside, name], extent * sizes[name]
    return (*inside, *(name for name in heaviest if name not in inside))


def _turned(sizes, traffic, gpus_per_node):
    return place_groups(sizes, traffic, gpus_per_node)[::-1]


def _inside_only(sizes, traffic, gpus_per_node):
    order = place_groups(sizes, traffic, gpus_per_node)
    extents = [
        bytes_across(order[: i + 1], sizes, traffic, gpus_per_node) for i in range(len(order))
    ]
    return tuple(name for name, across in zip(order, extents, strict=True) if not across)


PLACE_GROUPS = Exercise(
    name="parallel.place_groups",
    reference="dsv3_tutorial.cost.sharding:place_groups",
    cases=[
        Case("a dense model", _groups(8, dp=(16, 40e9), tp=(8, 300e9), pp=(4, 2e9))),
        Case("experts wider than a node", _groups(8, ep=(64, 90e9), pp=(16, 3e9), dp=(2, 20e9))),
        Case("two that fit together", _groups(8, a=(8, 100), b=(4, 70), c=(2, 60))),
        Case("one that fills the node", _groups(8, a=(2, 30), b=(2, 35), c=(8, 100))),
        Case("a node of 72", _groups(72, dp=(2, 20e9), pp=(16, 3e9), ep=(64, 90e9)), hidden=True),
        Case(
            "a group of one", _groups(8, tp=(1, 9e9), cp=(4, 2), dp=(8, 5), pp=(2, 4)), hidden=True
        ),
        Case("one GPU a node", _groups(1, tp=(2, 5), dp=(4, 7)), hidden=True),
        Case("four groups", _groups(16, a=(4, 50), b=(8, 90), c=(2, 40), d=(2, 30)), hidden=True),
    ],
    hints=[
        "There are few groups: itertools.permutations(sizes) gives every order, and "
        "bytes_across(order, sizes, traffic, gpus_per_node) what it costs.",
        "min(..., key=...) takes the best of them.",
    ],
    difficulty=2,
    importance=4,
    minutes=6,
    lines=2,
    mutants=[
        Mutant(
            "heaviest first",
            _by(lambda name, sizes, traffic: traffic[name], reverse=True),
            "The heaviest group is innermost; if it is larger than a node it crosses all the same, "
            "and has taken the others' place.",
        ),
        Mutant(
            "heaviest that fits",
            _fitting,
            "The heaviest group that fits goes first; two lighter ones may fit and save more.",
        ),
        Mutant(
            "smallest first",
            _by(lambda name, sizes, traffic: sizes[name]),
            "The smallest group is innermost; what counts is the bytes it saves.",
        ),
        Mutant(
            "bytes per GPU",
            _by(lambda name, sizes, traffic: traffic[name] / sizes[name], reverse=True),
            "The most bytes for each GPU of the group go first; one large group may save more.",
        ),
        Mutant(
            "TP inside, DP across",
            _fixed("tp", "cp", "ep", "pp", "dp"),
            "This is one order for all: the bytes and the node's size are not looked at.",
        ),
        Mutant("as given", _fixed(), "The groups are left as they came."),
        Mutant("outermost first", _turned, "This is outermost first; turn it round."),
        Mutant("inside only", _inside_only, "Only the groups inside a node are named; name all."),
    ],
    needs=("bytes_across", "permutations"),
    compare=_compare,
    run=_run,
)


def _on_nodes(seed: int, nodes: int, size: int, n: int, dtype: torch.dtype = torch.float64):
    make = inputs(seed, nodes * size, n, dtype)
    return lambda: (*make(), size)


def _hierarchy(function, xs: Tensor, size: int) -> Together:
    """The function on ranks in nodes of `size`, in order."""
    world = len(xs)

    def node_sums(tensors: list[Tensor]) -> list[Tensor]:
        sums = [sum(tensors[first : first + size]) for first in range(0, world, size)]
        return [sums[rank // size].chunk(size)[rank % size] for rank in range(world)]

    def across(tensors: list[Tensor]) -> list[Tensor]:
        return [sum(tensors[rank % size :: size]) for rank in range(world)]

    def gathered(tensors: list[Tensor]) -> list[Tensor]:
        first = [rank - rank % size for rank in range(world)]
        return [torch.cat(tensors[at : at + size]) for at in first]

    def make(rank: int, collective) -> tuple:
        names = ("reduce_scatter", "all_reduce", "all_gather")
        return xs[rank].clone(), *map(collective, names)

    meet = {"reduce_scatter": node_sums, "all_reduce": across, "all_gather": gathered}
    return together(function, make, world, meet)


def _over(got: Together, expected: Together) -> str | None:
    for kinds, where in ((("all_reduce",), "between nodes"), ((), "in all")):
        cost, budget = got.bytes(*kinds), expected.bytes(*kinds)
        if cost != budget:
            return (
                f"the sums are right, but a rank gives {cost:,} bytes to collectives {where}, the "
                f"budget is {budget:,}"
            )
    kinds = [[message.kind for message in each.sent[0]] for each in (got, expected)]
    return None if kinds[0] == kinds[1] else "the collectives come in another order"


HIERARCHICAL = Exercise(
    name="parallel.hierarchical_all_reduce",
    reference="dsv3_tutorial.parallel.rings:hierarchical_all_reduce",
    cases=[
        Case("2 nodes of 2", _on_nodes(0, 2, 2, 4)),
        Case("2 nodes of 4", _on_nodes(1, 2, 4, 8)),
        Case("3 nodes of 2, float32", _on_nodes(2, 3, 2, 6, torch.float32)),
        Case("4 nodes of 2", _on_nodes(3, 4, 2, 10), hidden=True),
        Case("whole numbers", _on_nodes(4, 2, 3, 9, torch.int64), hidden=True),
        Case("one node", _on_nodes(5, 1, 4, 8), hidden=True),
    ],
    hints=[
        "What crosses between nodes should be as small as can be: what is a rank's smallest part "
        "that still holds its whole node's sum?",
        "reduce_scatter(x) leaves a rank 1 / g of its node's sum; all_reduce adds that part of all "
        "nodes; all_gather brings the parts together.",
    ],
    difficulty=2,
    importance=4,
    minutes=4,
    lines=1,
    mutants=[
        Mutant(
            "across first",
            lambda x, reduce_scatter, all_reduce, all_gather: all_gather(
                reduce_scatter(all_reduce(x))
            ),
            "All of x crosses between nodes: reduce inside the node first.",
        ),
        Mutant(
            "across last",
            lambda x, reduce_scatter, all_reduce, all_gather: all_reduce(
                all_gather(reduce_scatter(x))
            ),
            "Whole node sums cross, the same from each GPU of a node: cross before gathering.",
        ),
        Mutant(
            "no crossing",
            lambda x, reduce_scatter, all_reduce, all_gather: all_gather(reduce_scatter(x)),
            "These are the node's sums: the other nodes' parts are missing.",
        ),
        Mutant(
            "across only",
            lambda x, reduce_scatter, all_reduce, all_gather: all_reduce(x),
            "all_reduce joins only the ranks with the same place in their nodes.",
        ),
        Mutant(
            "no gather",
            lambda x, reduce_scatter, all_reduce, all_gather: all_reduce(reduce_scatter(x)),
            "Each rank has 1 / g of the sums now: gather them inside the node.",
        ),
        Mutant(
            "gathered first",
            lambda x, reduce_scatter, all_reduce, all_gather: all_reduce(
                reduce_scatter(all_gather(x))
            ),
            "all_gather puts the x of a node behind each other, and makes them g times longer.",
        ),
    ],
    compare=compared(_over),
    run=_hierarchy,
)
