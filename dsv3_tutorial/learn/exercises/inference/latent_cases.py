"""A cache in eight bits for cases, and how many numbers are made by products over it."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_tutorial.learn.draw import randn

TILE = 128


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, n) float32 -> E4M3 codes (T, n), float32 scales (T, ceil(n / 128))."""
    tiles = F.pad(x, (0, -x.shape[-1] % TILE)).unflatten(-1, (-1, TILE))  # (T, tiles, 128)
    scales = tiles.abs().amax(dim=-1) / 448
    codes = (tiles / scales[..., None]).to(torch.float8_e4m3fn).flatten(-2)
    return codes[:, : x.shape[-1]].contiguous(), scales


def cached(
    seed: int, heads: int, rank: int, rope: int, tokens: int, dtype: torch.dtype = torch.float32
):
    """Queries of some heads and the cache of some tokens, whose tiles are of different sizes."""

    def make() -> tuple:
        shapes = (heads, rank), (heads, rope), (tokens, rank), (tokens, rope), (tokens, 9)
        q, q_rope, latent, k_rope, size = randn(seed, *shapes)
        size = torch.exp2(size).repeat_interleave(TILE, dim=1)[:, :rank]  # (T, C)
        codes, scales = quantized(latent * size)
        return (q.to(dtype), q_rope.to(dtype), codes, scales, k_rope.to(dtype), 0.07)

    return make


ONE_BY_ONE = ("mul", "mul_", "div", "div_", "addcmul", "addcmul_", "addcdiv", "addcdiv_")
SUMMED = ("mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "addr")  # diag(s) @ codes too


class _Multiplied(TorchDispatchMode):
    """Counts the numbers that products and quotients return; a sum of products is one number."""

    total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's own switch: with it the first call would load the compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ONE_BY_ONE + SUMMED:
            self.total += made.numel()
        return made


def _multiplied(function, *args: Tensor) -> int:
    with _Multiplied() as counter:
        function(*args)
    return counter.total


def scaled_tiles(function, *_args) -> int:
    """How often all codes of a tile are multiplied: two heads, two tiles of 128 numbers a token.

    What one more token adds, so that products over the queries do not count. Folding the scales
    into scores and probabilities takes 10 to 30 numbers a token: no tile.
    """
    short, long = (_multiplied(function, *cached(9, 2, 256, 8, tokens)()) for tokens in (16, 48))
    return (long - short) // 32 // TILE
