"""Tensors for cases: random, small, and the same at every call."""

import torch


def randn(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple:
    """One random tensor per shape, the same ones for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes)
