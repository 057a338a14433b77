"""Lesson 6's exercises: right answers in any style pass, the hints' own words among them."""

import math
import textwrap

import pytest
import torch
import torch.nn.functional as F

from dsv3_tutorial.learn import registry
from dsv3_tutorial.learn.submission import recheck
from dsv3_tutorial.learn.verdict import PASSED, RAISED, judge

HEADS = {
    "exposed": "work, other",
    "state_bytes": "dense, routed, pp, ep, dp, copies=1",
    "run_cost": "tokens, tokens_per_step, step_s, gpus, rent, watts",
    "both_orders": "price, decisions",
    "lab_design": "",
    "cluster_design": "",
    "slowest_stage": "costs, stages",
    "mfu": "tokens_per_second, flops_per_token, gpus, peak",
    "gain": "compute, network, overlapped, factor",
    "fit_efficiency": "flops, seconds, peak",
    "find_the_bug": "total, activated, tokens, gpus, peak, sent, link, stages, micro_batches",
}


def source(name, body):
    body = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    return f"def answer({HEADS[name]}):\n{body}"


def verdict(name, body):
    space = {"torch": torch, "math": math, "F": F}
    exec(source(name, body), space)
    return judge(registry.find(f"codesign.{name}"), space["answer"])


# the first is the exercise's hints, word by word, but for the two designs; then other styles
RIGHT = {
    "exposed": [
        """
        moments = sorted({moment for span in work + other for moment in span})
        total = 0
        for start, end in zip(moments, moments[1:]):
            sent = any(a <= start and end <= b for a, b in other)
            busy = any(a <= start and end <= b for a, b in work)
            if sent and not busy:
                total += end - start
        return total""",
        """
        left = sorted(other)
        for a, b in work:
            cut = []
            for c, d in left:
                cut += [(c, min(a, d)), (max(b, c), d)]
            left = [(c, d) for c, d in cut if c < d]
        total, reached = 0.0, -math.inf
        for c, d in sorted(left):
            total += max(0.0, d - max(c, reached))
            reached = max(reached, d)
        return total""",
        """
        def length(spans):
            total, reached = 0.0, -math.inf
            for start, end in sorted(spans):
                total += max(0.0, end - max(start, reached))
                reached = max(reached, end)
            return total
        return length(work + other) - length(work)""",
        """
        edges = [(a, 0, 1) for a, _ in work] + [(b, 0, -1) for _, b in work]
        edges += [(a, 1, 1) for a, _ in other] + [(b, 1, -1) for _, b in other]
        open_spans, total, last = [0, 0], 0.0, 0.0
        for moment, which, step in sorted(edges):
            if open_spans[1] > 0 and open_spans[0] == 0:
                total += moment - last
            open_spans[which] += step
            last = moment
        return total""",
        """
        if not other:
            return 0.0
        at = torch.tensor(sorted({t for s in [*work, *other] for t in s}), dtype=torch.float64)
        def inside(spans):
            s = torch.tensor(spans, dtype=torch.float64).reshape(-1, 2)
            return ((s[:, :1] <= at[:-1]) & (at[1:] <= s[:, 1:])).any(dim=0)
        return ((at[1:] - at[:-1]) * (inside(other) & ~inside(work))).sum()""",
    ],
    "state_bytes": [
        """
        dense, routed = dense / pp, routed / pp / ep
        kept = copies * (2 + 4) * (dense + routed)
        return kept + 8 * (dense / dp + routed / (dp // ep))""",
        "return (6 * copies * (dense + routed / ep) + 8 * (dense + routed) / dp) / pp",
        """
        total = 0
        for numbers, holders in ((dense / pp, dp), (routed / (pp * ep), dp // ep)):
            stages = numbers * copies
            total += 6 * stages + 8 * stages / (holders * copies)
        return total""",
        """
        weights = 2 * copies * (dense / pp + routed / pp / ep)
        gradients = 4 * copies * (dense / pp + routed / pp / ep)
        optimizer = (4 + 2 + 2) * (dense + routed) / (pp * dp)
        return weights + gradients + optimizer""",
        """
        parts = torch.tensor([dense, routed / ep], dtype=torch.float64) / pp
        holders = torch.tensor([dp, dp // ep], dtype=torch.float64)
        return float((parts * (6 * copies + 8 / holders)).sum())""",
    ],
    "run_cost": [
        """
        steps = tokens / tokens_per_step
        gpu_hours = steps * step_s / 3600 * gpus
        return gpu_hours, gpu_hours * rent, gpu_hours * watts / 1000""",
        """
        seconds = step_s * tokens / tokens_per_step * gpus
        return [seconds / 3600, seconds / 3600 * rent, seconds * watts / 3.6e6]""",
        """
        rate = tokens_per_step / step_s
        days = tokens / rate / 86_400
        hours = 24 * days * gpus
        return hours, rent * hours, watts * 24 * days * gpus / 1e3""",
        """
        h = math.prod([tokens, 1 / tokens_per_step, step_s, 1 / 3600, gpus])
        return (h, h * rent, h * watts * 1e-3)""",
    ],
    "both_orders": [
        """
        every, found = frozenset(decisions), {}
        for one in decisions:
            removal = price(every - {one}) - price(every)
            addition = price(frozenset()) - price(frozenset({one}))
            found[one] = (removal, addition)
        return found""",
        """
        all_, none = price(frozenset(decisions)), price(frozenset())
        return {d: (price(frozenset(x for x in decisions if x != d)) - all_,
                    none - price(frozenset([d]))) for d in decisions}""",
        """
        every = set(decisions)
        return {
            d: [price(frozenset(every.difference([d]))) - price(frozenset(every)),
                price(frozenset()) - price(frozenset((d,)))]
            for d in sorted(every)
        }""",
        """
        f = lambda *names: price(frozenset(names))
        rest = lambda d: tuple(set(decisions) - {d})
        removed = [f(*rest(d)) - f(*decisions) for d in decisions]
        added = [f() - f(d) for d in decisions]
        return dict(zip(decisions, zip(removed, added)))""",
    ],
    "lab_design": [
        """
        return {
            "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
            "kv_lora_rank": 512, "n_routed_experts": 60, "num_experts_per_tok": 5,
            "moe_intermediate_size": 1024, "tokens": 320e9,
        }""",
        """
        return dict(  # a wider latent over few layers, and two wide experts a token
            hidden_size=2560, num_hidden_layers=16, num_attention_heads=20, kv_lora_rank=704,
            n_routed_experts=32, num_experts_per_tok=2, moe_intermediate_size=2560, tokens=3e11)""",
        """
        return {  # fewer and wider layers, a wider latent
            "hidden_size": 2304, "num_hidden_layers": 16, "num_attention_heads": 18,
            "kv_lora_rank": 640, "n_routed_experts": 48, "num_experts_per_tok": 4,
            "moe_intermediate_size": 1984, "tokens": 300_000_000_000,
        }""",
        """
        design = {"num_hidden_layers": 24, "hidden_size": 2048, "tokens": 3.0e11}
        design["num_attention_heads"] = design["hidden_size"] // 128
        design |= {"n_routed_experts": 128, "num_experts_per_tok": 8, "n_shared_experts": 2}
        return {**design, "moe_intermediate_size": 512, "kv_lora_rank": 512}""",
        """
        return {  # a draft module, and fewer tokens
            "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
            "kv_lora_rank": 384, "q_lora_rank": 768, "n_routed_experts": 72,
            "num_experts_per_tok": 5, "moe_intermediate_size": 1024, "first_k_dense_replace": 2,
            "num_nextn_predict_layers": 1, "tokens": 300e9,
        }""",
    ],
    "cluster_design": [
        """
        return {  # more heads, over fewer and wider layers
            "hidden_size": 6144, "num_hidden_layers": 40, "num_attention_heads": 40,
            "kv_lora_rank": 512, "n_routed_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 1536, "tokens": 1.8e12,
        }""",
        """
        return {
            "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 24,
            "kv_lora_rank": 512, "q_lora_rank": 1536, "n_routed_experts": 160,
            "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "n_group": 8,
            "topk_group": 3, "tokens": 1.9e12,
        }""",
        """
        return dict(hidden_size=4096, num_hidden_layers=44, num_attention_heads=32,
                    kv_lora_rank=512, n_routed_experts=192, num_experts_per_tok=10,
                    moe_intermediate_size=1280, tokens=2.0e12)""",
        """
        return {
            "hidden_size": 6144, "num_hidden_layers": 40, "num_attention_heads": 36,
            "kv_lora_rank": 512, "n_routed_experts": 96, "num_experts_per_tok": 6,
            "moe_intermediate_size": 2048, "first_k_dense_replace": 2, "tokens": 1.8e12,
        }""",
        """
        return {
            "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32,
            "kv_lora_rank": 576, "n_routed_experts": 144, "num_experts_per_tok": 8,
            "moe_intermediate_size": 1536, "n_shared_experts": 2, "tokens": 2.0e12,
        }""",
    ],
    "slowest_stage": [
        """
        def needed(limit):
            count, own = 1, 0.0
            for cost in costs:
                if own + cost > limit:
                    count, own = count + 1, 0.0
                own += cost
            return count
        n = len(costs)
        sums = sorted({sum(costs[i:j]) for i in range(n) for j in range(i + 1, n + 1)})
        return next(s for s in sums if s >= max(costs) and needed(s + 1e-9) <= stages)""",
        """
        best = [math.inf] * (len(costs) + 1)
        best[0] = 0.0
        for _ in range(stages):
            best = [0.0] + [min(max(best[j], sum(costs[j:i])) for j in range(i))
                            for i in range(1, len(costs) + 1)]
        return best[-1]""",
        """
        known = {}
        def least(start, left):
            if (start, left) not in known:
                if left == 1:
                    known[start, left] = sum(costs[start:])
                else:
                    known[start, left] = min(
                        max(sum(costs[start:end]), least(end, left - 1))
                        for end in range(start, len(costs) + 1))
            return known[start, left]
        return least(0, stages)""",
        """
        low, high = max(costs), sum(costs)
        for _ in range(100):
            limit, count, own = (low + high) / 2, 1, 0.0
            for cost in costs:
                own += cost
                if own > limit:
                    count, own = count + 1, cost
            low, high = (limit, high) if count > stages else (low, limit)
        return high""",
    ],
    "mfu": [
        """
        done = tokens_per_second * flops_per_token
        return done / (gpus * peak)""",
        "return tokens_per_second / gpus * flops_per_token / peak",
        """
        possible = gpus * peak / flops_per_token
        return tokens_per_second / possible""",
    ],
    "gain": [
        """
        def step(network):
            hidden = min(overlapped * network, compute)
            return compute + network - hidden
        return step(network) / step(network / factor)""",
        """
        times = [max(compute, overlapped * n) + (1 - overlapped) * n
                 for n in (network, network / factor)]
        return times[0] / times[1]""",
        """
        n = torch.tensor([network, network / factor], dtype=torch.float64)
        steps = compute + n - torch.clamp(overlapped * n, max=compute)
        return (steps[0] / steps[1]).item()""",
        """
        old = compute + max(0, overlapped * network - compute) + (1 - overlapped) * network
        network /= factor
        new = compute + max(0, overlapped * network - compute) + (1 - overlapped) * network
        return old / new""",
    ],
    "fit_efficiency": [
        """
        a = sum(f * t for f, t in zip(flops, seconds)) / sum(f * f for f in flops)
        return 1 / (a * peak)""",
        """
        f, t = torch.tensor(flops, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
        return float(f @ f / (f @ t) / peak)""",
        """
        f = torch.tensor(flops, dtype=torch.float64)[:, None]
        t = torch.tensor(seconds, dtype=torch.float64)[:, None]
        slope = torch.linalg.lstsq(f, t).solution.item()
        return 1 / slope / peak""",
        """
        ideal = [f / peak for f in flops]
        return sum(i * i for i in ideal) / sum(i * t for i, t in zip(ideal, seconds))""",
    ],
    "find_the_bug": [
        """
        compute = 6 * activated * tokens / (gpus * peak)
        network = sent * 8 / (link * 1e9)
        busy = max(compute, network)
        bubble = busy * (stages - 1) / micro_batches
        return busy + bubble""",
        """
        compute = 6 * activated * tokens / (gpus * peak)
        network = sent / (link * 1e9 / 8)
        busy = max(compute, network)
        idle = (stages - 1) / (micro_batches + stages - 1)
        return busy / (1 - idle)""",
        """
        each = max(6 * activated * tokens / gpus / peak, sent / (125e6 * link)) / micro_batches
        return each * (micro_batches + stages - 1)""",
    ],
}
ANSWERS = [(name, at) for name, bodies in RIGHT.items() for at in range(len(bodies))]


@pytest.mark.parametrize(("name", "at"), ANSWERS)
def test_a_right_answer_passes_in_whatever_style(name, at):
    assert verdict(name, RIGHT[name][at]).status == PASSED, verdict(name, RIGHT[name][at]).line


def test_every_exercise_of_the_lesson_has_right_answers_here():
    assert [f"codesign.{name}" for name in HEADS] == list(registry.load("codesign"))
    assert list(HEADS) == list(RIGHT)


def test_the_core_exercises_fit_their_forty_minutes():
    core = list(registry.load("codesign").values())[:6]
    assert sum(one.minutes for one in core) == 40


def test_an_answer_is_judged_alike_from_a_notebooks_source():
    cell = '@exercise("codesign.exposed")\n' + source("exposed", RIGHT["exposed"][0])
    assert recheck(["import torch", cell], "codesign.exposed")["status"] == PASSED


@pytest.mark.parametrize(
    "asked", ["price(set(decisions))", "price(frozenset('mla'))", "price(['mla'])"]
)
def test_a_price_asked_of_what_is_no_frozenset_of_names_says_what_it_takes(asked):
    found = verdict("both_orders", f"return {{d: ({asked}, 0.0) for d in decisions}}")
    assert found.status == RAISED and "frozenset" in found.message
