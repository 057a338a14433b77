"""What eight bits and a scale are refused for, before anything is stored."""

from numbers import Integral

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # below it a quotient of tiny numbers would lose its digits
MOST = torch.finfo(torch.float32).max / 448  # above it 448 scales are beyond float32


class QuantizationError(ValueError):
    """Numbers that eight bits and a scale cannot hold, or that are no such numbers."""


def check_real(x: Tensor, least: int, checked: bool = False) -> None:
    """Refuses what is no vector (least = 1) or matrix (2) of real numbers, or a stack of them.

    `checked` refuses NaN and infinity too, as float32 sees them: a pass over x, and on a GPU a
    wait. FP8 is refused: its codes would be rounded again as if they were the numbers.
    """
    real = x.is_floating_point() and x.dtype.itemsize > 1
    if x.ndim < least or not real or 0 in x.shape[-least:]:
        wanted = ("", "vector, or a stack of them", "matrix, or a stack of them")[least]
        raise QuantizationError(
            f"{x.dtype} of shape {tuple(x.shape)} cannot be cut into parts of real numbers with a "
            "scale each. What came out would stand for something else. "
            f"Give a floating-point {wanted}, in 16 bits or more; codes in FP8 dequantized first."
        )
    if checked and not (x.float() if x.dtype == torch.float64 else x).isfinite().all():
        raise QuantizationError(
            "The tensor holds NaN or infinity, or a float64 beyond float32. One such value would "
            "decide the scale of its whole tile or block. Find the step that made it before "
            "storing anything."
        )


def check_part(*sides: int) -> None:
    """Refuses a tile or block whose sides are not whole numbers of at least 1."""
    if all(isinstance(s, Integral) and not isinstance(s, bool) and s >= 1 for s in sides):
        return
    raise QuantizationError(
        f"A tile or block of {' x '.join(map(repr, sides))} values holds no whole number of them: "
        "nothing would share its scale. Give whole numbers of at least 1; the paper takes 128."
    )


def check_scale(scale: float | Tensor, checked: bool = True) -> None:
    """Refuses a scale that is not one positive number which 448 can be multiplied with.

    A tensor's value is read only if `checked`: on a GPU that waits for it.
    """
    single = not isinstance(scale, Tensor) or scale.ndim == 0
    if single and isinstance(scale, Tensor):
        fits = not checked or TINY <= scale.item() <= MOST
    else:
        fits = single and TINY <= scale <= MOST
    if not fits:
        what = scale if single else f"a tensor of shape {tuple(scale.shape)}"
        raise QuantizationError(
            f"scale={what}: one number from 2^-126 to 7.5e35 can be the scale of a whole tensor. "
            "Divided by this one the values would be lost, or could not come back. Give such a "
            "number, or a float32 tensor of shape (), or leave it out to have it measured."
        )


def check_scales(stored: Tensor, scale: Tensor, wanted: tuple[int, ...], parts: str) -> None:
    """Refuses stored values whose scales are not of the shape `wanted`, one a part."""
    if stored.dtype != torch.float8_e4m3fn or tuple(scale.shape) != wanted:
        raise QuantizationError(
            f"{stored.dtype} {tuple(stored.shape)} with scales {tuple(scale.shape)} are not "
            f"{parts}: values would get another one's scale. "
            f"Give float8_e4m3fn and scales of shape {wanted}."
        )
