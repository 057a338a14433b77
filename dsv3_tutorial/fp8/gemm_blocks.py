"""How a scaled FP8 product's work is cut: pure arithmetic, so that it is tested without a GPU."""

import functools
from typing import NamedTuple

from dsv3_tutorial.backend import BackendError

STEP = 128  # products between promotions


class Blocks(NamedTuple):
    """The tile (rows, columns * parts) of a result that one program computes, and what it takes.

    `swapped` computes the transpose: a tensor core takes 64 rows at least but as few as 8 columns,
    so few tokens are its columns and the weight's rows its rows. `tma`: copies by descriptor.
    """

    rows: int
    columns: int  # of one tensor-core product
    parts: int  # products beside each other
    warps: int
    stages: int
    shared: int  # bytes of shared memory, as compiled
    swapped: bool = False
    tma: bool = True


# Found by compiling for Hopper: no spills. The first has 128 registers a thread, so that an SM
# holds two programs and one multiplies while the other promotes.
SHARED_SCALES = (  # 128 columns share a scale: a weight in blocks
    Blocks(rows=128, columns=64, parts=2, warps=8, stages=3, shared=98_360),
    Blocks(rows=64, columns=64, parts=2, warps=4, stages=3, shared=73_784),
)
OWN_SCALES = (  # every column has its own: tiles on both sides, as for a weight's gradient
    Blocks(rows=128, columns=128, parts=1, warps=8, stages=4, shared=131_104),
    Blocks(rows=64, columns=128, parts=1, warps=4, stages=3, shared=74_264),
)
FEW_TOKENS = (
    Blocks(rows=64, columns=64, parts=1, warps=4, stages=4, shared=65_568, swapped=True),
    Blocks(rows=64, columns=32, parts=1, warps=4, stages=6, shared=73_776, swapped=True),
    Blocks(rows=64, columns=16, parts=1, warps=4, stages=6, shared=61_488, swapped=True),
)
# Compiled for Ada (SM89), which has FP8 tensor cores but neither wgmma nor descriptors.
WITHOUT_TMA = (
    Blocks(128, 128, parts=1, warps=8, stages=3, shared=65_536, tma=False),
    Blocks(64, 128, parts=1, warps=8, stages=3, shared=49_152, tma=False),
    Blocks(64, 64, parts=1, warps=4, stages=4, shared=49_152, swapped=True, tma=False),
    Blocks(64, 32, parts=1, warps=4, stages=4, shared=36_864, swapped=True, tma=False),
    Blocks(64, 16, parts=1, warps=4, stages=4, shared=30_720, swapped=True, tma=False),
)
SECOND_KERNEL = 128 * 1024  # bytes an SM reads from L2 in the 3 us that adding up parts begins with


@functools.cache
def choose_blocks(
    m: int, n: int, k: int, share: int, tma: bool, n_sms: int, limit: int
) -> tuple[Blocks, int]:
    """The blocks for (m, k) times (n, k)^T, and into how many parts to split k.

    share: rows of the (n, k) side with one scale, 1 or 128; tma: whether the device has it; n_sms,
    limit: its SMs, and bytes of shared memory a program may take. The fewest bytes win that an SM
    reads, partial sums included: large tiles read less for a product, unless they stand half empty
    or leave SMs without one. Raises BackendError where not even the smallest fits.
    """
    table = (SHARED_SCALES if share > 1 else OWN_SCALES) + FEW_TOKENS if tma else WITHOUT_TMA
    fitting = [blocks for blocks in table if blocks.shared <= limit]
    if not fitting:
        need = min(blocks.shared for blocks in table)
        raise BackendError(
            f"the smallest block needs {need} bytes of shared memory and this device has {limit}. "
            "The kernel would not start. Pass backend='reference'."
        )
    steps = -(-k // STEP)
    splits = [1] + [s for s in (2, 4, 8, 16, 32) if s * 4 <= steps]

    def read(choice: tuple[Blocks, int]) -> float:
        b, s = choice
        width = b.columns * b.parts
        programs = s * tiles_of(b, m, n)
        rounds = -(-steps // s) + 2  # the pipeline fills and drains
        own = -(-programs // n_sms) * (b.rows + width) * STEP * rounds
        partial = 8 * s * m * n / n_sms + SECOND_KERNEL  # float32 written and read
        return own + (partial if s > 1 else 0)

    return min(((b, s) for s in splits for b in fitting), key=read)


def tiles_of(blocks: Blocks, m: int, n: int) -> int:
    """Programs that cover a result (m, n)."""
    rows, columns = (n, m) if blocks.swapped else (m, n)
    return -(-rows // blocks.rows) * -(-columns // (blocks.columns * blocks.parts))
