"""What a split of the model over GPUs costs: caches held, bytes between nodes, seconds idle."""

from collections.abc import Sequence
from itertools import permutations

from dsv3_tutorial.config import ModelConfig


def sharded_cache_bytes(
    cfg: ModelConfig, tokens: int, tp: int, dp: int, bytes_per_element: float = 2
) -> float:
    """Bytes of KV cache on the fullest of tp x dp GPUs that serve `tokens` cached tokens together.

    The dp replicas share the tokens. The tp GPUs of a replica share its key-value heads, at least
    one each; a latent belongs to all heads, so each of them holds all of it. MLA's cache is
    therefore shared by dp alone.
    """
    if cfg.is_mla:
        elements = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    else:
        elements = 2 * -(-cfg.kv_heads // tp) * cfg.head_size  # rounded up: never under one head
    return -(-tokens // dp) * elements * cfg.num_hidden_layers * bytes_per_element


def bytes_across(
    order: Sequence[str], sizes: dict[str, int], traffic: dict[str, float], gpus_per_node: int
) -> float:
    """Bytes a GPU sends between nodes in a step, for groups laid out with order[0] innermost.

    sizes: GPUs of a group; traffic: bytes a GPU sends in that group per step. A group reaches over
    all groups inside it, so it needs the product of their sizes and its own. If that fits in a
    node it sends nothing across; if not, all its bytes are counted: the worst place of its ring.
    """
    extent, across = 1, 0
    for name in order:
        extent *= sizes[name]
        across += traffic[name] if extent > gpus_per_node and sizes[name] > 1 else 0
    return across


def place_groups(
    sizes: dict[str, int], traffic: dict[str, float], gpus_per_node: int
) -> tuple[str, ...]:
    """The order of the groups, innermost first, that leaves the fewest bytes between nodes.

    Every order is tried: the heaviest group first is not always best, as one that is too large for
    a node crosses all the same and has taken the place of the others.
    """
    return min(
        permutations(sizes), key=lambda order: bytes_across(order, sizes, traffic, gpus_per_node)
    )


def bubble(orders: Sequence[Sequence[str]], t_f: float, t_b: float) -> float:
    """Seconds that a stage idles in one step, given what every stage does in which order.

    orders[stage] like ["F0", "B0"]: forward and backward of micro-batch 0, of t_f and t_b seconds.
    A forward waits for the stage before, a backward for the stage after; messages take no time.
    1F1B: (p - 1)(t_f + t_b). Raises ValueError when the stages wait for each other for ever.
    """
    source, seconds = {"F": -1, "B": 1}, {"F": t_f, "B": t_b}
    ends = {(name, edge): 0.0 for name in orders[0] for edge in (-1, len(orders))}
    clock, left = [0.0] * len(orders), [list(order) for order in orders]
    for _ in range(sum(map(len, orders))):  # each round does one operation at least
        for stage, todo in enumerate(left):
            while todo and (ready := (todo[0], stage + source[todo[0][0]])) in ends:
                name = todo.pop(0)
                clock[stage] = max(clock[stage], ends[ready]) + seconds[name[0]]
                ends[name, stage] = clock[stage]
    if any(left):
        raise ValueError(f"stages wait for each other: {left}. Order what is waited for first.")
    return max(clock) - len(orders[0]) / 2 * (t_f + t_b)


def overlap_speedup(
    compute: float, communication: float, sms: int = 132, reserved: int = 20
) -> float:
    """How much faster two overlapped micro-batches are than one after the other.

    compute and communication: seconds each micro-batch needs of both, on all SMs. Overlapped, one
    computes on sms - reserved of them while the other communicates, and the longer decides; one
    after the other, all SMs compute. Below 1 where communication is too short to be worth the SMs.
    """
    return (compute + communication) / max(compute * sms / (sms - reserved), communication)
