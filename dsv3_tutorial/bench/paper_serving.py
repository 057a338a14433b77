"""The printed day of the service and its deployments: what follows from what."""

from dsv3_tutorial.bench.paper_verdict import Reproduced, check, value
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import speculation
from dsv3_tutorial.hardware import chip

_DAY = 86_400


def checks() -> list[Reproduced]:
    """A day's money, its nodes, the deployments, and the gain of a second token."""
    return [*_day(), *_deployments(), *_drafts()]


def _day() -> list[Reproduced]:
    day = {n: value(f"serving.{n}") for n in ("input_tokens", "cached_tokens", "output_tokens")}
    missed = day["input_tokens"] - day["cached_tokens"]
    paid = {"cached": day["cached_tokens"], "input": missed, "output": day["output_tokens"]}
    revenue = sum(1e3 * n * value(f"serving.price_{kind}") for kind, n in paid.items())
    cost = value("serving.nodes") * 8 * 24 * value("serving.rent")
    busy = (("input_tokens", "input_per_node"), ("output_tokens", "output_per_node"))
    nodes = sum(day[n] * 1e9 / _DAY / value(f"serving.{rate}") for n, rate in busy)
    hit = 100 * day["cached_tokens"] / day["input_tokens"]
    margin = 100 * (value("serving.revenue") / value("serving.cost") - 1)
    return [
        check("serving.cached_input", hit, "342 of 608 billion tokens", "arithmetic"),
        check("serving.nodes", nodes, "the day's tokens over a node's rates", "arithmetic", 1e-3),
        check("serving.cost", cost, "226.75 nodes x 8 x 24 hours x 2 dollars", "arithmetic"),
        check("serving.revenue", revenue, "the day's tokens x R1's prices", "arithmetic", 2e-4),
        check("serving.margin", margin, "revenue over cost, less 1", "arithmetic"),
    ]


def _deployments() -> list[Reproduced]:
    experts, node = ModelConfig.named("deepseek-v3").n_routed_experts, chip("h800").scale_up.domain
    copies = experts + value("serving.redundant_experts")
    prefill, decode = (value(f"serving.{kind}_nodes") * node for kind in ("prefill", "decode"))
    report = {"prefill": 4 * 8, "decode": 4 * 80}  # tensor x data parallelism of its attention
    extra = report["decode"] - experts
    redundant = (experts + value("serving.report_redundant")) / report["prefill"]
    shared = "256 experts and 32 copies over its GPUs"
    return [
        check("serving.prefill_ep", prefill, "4 nodes x 8", "arithmetic"),
        check("serving.decode_ep", decode, "18 nodes x 8", "arithmetic"),
        check("serving.prefill_experts", copies / prefill, shared, "arithmetic"),
        check("serving.decode_experts", copies / decode, shared, "arithmetic"),
        check("serving.report_prefill_gpus", report["prefill"], "TP 4 x DP 8", "arithmetic"),
        check("serving.report_decode_gpus", report["decode"], "TP 4 x DP 80", "arithmetic"),
        check("serving.report_prefill_nodes", report["prefill"] / node, "32 / 8", "arithmetic"),
        check("serving.report_decode_nodes", report["decode"] / node, "320 / 8", "arithmetic"),
        check("serving.report_prefill_experts", redundant, shared, "arithmetic"),
        check("serving.report_extra_gpus", extra, "320 - 256, one expert each", "arithmetic"),
    ]


def _drafts() -> list[Reproduced]:
    report = speculation.tokens_per_pass(value("serving.mtp_acceptance_low") / 100)
    isca = speculation.tokens_per_pass(value("remark.mtp_acceptance_low") / 100)
    how = "1 + {} % accepted, if checking a draft costs nothing"
    return [
        check("serving.mtp_speedup", report, how.format(85), "model", 0.03),
        check("remark.mtp_speedup", isca, how.format(80), "model", 0.03),
    ]
