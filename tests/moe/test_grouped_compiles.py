"""Every form of the grouped kernels that can be launched compiles well for an H100."""

import pytest

from dsv3_tutorial.moe.grouped_blocks import HALF_BLOCKS, SINGLE_BLOCKS

pytestmark = pytest.mark.slow
MODULE = "dsv3_tutorial.moe.triton_grouped_kernels"
SHARED_LIMIT = 232_448  # bytes of shared memory a program may take on Hopper
REGISTER_FILE = 65_536  # registers of one SM
SIZES = ["n_columns", "n_sum", "stride_a", "stride_group", "stride_column", "stride_sum"]


def _rows(kind, blocks, side_by_side, even=True):
    """The forward reads weights that lie along the summed axis, the input's gradient across it."""
    pointers = dict.fromkeys(["a_ptr", "weight_ptr", "out_ptr"], f"*{kind}") | {"ends_ptr": "*i32"}
    sizes = [name for name in SIZES if name != side_by_side]
    return {
        "module": MODULE,
        "kernel": "rows_kernel",
        "signature": pointers | dict.fromkeys([*sizes, "n_tiles", "n_groups"], "i32"),
        "constexprs": {side_by_side: 1, "GROUPS": 256, "ROWS": blocks.rows}
        | {"COLUMNS": blocks.columns, "STEP": blocks.step, "EVEN": even},
        "divisible": [*pointers, *sizes],
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _weights(kind, blocks):
    pointers = dict.fromkeys(["a_ptr", "b_ptr", "out_ptr"], f"*{kind}") | {"ends_ptr": "*i32"}
    sizes = ["n_rows", "n_columns"]
    return {
        "module": MODULE,
        "kernel": "weights_kernel",
        "signature": pointers | dict.fromkeys(sizes, "i32"),
        "constexprs": {"ROWS": blocks.rows, "COLUMNS": blocks.columns, "STEP": blocks.step},
        "divisible": [*pointers, *sizes],
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


KERNELS = {
    "forward": lambda kind, b: _rows(kind, b, "stride_sum"),
    "input-gradient": lambda kind, b: _rows(kind, b, "stride_column"),
    "weight-gradient": _weights,
}
TABLES = {"bf16": HALF_BLOCKS, "fp16": HALF_BLOCKS[-1:], "fp32": SINGLE_BLOCKS}
FORMS = {
    f"{name}-{kind}-{b.rows}x{b.columns}": (name, kind, b)
    for name in KERNELS
    for kind, table in TABLES.items()
    for b in table
}


@pytest.fixture(scope="module")
def compiled(hopper_compile):
    specs = {name: KERNELS[kernel](kind, b) for name, (kernel, kind, b) in FORMS.items()}
    specs["ragged"] = _rows("bf16", HALF_BLOCKS[-1], "stride_sum", even=False)
    specs["spilling"] = _weights("bf16", HALF_BLOCKS[-1]._replace(warps=4))
    return dict(zip(specs, hopper_compile(list(specs.values())), strict=True))


@pytest.mark.parametrize("name", [*FORMS, "ragged"])
def test_nothing_spills_and_a_program_fits_an_sm(compiled, name):
    blocks = FORMS[name][2] if name in FORMS else HALF_BLOCKS[-1]
    made = compiled[name]
    assert made["target"] == "sm_90a"
    assert (made["spills"], made["stack"], made["local"]) == (0, 0, 0), made
    assert made["shared"] == blocks.shared <= SHARED_LIMIT
    assert made["registers"] * 32 * blocks.warps <= REGISTER_FILE


@pytest.mark.parametrize("name", FORMS)
def test_half_precision_runs_on_the_tensor_cores(compiled, name):
    _, kind, blocks = FORMS[name]
    made = compiled[name]
    if kind == "fp32":  # full precision was asked for, which the tensor cores do not have
        assert made["wgmma"] == made["mma_sync"] == 0
    elif blocks.rows >= 64:
        assert made["wgmma"] > 0 and made["HGMMA"] > 0 and made["mma_sync"] == 0
    else:  # wgmma takes 64 rows; fewer run on the older instruction
        assert made["mma_sync"] > 0 and made["HMMA"] > 0


@pytest.mark.parametrize("name", FORMS)
def test_operands_are_copied_to_shared_memory_while_the_last_are_multiplied(compiled, name):
    assert compiled[name]["LDGSTS"] > 0


def test_a_kernel_that_does_spill_is_seen_to_spill(compiled):
    made = compiled["spilling"]
    assert made["spills"] > 0 and made["stack"] > 0
