"""What is refused before anything is stored: parts, numbers and scales that cannot be."""

import math

import pytest
import torch

from dsv3_tutorial.fp8 import quant
from dsv3_tutorial.fp8.quant import QuantizationError


@pytest.mark.parametrize("tile", [0, -1, 2.5, True])
def test_a_tile_of_no_whole_number_of_values_is_refused_both_ways(tile):
    stored, scale = quant.quantize_tiles(torch.ones(4, 256))
    with pytest.raises(QuantizationError, match=r"holds no whole number.*nothing would.*Give"):
        quant.quantize_tiles(torch.ones(4, 256), tile=tile)
    with pytest.raises(QuantizationError, match="holds no whole number"):
        quant.dequantize_tiles(stored, scale, tile=tile)


@pytest.mark.parametrize("cast", [quant.quantize_tiles, quant.quantize_rows, quant.quantize_tensor])
def test_a_finite_float64_beyond_float32_is_refused_as_infinity_is(cast):
    x = torch.ones(2, 128, dtype=torch.float64)
    x[1, 3] = 1e300
    with pytest.raises(QuantizationError, match="a float64 beyond float32"):
        cast(x)
    x[1, 3] = torch.finfo(torch.float32).max  # the last that fits
    assert cast(x)[0].float().isfinite().all()


@pytest.mark.parametrize(
    "scale",
    [0, -1, 0.0, -2.0, math.nan, math.inf, 1e-60, 1e300, torch.ones(2), torch.ones(1)],
    ids=str,
)
def test_a_scale_from_outside_that_is_no_positive_number_is_refused(scale):
    with pytest.raises(QuantizationError, match=r"^scale=.*would be lost.*Give such a number"):
        quant.quantize_tensor(torch.ones(4), scale=scale)
    with pytest.raises(QuantizationError, match=r"^scale="):
        quant.quantize_tensor(torch.ones(4), scale=scale, checked=False)


def test_a_tensor_s_scale_is_read_only_where_it_is_to_be_checked():
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(QuantizationError, match=r"^scale="):
            quant.quantize_tensor(torch.ones(4), scale=torch.tensor(bad))

    class Unread(torch.Tensor):
        def item(self):
            raise AssertionError("read")

    unread = torch.tensor(2.0).as_subclass(Unread)
    stored, scale = quant.quantize_tensor(torch.ones(4), scale=unread, checked=False)
    assert stored.float().tolist() == [0.5] * 4 and scale == 2.0
