"""The correction of Triton's interpreter is itself right: bit for bit PyTorch's casts."""

import numpy as np
import pytest
import torch

TARGETS = ["float8e4nv", "float8e5", "bfloat16", "float16"]
KINDS = {
    "float8e4nv": torch.float8_e4m3fn,
    "float8e5": torch.float8_e5m2,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _signed(kind):
    return {1: torch.int8, 2: torch.int16}[kind.itemsize]


def _hard_values(kind):
    """float32 values where rounding goes wrong: ties and their neighbours, subnormals, carries."""
    codes = torch.arange(2 ** (8 * kind.itemsize), dtype=torch.int32).to(_signed(kind)).view(kind)
    exact = codes.float()
    exact = exact[exact.isfinite()].sort().values.unique()
    ties = (
        exact[1:] + exact[:-1]
    ) / 2  # exact in float32: no format here has over 10 mantissa bits
    near = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-torch.inf, torch.inf)]
    return torch.cat([exact, ties, *near])


def _convert(triton_interpreter, values, target):
    import triton.language as tl

    bits = triton_interpreter.convert(values.numpy(), tl.float32, getattr(tl, target))
    return torch.from_numpy(bits.view(f"int{8 * bits.itemsize}")).view(KINDS[target])


def _same(a, b):
    return torch.equal(a.view(_signed(a.dtype)), b.view(_signed(b.dtype)))


@pytest.mark.parametrize("target", TARGETS)
def test_every_tie_subnormal_and_carry_is_rounded_as_torch_rounds_it(triton_interpreter, target):
    values = _hard_values(KINDS[target])
    assert _same(_convert(triton_interpreter, values, target), values.to(KINDS[target]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_random_values_are_rounded_as_torch_rounds_them(triton_interpreter, target, scale):
    values = (torch.randn(4096) * scale).clamp(-448, 448)
    assert _same(_convert(triton_interpreter, values, target), values.to(KINDS[target]))


def test_rounding_ties_go_to_the_even_neighbour_and_carry_into_the_exponent(triton_interpreter):
    values = torch.tensor([7.75, 7.94, 31.8, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10])
    expected = [8.0, 8.0, 32.0, 16.0, 20.0, 0.0, 2.0**-8]
    assert _convert(triton_interpreter, values, "float8e4nv").float().tolist() == expected


def test_fp8_saturates_and_keeps_nan(triton_interpreter):
    values = torch.tensor([465.0, -1e6, torch.inf, torch.nan])
    codes = _convert(triton_interpreter, values, "float8e4nv").float()
    assert codes[:3].tolist() == [448.0, -448.0, 448.0] and codes[3].isnan()
    codes = _convert(triton_interpreter, values, "float8e5").float()
    assert codes[1:3].tolist() == [-57344.0, 57344.0] and codes[3].isnan()


@pytest.mark.parametrize("source", TARGETS)
def test_widening_is_exact_for_every_code(triton_interpreter, source):
    import triton.language as tl

    kind = KINDS[source]
    codes = torch.arange(2 ** (8 * kind.itemsize), dtype=torch.int32).to(_signed(kind))
    unsigned = codes.numpy().view(f"uint{8 * kind.itemsize}")
    wide = triton_interpreter.convert(unsigned, getattr(tl, source), tl.float32).view(np.float32)
    torch.testing.assert_close(
        torch.from_numpy(wide), codes.view(kind).float(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_kernel_casts_and_multiplies_like_torch(triton_interpreter, kind):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a_ptr, b_ptr, out_ptr, SIDE: tl.constexpr):
        i = tl.arange(0, SIDE)
        place = i[:, None] * SIDE + i[None, :]
        a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
        tl.store(out_ptr + place, tl.dot(a, b))

    a, b = (torch.randn(32, 32).to(kind) for _ in range(2))
    out = torch.empty(32, 32)
    kernel[(1,)](a, b, out, SIDE=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_a_float32_store_to_bf16_is_rounded_to_nearest(triton_interpreter):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))

    x = torch.randn(1024)
    out = torch.empty(1024, dtype=torch.bfloat16)
    kernel[(1,)](x, out, SIZE=1024)
    assert torch.equal(out, x.to(torch.bfloat16))
