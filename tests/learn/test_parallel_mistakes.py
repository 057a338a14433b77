"""What learners really got wrong in lesson 3, and the sentence that a verdict answers with."""

import dataclasses
import inspect
import math
import textwrap

import pytest
import torch
import torch.nn.functional as F

from dsv3_tutorial.cost.sharding import bytes_across
from dsv3_tutorial.learn import registry
from dsv3_tutorial.learn.exercises.parallel import ring_trace, split_ranks
from dsv3_tutorial.learn.verdict import NOT_YET, PASSED, RAISED, judge


def verdict(name, body):
    exercise = registry.find(f"parallel.{name}")
    head = inspect.signature(exercise.function)
    plain = [one.replace(annotation=one.empty) for one in head.parameters.values()]
    head = head.replace(parameters=plain, return_annotation=head.empty)
    body = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    space = {"torch": torch, "math": math, "F": F, "bytes_across": bytes_across}
    exec(f"def answer{head}:\n{body}", space)
    return judge(dataclasses.replace(exercise, seconds=5.0), space["answer"])


def ring(first, second, second_is="", steps="world - 1"):
    """A ring whose two phases send and put at these places."""
    return f"""
        c = list(x.chunk(world))
        for s in range({steps}):
            send, put = {first}
            c[put % world] = c[put % world] + exchange(c[send % world])
        for s in range({"world - 1" if second else "0"}):
            send, put = {second or "0, 0"}
            c[put % world] = {second_is}exchange(c[send % world])
        return torch.cat(c)"""


FIRST, SECOND = "rank - s, rank - s - 1", "rank - s + 1, rank - s"
ADDS = "c[put % world] + "

RINGS = [
    (ring("rank + s, rank + s + 1", "rank + s - 1, rank + s"), ring_trace.TURNED),
    (ring("rank + s, rank + s - 1", "rank + s + 1, rank + s"), ring_trace.TURNED),
    (ring("rank + s, rank + s + 1", "rank - s, rank - s - 1"), ring_trace.TURNED),
    (ring("rank + s, rank - s - 1", "rank - s, rank - s - 1", ADDS), ring_trace.TURNED),
    (ring(FIRST, SECOND, ADDS), ring_trace.ADDED),
    (ring(FIRST, "rank + s + 1, rank + s + 2", ADDS), ring_trace.ADDED),
    (ring(FIRST, None, steps="world"), ring_trace.ONE_PHASE),
    (ring(FIRST, None, steps="2 * world - 2"), ring_trace.ADDED),
    (ring(FIRST, None, steps="2 * world"), ring_trace.STEPS),
    (ring(FIRST, "rank + s, rank + s - 1"), ring_trace.EARLY),
    (ring(FIRST, "rank + s + 1, rank + s + 2"), ring_trace.PLACED),
    (ring("rank - s, rank - s + 1", SECOND), ring_trace.STALE),
    (ring("rank, rank", SECOND), ring_trace.MIXED),
    (ring("rank + 2 * s, rank + 2 * s + 2", SECOND), ring_trace.MIXED),
]


@pytest.mark.parametrize(("body", "said"), RINGS, ids=range(len(RINGS)))
def test_a_wrong_ring_is_told_what_its_messages_give_away(body, said):
    found = verdict("ring_all_reduce", body)
    assert found.status == NOT_YET and found.message.startswith("case 1 (4 ranks")
    assert found.message.endswith(f"Hint: {said}"), found.line


def test_a_right_ring_in_other_chunk_numbers_gives_nothing_away():
    assert verdict("ring_all_reduce", ring(FIRST, SECOND)).status == PASSED
    turned = ring("-rank + s, -rank + s + 1", "-rank + s - 1, -rank + s")
    assert verdict("ring_all_reduce", turned).status == PASSED


SPLIT = """
    n = len(w_gate) // world
    mine = slice(rank * n, rank * n + n)
    gate, up, down = w_gate[mine], w_up[mine], w_down[:, mine]
    return all_reduce((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)"""
CHUNKS = """
    gate, up = (w.chunk(world, dim={0})[rank] for w in (w_gate, w_up))
    down = w_down.chunk(world, dim={1})[rank]
    return all_reduce(F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down))"""

SPLITS = [
    (CHUNKS.format(1, 0), RAISED, "a column of the formula is a row here, so cut these two by row"),
    (CHUNKS.format(1, 1), RAISED, "a column of the formula is a row here, so cut these two by row"),
    (CHUNKS.format(0, 0), RAISED, "w_down is cut along D, its outputs: cut it along F"),
    (SPLIT.replace("gate.T", "gate"), RAISED, "Weights are stored (out, in)"),
    (SPLIT.replace("x @ up.T", "torch.einsum('md,df->mf', x, up)"), RAISED, "stored (out, in)"),
    (SPLIT.replace("w_gate[mine]", "W_gate[mine]"), RAISED, "name 'W_gate' is not defined"),
    (
        """
        zero, n = torch.zeros(len(w_gate), dtype=x.dtype), len(w_gate) // world
        gate, up = torch.addmm(zero, x, w_gate.T), torch.addmm(zero, x, w_up.T)
        mine = slice(rank * n, rank * n + n)
        return all_reduce((F.silu(gate) * up)[:, mine] @ w_down[:, mine].T)""",
        NOT_YET,
        "a rank computes 720 FLOP; its share is 432",
    ),
    (SPLIT.replace("w_gate[mine]", "w_gate[mine].detach()"), NOT_YET, "no gradient reaches w_gate"),
    (SPLIT.replace("F.silu(x ", "F.silu(x.data "), NOT_YET, "the gradient of x is not"),
    (SPLIT.replace(" return", " with torch.no_grad(): return"), NOT_YET, split_ranks.DETACHED),
]


@pytest.mark.parametrize(("body", "status", "said"), SPLITS, ids=range(len(SPLITS)))
def test_a_wrong_split_hears_how_weights_lie_what_it_computes_and_where_gradients_end(
    body, status, said
):
    found = verdict("column_row", body)
    assert found.status == status and said in found.message, found.line
    assert ("Hint: Weights" in found.message) <= ("mat1 and" in found.line or "einsum" in body)


def test_products_written_by_hand_cost_what_the_same_matmul_costs():
    by_hand = SPLIT.replace("x @ gate.T", "(x[..., None, :] * gate).sum(-1)")
    assert verdict("column_row", SPLIT).status == verdict("column_row", by_hand).status == PASSED


CACHE = """
    numbers = {mla} if cfg.is_mla else 2 * {heads} * cfg.head_size
    return {tokens} * numbers * cfg.num_hidden_layers * bytes_per_element"""
RIGHT_CACHE = {
    "mla": "(cfg.kv_lora_rank + cfg.qk_rope_head_dim)",
    "heads": "-(-cfg.kv_heads // tp)",
    "tokens": "-(-tokens // dp)",
}


@pytest.mark.parametrize(
    ("part", "wrong", "where", "said"),
    [
        ("tokens", "(tokens // dp)", "case 6", "the fullest replica holds one more."),
        ("heads", "(cfg.kv_heads // tp)", "case 4", "More GPUs than heads: each still holds one"),
        ("mla", "576", "a hidden case", "576 is V3's latent"),
    ],
)
def test_a_cache_rounded_down_or_of_one_model_only_is_refused(part, wrong, where, said):
    assert verdict("cache_per_gpu", CACHE.format(**RIGHT_CACHE)).status == PASSED
    found = verdict("cache_per_gpu", CACHE.format(**{**RIGHT_CACHE, part: wrong}))
    assert found.message.startswith(where) and said in found.message


ORDER = """
    ahead = min(stages - 1 - stage, micro_batches)
    order = [f"F{{i}}" for i in range(ahead)]
    for i in range(ahead, micro_batches):
        order += {pair}
    return order + [f"B{{i}}" for i in range({left})]"""
PAIR, LEFT = '[f"F{i}", f"B{i - ahead}"]', "micro_batches - ahead, micro_batches"

BUBBLE = """
    ends, clocks = {{}}, []
    for stage, order in enumerate(orders):
        clock = 0
        for name in order:
            at = stage - 1 if name[0] == "F" else stage + 1
            if {edges}:
                clock = max(clock, {known})
            clock += t_f if name[0] == "F" else t_b
            ends[name, stage] = clock
        clocks.append(clock)
    return max(clocks) - len(orders[0]) / 2 * (t_f + t_b)"""

OVERLAP = "return 2 * (compute + communication) / ({})"
SLOW = "compute * sms / (sms - reserved)"

NAMED = [
    ("destination_counts", "return torch.bincount((indices % world).flatten(), minlength=world)",
     "This deals experts out like cards; here neighbours share a rank."),
    ("one_f_one_b", ORDER.format(pair='[f"B{i - ahead}", f"F{i}"]', left=LEFT),
     "a forward first, then the oldest backward"),
    ("one_f_one_b", ORDER.format(pair=PAIR, left="micro_batches - ahead + 1, micro_batches"),
     "the `ahead` that are left come last"),
    ("one_f_one_b", ORDER.format(pair=PAIR, left="micro_batches - ahead - 1, micro_batches"),
     "the `ahead` that are left come last"),
    ("one_f_one_b", ORDER.format(pair='[f"F{i}", f"B{i}"]', left="ahead"),
     "the oldest micro-batch goes back first"),
    ("bubble", BUBBLE.format(edges="0 <= at < len(orders)", known="ends[name, at]"),
     "B0 of stage 1 is not known yet: go on with another stage, and come back"),
    ("bubble", BUBBLE.format(edges="True", known="ends[name, at]"),
     "The first stage's forwards and the last stage's backwards wait for no other stage."),
    ("bubble", BUBBLE.format(edges="True", known="ends.get((name, at), 0)"),
     "is not known yet when the stages are gone through once"),
    ("overlap_speedup", OVERLAP.format(f"max({SLOW}, communication)"),
     "Two micro-batches, twice the longer"),
    ("overlap_speedup", OVERLAP.format("2 * max(compute * (1 + reserved / sms), communication)"),
     "sms / (sms - reserved) as long"),
    ("overlap_speedup", OVERLAP.format(f"compute + max({SLOW}, communication) + communication"),
     "Steady state: no fill"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "body", "said"), NAMED, ids=range(len(NAMED)))
def test_a_mistake_that_people_make_is_answered_with_its_own_sentence(name, body, said):
    found = verdict(name, body)
    assert found.status != PASSED and said in found.message, found.line


ROUNDS = """
    ends = {{}}
    for _ in range(sum(map(len, orders))):
        for stage, order in enumerate(orders):
            clock = 0
            for name in order:
                before = stage + (-1 if name[0] == "F" else 1)
                clock = max(clock, ends.get((before, name), 0)) + (t_f if name[0] == "F" else t_b)
                ends[stage, name] = clock
    return {length} - {work} * (t_f + t_b)"""
LENGTH, HALF_OF_IT = "max(ends.values())", "len(orders[0]) / 2"
LAST_STAGE = "max(ends[len(orders) - 1, name] for name in orders[-1])"


def test_a_step_that_ends_with_the_last_stage_is_told_from_backwards_that_do_not_wait():
    assert verdict("bubble", ROUNDS.format(length=LENGTH, work=HALF_OF_IT)).status == PASSED
    for length, work, said in (
        (LAST_STAGE, HALF_OF_IT, "The step ends with stage 0's last backward"),
        (LENGTH, "len(orders[0])", "An order holds F and B, so it is 2 x micro-batches long"),
        (LENGTH, "len(orders)", "len(orders) counts the stages"),
    ):
        assert said in verdict("bubble", ROUNDS.format(length=length, work=work)).message


def test_a_placement_may_be_a_list():
    body = """
        from itertools import permutations
        cost = lambda order: bytes_across(order, sizes, traffic, gpus_per_node)
        return list(min(permutations(sizes), key=cost))"""
    assert verdict("place_groups", body).status == PASSED
