"""Wrong answers that people give in lesson 6: none passes, and each hears what it got wrong."""

import inspect
import math
import textwrap
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F

from dsv3_tutorial.learn import registry
from dsv3_tutorial.learn.exercises.codesign.bug import BUGS
from dsv3_tutorial.learn.verdict import NOT_YET, RAISED, judge


def verdict(name, body):
    exercise = registry.find(f"codesign.{name}")
    head = inspect.signature(exercise.function)
    plain = [one.replace(annotation=one.empty) for one in head.parameters.values()]
    head = head.replace(parameters=plain, return_annotation=head.empty)
    body = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    space = {"torch": torch, "math": math, "F": F}
    exec(f"def answer{head}:\n{body}", space)
    return judge(exercise, space["answer"])


BUG = """
    compute = 6 * {params} * tokens / (gpus * peak)
    network = {network}
    busy = max(compute, network)
    bubble = {bubble}
    return busy + bubble"""
AS_GIVEN = {
    "params": "total",
    "network": "sent / (link * 1e9)",
    "bubble": "busy * (stages - 1) / (micro_batches + stages - 1)",
}
MENDED = {
    "params": "activated",
    "network": "8 * sent / (link * 1e9)",
    "bubble": "busy * (stages - 1) / micro_batches",
}
LINES = dict(zip(("met", "bits", "bubble"), AS_GIVEN, strict=True))


@pytest.mark.parametrize(
    "left", [("met", "bits", "bubble"), ("met", "bits"), ("bits", "bubble"), ("met", "bubble")]
)
def test_the_given_cell_and_a_first_mended_line_are_told_how_many_bugs_are_left(left):
    lines = {**MENDED, **{LINES[one]: AS_GIVEN[LINES[one]] for one in left}}
    found = verdict("find_the_bug", BUG.format(**lines))
    said = "All three bugs are left." if len(left) == 3 else "Two bugs are left."
    assert found.status == NOT_YET and found.message.endswith(said)
    assert not any(text in found.message for text in BUGS.values()), "it must not spoil itself"


@pytest.mark.parametrize("left", BUGS)
def test_the_last_bug_is_named(left):
    lines = {**MENDED, LINES[left]: AS_GIVEN[LINES[left]]}
    found = verdict("find_the_bug", BUG.format(**lines))
    assert f"One bug is left: {BUGS[left]}" in found.message


# name -> (body, what its verdict says)
WRONG = [
    ("exposed", "return sum(b - a for a, b in other) - sum(b - a for a, b in work)", "Hint"),
    (
        "exposed",
        """
        total = 0.0
        for c, d in other:
            for a, b in work:
                total += max(0, min(b, d) - max(a, c))
        return sum(d - c for c, d in other) - total""",
        "union",
    ),
    (
        "exposed",
        """
        left = [(c, d) for c, d in other if not any(a <= c and d <= b for a, b in work)]
        return sum((d - c for c, d in left), 0.0)""",
        "the part beside work",
    ),
    (
        "exposed",
        """
        covered = 0.0
        for c, d in other:
            a, b = max(work, key=lambda s: min(s[1], d) - max(s[0], c), default=(0, 0))
            covered += max(0.0, min(b, d) - max(a, c))
        return sum(d - c for c, d in other) - covered""",
        "Hint",
    ),
    (
        "exposed",
        """
        work.sort()
        other.sort()
        edges = sorted({t for s in work + other for t in s})
        inside = lambda spans, x, y: any(a <= x and y <= b for a, b in spans)
        return sum((y - x for x, y in zip(edges, edges[1:])
                    if inside(other, x, y) and not inside(work, x, y)), 0.0)""",
        "the input work was changed",
    ),
    (
        "exposed",
        """
        first = min([a for a, _ in work + other])
        last = max([b for _, b in work + other])
        quarters = [(i + 0.5) / 4 for i in range(math.floor(4 * first), math.ceil(4 * last))]
        return sum(0.25 for t in quarters if any(a <= t < b for a, b in other)
                   and not any(a <= t < b for a, b in work))""",
        "ticks of one length",
    ),
    (
        "exposed",
        """
        def length(spans):
            total, reached = 0.0, 0.0
            for start, end in sorted(spans):
                total += max(0.0, end - max(start, reached))
                reached = max(reached, end)
            return total
        return length(work + other) - length(work)""",
        "What lies before 0 is left out",
    ),
    ("state_bytes", "return 14 * (dense + routed) / (pp * dp)", "Hint"),
    (
        "state_bytes",
        "return (6 * copies + 8 / dp) * (dense + routed / ep) / pp",
        "only dp // ep hold that expert",
    ),
    (
        "state_bytes",
        "return copies * (6 * (dense + routed / ep) + 8 * (dense + routed) / dp) / pp",
        "a GPU's share of the optimizer stays",
    ),
    (
        "state_bytes",
        "return (6 * (dense + routed / ep) + 8 * (dense + routed) / dp) / pp",
        "copies is not used",
    ),
    (
        "run_cost",
        """
        steps = math.ceil(tokens / tokens_per_step)
        hours = steps * step_s / 3600 * gpus
        return hours, hours * rent, hours * watts / 1000""",
        "rounded",
    ),
    (
        "run_cost",
        """
        days = tokens / tokens_per_step * step_s / 86400
        return days * gpus, days * gpus * rent, days * gpus * watts""",
        "Hint",
    ),
    ("run_cost", "return tokens / tokens_per_step * step_s * gpus / 3600", "a tuple of 3"),
    (
        "both_orders",
        """
        found, kept = {}, frozenset()
        for one in decisions:
            before, kept = kept, kept | {one}
            found[one] = (price(before) - price(kept), price(before) - price(kept))
        return found""",
        "Hint",
    ),
    (
        "both_orders",
        """
        every = frozenset(decisions)
        return {d: (price(every) - price(every - {d}), price(frozenset({d})) - price(frozenset()))
                for d in decisions}""",
        "Both signs are turned",
    ),
    (
        "both_orders",
        """
        every = frozenset(decisions)
        return [(price(every - {d}) - price(every), price(frozenset()) - price(frozenset({d})))
                for d in decisions]""",
        "expected a dict",
    ),
    ("gain", "return max(compute, network) / max(compute, network / factor)", "the longer of"),
    ("gain", "return 1 / (1 - network / (compute + network) * (1 - 1 / factor))", "not used"),
    (
        "gain",
        "return (compute + (1 - overlapped) * network) / (compute + (1 - overlapped) * network "
        "/ factor)",
        "More is hidden here than there is arithmetic",
    ),
    ("mfu", "return 6 * tokens_per_second * flops_per_token / gpus / peak", "factor of 6"),
    ("mfu", "return tokens_per_second * flops_per_token / peak", "gpus is not used"),
    ("fit_efficiency", "return sum(flops) / sum(seconds) / peak", "All FLOP over all seconds"),
    (
        "fit_efficiency",
        "r = [f / t / peak for f, t in zip(flops, seconds)]\nreturn sum(r) / len(r)",
        "mean of the efficiencies",
    ),
    ("slowest_stage", "return max(max(costs), sum(costs) / stages)", "a bound"),
    (
        "slowest_stage",
        "size = math.ceil(len(costs) / stages)\n"
        "return max(sum(costs[i:i + size]) for i in range(0, len(costs), size))",
        "as many layers",
    ),
    (
        "slowest_stage",
        """
        low, high = math.ceil(max(costs)), math.ceil(sum(costs))
        while low < high:
            limit, count, own = (low + high) // 2, 1, 0
            for cost in costs:
                own += cost
                if own > limit:
                    count, own = count + 1, cost
            low, high = (limit + 1, high) if count > stages else (low, limit)
        return low""",
        "Only whole numbers are tried",
    ),
]


@pytest.mark.parametrize("at", range(len(WRONG)))
def test_a_wrong_answer_hears_what_it_got_wrong(at):
    name, body, says = WRONG[at]
    found = verdict(name, body)
    assert found.status == NOT_YET and says in found.message, found.line


def test_trying_all_cuts_runs_out_of_time():
    def all_cuts(costs, stages):
        cuts = combinations(range(1, len(costs)), stages - 1)
        ends = ((0, *cut, len(costs)) for cut in cuts)
        return min(max(sum(costs[a:b]) for a, b in pairwise(e)) for e in ends)

    found = judge(replace(registry.find("codesign.slowest_stage"), seconds=0.4), all_cuts)
    assert found.status == NOT_YET and "did not finish within 0.4 s" in found.message


LAB = """
    design = {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "kv_lora_rank": 512, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1024, "tokens": 360e9,
    }
    """
DESIGNS = [
    ("lab_design", "design['tokens'] = 1e12", "times the 14.0 days that are given"),
    ("lab_design", "design['tokens'] = 250e9", "250 B tokens, and 300 B are asked for"),
    ("lab_design", "design['kv_lora_rank'] = 1024", "memory binds"),
    ("lab_design", "design['kv_lora_rank'] = 8", "caches 72 numbers in a layer"),
    ("lab_design", "design['n_routed_experts'] = 32", "5.68 B parameters, and 10 B are asked for"),
    ("lab_design", "design['num_experts_per_tok'] = 12", "times the 14.0 days that are given"),
    ("lab_design", "design['top_k'] = 12", "there is no field 'top_k'"),
    ("lab_design", "design['tokens'] = '360e9'", "tokens = '360e9' is no number above 0"),
    ("lab_design", "design = list(design)", "returned a list of 8, expected a dict"),
    ("cluster_design", "pass", "10.31 B parameters, and 120 B are asked for"),
]


@pytest.mark.parametrize("at", range(len(DESIGNS)))
def test_a_design_that_misses_a_demand_hears_which_with_both_numbers(at):
    name, change, says = DESIGNS[at]
    found = verdict(name, textwrap.dedent(LAB) + f"{change}\nreturn design")
    assert found.status == NOT_YET and says in found.message, found.line


def test_all_that_is_missed_is_listed_at_once_a_line_each_with_every_number():
    change = "design |= {'num_hidden_layers': 60, 'tokens': 2.5e11, 'n_shared_experts': 9}"
    found = verdict("lab_design", textwrap.dedent(LAB) + f"{change}\nreturn design")
    head, *lines = found.message.splitlines()
    assert head == "case 1 (the whole brief): 4 demands are missed"
    assert all(line.startswith("- ") for line in lines[:-1]) and len(lines) == 5
    assert lines[-1].startswith("Your design: parameters ")
    for said in ("1.2 B", "10 B", "300 B", "at most 14.0", "at least 48"):
        assert said in lines[-1]


HINTED = [
    ("design['top_k'] = 12", "The task's table has every field's name"),
    ("design['n_shared_experts'] = 9", "what a shape must keep to"),
    ("design['tokens'] = 'many'", "is one number"),
    ("design['n_routed_experts'] = 32", "A token meets, in each layer"),
    ("design['kv_lora_rank'] = 1024", "A user's cache takes"),
    ("design['tokens'] = 9e11", "14 days hold about 5e21"),
]


@pytest.mark.parametrize("at", range(len(HINTED)))
def test_a_hint_belongs_to_what_is_missed(at):
    change, hint = HINTED[at]
    found = verdict("lab_design", textwrap.dedent(LAB) + f"{change}\nreturn design")
    assert hint in found.message.partition("Hint: ")[2], found.line


def test_a_sampled_answer_and_the_right_one_are_not_printed_alike():
    found = verdict("exposed", "return 1.9999999")
    assert "returned 1.9999999, expected 2" in found.message


def test_a_design_that_raises_is_told_so():
    assert verdict("lab_design", "return {}['tokens']").status == RAISED
