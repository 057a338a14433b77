"""What fine-grained routing offers and what it costs on the way: combinations, nodes, copies.

Counted on paper, for experts drawn evenly: a trained router has favourites, and its numbers differ.
"""

import math


def expert_combinations(n_experts: int, top_k: int, split: int = 1) -> int:
    """How many sets of experts a token can have once each expert is cut into `split` smaller ones.

    Parameters and FLOPs stay: split times more experts of 1 / split the width, split times more
    of them chosen. 2 of 16 make 120 sets; cut in four, 8 of 64 make 4,426,165,368 (DeepSeekMoE,
    section 3.1).
    """
    return math.comb(n_experts * split, top_k * split)


def expected_nodes(n_experts: int, top_k: int, nodes: int) -> float:
    """How many nodes hold at least one of a token's experts, on average over evenly drawn sets.

    A token's copy is sent once to each such node: 8 of 256 over 8 nodes touch 5.29, not 8. Raises
    ValueError when the experts do not divide over the nodes.
    """
    if nodes < 1 or n_experts % nodes or not 0 <= top_k <= n_experts:
        raise ValueError(
            f"{n_experts} experts, {top_k} chosen, {nodes} nodes: the experts must divide evenly "
            "over the nodes and be as many as are chosen. Change one of the three."
        )
    missed = math.comb(n_experts - n_experts // nodes, top_k) / math.comb(n_experts, top_k)
    return nodes * (1 - missed)


def steps_to_close(gap: float, gamma: float) -> int:
    """Optimizer steps until the balance bias has lifted an expert over a gap in score.

    The bias moves gamma a step, and the overloaded rival's falls as fast: the gap closes by
    2 gamma. Raises ValueError for a gamma that moves nothing.
    """
    if not gamma > 0:
        raise ValueError(
            f"gamma is {gamma}: a bias that does not move closes no gap. Give gamma above 0."
        )
    return max(0, math.ceil(gap / (2 * gamma)))
