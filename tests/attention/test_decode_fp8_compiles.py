"""The decode kernels over bytes and over pages compile well for an H100, at V3's sizes."""

import pytest

from dsv3_tutorial.attention.decode_blocks import (
    BYTE_BLOCKS,
    HALF_BLOCKS,
    SINGLE_BYTE_BLOCKS,
    padded,
    within_page,
)

pytestmark = pytest.mark.slow
MODULE = "dsv3_tutorial.attention.triton_decode_{}kernels"
RANK, ROPE = 512, 64  # DeepSeek-V3's latent and decoupled key
SHARED_LIMIT = 232_448  # bytes of shared memory a program may take on Hopper
REGISTER_FILE = 65_536  # registers of one SM
VIEWS = {
    "numbers": {"latent_ptr": "bf16"},
    "bytes": {"codes_ptr": "fp8e4nv", "scales_ptr": "fp32", "rope_ptr": "bf16"},
}
SIDES = {
    "numbers": {"BLOCK_C": padded(RANK), "BLOCK_R": padded(ROPE)},
    "bytes": {"TILE": 128, "TILES": RANK // 128, "BLOCK_R": padded(ROPE)},
}


def _spec(rows, blocks, page, kind="bf16"):
    """Several parts, whose results are float32: the form that takes the most registers."""
    pointers = {"q_ptr": kind, **VIEWS[rows], "tables_ptr": "i32", "lengths_ptr": "i64"}
    pointers |= {"out_ptr": "fp32", "lse_ptr": "fp32"}
    counts = ["n_queries", "n_heads", "n_cached", "n_splits", "stride_table"]
    strides = ["stride_batch", "stride_token"]
    return {
        "module": MODULE.format("fp8_" if rows == "bytes" else ""),
        "kernel": "attend_fp8_kernel" if rows == "bytes" else "attend_kernel",
        "signature": {name: f"*{of}" for name, of in pointers.items()}
        | {"scale_log2": "fp32"}
        | dict.fromkeys(counts + strides, "i32"),
        "constexprs": {"C": RANK, "R": ROPE, **SIDES[rows]}
        | {"ROWS": blocks.rows, "TOKENS": blocks.tokens, "PAGE": page},
        "divisible": [*pointers, *strides, "n_heads"],
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


# in order (page 0), in pages of the size that is usual, and in small ones
FORMS = {
    f"{rows}-{b.rows}-in-pages-of-{page}": (rows, within_page(b, page) if page else b, page)
    for rows, b, page in [
        *(("bytes", b, 0) for b in BYTE_BLOCKS),
        *(("bytes", b, 64) for b in (BYTE_BLOCKS[0], BYTE_BLOCKS[-1])),
        *(("numbers", b, 64) for b in (HALF_BLOCKS[0], HALF_BLOCKS[-1])),
        *(("bytes", BYTE_BLOCKS[-1], 16), ("numbers", HALF_BLOCKS[-1], 16)),
    ]
}
SINGLE = SINGLE_BYTE_BLOCKS[0]


@pytest.fixture(scope="module")
def compiled(hopper_compile):
    specs = {name: _spec(*form) for name, form in FORMS.items()}
    specs["single"] = _spec("bytes", SINGLE, 0, kind="fp32")
    return dict(zip(specs, hopper_compile(list(specs.values())), strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_nothing_spills_and_an_sm_holds_as_many_programs_as_the_plan_says(compiled, name):
    _, blocks, _ = FORMS[name]
    made = compiled[name]
    assert made["target"] == "sm_90a"
    assert (made["spills"], made["stack"], made["local"]) == (0, 0, 0), made
    assert made["shared"] <= blocks.shared <= SHARED_LIMIT
    assert made["registers"] * 32 * blocks.warps * blocks.per_sm <= REGISTER_FILE
    assert (blocks.shared + 1024) * blocks.per_sm <= SHARED_LIMIT + 1024


@pytest.mark.parametrize("name", FORMS)
def test_the_products_run_on_the_tensor_cores_behind_copies_that_run_ahead(compiled, name):
    made = compiled[name]
    wide = FORMS[name][1].rows == 64  # wgmma takes 64 rows; fewer run on the older instruction
    assert made["HGMMA" if wide else "HMMA"] > 0
    assert made["LDGSTS"] > 0


def test_the_blocks_shared_memory_is_what_the_compiler_asks_for(compiled):
    for blocks in BYTE_BLOCKS:
        assert compiled[f"bytes-{blocks.rows}-in-pages-of-0"]["shared"] == blocks.shared
    assert compiled["single"]["shared"] == SINGLE.shared


def test_float32_over_bytes_spills_as_it_is_said_to(compiled):
    made = compiled["single"]
    assert made["spills"] > 0 and made["HMMA"] == made["HGMMA"] == 0
