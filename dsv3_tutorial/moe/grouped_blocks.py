"""How the grouped products' work is cut: pure arithmetic, so that it is tested without a GPU."""

import functools
from typing import NamedTuple

from dsv3_tutorial.backend import BackendError


class Blocks(NamedTuple):
    """The part of a product that one program computes, and what that takes of a Hopper SM."""

    rows: int
    columns: int
    step: int  # of the summed axis, per round of the loop
    warps: int
    stages: int
    shared: int  # bytes of shared memory, as compiled


# Found by compiling for Hopper: float32 sums stay in registers, unspilled. From 64 rows on the
# products run on wgmma; 16 rows waste less where an expert has few tokens and reading its weights
# is the cost.
HALF_BLOCKS = (
    Blocks(rows=16, columns=128, step=64, warps=4, stages=4, shared=55_296),
    Blocks(rows=64, columns=128, step=64, warps=4, stages=4, shared=98_304),
    Blocks(rows=128, columns=128, step=64, warps=8, stages=4, shared=131_072),
    Blocks(rows=128, columns=256, step=64, warps=8, stages=3, shared=147_456),
)
SINGLE_BLOCKS = (Blocks(rows=64, columns=64, step=32, warps=8, stages=3, shared=32_768),)


@functools.cache
def choose_blocks(
    groups: int, rows: int, columns: int, element_size: int, n_sms: int, limit: int
) -> Blocks:
    """The blocks for `groups` results of about this many rows and columns each.

    n_sms, limit: the device's SMs, and bytes of shared memory a program may take. The fewest bytes
    win that an SM reads for each step of the sum: large blocks read less for a product, unless they
    stand half empty or leave SMs without one. Raises BackendError where not even the smallest fits.
    """
    table = HALF_BLOCKS if element_size == 2 else SINGLE_BLOCKS
    fitting = [blocks for blocks in table if blocks.shared <= limit]
    if not fitting:
        raise BackendError(
            f"the smallest block needs {table[0].shared} bytes of shared memory and this device "
            f"has {limit}. The kernel would not start. Use the engine 'grouped_mm' or 'sorted'."
        )

    def read(b: Blocks) -> int:
        programs = groups * -(-rows // b.rows) * -(-columns // b.columns)
        return -(-programs // n_sms) * (b.rows + b.columns)

    return min(fitting, key=read)


def most_tiles(n_rows: int, n_groups: int, rows: int) -> int:
    """Tiles of `rows` rows that n_rows in n_groups groups can take at most, however they fall.

    The grid is this large, because the counts themselves stay on the device: a program without a
    tile ends at once. Each group that is not empty has one tile that need not be full.
    """
    begun = min(n_groups, n_rows)
    return begun + (n_rows - begun) // rows
