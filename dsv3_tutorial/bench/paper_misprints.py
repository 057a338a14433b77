"""Where the papers contradict themselves, each other or their own code: each with a calculation."""

from dsv3_tutorial.bench.paper_miscounts import miscounts
from dsv3_tutorial.bench.paper_model import V3
from dsv3_tutorial.bench.paper_training import STAGES, long_hours, pipeline
from dsv3_tutorial.bench.paper_verdict import Inconsistency, value
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import deepep, schedule_table, speculation, step_time, topology, validation


def inconsistencies() -> list[Inconsistency]:
    """All that we found, the ones that change a conclusion first."""
    return [*miscounts(), *_networks(), *_training(), *_wording()]


def _networks() -> list[Inconsistency]:
    ratios = value("network.scale_up_over_out"), value("network.report_ratio")
    wire = deepep.on_the_wire("deepep.figure_7.dispatch.32")["across"]
    slim = topology.PRINTED["slim_fly"]()
    dragonfly, prices = topology.PRINTED["dragonfly"](), topology.paper_prices()
    cost = dragonfly.cost(prices.per_switch, prices.per_link) / 1e6
    possible = [4 * ratio for ratio in ratios]
    return [
        Inconsistency(
            "scale-up over scale-out",
            "ISCA, section 4.3; V3 report, section 3.2.2",
            "4 and 3.2",
            "160 : 40 and 160 : 50; a token on 4 nodes could have so many experts for free",
            f"{possible[0]:.0f} and {possible[1]:.1f} experts",
        ),
        Inconsistency(
            "rates above the line rate",
            "ISCA, figure 7",
            "58.02 of 50 GB/s",
            "copies for the own node are counted and never leave it; on the wire",
            f"{wire:.1f} GB/s",
        ),
        Inconsistency(
            "a Slim Fly of q = 28",
            "ISCA, table 3",
            f"{slim.endpoints:,} endpoints",
            "its graph needs a power of a prime: 27 is the nearest below",
            f"{topology.slim_fly(27).endpoints:,} endpoints",
        ),
        Inconsistency(
            "cost of the Dragonfly",
            "ISCA, table 3",
            "1522 million USD",
            "prices that give the other columns within 1.2 %",
            f"{cost:,.0f} million USD",
        ),
        Inconsistency(
            "SMs that communicate",
            "V3 report, section 3.2.2; DeepEP's README",
            "20 and 24",
            "of 132: what is left to compute",
            f"{100 * (1 - 20 / 132):.1f} and {100 * (1 - 24 / 132):.1f} %",
        ),
    ]


def _training() -> list[Inconsistency]:
    times = step_time.operation_times(pipeline(), whole=True)
    bubble = schedule_table.table_bubble("dualpipe", STAGES, times)
    uneven = validation.deepseek_v3().times["uneven stages"]
    cfg = ModelConfig.named(V3)
    return [
        Inconsistency(
            "the bubble of a step",
            "ISCA, table 4; V3 report, table 2",
            "2.06 s",
            "(PP / 2 - 1)(F&B + B - 3 W) with table 4's own times; by the planner, uneven stages "
            f"(62 layers and two heads on {STAGES}) add {uneven:.2f}",
            f"{bubble:.2f} s",
        ),
        Inconsistency(
            "a step and its parts",
            "ISCA, table 4",
            "19.926 s",
            "the sum of the six parts",
            f"{step_time.sum_of_parts():.2f} s",
        ),
        Inconsistency(
            "the extension of the context",
            "V3 report, table 1",
            "119 thousand hours",
            "two phases of 1,000 steps at the FLOP/s of table 4",
            f"{long_hours():.0f} thousand hours",
        ),
        Inconsistency(
            "standard deviation of the first weights",
            "V3 report, section 4.2; config.json",
            "0.006",
            "initializer_range of the published file, a default of its library",
            f"{cfg.initializer_range:g}",
        ),
    ]


def _wording() -> list[Inconsistency]:
    low = [speculation.tokens_per_pass(a) for a in (0.80, 0.85)]
    experts = ModelConfig.named(V3).n_routed_experts
    report = (experts + value("serving.report_extra_gpus")) / value("serving.report_decode_gpus")
    service = (experts + value("serving.redundant_experts")) / value("serving.decode_ep")
    bits = int(value("fp8.fraction_bits"))
    return [
        Inconsistency(
            "accepted second tokens",
            "ISCA, section 2.3.3; V3 report, section 5.4.3",
            "80 to 90 and 85 to 90 %",
            "1 + the lower end: both print 1.8x",
            f"{low[0]:.2f}x and {low[1]:.2f}x",
        ),
        Inconsistency(
            "bits of Hopper's FP8 sums",
            "V3 report, section 3.3.2; ISCA, section 3.1.1",
            "14 and 13 bits",
            "the report counts the leading 1, the other the fraction",
            f"{bits} + 1 = {bits + 1} bits",
        ),
        Inconsistency(
            "how V3 is served",
            "V3 report, section 3.4.2; the service's overview",
            "320 and 144 GPUs",
            "routed experts on a GPU, copies included (64 of the 320 hold shared ones too)",
            f"{report:.0f} and {service:.0f}",
        ),
    ]
