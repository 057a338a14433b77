"""Which tokens a dispatcher sends across to each node, once."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.exercises.parallel.counts import chosen
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _crossing(seed: int, m: int, k: int, size: int, nodes: int, home: int, *between: int):
    first, last = between or (0, size * nodes)
    return lambda: (chosen(seed, m, k, first, last), size, nodes, home)


def _per_node(tokens: Tensor, rows: Tensor) -> list[list[int]]:
    return [part.tolist() for part in tokens.split(rows.tolist())]


def _what_crosses(got: tuple, expected: tuple) -> str | None:
    """What does not arrive, what need not go, what goes twice. A node's order is free."""
    if len(got) != 2:
        return "return two flat tensors of int64: tokens, and rows for each node"
    (tokens, rows), (_, least) = got, expected
    for given in (tokens, rows):
        if not isinstance(given, Tensor) or given.ndim != 1 or given.dtype != torch.int64:
            return "return two flat tensors of int64, also when empty: tokens, rows for each node"
    if len(rows) != len(least):
        return f"rows has {len(rows)} numbers, and there are {len(least)} nodes"
    if rows.sum() != len(tokens) or (rows < 0).any():
        return f"rows add up to {int(rows.sum())}, but there are {len(tokens)} tokens"
    for node, (one, other) in enumerate(zip(_per_node(*got), _per_node(*expected), strict=True)):
        if missing := set(other) - set(one):
            return f"node {node} does not get {len(missing)} of the tokens that have experts there"
        if extra := set(one) - set(other):
            return f"node {node} gets {len(extra)} tokens that need not cross to it"
    if len(tokens) > int(least.sum()):
        return (
            f"every token arrives, but {len(tokens)} rows cross between nodes, the budget is "
            f"{int(least.sum())}"
        )
    return "fewer rows" if len(tokens) < int(least.sum()) else None  # than a mutant's


def _copies(reached: Tensor) -> tuple[Tensor, Tensor]:
    return reached.T.nonzero()[:, 1], reached.sum(dim=0)


def _reached(indices: Tensor, experts_per_node: int, nodes: int) -> Tensor:
    reached = torch.zeros(len(indices), nodes, dtype=torch.bool)
    return reached.scatter(1, indices // experts_per_node, True)


def _a_row_each(indices, experts_per_node, nodes, home):
    lists = [(indices // experts_per_node == node).nonzero()[:, 0] for node in range(nodes)]
    lists[home] = lists[home][:0]
    return torch.cat(lists), torch.tensor([len(each) for each in lists])


def _home_too(indices, experts_per_node, nodes, home):
    return _copies(_reached(indices, experts_per_node, nodes))


def _a_row_each_home_too(indices, experts_per_node, nodes, home):
    lists = [(indices // experts_per_node == node).nonzero()[:, 0] for node in range(nodes)]
    return torch.cat(lists), torch.tensor([len(each) for each in lists])


def _everything_everywhere(indices, experts_per_node, nodes, home):
    reached = torch.ones(len(indices), nodes, dtype=torch.bool)
    reached[:, home] = False
    return _copies(reached)


def _first_only(indices, experts_per_node, nodes, home):
    reached = _reached(indices[:, :1], experts_per_node, nodes)
    reached[:, home] = False
    return _copies(reached)


def _not_if_home(indices, experts_per_node, nodes, home):
    reached = _reached(indices, experts_per_node, nodes)
    reached[reached[:, home]] = False
    return _copies(reached)


def _by_token(indices, experts_per_node, nodes, home):
    reached = _reached(indices, experts_per_node, nodes)
    reached[:, home] = False
    return reached.nonzero()[:, 0], reached.sum(dim=0)


def _interleaved_nodes(indices, experts_per_node, nodes, home):
    reached = torch.zeros(len(indices), nodes, dtype=torch.bool).scatter(1, indices % nodes, True)
    reached[:, home] = False
    return _copies(reached)


def _each_token_once(indices, experts_per_node, nodes, home):
    reached = _reached(indices, experts_per_node, nodes)
    reached[:, home] = False
    return _copies(reached & (reached.cumsum(dim=1) == 1))


NODE_COPIES = Exercise(
    name="parallel.node_copies",
    reference="dsv3_tutorial.parallel.counts:node_copies",
    cases=[
        Case("6 tokens, 3 of 8 on 2 nodes", _crossing(0, 6, 3, 4, 2, 0)),
        Case("4 nodes, sent from node 2", _crossing(1, 10, 4, 4, 4, 2)),
        Case("nobody chose the last node's", _crossing(2, 5, 3, 4, 3, 0, 0, 8)),
        Case("V3: 8 of 256 on 8 nodes", _crossing(3, 24, 8, 32, 8, 5), hidden=True),
        Case("no tokens", _crossing(4, 0, 2, 4, 4, 1), hidden=True),
        Case("all stay at home", _crossing(5, 6, 2, 5, 3, 1, 5, 10), hidden=True),
        Case("one expert a node", _crossing(6, 8, 3, 1, 6, 5), hidden=True),
    ],
    hints=[
        "nodes_of = indices // experts_per_node is (M, K): a node may stand in a row twice.",
        "A bool table (M, nodes) cannot count twice: zeros, then .scatter_(1, nodes_of, True); and "
        "column `home` is False again.",
        "table.sum(dim=0) are the rows of each node; table.T.nonzero()[:, 1] the tokens, node by "
        "node.",
    ],
    difficulty=3,
    importance=5,
    minutes=8,
    lines=5,
    mutants=[
        Mutant(
            "a row each",
            _a_row_each,
            "A token with two experts on a node crosses twice: one copy is enough, and the node "
            "hands it on inside.",
        ),
        Mutant(
            "home too",
            _home_too,
            "Copies for the home node are counted: they cross no link between nodes.",
        ),
        Mutant(
            "a row each, home too",
            _a_row_each_home_too,
            "A row for each expert, those at home included: only other nodes, and one copy each.",
        ),
        Mutant(
            "everything everywhere",
            _everything_everywhere,
            "Every token goes to every node: send it only where it has an expert.",
        ),
        Mutant("first choice", _first_only, "Only each token's first expert counts; all K do."),
        Mutant(
            "not if at home",
            _not_if_home,
            "A token with an expert at home still crosses to its other nodes.",
        ),
        Mutant(
            "token by token",
            _by_token,
            "tokens is ordered by token: those for node 0 come first, then node 1's.",
        ),
        Mutant(
            "interleaved",
            _interleaved_nodes,
            "Expert e is on node e // experts_per_node: neighbours share a node.",
        ),
        Mutant(
            "one node each",
            _each_token_once,
            "Each token crosses to one node only; it goes to every node that has an expert for it.",
        ),
    ],
    compare=_what_crosses,
)
