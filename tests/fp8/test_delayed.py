"""Delayed scaling: the past decides, and what has grown since is cut off."""

import pytest
import torch

from dsv3_tutorial.fp8.delayed import DelayedScale
from dsv3_tutorial.fp8.quant import QuantizationError, quantize_tensor


def test_the_first_tensor_is_measured_and_the_next_one_takes_its_scale():
    torch.manual_seed(0)
    first, second = torch.randn(50), torch.randn(50) / 10
    delayed = DelayedScale()
    stored, scale = delayed.quantize(first)
    expected, wanted = quantize_tensor(first)
    assert torch.equal(stored.float(), expected.float()) and scale == wanted
    assert delayed.quantize(second)[1] == wanted


def test_a_tensor_that_has_grown_is_cut_off_at_what_was_remembered():
    delayed = DelayedScale()
    delayed.quantize(torch.tensor([1.0, -0.5]))
    stored, scale = delayed.quantize(torch.tensor([4.0, -0.5]))
    assert stored.float()[0] * scale == 1.0
    assert delayed.quantize(torch.tensor([4.0]))[1] == torch.tensor(4.0) / 448


def test_a_margin_leaves_room_to_grow():
    delayed = DelayedScale(margin=2)
    delayed.quantize(torch.tensor([1.0]))
    stored, scale = delayed.quantize(torch.tensor([4.0]))
    assert stored.float() * scale == 4.0


def test_what_is_older_than_the_history_is_forgotten():
    delayed = DelayedScale(history=2)
    for value in (8.0, 1.0, 1.0):
        delayed.quantize(torch.tensor([value]))
    assert delayed.quantize(torch.tensor([1.0]))[1] == torch.tensor(1.0) / 448


def test_no_history_and_no_numbers_are_refused():
    with pytest.raises(ValueError, match="history=0"):
        DelayedScale(history=0)
    with pytest.raises(QuantizationError):
        DelayedScale().quantize(torch.tensor([torch.nan]))
