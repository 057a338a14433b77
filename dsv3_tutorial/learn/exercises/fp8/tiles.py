"""Eight bits, and a scale for every 128 neighbours."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

E4M3 = torch.float8_e4m3fn


def _rows(seed: int, *shape: int, tile: int | None = None, size: float = 1.0, dtype=torch.float32):
    def make() -> tuple:
        (x,) = randn(seed, shape)
        return ((x * size).to(dtype), *([tile] if tile else []))

    return make


def _loud_channel() -> tuple[Tensor]:
    (x,) = randn(1, (4, 256))
    x[:, 3] *= 1e4
    return (x,)


def _zero_tile() -> tuple[Tensor]:
    (x,) = randn(2, (3, 384))
    x[0, :128], x[2, 256:] = 0.0, 0.0
    return (x,)


def _negative() -> tuple[Tensor]:
    (x,) = randn(6, (3, 256))
    return (-x.abs() - 0.01,)


def tiles_of(
    x: Tensor, tile: int = 128, largest=None, full: float = 448.0, fit=None, factor=None
) -> tuple[Tensor, Tensor]:
    """`cast_tiles` with its parts open to be got wrong."""
    each = x.float().unflatten(-1, (-1, tile))
    found = largest(each) if largest else each.abs().amax(dim=-1)
    scale = fit(found) if fit else torch.where(found == 0, 1.0, found / full)
    ratio = factor(each, scale[..., None]) if factor else each / scale[..., None]
    return ratio.clamp(-448, 448).to(E4M3).flatten(-2), scale


def _one_scale(x, tile=128):
    return tiles_of(x, tile, lambda each: each.abs().amax().expand(each.shape[:-1]))


def _one_number(x, tile=128):
    scale = x.float().abs().amax() / 448
    return (x.float() / scale).clamp(-448, 448).to(E4M3), scale


def _one_a_row(x, tile=128):
    return tiles_of(
        x, tile, lambda each: each.abs().amax(dim=(-1, -2))[..., None].expand(each.shape[:-1])
    )


def _one_a_column(x, tile=128):
    scale = x.float().abs().amax(dim=0) / 448
    return (x.float() / scale.clamp_min(1e-30)).clamp(-448, 448).to(E4M3), scale


def _along_tokens(x, tile=128):
    def largest(each: Tensor) -> Tensor:
        return each.abs().amax(dim=(0, -1)).expand(each.shape[:-1])

    return tiles_of(x, tile, largest)


def _interleaved(x, tile=128):
    each = x.float().unflatten(-1, (tile, -1)).transpose(-1, -2)
    codes, scale = tiles_of(each.flatten(-2), tile)
    return codes.unflatten(-1, (-1, tile)).transpose(-1, -2).flatten(-2), scale


def _inverted(x, tile=128):
    codes, scale = tiles_of(x, tile)
    return codes, 1 / scale


def _floored(x, tile=128):
    return tiles_of(x, tile, lambda each: each.abs().amax(dim=-1).clamp_min(1e-4))


def _narrow(x, tile=128):
    each = x.unflatten(-1, (-1, tile))
    largest = each.abs().amax(dim=-1)
    scale = torch.where(largest == 0, 1.0, (largest / 448)).to(x.dtype)
    return (each / scale[..., None]).clamp(-448, 448).to(E4M3).flatten(-2), scale.float()


def _kept_axis(x, tile=128):
    codes, scale = tiles_of(x, tile)
    return codes, scale[..., None]


def _in_tiles(x, tile=128):
    codes, scale = tiles_of(x, tile)
    return codes.unflatten(-1, (-1, tile)), scale


QUANTIZE_TILES = Exercise(
    name="fp8.quantize_tiles",
    reference="dsv3_tutorial.fp8.quant:cast_tiles",
    cases=[
        Case("3 tokens, 256 channels", _rows(0, 3, 256)),
        Case("a loud channel", _loud_channel),
        Case("a tile of zeros", _zero_tile),
        Case("tiles of 32", _rows(3, 4, 96, tile=32)),
        Case("BF16", _rows(4, 5, 128, dtype=torch.bfloat16)),
        Case("gradients of 1e-9", _rows(5, 2, 384, size=1e-9)),
        Case("below zero", _negative, hidden=True),
        Case("a batch of sequences", _rows(7, 2, 3, 256, size=300.0), hidden=True),
        Case("one row without others", _rows(8, 640, tile=64), hidden=True),
        Case("BF16, other tiles", _rows(9, 2, 80, tile=16, dtype=torch.bfloat16), hidden=True),
    ],
    hints=[
        "tiles = x.float().unflatten(-1, (-1, tile)) puts each tile in a row of its own: "
        "(..., n / tile, tile).",
        "scale = tiles.abs().amax(dim=-1) / 448, and 1 where that is 0: torch.where or masked_fill."
        " It has to be float32.",
        "Divide: (tiles / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(-2) "
        "has x's shape again. Return it and the scale.",
    ],
    difficulty=2,
    importance=5,
    minutes=8,
    lines=5,
    mutants=[
        Mutant("one for all", _one_scale, "One scale for the whole tensor: each tile has its own."),
        Mutant("one number", _one_number, "One scale for the whole tensor: each tile has its own."),
        Mutant("a row", _one_a_row, "One scale for a whole row: every `tile` channels have one."),
        Mutant("a column", _one_a_column, "The largest is sought over the tokens: use dim=-1."),
        Mutant(
            "over tokens", _along_tokens, "Tokens share a scale here: each has scales of its own."
        ),
        Mutant(
            "interleaved", _interleaved, "A tile is `tile` neighbours: unflatten to (-1, tile)."
        ),
        Mutant(
            "inverted",
            _inverted,
            "The scale is inverted: x is x_fp8 * scale, so it is largest / 448.",
        ),
        Mutant(
            "multiplied",
            lambda x, tile=128: tiles_of(x, tile, factor=lambda each, scale: each * scale),
            "x is multiplied by the scale: divide, so that the largest comes to lie on 448.",
        ),
        Mutant(
            "NaN",
            lambda x, tile=128: tiles_of(x, tile, fit=lambda largest: largest / 448),
            "A tile of zeros is divided by 0: give it the scale 1.",
        ),
        Mutant(
            "NaN hidden",
            lambda x, tile=128: tiles_of(
                x, tile, None, 448.0, lambda m: m / 448, lambda each, s: (each / s).nan_to_num()
            ),
            "A tile of zeros has the scale 0: give it 1.",
        ),
        Mutant(
            "floor",
            _floored,
            "The largest is held above 1e-4, which crushes small gradients: only zero is special.",
        ),
        Mutant(
            "integers",
            lambda x, tile=128: tiles_of(x, tile, factor=lambda each, s: (each / s).round()),
            "round() makes integers, INT8's grid: the cast to float8_e4m3fn rounds by itself.",
        ),
        Mutant(
            "no abs",
            lambda x, tile=128: tiles_of(x, tile, lambda each: each.amax(dim=-1)),
            "The largest is taken with its sign: abs() first, or a large negative is cut off.",
        ),
        Mutant(
            "tile ignored", lambda x, tile=128: tiles_of(x), "tile is not used: it is 128 here."
        ),
        Mutant(
            "not divided",
            lambda x, tile=128: tiles_of(x, tile, factor=lambda each, s: each),
            "x is cast as it is: divide it by its tile's scale first.",
        ),
        Mutant(
            "to one",
            lambda x, tile=128: tiles_of(x, tile, full=1.0),
            "The largest comes to lie on 1: lay it on 448, where E4M3 ends.",
        ),
        Mutant(
            "to 127",
            lambda x, tile=128: tiles_of(x, tile, full=127.0),
            "127 is where INT8 ends: E4M3 ends at 448.",
        ),
        Mutant("in BF16", _narrow, "The scale is made in BF16: take x.float() first."),
        Mutant("kept axis", _kept_axis, "The scale has an axis of 1 too many: (..., n / tile)."),
        Mutant("in tiles", _in_tiles, "x_fp8 is still cut in tiles: flatten(-2) at the end."),
    ],
)
