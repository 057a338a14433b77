"""Saying in one line how a result differs from the expected one, in the order a learner can use.

Type, then shape, dtype, finite, values. Nothing here imports torch: it asks whether torch is
loaded, and without it no result is a tensor.
"""

import math
import numbers
import sys
from collections.abc import Mapping
from typing import Any

# Largest error relative to the answer's largest number: a little above what the format rounds away.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}
FLOAT8_STEP = 0.125  # E4M3 has 3 mantissa bits: each element may be one step off


def difference(
    got: Any, expected: Any, tolerance: float | None = None, spoil: bool = True
) -> str | None:
    """What is wrong with got, or None if it is right. spoil=False keeps expected numbers secret.

    A tensor without axes counts as the number in it, to its own dtype's precision.
    """
    if _is_number(expected) and _is_tensor(got) and got.ndim == 0:
        if got.is_floating_point():
            tolerance = max(tolerance or 0.0, TOLERANCE.get(_dtype(got), 1e-5))
        got = got.item()
    wrong = _kind_difference(got, expected)
    if wrong:
        return wrong
    if _is_tensor(expected):
        return _tensor_difference(got, expected, tolerance)
    if isinstance(expected, Mapping):
        return _mapping_difference(got, expected, tolerance, spoil)
    if isinstance(expected, tuple | list):
        return _sequence_difference(got, expected, tolerance, spoil)
    if _is_number(expected):
        return _number_difference(got, expected, tolerance, spoil)
    if got == expected:
        return None
    secret = not spoil or not isinstance(expected, str | bool)
    return "it is not the expected value" if secret else f"returned {got!r}, expected {expected!r}"


def describe(value: Any) -> str:
    """A value's kind in a few words: 'a tensor of shape (2, 4)', 'a number', 'None'."""
    if value is None:
        return "None"
    if _is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, bool):
        return "a bool"
    if _is_number(value):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) and not isinstance(value, bool)


def _kind_difference(got: Any, expected: Any) -> str | None:
    kinds = (
        *(_is_tensor, lambda v: isinstance(v, bool), _is_number, lambda v: isinstance(v, str)),
        *(lambda v: isinstance(v, Mapping), lambda v: isinstance(v, tuple | list)),
    )
    kind = next((k for k in kinds if k(expected)), lambda v: type(v) is type(expected))
    if kind(got):
        return None
    advice = ""
    if got is None:
        advice = " (is there a return?)"
    elif type(got).__name__ in ("generator", "coroutine"):
        advice = " (use return, not yield, and def, not async def)"
    elif got is ...:
        advice = " (is a ... left in the code?)"
    return f"returned {describe(got)}, expected {describe(expected)}{advice}"


def _tensor_difference(got: Any, expected: Any, tolerance: float | None) -> str | None:
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.dtype != expected.dtype:
        return f"dtype {_dtype(got)}, expected {_dtype(expected)}"
    if not (expected.is_floating_point() or expected.is_complex()):
        different = int((got.cpu() != expected.cpu()).sum())
        return (different and f"{different} of {expected.numel()} values differ") or None
    return _float_difference(got, expected, _tolerance(expected, tolerance))


def _float_difference(got: Any, expected: Any, tolerance: float) -> str | None:
    import torch

    step_each = expected.dtype.itemsize == 1
    wide = torch.complex128 if expected.is_complex() else torch.float64
    got, expected = got.detach().cpu().to(wide), expected.detach().cpu().to(wide)
    bad = ~got.isfinite() & expected.isfinite()
    if bad.any():
        return f"NaN or infinity in {int(bad.sum())} of {bad.numel()} places"
    finite = expected.isfinite()
    # Where the answer itself is -inf (a mask) or NaN, the result must be the very same.
    same = (got == expected) | (got.isnan() & expected.isnan())
    error = torch.where(finite, (got - expected).abs(), 0.0)
    size = torch.where(finite, expected.abs(), 0.0)
    allowed = tolerance * (size if step_each else size.max() if size.numel() else 0.0)
    if (finite | same).all() and (error <= allowed).all():
        return None
    if not (finite | same).all():
        return f"infinity or NaN is missing in {int((~finite & ~same).sum())} places"
    if tolerance and error.max() < 100 * tolerance * size.max():
        return f"values differ by up to {float(error.max()):.1e}, more than rounding explains"
    return f"values differ by up to {float(error.max()):.2g}"


def _tolerance(expected: Any, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    if expected.dtype.itemsize == 1:
        return FLOAT8_STEP
    return TOLERANCE.get(_dtype(expected), 1e-5)


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _number_difference(got: Any, expected: Any, tolerance: float | None, spoil: bool) -> str | None:
    exact = isinstance(expected, numbers.Integral) and tolerance is None
    allowed = 0.0 if exact else (tolerance or TOLERANCE["float64"])
    got_bad = isinstance(got, numbers.Real) and not math.isfinite(got)
    if got == expected or (got != got and expected != expected):
        return None
    if not got_bad and abs(got - expected) <= allowed * abs(expected):
        return None
    if got_bad:
        return f"returned {got}, expected a finite number"
    if not spoil:
        return "the number differs"
    return "returned {}, expected {}".format(*_apart(got, expected))


def _apart(got: Any, expected: Any) -> tuple[str, str]:
    """Both numbers in 6 digits, or in as many more as it takes until they print differently."""
    written = ("", "")
    for digits in range(6, 18):
        written = _short(got, digits), _short(expected, digits)
        if written[0] != written[1]:
            break
    return written


def _short(number: Any, digits: int) -> str:
    if isinstance(number, numbers.Integral):
        return f"{int(number)}"
    return f"{number:.{digits}g}"


def _mapping_difference(
    got: Any, expected: Mapping, tolerance: float | None, spoil: bool
) -> str | None:
    if set(got) != set(expected):
        names = ", ".join(map(repr, sorted(expected, key=str)))
        return f"the keys differ, expected {names}"
    for key in expected:
        if wrong := difference(got[key], expected[key], tolerance, spoil):
            return f"{key!r}: {wrong}"
    return None


def _sequence_difference(
    got: Any, expected: Any, tolerance: float | None, spoil: bool
) -> str | None:
    if len(got) != len(expected):
        return f"returned {describe(got)}, expected {describe(expected)}"
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        if wrong := difference(one, other, tolerance, spoil):
            return f"item {index} of the result: {wrong}"
    return None
