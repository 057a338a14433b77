"""How products with quantised weights are cut: pure arithmetic, so that it is tested without a GPU.

m the outputs, k the summed axis.
"""

import functools
from typing import NamedTuple

from dsv3_tutorial.backend import BackendError

GROUP = 128  # neighbours along k that share a scale, where not all of a row do


class Blocks(NamedTuple):
    """The tile (rows, tokens) of a result that one program computes, and what that takes."""

    rows: int  # of the weight: outputs
    tokens: int
    step: int  # of k, per round of the loop; divides GROUP
    warps: int
    stages: int
    shared: int  # bytes of shared memory with eight-bit codes, as compiled for Hopper


# No spills: 64 rows of codes become the tensor core's left side in registers, and what limits a
# program is the bytes it has under way: 64 x 128 codes a stage. float32 has no tensor cores.
HALF_BLOCKS = (
    Blocks(rows=64, tokens=16, step=128, warps=4, stages=5, shared=53_248),
    Blocks(rows=64, tokens=32, step=128, warps=4, stages=4, shared=57_344),
    Blocks(rows=64, tokens=64, step=128, warps=4, stages=4, shared=90_112),
)
SINGLE_BLOCKS = (Blocks(rows=32, tokens=16, step=32, warps=4, stages=3, shared=10_240),)
FEW_TOKENS = 64  # up to here the weight's bytes are the cost; above, its products
SECOND_KERNEL = 64 * 1024  # bytes an SM reads in the 3 us that adding up parts begins with


@functools.cache
def choose_blocks(
    n_tokens: int, m: int, k: int, element_size: int, n_sms: int, limit: int
) -> tuple[Blocks, int]:
    """The blocks for (n_tokens, k) times (m, k)^T, and into how many parts to split k.

    element_size: bytes of a token's number; n_sms, limit: the device's SMs, and bytes of shared
    memory a program may take. A tile holds all tokens if one can, so that codes are read once. A
    weight with few outputs leaves SMs without one: k is split so that the bytes which an SM reads,
    and the partial sums it writes and reads, are fewest. Raises BackendError where nothing fits.
    """
    table = HALF_BLOCKS if element_size == 2 else SINGLE_BLOCKS
    fitting = [blocks for blocks in table if blocks.shared <= limit]
    if not fitting:
        raise BackendError(
            f"the smallest block needs {table[0].shared} bytes of shared memory and this device "
            f"has {limit}. The kernel would not start. Pass backend='reference'."
        )
    blocks = next((b for b in fitting if b.tokens >= n_tokens), fitting[-1])
    programs = _ceil(m, blocks.rows) * _ceil(n_tokens, blocks.tokens)
    steps = _ceil(k, blocks.step)

    def read(splits: int) -> float:
        rounds = _ceil(steps, splits) + 2  # the pipeline fills and drains
        own = _ceil(programs * splits, n_sms) * blocks.rows * blocks.step * rounds
        partial = 8 * splits * n_tokens * m / n_sms + SECOND_KERNEL  # float32 out and back
        return own + (partial if splits > 1 else 0)

    return blocks, min([1] + [s for s in (2, 4, 8, 16, 32) if s * 4 <= steps], key=read)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
