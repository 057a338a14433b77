"""Triton's interpreter with float conversions as the GPU makes them.

As shipped (Triton 3.6 to 3.9), it truncates float32 to BF16, loses the mantissa's carry and the
subnormals on the way to FP8, and multiplies the bit patterns of BF16 operands in `tl.dot`. PyTorch
rounds all of them right, so its casts are put in their place. Elementwise arithmetic on BF16 stays
wrong: a kernel must go through float32 for it. `tl.fma` rounds twice as shipped, and once here. A
loop bound known at run time only is also mended: it is an array of one element, which numpy makes
no integer of any more.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TYPES = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # torch's side of a view
_as_shipped = interpreter._convert_float
_fma_as_shipped = interpreter.InterpreterBuilder.create_fma
_patch_as_shipped = interpreter._patch_lang_tensor


def install() -> None:
    """Put the corrected conversions in place, for every kernel interpreted from now on."""
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.create_fma = fused
    interpreter._patch_lang_tensor = patch_tensor


def convert(values: np.ndarray, source, target, rounding=None) -> np.ndarray:
    """`values`, bits of type `source`, as unsigned bits of type `target`: to nearest, ties to even.

    FP8 saturates, as the only form of the GPU's instruction does (cvt.rn.satfinite).
    """
    toward_zero = rounding is not None and "RTZ" in str(rounding)
    if source not in TYPES or target not in TYPES or toward_zero:
        return _as_shipped(values, source, target, rounding)
    kind = TYPES[target]
    floats = _tensor(values, TYPES[source])
    if kind.itemsize == 1:
        largest = torch.finfo(kind).max
        floats = floats.to(torch.float32).clamp(-largest, largest)
    bits = floats.to(kind).view(_SIGNED[kind.itemsize]).numpy()
    return bits.view(_UNSIGNED[kind.itemsize]).reshape(values.shape)


def dot(builder, a, b, accumulator, input_precision, max_num_imprecise_acc):
    """`tl.dot`: operands widened to the accumulator's type first, so that products are exact."""
    wide = accumulator.data.dtype
    product = np.matmul(_widened(a, wide), _widened(b, wide))
    return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def fused(builder, x, y, z):
    """`tl.fma` of float32: x * y + z, rounded once.

    The product is exact in float64. The sum is rounded there to the odd neighbour, which float32
    then rounds as it would have rounded the sum itself.
    """
    if z.data.dtype != np.float32:
        return _fma_as_shipped(builder, x, y, z)
    with np.errstate(all="ignore"):  # NaN and infinity go through, as on the GPU
        product, addend = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
        total = product + addend
        back = total - product
        lost = (product - (total - back)) + (addend - back)
        even = total.view(np.int64) & 1 == 0
        nudged = even & (lost != 0) & np.isfinite(lost)
        total = np.where(nudged, np.nextafter(total, lost * np.inf), total)
        return interpreter.TensorHandle(total.astype(np.float32), z.dtype.scalar)


def patch_tensor(tensor, scope) -> None:
    """As shipped, save that a scalar becomes an integer (a loop's bound) under any numpy."""
    _patch_as_shipped(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _widened(handle, wide: np.dtype) -> np.ndarray:
    kind = handle.dtype.scalar
    if kind not in TYPES:
        return handle.data.astype(wide)
    floats = _tensor(handle.data, TYPES[kind]).to(torch.float32).numpy()
    return floats.reshape(handle.data.shape).astype(wide)


def _tensor(values: np.ndarray, kind: torch.dtype) -> torch.Tensor:
    """The same bits as a flat tensor; torch cannot read numpy's unsigned or BF16 arrays."""
    flat = np.array(values, order="C").reshape(-1)  # a copy: torch wants to own what it can write
    return torch.from_numpy(flat.view(f"int{8 * flat.itemsize}")).view(kind)
