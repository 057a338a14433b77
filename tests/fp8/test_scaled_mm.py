"""PyTorch's scaled_mm behind our signature: what it is given, and what it cannot run."""

import pytest
import torch
import torch.nn.functional as F

from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.fp8 import scaled_mm

E4M3 = torch.float8_e4m3fn


def operand(rows, k, kind, seed=0):
    made = torch.Generator().manual_seed(seed)
    tiles = -(-k // 128)
    shapes = {"tile": (rows, tiles), "block": (-(-rows // 128), tiles), "row": (rows, 1)}
    codes = (torch.randn(rows, k, generator=made) * 20).clamp(-448, 448).to(E4M3)
    return codes, torch.rand(shapes.get(kind, ()), generator=made) + 0.5


def exact(a, a_scale, b, b_scale):
    return whole(a, a_scale) @ whole(b, b_scale).T


def whole(x, scale):
    """x times its scales in float64, each value's own looked up."""
    (rows, k), scale = x.shape, scale.cpu().double()
    scale = scale.reshape(1, 1) if scale.ndim == 0 else scale
    i, j = torch.arange(rows)[:, None], torch.arange(k)[None, :] // 128
    i = i if scale.shape[0] == rows else i // 128
    own = scale[i.clamp_max(scale.shape[0] - 1), j.clamp_max(scale.shape[1] - 1)]
    return x.cpu().double() * own


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_one_scale_a_tensor_runs_on_a_cpu_and_is_the_product(out_dtype):
    inputs = [*operand(12, 64, "tensor", 1), *operand(32, 64, "tensor", 2)]
    found = scaled_mm.matmul(*inputs, out_dtype)
    assert found.dtype == out_dtype
    tolerance = 1e-5 if out_dtype == torch.float32 else 8e-3
    wanted = exact(*inputs)
    assert ((found.double() - wanted).abs() <= tolerance * wanted.abs() + 1e-2).all()


def as_read(x, scale, recipe, rows):
    """x with its scales as cuBLAS 12.9 reads them from memory, the layout it demands checked."""
    tiles = -(-x.shape[1] // 128)
    four = -(-tiles // 4) * 4
    if recipe == F.ScalingType.BlockWise1x128:
        assert scale.shape == (rows, tiles) and scale.stride() == (1, rows)
        return whole(x, torch.as_strided(scale, (rows, tiles), (1, rows)))
    assert recipe == F.ScalingType.BlockWise128x128
    blocks = -(-rows // 128)
    assert scale.shape == (four, blocks) and scale.stride() == (1, four)
    return whole(x, torch.as_strided(scale, (blocks, tiles), (four, 1)))


@pytest.mark.parametrize("k", [256, 384, 640])
@pytest.mark.parametrize("kinds", [("tile", "block"), ("tile", "tile"), ("block", "tile")])
def test_tiles_and_blocks_reach_cublas_in_the_order_it_reads(monkeypatch, kinds, k):
    def read(a, b_across, a_scale, a_recipe, b_scale, b_recipe, output_dtype):
        assert a.stride() == (k, 1) and b_across.stride() == (1, k)
        left = as_read(a, a_scale, a_recipe, len(a))
        right = as_read(b_across.T, b_scale, b_recipe, b_across.shape[1])
        return (left @ right.T).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", read)
    monkeypatch.setattr(scaled_mm, "problem", lambda *inputs: None)
    inputs = [*operand(256, k, kinds[0], 1), *operand(384, k, kinds[1], 2)]
    found = scaled_mm.matmul(*inputs, torch.float64)
    assert torch.equal(found, exact(*inputs))


def test_the_order_holds_for_one_tile_one_row_and_a_view():
    for shape in ((1, 1), (1, 3), (5, 1), (5, 3)):
        scale = torch.rand(shape)
        for given in (scale, scale.T.contiguous().T, torch.stack([scale, scale])[0]):
            columns = scaled_mm.column_by_column(given)
            assert torch.equal(columns, scale)
            assert columns.stride(1) in (shape[0], 1) and columns.stride(0) == 1
            padded = scaled_mm.padded_to_four(given)
            assert padded.shape == (4, shape[0]) and torch.equal(padded[: shape[1]].T, scale)
            assert padded.stride(0) == 1 and padded.stride(1) == 4


REFUSED = {
    "a tile against a tensor": ((16, 256, "tile"), (32, 256, "tensor"), "no product of scales"),
    "blocks against blocks": ((256, 256, "block"), (256, 256, "block"), "no product of scales"),
    "n that is odd": ((16, 64, "tensor"), (33, 64, "tensor"), "multiples of 16"),
    "k that is odd": ((16, 72, "tensor"), (32, 72, "tensor"), "multiples of 16"),
    "m that is odd": ((6, 256, "tile"), (32, 256, "block"), "m in multiples of 4, and m is 6"),
    "tiles on a CPU": ((16, 256, "tile"), (32, 256, "block"), "on 'cpu'"),
    "rows on a CPU": ((16, 256, "row"), (32, 256, "row"), "on 'cpu'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_run_is_refused_with_the_reason(case):
    a, b, reason = REFUSED[case]
    inputs = [*operand(*a), *operand(*b)]
    assert reason in scaled_mm.problem(*inputs)
    with pytest.raises(BackendError, match=r"(?s)cannot run this product: .*\. It was forced, so"):
        scaled_mm.matmul(*inputs)


def test_each_device_is_told_what_it_lacks(monkeypatch):
    tell = scaled_mm._device_problem
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "8.0, and FP8 products exist from 8.9" in tell(("tensor", "tensor"), (8, 0))
    assert tell(("tensor", "tensor"), (8, 9)) is None and tell(("row", "row"), (10, 0)) is None
    for capability in ((8, 9), (10, 0), (12, 0)):
        assert "Hopper (9.0) only" in tell(("tile", "block"), capability)
    assert tell(("tile", "block"), (9, 0)) is None
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "cuBLAS 12.9" in tell(("tile", "block"), (9, 0))
    monkeypatch.delattr(F, "scaled_mm")
    assert "has no torch.nn.functional.scaled_mm" in tell(("tile", "tile"), (9, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", scaled_mm._PRODUCTS)
def test_on_a_gpu_every_product_is_the_exact_one(kinds):
    inputs = [*operand(256, 640, kinds[0], 1), *operand(384, 640, kinds[1], 2)]
    inputs = [t.cuda() for t in inputs]
    reason = scaled_mm.problem(*inputs)
    if reason is not None:
        pytest.skip(reason)
    found, wanted = scaled_mm.matmul(*inputs, torch.bfloat16).cpu().double(), exact(*inputs)
    terms = whole(*inputs[:2]).abs() @ whole(*inputs[2:]).abs().T
    assert ((found - wanted).abs() <= wanted.abs() * 2**-8 + terms * 2**-11).all()
