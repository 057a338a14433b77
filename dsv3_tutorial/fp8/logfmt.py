"""LogFMT: a tile's logarithms, evenly spaced between its own smallest and largest.

n bits: a sign, and K from 0 to 2^(n-1) - 1. K = 0 is zero; K = 1 is the tile's smallest magnitude
above zero, the largest K its largest, and those between are evenly spaced as logarithms, that is,
by equal factors. A tile whose numbers are alike gets fine steps, one that spans decades coarse.
ISCA 2025, section 3.2 (arXiv 2505.09343). It was tried for the combine of experts' outputs and not
deployed: a logarithm and an exponential for every value cost 50 to 100 % on top of the transfer.
"""

import math

import torch
from torch import Tensor

from dsv3_tutorial.fp8.formats import real_tiles
from dsv3_tutorial.fp8.quant import TILE, QuantizationError

RANGE = 32 * math.log(2)  # log(2^32): about what five exponent bits span


def encode(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Store x in `bits` a value, each 1 x 128 tile with its own smallest magnitude and step.

    x (..., n) real -> codes (..., n), uint8 up to 8 bits and int16 above, S.K with the sign in
    front; low and step, float32 (..., ceil(n / 128)): the smallest logarithm, and what K adds.
    Of the decoded values the nearest *on the number line* is taken, not the nearest logarithm,
    which would enlarge on average; between two equally near, the smaller. `low` stays within
    log(2^32) of the largest, so that one tiny number cannot make all steps coarse: what lies below
    becomes that bound or zero. A tile of zeros has low = step = 0, one of equal magnitudes step 0.
    Bytes once packed: bits / 8 + 8 / 128 a value. Raises QuantizationError for NaN and infinity.
    """
    _check_bits(bits)
    tiles = real_tiles(x, TILE)  # (..., tiles, 128)
    logs = tiles.abs().double().log()  # zero's is -infinity
    low, step = _range(logs, bits)
    guess = (logs - low[..., None].double()) / step[..., None].double()
    guess = guess.nan_to_num(0.0, neginf=0.0).round() + 1  # step 0: all of them are K = 1
    steps = _nearest(tiles.abs(), guess.clamp(1, _largest(bits)), low, step, bits)
    signs = torch.signbit(tiles).int() << (bits - 1)
    codes = (signs | steps.int()).to(_dtype(bits))
    return codes.flatten(-2)[..., : x.shape[-1]], low, step


def decode(codes: Tensor, low: Tensor, step: Tensor, bits: int = 8) -> Tensor:
    """What the codes stand for: sign * exp(low + step * (K - 1)), and zero for K = 0.

    codes (..., n), low and step (..., ceil(n / 128)) -> float32 (..., n).
    Raises QuantizationError where codes and tiles do not belong together.
    """
    _check_bits(bits)
    n = codes.shape[-1] if codes.ndim else 0
    wanted = (*codes.shape[:-1], math.ceil(n / TILE))
    if codes.dtype != _dtype(bits) or n == 0 or not low.shape == step.shape == wanted:
        raise QuantizationError(
            f"{codes.dtype} {tuple(codes.shape)} with low {tuple(low.shape)} and step "
            f"{tuple(step.shape)} are not tiles of LogFMT-{bits}: values would get another one's "
            f"range. Give {_dtype(bits)} codes, and low and step of shape {wanted}."
        )
    low, step = (each.repeat_interleave(TILE, dim=-1)[..., :n] for each in (low, step))
    sizes = _magnitude(codes.int() & _largest(bits), low, step)
    return torch.where((codes.int() >> (bits - 1)) & 1 == 1, -sizes, sizes)


def _range(logs: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """low and step of each tile: logs (..., tiles, 128) -> float32 (..., tiles) twice."""
    most = logs.amax(dim=-1)
    least = logs.masked_fill(logs == -torch.inf, torch.inf).amin(dim=-1)
    empty = most == -torch.inf
    low = torch.maximum(least, most - RANGE)
    step = (most - low) / (2 ** (bits - 1) - 2)
    return low.masked_fill(empty, 0.0).float(), step.masked_fill(empty, 0.0).float()


def _nearest(sizes: Tensor, guess: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    """K of the decoded value nearest to each size: the guess from the logarithm, or beside it.

    All (..., tiles, 128), but low and step (..., tiles). The middle between two neighbours lies
    above the middle of their logarithms, so the answer is the guess, one less, or zero.
    """
    low, step = low[..., None], step[..., None]
    best, error = torch.zeros_like(guess), sizes.double()  # K = 0 is a candidate for every size
    for offset in (-1, 0):
        candidate = (guess + offset).clamp(1, _largest(bits))
        distance = (_magnitude(candidate, low, step).double() - sizes.double()).abs()
        closer = distance < error
        best, error = torch.where(closer, candidate, best), torch.where(closer, distance, error)
    return best


def _magnitude(steps: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """exp(low + step * (K - 1)), in float64 until the end; float32, never above its largest."""
    sizes = torch.exp(low.double() + step.double() * (steps - 1))
    return sizes.clamp_max(torch.finfo(torch.float32).max).float().masked_fill(steps == 0, 0.0)


def _largest(bits: int) -> int:
    return (1 << (bits - 1)) - 1


def _dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int16


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 3 <= bits <= 15:
        raise QuantizationError(
            f"LogFMT with {bits!r} bits: between a sign and two magnitudes there is no step, and "
            "above 15 bits a code no longer fits its int16; a code has no part of a bit. Give 3 to "
            "15, a whole number; the paper uses 8 and 10."
        )
