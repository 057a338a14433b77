"""Every form of the decode kernel that can be launched at V3's sizes compiles well for an H100."""

import pytest

from dsv3_tutorial.attention.decode_blocks import HALF_BLOCKS, SINGLE_BLOCKS, padded

pytestmark = pytest.mark.slow
MODULE = "dsv3_tutorial.attention.triton_decode_kernels"
RANK, ROPE = 512, 64  # DeepSeek-V3's latent and decoupled key
SHARED_LIMIT = 232_448  # bytes of shared memory a program may take on Hopper
REGISTER_FILE = 65_536  # registers of one SM
TYPES = {"bf16": HALF_BLOCKS, "fp16": HALF_BLOCKS[-1:], "fp32": SINGLE_BLOCKS}


def _attend(kind, blocks, out):
    pointers = {"q_ptr": kind, "latent_ptr": kind, "tables_ptr": "i64", "lengths_ptr": "i64"}
    pointers |= {"out_ptr": out, "lse_ptr": "fp32"}
    counts = ["n_queries", "n_heads", "n_cached", "n_splits"]
    strides = ["stride_batch", "stride_token"]
    return {
        "module": MODULE,
        "kernel": "attend_kernel",
        "signature": {name: f"*{of}" for name, of in pointers.items()}
        | {"scale_log2": "fp32"}
        | dict.fromkeys([*counts, *strides, "stride_table"], "i32"),
        "constexprs": {"C": RANK, "R": ROPE, "BLOCK_C": padded(RANK), "BLOCK_R": padded(ROPE)}
        | {"ROWS": blocks.rows, "TOKENS": blocks.tokens, "PAGE": 0},
        "divisible": [*pointers, *strides, "n_heads"],
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _combine(splits):
    return {
        "module": MODULE,
        "kernel": "combine_kernel",
        "signature": {"parts_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16"}
        | {"n_splits": "i32"},
        "constexprs": {"C": RANK, "SPLITS": splits, "COLUMNS": max(16, min(128, 8192 // splits))},
        "divisible": ["parts_ptr", "lse_ptr", "out_ptr"],
        "num_warps": 4,
        "num_stages": 3,
    }


# one part writes its result as it is, several write float32 for the combining kernel
FORMS = {
    f"{kind}-{b.rows}x{b.tokens}-w{b.warps}-to-{out}": (kind, b, out)
    for kind, table in TYPES.items()
    for b in table
    for out in dict.fromkeys([kind, "fp32"])
}


@pytest.fixture(scope="module")
def compiled(hopper_compile):
    specs = {name: _attend(*form) for name, form in FORMS.items()}
    specs |= {f"combine-{splits}": _combine(splits) for splits in (64, 256)}
    too_few_threads = HALF_BLOCKS[1]._replace(warps=4)
    specs["spilling"] = _attend("bf16", too_few_threads, "fp32")
    return dict(zip(specs, hopper_compile(list(specs.values())), strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_nothing_spills_and_an_sm_holds_as_many_programs_as_the_plan_says(compiled, name):
    _, blocks, _ = FORMS[name]
    made = compiled[name]
    assert made["target"] == "sm_90a"
    assert (made["spills"], made["stack"], made["local"]) == (0, 0, 0), made
    assert made["shared"] == blocks.shared <= SHARED_LIMIT
    assert made["registers"] * 32 * blocks.warps * blocks.per_sm <= REGISTER_FILE
    assert (blocks.shared + 1024) * blocks.per_sm <= SHARED_LIMIT + 1024


@pytest.mark.parametrize("name", FORMS)
def test_half_precision_runs_on_the_tensor_cores(compiled, name):
    kind, blocks, _ = FORMS[name]
    made = compiled[name]
    if kind == "fp32":  # full precision was asked for, which the tensor cores do not have
        assert made["wgmma"] == made["mma_sync"] == 0
    elif blocks.rows == 64:
        assert made["wgmma"] > 0 and made["HGMMA"] > 0
    else:  # wgmma takes 64 rows; fewer run on the older instruction
        assert made["mma_sync"] > 0 and made["HMMA"] > 0


@pytest.mark.parametrize("name", FORMS)
def test_the_cache_is_copied_to_shared_memory_while_the_last_block_is_computed(compiled, name):
    assert compiled[name]["LDGSTS"] > 0


@pytest.mark.parametrize("splits", [64, 256])
def test_the_combining_kernel_spills_nothing(compiled, splits):
    made = compiled[f"combine-{splits}"]
    assert made["spills"] == made["stack"] == 0
    assert made["registers"] <= 128


def test_a_kernel_that_does_spill_is_seen_to_spill(compiled):
    made = compiled["spilling"]
    assert made["spills"] > 0 and made["stack"] > 0
