"""The FP8 kernels with the blocks that are launched compile well, for an H100 and for an L4."""

import pytest

from dsv3_tutorial.fp8.gemm_blocks import FEW_TOKENS, OWN_SCALES, SHARED_SCALES, WITHOUT_TMA

pytestmark = pytest.mark.slow
QUANT = "dsv3_tutorial.fp8.triton_quant_kernels"
GEMM = "dsv3_tutorial.fp8.triton_gemm_kernels"
SHARED_LIMIT = {90: 232_448, 89: 101_376}  # bytes of shared memory a program may take
REGISTER_FILE = 65_536  # registers of one SM
SIZES = ["n_rows", "n_columns", "n_sum", "stride_left", "stride_right", "stride_split"]
SIZES += ["stride_left_row", "stride_right_row"]


def _tiles(kind, pow2=False, tile=128, even=True, across=False):
    pointers = {"x_ptr": f"*{kind}", "stored_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    return {
        "module": QUANT,
        "kernel": "tiles_kernel",
        "signature": pointers | dict.fromkeys(["n_rows", "n", "tiles_per_row"], "i32"),
        "constexprs": {"TILE": tile, "BLOCK": tile, "TILES": 64 if across else max(1, 4096 // tile)}
        | {"EVEN": even, "POW2": pow2, "ACROSS": across},
        "divisible": [*pointers, "n", "n_rows"],
        "num_warps": 4 if tile <= 4096 else 8,
        "num_stages": 3,
    }


def _blocks(kind):
    pointers = {"x_ptr": f"*{kind}", "stored_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    return {
        "module": QUANT,
        "kernel": "blocks_kernel",
        "signature": pointers | dict.fromkeys(["m", "n"], "i32"),
        "constexprs": {"SIDE": 128, "POW2": False},
        "divisible": [*pointers, "n"],
        "num_warps": 8,
        "num_stages": 3,
    }


def _product(blocks, left=1, right=128, out="bf16", split=False, even=True):
    """left, right: the rows of a side that share a scale. A swapped result lies the other way."""
    sides = {"left": blocks.rows, "right": blocks.columns}
    kinds = {
        side: f"tensordesc<fp8e4nv[{rows},128]>" if blocks.tma else "*fp8e4nv"
        for side, rows in sides.items()
    }
    pointers = {"left_scale_ptr": "*fp32", "right_scale_ptr": "*fp32", "out_ptr": f"*{out}"}
    across, beside = "stride_row", "stride_column"
    if blocks.swapped:
        across, beside = beside, across
    ones = dict.fromkeys(["stride_left_k", "stride_right_k", beside], 1)
    divisible = ["n_sum", "stride_left", "stride_right", "stride_split", across]
    return {
        "module": GEMM,
        "kernel": "product_kernel",
        "signature": kinds | pointers | dict.fromkeys([*SIZES, across], "i32"),
        "constexprs": ones
        | {"ROWS": blocks.rows, "COLUMNS": blocks.columns, "PARTS": blocks.parts}
        | {"LEFT_SHARE": left, "RIGHT_SHARE": right, "SPLIT": split}
        | {"TMA": blocks.tma, "EVEN": even},
        "divisible": [*pointers, *(() if blocks.tma else sides), *divisible],
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "capability": 90 if blocks.tma else 89,
    }


QUANTISED = {
    "tiles-bf16": (4, 8, _tiles("bf16")),
    "tiles-bf16-across": (4, 4, _tiles("bf16", across=True)),
    "tiles-bf16-pow2-ragged": (4, 8, _tiles("bf16", pow2=True, even=False)),
    "tiles-bf16-widest": (8, 2, _tiles("bf16", tile=16_384)),
    "blocks-bf16": (8, 2, _blocks("bf16")),
}
PRODUCTS = {
    **{f"shared-{b.rows}": (b, _product(b)) for b in SHARED_SCALES},
    "shared-128-blocks-fp32": (SHARED_SCALES[0], _product(SHARED_SCALES[0], 128, out="fp32")),
    "shared-128-split": (SHARED_SCALES[0], _product(SHARED_SCALES[0], out="fp32", split=True)),
    **{f"own-{b.rows}": (b, _product(b, right=1)) for b in OWN_SCALES},
    **{f"few-{b.columns}": (b, _product(b, 128, 1)) for b in FEW_TOKENS},
    **{
        f"without-tma-{b.rows}x{b.columns}": (b, _product(b, right=right, out="fp32", even=False))
        for b, right in zip(WITHOUT_TMA, (1, 128, 1, 1, 1), strict=True)
    },
}


@pytest.fixture(scope="module")
def compiled(hopper_compile):
    specs = {name: spec for name, (*_, spec) in (QUANTISED | PRODUCTS).items()}
    return dict(zip(specs, hopper_compile(list(specs.values())), strict=True))


@pytest.mark.parametrize("name", QUANTISED)
def test_quantisation_stays_in_registers_and_fills_the_sm_with_loads(compiled, name):
    warps, programs, _ = QUANTISED[name]
    made = compiled[name]
    assert made["target"] == "sm_90a"
    assert (made["spills"], made["stack"], made["local"]) == (0, 0, 0), made
    assert made["registers"] * 32 * warps * programs <= REGISTER_FILE


@pytest.mark.parametrize("name", PRODUCTS)
def test_nothing_spills_and_a_program_fits_an_sm(compiled, name):
    (blocks, spec), made = PRODUCTS[name], compiled[name]
    assert made["target"] == ("sm_90a" if blocks.tma else "sm_89")
    assert (made["spills"], made["stack"], made["local"]) == (0, 0, 0), made
    assert made["shared"] <= blocks.shared <= SHARED_LIMIT[spec["capability"]]
    assert made["registers"] * 32 * blocks.warps <= REGISTER_FILE


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_run_on_the_fp8_tensor_cores(compiled, name):
    """QGMMA and QMMA are the eight-bit forms: nothing was widened to sixteen bits first."""
    blocks, made = PRODUCTS[name][0], compiled[name]
    found = made["QGMMA"], made["UTMALDG"], made["wgmma"]
    if blocks.tma:
        assert min(found) > 0 and made["LDGSTS"] == made["mma_sync"] == 0
    else:
        assert found == (0, 0, 0) and made["mma_sync"] > 0 and made["LDGSTS"] > 0
    assert made["HGMMA"] == made["HMMA"] == 0


@pytest.mark.parametrize(
    "name", [n for n in PRODUCTS if n in ("shared-128", "shared-128-blocks-fp32")]
)
def test_two_programs_of_the_largest_blocks_share_an_sm(compiled, name):
    """One multiplies while the other promotes: 128 registers a thread, half the shared memory."""
    blocks, made = PRODUCTS[name][0], compiled[name]
    assert made["registers"] * 32 * blocks.warps * 2 <= REGISTER_FILE
    assert 2 * (made["shared"] + 1024) <= 228 * 1024
