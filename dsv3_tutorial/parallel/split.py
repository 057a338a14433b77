"""One feed-forward network on several ranks, with a single all-reduce: columns first, then rows.

D hidden_size, F width. Megatron-LM (Shoeybi et al. 2019).
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def column_row(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    rank: int,
    world: int,
    all_reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """SwiGLU with 1 / world of the work on each rank, and one sum of (..., D) over the ranks.

    x (..., D) the same on every rank, w_gate and w_up (F, D), w_down (D, F), F divisible by world
    -> (..., D) on every rank. A hidden feature needs all of x but no other feature, so gate and up
    are cut by features (columns, as x W is written) and silu needs no one else; down is cut along
    the same features (rows), which leaves each rank a part of the sum.
    """
    mine = slice(rank * len(w_gate) // world, (rank + 1) * len(w_gate) // world)
    hidden = F.silu(x @ w_gate[mine].T) * (x @ w_up[mine].T)  # (..., F / world)
    return all_reduce(hidden @ w_down[:, mine].T)
