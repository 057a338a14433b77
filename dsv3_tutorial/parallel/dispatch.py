"""Which rows go to which rank on the way to the experts, and how many bytes that makes: no ranks.

M tokens of a rank, K experts per token, E experts, P = M K pairs of a token and an expert. Experts
lie in order: rank r of p holds r E / p to (r + 1) E / p - 1, and a node holds ranks in a row.

flat: a row for every pair. deduplicated: a row for every token and rank; the rank sums what its
experts make of it and returns one. two_stage: a row for every token and *node*, sent to the rank of
the sender's own place in that node, which forwards one to each rank of the node that needs it
(DeepSeek-V3 report, section 3.2.2). With few nodes allowed per token the last is small for certain.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Matrix = list[list[int]]

NAME = 8  # bytes that name a pair: its row and its expert, 4 each
DISPATCHES = ("flat", "deduplicated", "two_stage")


class Pairs(NamedTuple):
    """A row and an expert it visits, with what weight: row (P,), expert (P,) int64, weight (P,)."""

    row: Tensor
    expert: Tensor
    weight: Tensor


class Parcel(NamedTuple):
    """How rows and pairs are packed for one hop, both sorted by destination.

    row (R,): which row to send, once per destination. order (P,): which pair. place (P,): where in
    its destination's message that pair's row stands. counts (destinations, 2): rows, pairs.
    """

    row: Tensor
    order: Tensor
    place: Tensor
    counts: Tensor


class Stage(NamedTuple):
    """What one hop carries from rank i to rank j: rows[i][j], pairs[i][j] named with their weights,
    and the bytes counts[i][j] that announce them. A flat dispatch names no pair: rows are pairs.
    """

    rows: Matrix
    pairs: Matrix
    counts: Matrix


def pairs_of(indices: Tensor, weights: Tensor) -> Pairs:
    """Every token with every expert it chose. indices, weights (M, K) -> P = M K pairs."""
    row = torch.arange(len(indices), device=indices.device)
    return Pairs(row.repeat_interleave(indices.shape[1]), indices.flatten(), weights.flatten())


def pack(row: Tensor, destination: Tensor, n_destinations: int, n_rows: int) -> Parcel:
    """Pack each row once for each destination that any of its pairs goes to.

    row, destination (P,) int64 -> Parcel. Sorts P numbers; waits for a GPU to count the rows.
    """
    key = destination * n_rows + row  # sorted, these stand by destination and then by row
    wanted, which = key.unique(return_inverse=True)
    per_rows = torch.bincount(wanted // max(n_rows, 1), minlength=n_destinations)
    per_pairs = torch.bincount(destination, minlength=n_destinations)
    order = key.argsort(stable=True)
    begin = starts(per_rows)[destination[order]]
    counts = torch.stack([per_rows, per_pairs], dim=1)  # (destinations, 2)
    return Parcel(wanted % max(n_rows, 1), order, which[order] - begin, counts)


def starts(counts: Tensor) -> Tensor:
    """Where each part begins: the sum of those before it. counts (n,) -> (n,)."""
    return counts.cumsum(0) - counts


def messages(
    indices: Sequence[Tensor],
    n_experts: int,
    dispatch: str = "flat",
    ranks_per_node: int | None = None,
) -> tuple[Stage, ...]:
    """What a layer's dispatch sends, hop by hop, from the experts that were chosen.

    indices: each rank's (M, K). One Stage, or two for "two_stage": across, then inside. What a rank
    keeps for itself is there too, and travels nowhere. `forward_bytes` prices it.
    """
    world = len(indices)
    tables = [_pairs_per_token(own, n_experts, world) for own in indices]
    if dispatch == "two_stage":
        return _two_stages(tables, ranks_per_node or world)
    per_rank = [t.sum(0) for t in tables]
    if dispatch == "flat":
        return (_stage(per_rank, [0 * t for t in per_rank], 8 * n_experts // world, world),)
    return (_stage([(t > 0).sum(0) for t in tables], per_rank, 16, world),)


def forward_bytes(stages: Sequence[Stage], there: int, back: int, weight: int = 4) -> list[Matrix]:
    """Every all-to-all of a forward pass in order, bytes from rank i to j; `cost.comm` takes them.

    there, back: bytes of a row on its way to the experts and home (`exchange.row_bytes`); weight:
    bytes of a routing weight.
    """
    sent = []
    for s in stages:
        sent += [s.counts, _times(s.rows, there), _times(s.pairs, NAME), _times(s.pairs, weight)]
    return sent + [_turned(_times(s.rows, back)) for s in reversed(stages)]


def backward_bytes(stages: Sequence[Stage], there: int, back: int, weight: int = 4) -> list[Matrix]:
    """The same of a backward pass: gradients of sums go to the experts, those of rows go home.

    there: bytes of a row's gradient on its way to the experts. Nothing is announced again.
    """
    sent = [_times(s.rows, there) for s in stages]
    for s in reversed(stages):
        sent += [_turned(_times(s.pairs, weight)), _turned(_times(s.rows, back))]
    return sent


def _pairs_per_token(indices: Tensor, n_experts: int, world: int) -> Tensor:
    """How many of a token's experts lie on each rank. (M, K) -> (M, world) int64."""
    table = torch.zeros(len(indices), world, dtype=torch.int64)
    owner = indices.cpu() // (n_experts // world)
    return table.scatter_add(1, owner, torch.ones_like(owner))


def _two_stages(tables: list[Tensor], places: int) -> tuple[Stage, Stage]:
    """tables: each rank's (M, world). A rank's relay in a node is the one at its own place."""
    world = len(tables)
    rank = torch.arange(world)
    by_node = [t.unflatten(1, (-1, places)).sum(-1) for t in tables]  # (M, nodes) each
    rail, node = rank % places, rank // places
    rows = [(t > 0).sum(0)[node] * (rail == rail[i]) for i, t in enumerate(by_node)]
    pairs = [t.sum(0)[node] * (rail == rail[i]) for i, t in enumerate(by_node)]
    across = _stage(rows, pairs, 16, rail)
    handed_on = [tables[i % places :: places] for i in range(world)]  # relay i has their tokens
    rows = [sum((t > 0).sum(0) for t in s) * (node == node[i]) for i, s in enumerate(handed_on)]
    pairs = [sum(t.sum(0) for t in s) * (node == node[i]) for i, s in enumerate(handed_on)]
    return across, _stage(rows, pairs, 16, node)


def _stage(rows: list[Tensor], pairs: list[Tensor], announced: int, group: Tensor | int) -> Stage:
    """Each rank's rows and pairs (world,); ranks of one group announce themselves to each other."""
    group = torch.zeros(group, dtype=torch.int64) if isinstance(group, int) else group
    counts = announced * (group[:, None] == group).long()  # (world, world)
    return Stage([r.tolist() for r in rows], [p.tolist() for p in pairs], counts.tolist())


def _times(matrix: Matrix, n: int) -> Matrix:
    return [[n * value for value in row] for row in matrix]


def _turned(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix)]
