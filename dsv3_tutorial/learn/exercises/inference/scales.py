"""Eight-bit weights: a scale for each output."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.attempt import first_line
from dsv3_tutorial.learn.compare import difference
from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _weight(seed: int, m: int, k: int, dtype: torch.dtype = torch.float32):
    """A weight whose rows are of very different sizes."""

    def make() -> tuple[Tensor]:
        weight, size = randn(seed, (m, k), (m, 1))
        return ((weight * torch.exp2(3 * size)).to(dtype),)

    return make


def _ties() -> tuple:  # both scales are exactly 1, then exactly 1/2
    halves = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.4, -0.6]
    return (torch.tensor([halves, [each / 2 for each in halves]]),)


def _zeros_and_dust() -> tuple:
    weight = randn(2, (4, 6))[0]
    weight[1], weight[3] = 0.0, weight[3] * 1e-20  # below every usual floor, and no denormal
    return (weight,)


def _one_sided() -> tuple:
    weight = randn(3, (3, 8))[0].abs() + 0.5
    weight[0, 2], weight[1, 5], weight[2] = -9.0, 7.0, -weight[2]
    return (weight,)


def _open(
    largest=lambda rows: rows.abs().amax(dim=-1, keepdim=True),
    levels: float = 127.0,
    near=torch.round,
    safe=lambda scale: scale.masked_fill(scale == 0, 1.0),
    wide=lambda weight: weight.float(),
    store=lambda codes: codes.clamp(-127, 127).to(torch.int8),
    give=lambda scale: scale.float().flatten(),
):
    """`quantize_int8` with its parts open to be got wrong."""

    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = wide(weight)
        scale = safe((largest(rows) / levels).expand(len(rows), 1))
        return store(near(rows / scale)), give(scale)

    return quantize


def _per_column(weight):
    scale = (weight.float().abs().amax(dim=0) / 127).clamp_min(1e-30)
    return (weight.float() / scale).round().to(torch.int8), scale


def _one_scale(weight):
    codes, scale = _open(lambda rows: rows.abs().amax().view(1, 1))(weight)
    return codes, scale[0]


def _with_zero_point(weight):
    low, high = weight.float().aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 255).clamp_min(1e-30)
    codes = ((weight.float() - low) / scale).round() - 128
    return codes.to(torch.int8), scale.flatten()


def _upside_down(weight):
    codes, scale = _open()(weight)
    return codes, 1 / scale


def _narrow_quotient(levels: int):
    """The scale in float32, but the division in the weight's dtype, which can give 128."""

    def quantize(weight):
        scale = _open()(weight)[1]
        quotient = weight / scale[:, None].to(weight.dtype)
        return quotient.round().clamp(-levels, levels).to(torch.int8), scale

    return quantize


def _narrow_scale(weight):
    """A scale that the weight's dtype has rounded."""
    scale = _open()(weight)[1].to(weight.dtype).float()
    codes = (weight.float() / scale[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


_IN_BF16 = {
    "all": _open(wide=lambda weight: weight),
    "given so": _open(wide=lambda weight: weight, give=lambda scale: scale.flatten()),
    "the quotient": _narrow_quotient(127),
    "the quotient, wrapped": _narrow_quotient(128),
    "the scale": _narrow_scale,
}


def _half_away(quotient: Tensor) -> Tensor:
    return quotient.sign() * (quotient.abs() + 0.5).floor()


def _row_of_zeros_is_free(got: tuple, expected: tuple) -> str | None:
    """A row of zeros has codes of 0; whatever scale above 0 it has, nothing is changed by it."""
    wrong = difference(got, expected)
    if len(got) != 2 or difference(got[0], expected[0]) or not isinstance(got[1], Tensor):
        return wrong
    (codes, scale), (_, right) = got, expected
    if scale.shape != right.shape or scale.dtype != right.dtype or codes.ndim != 2:
        return wrong
    free = (codes == 0).all(dim=-1) & scale.isfinite() & (scale > 0)
    return difference((codes, torch.where(free, right, scale)), expected)


def _not_beside_rows(error: BaseException, arguments: tuple) -> str | None:
    """After sizes that do not fit: where a scale stands."""
    if "size" in first_line(error):
        return "There is a scale for each row, (m,): as scale[:, None] it stands beside its row."
    return None


QUANTIZE_INT8 = Exercise(
    name="inference.quantize_int8",
    reference="dsv3_tutorial.weights.formats:quantize_int8",
    cases=[
        Case("rows of all sizes", _weight(0, 5, 8)),
        Case("a square weight", _weight(1, 6, 6)),
        Case("halfway between two codes", _ties),
        Case("a row of zeros and a tiny one", _zeros_and_dust),
        Case("BF16", _weight(8, 4, 16, torch.bfloat16)),
        Case("one sign", _one_sided, hidden=True),
        Case("one output", _weight(5, 1, 40), hidden=True),
        Case("one input", _weight(6, 7, 1), hidden=True),
        Case("BF16, larger", _weight(7, 9, 65, torch.bfloat16), hidden=True),
        Case("all zero", lambda: (torch.zeros(2, 3),), hidden=True),
    ],
    hints=[
        "The scale of a row is what one code is worth: weight.float().abs().amax(dim=-1) / 127.",
        "A row of zeros would divide by 0: scale = torch.where(scale == 0, 1.0, scale).",
        "(weight.float() / scale[:, None]).round().to(torch.int8), and the scale as float32 (m,).",
    ],
    difficulty=2,
    importance=5,
    minutes=7,
    lines=4,
    mutants=[
        Mutant(
            "one scale, m times",
            _open(lambda rows: rows.abs().amax().view(1, 1)),
            "All rows have the scale of the largest weight: each output gets its own.",
        ),
        Mutant("one scale", _one_scale, "This is one scale for the whole matrix: return (m,)."),
        Mutant(
            "per column",
            _per_column,
            "The scale belongs to a column here, an input: it could not be taken out of the sum. "
            "An output is a row.",
        ),
        Mutant("cut off", _open(near=torch.trunc), "Digits are cut off: round before .to(int8)."),
        Mutant("floor", _open(near=torch.floor), "floor always rounds down: round."),
        Mutant("half away", _open(near=_half_away), "Halfway goes to the even code: torch.round."),
        Mutant(
            "128",
            _open(levels=128.0, store=lambda codes: codes.to(torch.int8)),
            "The largest weight becomes 128, which int8 does not have: it wraps to -128.",
        ),
        Mutant(
            "128, clamped",
            _open(levels=128.0),
            "With amax / 128 the largest weight does not fit and is cut to 127: divide by 127.",
        ),
        Mutant("255", _open(levels=255.0), "255 counts both signs: one side has 127 codes."),
        Mutant(
            "255, wrapped",
            _open(levels=255.0, store=lambda codes: codes.to(torch.int8)),
            "255 counts both signs: one side has 127 codes.",
        ),
        Mutant(
            "no sign",
            _open(lambda rows: rows.amax(dim=-1, keepdim=True).abs()),
            "The largest weight may be negative: take abs() before the maximum.",
        ),
        Mutant(
            "zero point",
            _with_zero_point,
            "The codes run from the row's lowest to its highest: symmetric means that 0 stays 0.",
        ),
        Mutant(
            "zero row",
            _open(safe=lambda scale: scale),
            "A row of zeros has the scale 0 here, and 0 / 0 is NaN: give it any scale above 0.",
        ),
        *(
            Mutant(
                f"a floor of {floor:.2g}",
                _open(safe=lambda scale, floor=floor: scale.clamp_min(floor)),
                "Very small rows exist, and a floor above their scale makes it wrong: change a "
                "scale of 0 only.",
            )
            for floor in (1e-5, 1e-8, 1e-12, torch.finfo(torch.float32).eps)
        ),
        Mutant(
            "something added",
            _open(safe=lambda scale: scale + 1e-8),
            "What is added to the scale changes small rows: replace a scale of 0 only.",
        ),
        Mutant("upside down", _upside_down, "The scale is upside down: weight = code * scale."),
        *(
            Mutant(
                f"in the weight's dtype, {name}",
                function,
                "BF16 has 8 binary digits, too few for weight / scale: divide and round in "
                "float32.",
            )
            for name, function in _IN_BF16.items()
        ),
        Mutant(
            "scale in BF16",
            _open(give=lambda scale: scale.bfloat16().float().flatten()),
            "The scale has passed through BF16: keep it in float32.",
        ),
        Mutant("numbers", _open(store=lambda codes: codes), "The codes are not int8 yet."),
        Mutant("bytes", _open(store=lambda codes: codes.to(torch.uint8)), "uint8 has no signs."),
        Mutant(
            "a column of scales", _open(give=lambda scale: scale), "Return scale (m,), not (m, 1)."
        ),
    ],
    compare=_row_of_zeros_is_free,
    raised=_not_beside_rows,
)
