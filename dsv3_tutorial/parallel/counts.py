"""Which rows go where: what a dispatcher tells the all-to-all, from the router's choice alone.

M tokens, K experts per token. Experts lie on the ranks, and on the nodes, in the order of their
numbers, equally many on each.
"""

import torch
from torch import Tensor


def destination_counts(indices: Tensor, experts_per_rank: int, world: int) -> Tensor:
    """How many rows this rank sends to each rank when every (token, expert) pair is a row.

    indices (M, K) int64 -> (world,) int64, summing to M K: the split sizes of an all-to-all. The
    rank's own share is among them.
    """
    return torch.bincount((indices // experts_per_rank).flatten(), minlength=world)


def node_copies(
    indices: Tensor, experts_per_node: int, nodes: int, home: int
) -> tuple[Tensor, Tensor]:
    """The tokens that must cross to each other node, each once however many experts it has there.

    indices (M, K) int64, home the node that the tokens are on -> tokens (rows,) int64, those for
    node 0 first, and rows per node (nodes,) int64, none for home. Inside a node a copy is handed
    on over NVLink. Source: V3 report, section 3.2.2.
    """
    reached = torch.zeros(len(indices), nodes, dtype=torch.bool)
    reached.scatter_(1, indices // experts_per_node, True)
    reached[:, home] = False
    tokens = reached.T.nonzero()[:, 1]  # (rows,)
    return tokens, reached.sum(dim=0)
