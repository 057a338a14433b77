"""PyTorch's own scaled FP8 product behind our signature: the peer that our kernel is held against.

On CUDA it is cuBLAS. Scales for tiles and blocks exist on Hopper alone (from cuBLAS 12.9 on), one a
row or one a tensor from Ada on, and a CPU has one a tensor, slowly: enough for a test. cuBLAS reads
tiles' scales column by column and blocks' scales padded to four along k; ours are copied into that
order, which is 1/32 of the bytes. `problem` says why a product cannot run before it is tried.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.backend import BackendError

STEP = 128
_PRODUCTS = (
    ("tensor", "tensor"),
    ("row", "row"),
    ("tile", "block"),
    ("tile", "tile"),
    ("block", "tile"),
)
_RECIPES = {"tile": "BlockWise1x128", "block": "BlockWise128x128"}


def matmul(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a @ b^T of scaled FP8 matrices by PyTorch: a (m, k), b (n, k), float8_e4m3fn -> (m, n).

    Scales as in `fp8.gemm.matmul`, save that PyTorch has no product of every pair. Sums are kept
    as exactly as the hardware can (no fast accumulation).
    Raises BackendError, with the reason of `problem`, where it has none.
    """
    reason = problem(a, a_scale, b, b_scale)
    if reason is not None:
        raise BackendError(
            f"PyTorch's scaled_mm cannot run this product: {reason}. It was forced, so nothing "
            "else was run in its place. Pass backend=None, 'triton' or 'reference'."
        )
    kinds = _product(a, a_scale, b, b_scale)
    a, b = a.contiguous(), b.contiguous()
    if kinds == ("tensor", "tensor"):
        scales = a_scale.reshape(()), b_scale.reshape(())
        return torch._scaled_mm(a, b.T, *scales, out_dtype=out_dtype)
    if kinds == ("row", "row"):
        rows, columns = a_scale.contiguous(), b_scale.reshape(1, -1).contiguous()
        return torch._scaled_mm(a, b.T, rows, columns, out_dtype=out_dtype)
    recipes = [getattr(F.ScalingType, _RECIPES[kind]) for kind in kinds]
    orders = [{"tile": column_by_column, "block": padded_to_four}[kind] for kind in kinds]
    scales = [order(scale) for order, scale in zip(orders, (a_scale, b_scale), strict=True)]
    return F.scaled_mm(a, b.T, scales[0], recipes[0], scales[1], recipes[1], output_dtype=out_dtype)


def problem(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> str | None:
    """Why PyTorch's scaled_mm cannot run this product, in words; None where it can."""
    kinds = _product(a, a_scale, b, b_scale)
    (m, k), n = a.shape, b.shape[0]
    if kinds is None:
        return (
            f"it has no product of scales {tuple(a_scale.shape)} for a {tuple(a.shape)} with "
            f"scales {tuple(b_scale.shape)} for b {tuple(b.shape)}"
        )
    if k % 16 or n % 16:
        return f"it needs n and k in multiples of 16, and they are {n} and {k}"
    if "tile" in kinds and m % 4:
        return f"with a scale a tile it needs m in multiples of 4, and m is {m}"
    if not a.is_cuda:
        if kinds == ("tensor", "tensor") and a.device.type == "cpu":
            return None
        return f"on {a.device.type!r} it has products with one scale a tensor only"
    return _device_problem(kinds, torch.cuda.get_device_capability(a.device))


def _device_problem(kinds: tuple[str, str], capability: tuple[int, int]) -> str | None:
    have = ".".join(map(str, capability))
    if capability < (8, 9):
        return f"the device has compute capability {have}, and FP8 products exist from 8.9 on"
    if kinds[0] in ("tensor", "row"):
        return None
    if capability[0] != 9:
        return f"scales for tiles and blocks exist on Hopper (9.0) only, and this is {have}"
    if not hasattr(F, "scaled_mm"):
        return f"PyTorch {torch.__version__} has no torch.nn.functional.scaled_mm; 2.11 has"
    built = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if built < (12, 9):
        return f"tiles and blocks need cuBLAS 12.9, and PyTorch was built for {torch.version.cuda}"
    return None


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> tuple[str, str] | None:
    """The first of PyTorch's products that these scales can be read as, or None.

    They may be several things: one a row is one a tile where k is a single tile.
    """
    left, right = _readings(a, a_scale), _readings(b, b_scale)
    return next((kinds for kinds in _PRODUCTS if kinds[0] in left and kinds[1] in right), None)


def _readings(x: Tensor, scale: Tensor) -> set[str]:
    rows, tiles = x.shape[0], math.ceil(x.shape[1] / STEP)
    shapes = {
        "row": (rows, 1),
        "tile": (rows, tiles),
        "block": (math.ceil(rows / STEP), tiles),
    }
    fitting = {kind for kind, shape in shapes.items() if tuple(scale.shape) == shape}
    return fitting | {"tensor"} if scale.numel() == 1 else fitting


def column_by_column(scale: Tensor) -> Tensor:
    """The scales of tiles (m, ceil(k / 128)), with the strides (1, m) that cuBLAS reads."""
    return scale.new_empty(scale.shape[::-1]).copy_(scale.T).T


def padded_to_four(scale: Tensor) -> Tensor:
    """The scales of blocks (ceil(n / 128), ceil(k / 128)) as cuBLAS reads them.

    (ceil(k / 128) up to a multiple of 4, ceil(n / 128)), with the strides (1, that multiple).
    """
    rows, tiles = scale.shape
    whole = scale.new_ones((rows, tiles + -tiles % 4))
    whole[:, :tiles] = scale
    return whole.T
