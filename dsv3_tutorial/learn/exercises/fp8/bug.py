"""A linear layer in FP8 with the field's bugs in it."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

E4M3 = torch.float8_e4m3fn
BUGS = {
    "inverse": "the stored values are multiplied by the factor again; on the way back they are "
    "divided by it",
    "zero": "a tile of zeros is divided by zero and turns all it touches into NaN",
    "round": "round() makes integers, which is INT8's grid; E4M3 keeps small values finer",
}


def _codes(scaled: Tensor, cast: str) -> Tensor:
    bounded = scaled.clamp(-448.0, 448.0)
    return bounded.round() if cast == "integers" else bounded.to(E4M3).float()


def buggy(
    *kept: str, factor=None, largest=None, cast: str = "e4m3", full: float = 448.0, mend=None
):
    """`quantized_linear` with some of BUGS left in."""
    largest = largest or (lambda tiles: tiles.abs().amax(dim=-1, keepdim=True))
    cast = "integers" if "round" in kept else cast

    def linear(x: Tensor, w: Tensor, tile: int = 128) -> Tensor:
        restored = []
        for operand in (x, w):
            tiles = operand.float().unflatten(-1, (-1, tile))
            most = largest(tiles)
            times = factor(most) if factor else full / most
            if "zero" not in kept and factor is None:
                times = times.masked_fill(most == 0, 1.0)
            codes = _codes(tiles * times, cast)
            back = codes * times if "inverse" in kept else codes / times
            restored.append((mend(back) if mend else back).flatten(-2))
        return restored[0] @ restored[1].T

    return linear


def _hidden_nan(x, w, tile=128):
    return buggy("zero")(x, w, tile).nan_to_num()


def _only_x(x, w, tile=128):
    identity = buggy()(x, torch.eye(x.shape[-1]), tile)  # x rounded
    return identity @ w.float().T


def _not_rounded(x, w, tile=128):
    return x.float() @ w.float().T


def _tile_ignored(x, w, tile=128):
    return buggy()(x, w)


def _whole(tiles: Tensor) -> Tensor:
    return tiles.abs().amax().expand(*tiles.shape[:-1], 1)


def _remaining(kept: tuple[str, ...]) -> Mutant:
    left = {3: "All three bugs are left.", 2: "Two bugs are left."}
    message = left.get(len(kept)) or f"One bug is left: {BUGS[kept[0]]}."
    return Mutant(" and ".join(kept), buggy(*kept), message)


def _layer(seed: int, m: int, n: int, k: int, *tile: int, size: float = 1.0, zero=None, dtype=None):
    def make() -> tuple:
        x, w = randn(seed, (m, k), (n, k))
        if zero is not None:
            x[zero], w[0, : tile[0] if tile else 128] = 0.0, 0.0
        x, w = ((t * s).to(dtype or torch.float32) for t, s in ((x, size), (w, 0.06)))
        return x, w, *tile

    return make


def _broken() -> tuple[Tensor, Tensor]:
    x, w = _layer(7, 3, 4, 256)()
    x[1, 70] = torch.nan
    return x, w


FIND_THE_BUG = Exercise(
    name="fp8.find_the_bug",
    reference="dsv3_tutorial.fp8.errors:quantized_linear",
    cases=[
        Case("4 tokens", _layer(0, 4, 3, 256)),
        Case("a token of zeros", _layer(1, 4, 3, 256, zero=2)),
        Case("tiles of 32", _layer(2, 5, 2, 96, 32)),
        Case("inputs of 1e-9", _layer(3, 2, 5, 128, size=1e-9)),
        Case("NaN comes in", _broken),
        Case("zeros in tiles of 16", _layer(4, 3, 6, 48, 16, zero=(1, slice(0, 16))), hidden=True),
        Case("BF16, large", _layer(5, 3, 4, 384, size=900.0, dtype=torch.bfloat16), hidden=True),
        Case("one token", _layer(6, 1, 8, 640, 128), hidden=True),
    ],
    hints=[
        "Follow one number there and back: multiplied by what, and then?",
        "What is the factor of a tile in which every value is zero?",
        "Which numbers between 1 and 2 does the code keep, and which does E4M3? "
        ".to(torch.float8_e4m3fn) rounds to its grid.",
    ],
    difficulty=3,
    importance=5,
    minutes=10,
    lines=3,
    mutants=[
        _remaining(("inverse", "zero", "round")),
        *(_remaining(pair) for pair in (("inverse", "zero"), ("inverse", "round"))),
        _remaining(("zero", "round")),
        *(_remaining((bug,)) for bug in BUGS),
        Mutant(
            "NaN hidden",
            _hidden_nan,
            "NaN is hidden in the result: the token's other tiles are lost with it.",
        ),
        Mutant(
            "NaN replaced",
            buggy("zero", mend=torch.nan_to_num),
            "NaN that comes in is replaced: keep it, and give only a tile of zeros another factor.",
        ),
        Mutant(
            "factor held",
            buggy(factor=lambda most: 448.0 / most.clamp_min(1e-4)),
            "The largest is held above 1e-4, which crushes small inputs: only zero is special.",
        ),
        Mutant("no rounding", _not_rounded, "Nothing is rounded any more: FP8 has to stay in."),
        Mutant("only x", _only_x, "w is not rounded any more: both operands are in FP8."),
        Mutant(
            "one for all",
            buggy(largest=_whole),
            "One factor for the whole tensor: each tile has its own.",
        ),
        Mutant("tile ignored", _tile_ignored, "tile is not used any more."),
        Mutant("to one", buggy(full=1.0), "The largest comes to lie on 1: lay it on 448."),
    ],
)
