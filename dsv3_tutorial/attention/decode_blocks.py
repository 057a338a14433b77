"""How the decode kernel's work is cut: pure arithmetic, so that it is tested without a GPU."""

import functools
import math
from typing import NamedTuple

from dsv3_tutorial.backend import BackendError


class Blocks(NamedTuple):
    """What one program of the attention kernel works on, and what that takes of a Hopper SM."""

    rows: int  # heads times queries held at once; they share every read of the cache
    tokens: int  # cached tokens per step of the loop
    warps: int
    stages: int
    shared: int  # bytes of shared memory at V3's width, 512 + 64, as compiled
    per_sm: int  # programs that fit on one SM, by registers and shared memory


# Found by compiling for Hopper: the (rows, 512) float32 accumulator stays in registers, unspilled.
# 64 rows feed wgmma; below that the tensor cores are fed by mma.sync and the cache by bandwidth.
HALF_BLOCKS = (
    Blocks(rows=16, tokens=64, warps=4, stages=2, shared=94_208, per_sm=2),
    Blocks(rows=32, tokens=64, warps=8, stages=2, shared=114_688, per_sm=1),
    Blocks(rows=64, tokens=64, warps=8, stages=2, shared=221_184, per_sm=1),
)
SINGLE_BLOCKS = (Blocks(rows=16, tokens=16, warps=8, stages=2, shared=74_816, per_sm=2),)
# The same over rows of bytes: the codes become BF16 in registers, which leaves room for 32 tokens.
# In float32 they do not fit and spill: there to be compared with, not to be fast.
BYTE_BLOCKS = (
    Blocks(rows=16, tokens=32, warps=4, stages=3, shared=61_440, per_sm=2),
    Blocks(rows=32, tokens=32, warps=8, stages=3, shared=80_896, per_sm=1),
    Blocks(rows=64, tokens=32, warps=8, stages=2, shared=131_584, per_sm=1),
)
SINGLE_BYTE_BLOCKS = (Blocks(rows=16, tokens=16, warps=16, stages=2, shared=84_224, per_sm=1),)
WIDTH = 512 + 64
MAX_SPLITS = 256
RESERVED = 1024  # bytes of shared memory that a program costs beside its own


@functools.cache
def choose_blocks(
    n_rows: int, width: int, element_size: int, limit: int, of_bytes: bool = False
) -> Blocks:
    """The blocks for n_rows = S * H rows: the smallest that hold all of them, within the limit.

    width: C + R, each padded to a power of two; element_size: of a query's numbers; limit: bytes of
    shared memory a program may take; of_bytes: whether the cached rows are bytes, FP8 and scales.
    Fewer programs that share a read are better than many, up to 64 rows; an A100 stops at 32, a
    desktop GPU (99 KB) at 16. Raises BackendError where not even the smallest fits.
    """
    tables = (BYTE_BLOCKS, SINGLE_BYTE_BLOCKS) if of_bytes else (HALF_BLOCKS, SINGLE_BLOCKS)
    table = tables[element_size != 2]
    fitting = [blocks for blocks in table if blocks.shared * width <= limit * WIDTH]
    if not fitting:
        need = table[0].shared * width // WIDTH
        raise BackendError(
            f"a cached row of {width} numbers needs {need} bytes of shared memory and this device "
            f"has {limit}. The kernel would not start. Pass backend='reference'."
        )
    return next((blocks for blocks in fitting if blocks.rows >= n_rows), fitting[-1])


@functools.cache
def choose_splits(programs: int, steps: int, blocks: Blocks, slots: int) -> int:
    """Parts to split the cached tokens into, so that the last wave of programs is a full one.

    programs: row blocks times batch; steps: blocks of tokens in the longest sequence; slots:
    programs the device runs at once. Time is counted in steps: a wave costs its steps, two to start
    and end, and, with more parts than one, the float32 result that is written and read again. Of
    equals the fewest parts are taken.
    """
    partial = 4 * blocks.rows / blocks.tokens  # float32 out and back, over BF16 in: 8 C / (2 C)

    def time(splits: int) -> float:
        waves = _ceil(programs * splits, slots)
        return waves * (_ceil(steps, splits) + 2 + (partial if splits > 1 else 0.0))

    return min(range(1, max(1, min(steps, MAX_SPLITS)) + 1), key=time)


def within_page(blocks: Blocks, page_size: int) -> Blocks:
    """The same blocks with as many tokens a step as one page holds: a step then looks up one page.

    Unchanged where a page has room for all of them, or is no multiple of 16, a tensor core's least:
    then every token looks up its own, which costs registers (those blocks spill, and still work).
    """
    tokens = math.gcd(blocks.tokens, page_size)
    return blocks._replace(tokens=tokens) if tokens >= 16 else blocks


def slots_of(blocks: Blocks, n_sms: int, limit: int) -> int:
    """Programs that a device runs at once; one with less shared memory than Hopper holds fewer."""
    by_memory = (limit + RESERVED) // (blocks.shared + RESERVED)
    return n_sms * max(1, min(blocks.per_sm, by_memory))


def padded(size: int) -> int:
    """A side as the kernel holds it: a power of two, and no less than the 16 of a tensor core."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
