"""The planner beside what was published of real runs: how far off it is, and what it cannot know.

No efficiency is fitted to a row here (`calibration` has theirs). Every error is stated, and a test
holds it to what is stated. All predictions are too fast: what a model of peaks and bytes leaves out
can only slow a step.
"""

from dataclasses import replace
from functools import cache

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import calibration, stage_step, stage_time
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.checks import Check
from dsv3_tutorial.cost.layout import Job, Layout
from dsv3_tutorial.cost.plan import Plan, plan
from dsv3_tutorial.cost.step_time import printed

# The largest error that is claimed, as a share of the printed number.
STATED = {
    "step_time.mpft.step": 0.15,
    "step_time.mpft.tokens_per_day": 0.18,
    "step_time.mpft.mfu_causal": 0.18,
    "step_time.mpft.mfu_non_causal": 0.18,
    "training_cost.pre_training_hours": 0.15,
    "training_cost.pre_training_dollars": 0.15,
    "training_cost.total_dollars": 0.15,
    "v2.hours_per_trillion": 0.32,
    "v2.hours_per_trillion_67b": 0.08,
    "llama3.tflops_8192": 0.12,
    "llama3.tflops_16384": 0.12,
}
INTERLEAVED = 8  # stages a GPU of Llama 3.1 405B: 126 layers and two left out, on 16 x 8 places

UNKNOWN = (
    "How much a pair of micro-batches slows itself down beyond the SMs it gives up: both want the "
    "memory's bandwidth and the L2 cache, and table 4's pairs take longer than its parts explain.",
    "Which kernels a run had: DeepGEMM came after V3, FlashAttention 3 after V2. The rates are of "
    "single kernels on a cool chip; in a step of 20 s the clock is lower.",
    "Small products: a rate is the same for 16 tokens an expert as for 8,192, and what tensor "
    "parallelism leaves of a matrix is taken to be as fast as the whole.",
    "Kernel launches, host time, stragglers, checkpoints, evaluation and failures; `lost` is where "
    "a share for them can be named.",
    "How a real run cuts its stages: here the slowest device is as fast as can be, and stages that "
    "are unequal on one device make no further wait.",
    "Interleaved 1F1B: of the schedules here none has it. Llama's bubble is divided by its 8 "
    "stages a GPU, as its paper's formula does.",
    "Overlap of gradients with the last backward, of tensor parallelism with products, of weights "
    "gathered with the first forward: all of them are shown in full.",
    "The number of GPUs of V2 and of DeepSeek 67B and the 67B's degrees of parallelism: not "
    "published, so they are assumed.",
    "Congestion: every GPU has its link to itself, and its tokens reach experts evenly but for one "
    "number, `expert_load`.",
    "Memory: buffers of dispatch, workspaces and fragments are in `usable_memory`; recomputation "
    "drops what V3 drops, and what a framework keeps besides is not known.",
    "Moonlight's GPU hours: not published, nor its layout. `moonlight` is a prediction that "
    "nothing here can check.",
    "Power: the rated one, all the time. What a chip draws, and what hosts, network and cooling "
    "draw, is `power_share` and `pue`, both 1 unless given.",
)


@cache
def deepseek_v3(assume: Assumptions | None = None) -> Plan:
    """V3 in the report's layout on 2,048 H800."""
    layout = Layout.read("deepseek-v3")
    model, cluster = ModelConfig.named("deepseek-v3"), hardware.cluster("h800:2048")
    return plan(model, cluster, Job(), layout, assume or Assumptions())


def as_trained() -> Plan:
    """V3 with the FP8 kernels of its time: DeepGEMM's rates less what DeepGEMM gained on them."""
    return deepseek_v3(Assumptions(fp8_products=calibration.fp8_products(earlier=True)))


def without_mtp() -> Plan:
    """V3 without its multi-token prediction module."""
    return deepseek_v3(Assumptions(mtp=0.0))


@cache
def deepseek_v2() -> Plan:
    """V2 on 1,024 H800 (their number is assumed), 9,216 sequences a step."""
    model, cluster = ModelConfig.named("deepseek-v2"), hardware.cluster("h800:1024")
    return plan(model, cluster, Job(8.1e12, 4096, 9216), Layout.read("deepseek-v2"))


@cache
def deepseek_67b() -> Plan:
    """DeepSeek 67B on 1,024 H800, 4,608 sequences a step; GPUs and degrees are assumed."""
    model, cluster = ModelConfig.named("deepseek-67b"), hardware.cluster("h800:1024")
    return plan(model, cluster, Job(2e12, 4096, 4608), Layout.read("deepseek-67b"))


@cache
def llama(gpus: int) -> Plan:
    """Llama 3.1 405B on so many H100, 2,048 sequences of 8,192 tokens a step, plain 1F1B."""
    layout = replace(Layout.read("llama-3.1-405b"), dp=gpus // 128)
    model, cluster = ModelConfig.named("llama-3.1-405b"), hardware.cluster(f"h100-sxm:{gpus}")
    return plan(model, cluster, Job(15.6e12, 8192, 2048), layout)


@cache
def moonlight() -> Plan:
    """A model of Moonlight's size for its 5.7T tokens; no hours are published to hold it against.

    256 H800, 4,096 sequences of 4,096 tokens a step and the layout are assumed.
    """
    model, cluster = ModelConfig.named("moonlight-16b-a3b"), hardware.cluster("h800:256")
    return plan(model, cluster, Job(5.7e12, 4096, 4096), Layout.read("moonlight-16b-a3b"))


def llama_tflops(gpus: int) -> float:
    """TFLOP/s of a GPU, with the bubble of an interleaved pipeline."""
    found = llama(gpus)
    step_s = found.step_time_s - found.times["bubble"] * (1 - 1 / INTERLEAVED)
    return found.flops_per_token * found.tokens_per_step / step_s / gpus / 1e12


def hours_per_trillion(found: Plan) -> float:
    """Thousand GPU hours for 1e12 tokens."""
    return found.gpu_hours / found.job.tokens * 1e9


def checks() -> list[Check]:
    """Every published number that a plan predicts, beside the prediction."""
    v3 = deepseek_v3()
    how = "the planner, V3 in the report's layout on 2,048 H800"
    quoted = sum(
        paper.row(f"training_cost.{part}_dollars").value
        for part in ("context_extension", "post_training")
    )
    dollars = v3.cost_usd / 1e6
    found = [
        ("step_time.mpft.step", v3.step_time_s, how),
        ("step_time.mpft.tokens_per_day", v3.tokens_per_day / 1e9, how),
        ("step_time.mpft.mfu_causal", 100 * v3.mfu, how),
        ("step_time.mpft.mfu_non_causal", 100 * v3.mfu_non_causal, how),
        ("training_cost.pre_training_hours", v3.gpu_hours / 1e3, how),
        ("training_cost.pre_training_dollars", dollars, f"{how}, at 2 dollars an hour"),
        ("training_cost.total_dollars", dollars + quoted, f"{how}; later stages quoted"),
        ("v2.hours_per_trillion", hours_per_trillion(deepseek_v2()), "the planner, V2's layout"),
        (
            "v2.hours_per_trillion_67b",
            hours_per_trillion(deepseek_67b()),
            "the planner, 1F1B with tensor parallelism; degrees assumed",
        ),
    ]
    for gpus in (8192, 16384):
        how = "the planner, bubble of 8 interleaved stages a GPU"
        found.append((f"llama3.tflops_{gpus}", llama_tflops(gpus), how))
    return [Check(paper.row(name), value, way) for name, value, way in found]


def beside_table_4(found: Plan | None = None) -> list[tuple[str, float, float]]:
    """(part, ours, printed) seconds of a plan's step as ISCA table 4 takes V3's apart.

    Its 1B and 1W together are backwards that run alone, as its parts add up to the step; its
    bubble is ours and what unequal stages cost; its optimizer ours and the gradients.
    """
    found = found or deepseek_v3()
    one = stage_step.mean_chunk(found.cfg, found.cluster, found.job, found.layout, found.assume)
    alone = stage_time.unpaired(found.layout.stages)
    pairs = 2 * found.layout.micro_batches(found.job) / found.layout.copies - alone
    sms, times = found.assume.communication_sms, found.times
    ours = {
        "forward": alone * (one.forward + one.sending),
        "backward": alone * (one.backward + (one.passes - 1) * one.sending),
        "overlapped": pairs * stage_time.pair(one, sms),
        "bubble": times["bubble"] + times["uneven stages"] + times["pipeline sends"],
        "optimizer": times["optimizer"] + times["gradients"],
    }
    theirs = {part: printed(part) for part in ("forward", "overlapped", "bubble", "optimizer")}
    theirs["backward"] = printed("backward_input") + printed("backward_weight")
    return [(part, seconds, theirs[part]) for part, seconds in ours.items()]
