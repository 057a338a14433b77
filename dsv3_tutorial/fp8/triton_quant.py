"""Quantisation in one pass over memory: a tile is read once, its largest found, its codes written.

PyTorch takes a pass for each of amax, divide, clamp and cast; memory is what these cost. Here a
program holds its tiles in registers between the two ends. Bit for bit the definition of
`fp8.quant`, division included.

Imported by fp8/quant.py alone, and only where Triton is to run.
"""

import torch
import triton
from torch import Tensor

from dsv3_tutorial.backend import BackendError, pick
from dsv3_tutorial.fp8.quant import QuantizationError
from dsv3_tutorial.fp8.triton_quant_kernels import blocks_kernel, tiles_kernel

WIDEST = 16_384  # values of a tile that one program can hold in registers
PER_PROGRAM = 4096  # values: 32 a thread, all loaded before the first is needed
ROWS_ACROSS = 64  # of a transposed matrix: what a program reads side by side, 128 bytes of BF16
BLOCK = 128
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_OLDEST = (8, 9)  # Ada: the first with conversions to E4M3 and tensor cores that multiply it


def quantize_tiles(x: Tensor, pow2: bool = False, tile: int = 128) -> tuple[Tensor, Tensor]:
    """`fp8.quant.quantize_tiles` on CUDA, or anywhere in Triton's interpreter; nothing is checked
    for NaN, whose tile gets the scale NaN.

    x (..., n) -> float8_e4m3fn (..., n), float32 (..., ceil(n / tile)). One read of x, one write.
    Raises QuantizationError for what has no tiles, BackendError where there is no kernel.
    """
    _check(x, 1)
    if not 1 <= tile <= WIDEST:
        raise QuantizationError(
            f"A tile of {tile} values does not fit: a program holds 1 to {WIDEST} in its "
            "registers. Pass tile=128, or backend='reference'."
        )
    return torch.ops.dsv3.fp8_quantize_tiles(x, pow2, tile)


def quantize_blocks(w: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """`fp8.quant.quantize_blocks` for blocks of 128 x 128, where `quantize_tiles` above runs.

    w (..., m, n) -> float8_e4m3fn (..., m, n), float32 (..., ceil(m / 128), ceil(n / 128)).
    """
    _check(w, 2)
    return torch.ops.dsv3.fp8_quantize_blocks(w, pow2)


def fp8_problem(device: torch.device) -> str | None:
    """Why no Triton kernel with FP8 can run on this device, in words; None where one can."""
    if device.type != "cuda":
        return None  # the interpreter, or `backend.pick` has refused it
    capability = torch.cuda.get_device_capability(device)
    if capability >= _OLDEST:
        return None
    have, need = (f"{major}.{minor}" for major, minor in (capability, _OLDEST))
    return (
        f"the device has compute capability {have} (SM{capability[0]}{capability[1]}), and FP8 "
        f"conversions and products exist from {need} (Ada, Hopper) on"
    )


def need_fp8(x: Tensor) -> None:
    """Raises BackendError where Triton cannot run, or not with FP8."""
    pick(x, "triton")
    problem = fp8_problem(x.device)
    if problem is not None:
        raise BackendError(
            f"Triton cannot run FP8 here: {problem}. Nothing else was run in its place. "
            "Pass backend='reference', which emulates FP8 on any device."
        )


def _check(x: Tensor, least: int) -> None:
    if x.ndim < least or not x.is_floating_point() or 0 in x.shape[-least:]:
        wanted = ("", "vector, or a stack of them", "matrix, or a stack of them")[least]
        raise QuantizationError(
            f"{x.dtype} of shape {tuple(x.shape)} cannot be cut into parts of real numbers with a "
            f"scale each. The codes would stand for something else. Give a floating-point {wanted}."
        )
    need_fp8(x)


def _rows(x: Tensor) -> Tensor:
    """x as the kernels read it, contiguous; float64 goes through float32, as in the definition."""
    return (x if x.dtype in _FLOATS else x.float()).contiguous()


def _lies_across(x: Tensor) -> bool:
    """Whether x is a transposed matrix, as for a weight's gradient: read so, not copied first."""
    return x.ndim == 2 and x.dtype in _FLOATS and x.T.is_contiguous() and not x.is_contiguous()


@torch.library.custom_op("dsv3::fp8_quantize_tiles", mutates_args=())
def _tiles(x: Tensor, pow2: bool, tile: int) -> tuple[Tensor, Tensor]:
    stored, scale = _empty_tiles(x, pow2, tile)
    across = tile <= 128 and _lies_across(x)
    x = x if across else _rows(x)
    block = max(16, triton.next_power_of_2(tile))
    tiles = ROWS_ACROSS if across else max(1, PER_PROGRAM // block)
    per_row = scale.shape[-1]
    n_rows = scale.numel() // per_row
    programs = (
        triton.cdiv(n_rows, tiles) * per_row if across else triton.cdiv(n_rows * per_row, tiles)
    )
    if programs > 0:
        with torch.cuda.device_of(x):
            tiles_kernel[(programs,)](
                x,
                stored,
                scale,
                n_rows,
                x.shape[-1],
                per_row,
                TILE=tile,
                BLOCK=block,
                TILES=tiles,
                ACROSS=across,
                EVEN=x.shape[-1] % tile == 0 and tile == block,
                POW2=pow2,
                num_warps=4 if block <= PER_PROGRAM else 8,
            )
    return stored, scale


@_tiles.register_fake
def _empty_tiles(x, pow2, tile):
    scale = x.new_empty((*x.shape[:-1], -(-x.shape[-1] // tile)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale


@torch.library.custom_op("dsv3::fp8_quantize_blocks", mutates_args=())
def _blocks(w: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    w = _rows(w)
    stored, scale = _empty_blocks(w, pow2)
    if scale.numel() > 0:
        with torch.cuda.device_of(w):
            blocks_kernel[(scale.numel(),)](
                w, stored, scale, *w.shape[-2:], SIDE=BLOCK, POW2=pow2, num_warps=8
            )
    return stored, scale


@_blocks.register_fake
def _empty_blocks(w, pow2):
    *lead, m, n = w.shape
    scale = w.new_empty((*lead, -(-m // BLOCK), -(-n // BLOCK)), dtype=torch.float32)
    return w.new_empty(w.shape, dtype=torch.float8_e4m3fn), scale
