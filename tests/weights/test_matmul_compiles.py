"""The product with quantised weights compiles well for an H100, in every format and tile."""

import pytest

from dsv3_tutorial.weights.matmul_blocks import GROUP, HALF_BLOCKS, SINGLE_BLOCKS

pytestmark = pytest.mark.slow
MODULE = "dsv3_tutorial.weights.triton_matmul_kernels"
SHARED_LIMIT = 232_448  # bytes of shared memory a program may take on Hopper
REGISTER_FILE = 65_536  # registers of one SM
CODES = {"int8": "i8", "int8-tile": "i8", "fp8": "fp8e4nv", "int4": "u8"}


def _spec(fmt, kind, blocks, even=True):
    """As parts in float32, which is what a small weight is launched with."""
    pointers = {"x_ptr": kind, "codes_ptr": CODES[fmt], "scale_ptr": "fp32", "out_ptr": "fp32"}
    sizes = ["n_rows", "n_sum", "stride_x", "stride_codes"]
    return {
        "module": MODULE,
        "kernel": "matmul_kernel",
        "signature": {name: f"*{of}" for name, of in pointers.items()}
        | dict.fromkeys(["n_tokens", "stride_scale", *sizes], "i32"),
        "constexprs": {"ROWS": blocks.rows, "TOKENS": blocks.tokens, "STEP": blocks.step}
        | {"GROUP": GROUP, "SHARE": GROUP if fmt == "fp8" else 1, "GROUPED": fmt != "int8"}
        | {"PACKED": fmt == "int4", "EVEN": even},
        "divisible": [*pointers, *sizes],
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


FEW, SOME, MANY = HALF_BLOCKS
FORMS = {
    f"{fmt}-{kind}-{b.tokens}": (fmt, kind, b)
    for fmt, kind, b in [
        ("int8", "bf16", FEW),
        ("int8", "bf16", MANY),
        ("int8-tile", "bf16", SOME),
        ("fp8", "bf16", FEW),
        ("fp8", "bf16", MANY),
        ("int4", "bf16", FEW),
        ("int4", "bf16", MANY),
        ("int4", "fp32", SINGLE_BLOCKS[0]),
    ]
}


@pytest.fixture(scope="module")
def compiled(hopper_compile):
    specs = {name: _spec(*form) for name, form in FORMS.items()}
    specs["ragged"] = _spec("int4", "bf16", HALF_BLOCKS[-1], even=False)
    return dict(zip(specs, hopper_compile(list(specs.values())), strict=True))


@pytest.mark.parametrize("name", [*FORMS, "ragged"])
def test_nothing_spills_and_a_program_fits_an_sm(compiled, name):
    blocks = FORMS[name][2] if name in FORMS else HALF_BLOCKS[-1]
    made = compiled[name]
    assert made["target"] == "sm_90a"
    assert (made["spills"], made["stack"], made["local"]) == (0, 0, 0), made
    assert made["shared"] <= SHARED_LIMIT
    two_programs = 2 * 32 * blocks.warps  # that one may load while the other multiplies
    assert made["registers"] * two_programs <= REGISTER_FILE


@pytest.mark.parametrize("blocks", HALF_BLOCKS, ids=lambda b: str(b.tokens))
def test_the_plan_s_shared_memory_is_what_eight_bits_need(compiled, blocks):
    for name, (fmt, _, used) in FORMS.items():
        if used == blocks and fmt != "int4":
            assert compiled[name]["shared"] == blocks.shared


@pytest.mark.parametrize("name", FORMS)
def test_codes_go_to_the_tensor_cores_and_arrive_while_the_last_are_multiplied(compiled, name):
    made = compiled[name]
    if FORMS[name][1] == "fp32":  # full precision was asked for, which tensor cores do not have
        assert made["wgmma"] == made["mma_sync"] == 0
    else:
        assert made["wgmma"] > 0 and made["HGMMA"] > 0
    assert made["LDGSTS"] > 0
