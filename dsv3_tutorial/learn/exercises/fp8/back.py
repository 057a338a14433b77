"""From eight bits and their scales back to float32."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

E4M3 = torch.float8_e4m3fn


def _stored(seed: int, *shape: int, tile: int | None = None):
    def make() -> tuple:
        size = tile or 128
        (values, scales) = randn(seed, shape, (*shape[:-1], shape[-1] // size))
        codes = (values * 100).clamp(-448, 448).to(E4M3)
        return (codes, torch.exp2(3 * scales), *([tile] if tile else []))

    return make


def _nan_tile() -> tuple[Tensor, Tensor]:
    codes, scale = _stored(3, 2, 256)()
    scale[1, 0] = torch.nan
    return codes, scale


def _spread(x_fp8, scale, tile=128, each=None, join=torch.mul) -> Tensor:
    own = each(scale) if each else scale.float().repeat_interleave(tile, dim=-1)
    return join(x_fp8.float(), own)


DEQUANTIZE_TILES = Exercise(
    name="fp8.dequantize_tiles",
    reference="dsv3_tutorial.fp8.quant:restore_tiles",
    cases=[
        Case("3 tokens, 384 channels", _stored(0, 3, 384)),
        Case("tiles of 64", _stored(1, 4, 256, tile=64)),
        Case("a scale that is NaN", _nan_tile),
        Case("a batch of sequences", _stored(4, 2, 3, 256), hidden=True),
        Case("one row, tiles of 8", _stored(5, 40, tile=8), hidden=True),
    ],
    hints=[
        "x_fp8.float() first: E4M3 numbers cannot be multiplied as they are.",
        "Each scale belongs to `tile` neighbours: scale.repeat_interleave(tile, dim=-1) has x's "
        "shape. Multiply.",
    ],
    difficulty=1,
    importance=4,
    minutes=3,
    lines=2,
    mutants=[
        Mutant(
            "divided",
            lambda x_fp8, scale, tile=128: _spread(x_fp8, scale, tile, join=torch.div),
            "Divided by the scale: x is x_fp8 * scale.",
        ),
        Mutant(
            "repeated in turn",
            lambda x_fp8, scale, tile=128: _spread(x_fp8, scale, tile, lambda s: s.tile(tile)),
            "The scales alternate: neighbours share one, repeat_interleave and not repeat.",
        ),
        Mutant(
            "the first",
            lambda x_fp8, scale, tile=128: _spread(x_fp8, scale, tile, lambda s: s[..., :1]),
            "Only each row's first scale is used: every tile has its own.",
        ),
        Mutant(
            "tile ignored",
            lambda x_fp8, scale, tile=128: _spread(x_fp8, scale),
            "tile is not used: it is 128 here.",
        ),
        Mutant(
            "in eight bits",
            lambda x_fp8, scale, tile=128: _spread(x_fp8, scale, tile).clamp(-448, 448).to(E4M3),
            "The result is in E4M3 again: return float32.",
        ),
        Mutant(
            "in BF16",
            lambda x_fp8, scale, tile=128: _spread(x_fp8, scale, tile).bfloat16(),
            "The result is in BF16: return float32.",
        ),
        Mutant(
            "in tiles",
            lambda x_fp8, scale, tile=128: _spread(x_fp8, scale, tile).unflatten(-1, (-1, tile)),
            "The result is still cut in tiles: flatten(-2) at the end.",
        ),
        Mutant(
            "NaN hidden",
            lambda x_fp8, scale, tile=128: _spread(x_fp8, scale, tile).nan_to_num(),
            "NaN is turned into a number: a tile that broke must be seen.",
        ),
        Mutant(
            "not scaled", lambda x_fp8, scale, tile=128: x_fp8.float(), "The scales are not used."
        ),
    ],
)
