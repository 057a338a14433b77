"""Lesson 3's exercises: ranks that cannot hang, right answers in any style, wrong ones named."""

import dataclasses
import math
import textwrap

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dsv3_tutorial.cost.sharding import bytes_across
from dsv3_tutorial.learn import registry
from dsv3_tutorial.learn.exercises.parallel.lockstep import add_up, pass_on, together
from dsv3_tutorial.learn.exercises.parallel.products import counted_flops
from dsv3_tutorial.learn.submission import recheck
from dsv3_tutorial.learn.verdict import PASSED, RAISED, judge
from dsv3_tutorial.parallel.launch import launch
from dsv3_tutorial.parallel.rings import neighbour_exchange

HEADS = {
    "ring_all_reduce": "x, rank, world, exchange",
    "column_row": "x, w_gate, w_up, w_down, rank, world, all_reduce",
    "cache_per_gpu": "cfg, tokens, tp, dp, bytes_per_element=2",
    "destination_counts": "indices, experts_per_rank, world",
    "node_copies": "indices, experts_per_node, nodes, home",
    "one_f_one_b": "stage, stages, micro_batches",
    "bubble": "orders, t_f, t_b",
    "place_groups": "sizes, traffic, gpus_per_node",
    "overlap_speedup": "compute, communication, sms=132, reserved=20",
    "hierarchical_all_reduce": "x, reduce_scatter, all_reduce, all_gather",
    "find_the_bug": "replicated, expert, counts, bias, gamma, max_norm, world, all_reduce",
}


def source(name, body):
    return f"def answer({HEADS[name]}):\n" + textwrap.indent(
        textwrap.dedent(body).strip("\n"), "    "
    )


def written(name, body):
    """An answer as a cell would define it."""
    space = {"torch": torch, "math": math, "F": F, "bytes_across": bytes_across}
    exec(source(name, body), space)
    return space["answer"]


def verdict(name, body, seconds=10.0):
    exercise = dataclasses.replace(registry.find(f"parallel.{name}"), seconds=seconds)
    return judge(exercise, written(name, body))


RING_IN_PLACE_OF_A_COPY = """
c = x.clone().view(world, -1)
for s in range(world - 1):
    c[(rank - s - 1) % world] += exchange(c[(rank - s) % world])
for s in range(world - 1):
    c[(rank - s) % world] = exchange(c[(rank - s + 1) % world])
return c.flatten()
"""

# the words of each core exercise's hints, as code; and other right styles
RIGHT = [
    (
        "ring_all_reduce",
        """
        chunks = list(x.chunk(world))
        for s in range(world - 1):
            arrived = exchange(chunks[(rank - s) % world])
            chunks[(rank - s - 1) % world] = chunks[(rank - s - 1) % world] + arrived
        for s in range(world - 1):
            chunks[(rank - s) % world] = exchange(chunks[(rank + 1 - s) % world])
        return torch.cat(chunks)""",
    ),
    ("ring_all_reduce", RING_IN_PLACE_OF_A_COPY),
    (
        "ring_all_reduce",
        """
        parts, i = [p.clone() for p in x.split(len(x) // world)], (rank + 2) % world
        for s in range(2 * world - 2):
            got = exchange(parts[i])
            i = (i - 1) % world
            parts[i] = parts[i] + got if s < world - 1 else got
        print("rank", rank, "is done")
        return torch.cat(parts)""",
    ),
    (
        "column_row",
        """
        part = w_gate.shape[0] // world
        gate, up = w_gate[rank * part : (rank + 1) * part], w_up[rank * part : (rank + 1) * part]
        hidden = F.silu(x @ gate.T) * (x @ up.T)
        return all_reduce(hidden @ w_down[:, rank * part : (rank + 1) * part].T)""",
    ),
    (
        "column_row",
        """
        both = F.linear(x, torch.cat([w_gate[rank::world], w_up[rank::world]]))
        gate, up = both.chunk(2, -1)
        return all_reduce(F.linear(gate * gate.sigmoid() * up, w_down[:, rank::world]))""",
    ),
    (
        "column_row",
        """
        g, u = (w.chunk(world)[rank] for w in (w_gate, w_up))
        h = F.silu(torch.einsum("...d,fd->...f", x, g)) * torch.einsum("...d,fd->...f", x, u)
        return all_reduce(torch.einsum("...f,df->...d", h, w_down.chunk(world, dim=1)[rank]))""",
    ),
    (
        "cache_per_gpu",
        """
        if cfg.is_mla:
            numbers = cfg.kv_lora_rank + cfg.qk_rope_head_dim
        else:
            numbers = -(-cfg.kv_heads // tp) * 2 * cfg.head_size
        return -(-tokens // dp) * numbers * cfg.num_hidden_layers * bytes_per_element""",
    ),
    (
        "destination_counts",
        "return torch.bincount((indices // experts_per_rank).flatten(), minlength=world)",
    ),
    (
        "destination_counts",
        "return F.one_hot(indices // experts_per_rank, world).sum(dim=(0, 1))",
    ),
    (
        "node_copies",
        """
        nodes_of = indices // experts_per_node
        table = torch.zeros(len(indices), nodes, dtype=torch.bool)
        table.scatter_(1, nodes_of, True)
        table[:, home] = False
        return table.T.nonzero()[:, 1], table.sum(dim=0)""",
    ),
    (
        "node_copies",
        """
        where, tokens, rows = (indices // experts_per_node).tolist(), [], []
        for node in range(nodes):
            crossing = [t for t, on in enumerate(where) if node in on and node != home]
            tokens, rows = tokens + crossing[::-1], rows + [len(crossing)]
        return torch.tensor(tokens, dtype=torch.int64), torch.tensor(rows)""",
    ),
    (
        "one_f_one_b",
        """
        ahead = min(stages - 1 - stage, micro_batches)
        order = [f"F{i}" for i in range(ahead)]
        for i in range(ahead, micro_batches):
            order += [f"F{i}", f"B{i - ahead}"]
        return order + [f"B{i}" for i in range(micro_batches - ahead, micro_batches)]""",
    ),
    (
        "one_f_one_b",
        """
        order, f, b = [], 0, 0
        while b < micro_batches:
            if f < micro_batches and f - b < stages - stage:
                order, f = order + [f"F{f}"], f + 1
            else:
                order, b = order + [f"B{b}"], b + 1
        return order""",
    ),
    (
        "bubble",
        """
        ends, seconds = {}, {"F": t_f, "B": t_b}
        for _ in range(sum(map(len, orders))):
            for stage, order in enumerate(orders):
                clock = 0
                for name in order:
                    before = stage + (-1 if name[0] == "F" else 1)
                    clock = max(clock, ends.get((before, name), 0)) + seconds[name[0]]
                    ends[stage, name] = clock
        return max(ends.values()) - len(orders[0]) / 2 * (t_f + t_b)""",
    ),
    (
        "place_groups",
        """
        from itertools import permutations
        cost = lambda order: bytes_across(order, sizes, traffic, gpus_per_node)
        return list(min(permutations(sizes), key=cost))""",
    ),
    (
        "overlap_speedup",
        """
        left = compute * sms / (sms - reserved)
        return (compute + communication) / max(left, communication)""",
    ),
    (
        "hierarchical_all_reduce",
        """
        part = all_reduce(reduce_scatter(x))
        return all_gather(part)""",
    ),
    (
        "find_the_bug",
        """
        n = len(replicated)
        expert = expert / world
        both = torch.cat([replicated / world, counts.to(bias.dtype), expert.square().sum()[None]])
        both = all_reduce(both)
        norm = (both[:n].square().sum() + both[-1]).sqrt()
        shrink = min(1.0, max_norm / (norm.item() + 1e-6))
        load = both[n:-1]
        bias = bias + gamma * (load.sum() - len(load) * load).sign()
        return both[:n] * shrink, expert * shrink, bias""",
    ),
]

# wrong or hostile, and what the verdict must say; none of them is a declared mutant
WRONG = [
    ("ring_all_reduce", "return x * world", "values differ"),
    ("ring_all_reduce", "exchange(x)", "is there a return?"),
    ("ring_all_reduce", "while True: exchange(x)", "after 64 messages no rank has returned"),
    ("ring_all_reduce", "while True: pass", "did not finish"),
    (
        "ring_all_reduce",
        "while True:\n    try: exchange(x)\n    except: pass",
        "did not finish",
    ),
    (
        "ring_all_reduce",
        "try: y = exchange(x)\nexcept: y = x\nreturn x + y",
        "an except without a type",
    ),
    ("ring_all_reduce", "return answer(x, rank, world, exchange)", "calls itself without end"),
    ("ring_all_reduce", "import sys\nsys.exit()", "SystemExit on line 3"),
    ("ring_all_reduce", "return exchange(x.tolist())", "exchange takes a tensor, this is a list"),
    (
        "ring_all_reduce",
        "if rank == 1: raise KeyError('boom')\nreturn exchange(x)",
        "KeyError on line 2: 'boom (rank 1 of 4)'",
    ),
    (
        "ring_all_reduce",
        "return x + exchange(x) if rank else x",
        "rank 0 returns where rank 1 makes call 1, exchange, and waits for ever",
    ),
    (
        "ring_all_reduce",
        "exchange(x[: rank + 1])\nreturn x",
        "call 1 differs between ranks: exchange of (1,) in float64 on rank 0",
    ),
    ("ring_all_reduce", RING_IN_PLACE_OF_A_COPY.replace(".clone()", ""), "x was changed"),
    (
        "column_row",
        """
        y = (F.silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T
        return all_reduce(y if rank == 0 else torch.zeros_like(y))""",
        "a rank computes 864 FLOP; its share is 432",
    ),
    (
        "column_row",
        """
        g, u, d = w_gate[rank::world], w_up[rank::world], w_down[:, rank::world]
        left, right = ((F.silu(x @ g.T) * (x @ u.T)) @ d.T).split([1, x.shape[-1] - 1], dim=-1)
        return torch.cat([all_reduce(left), all_reduce(right)], dim=-1)""",
        "144 bytes in 2 calls; the budget is 144 in 1",
    ),
    ("destination_counts", "return (indices // experts_per_rank).unique()", "values differ"),
    ("node_copies", "return indices, indices, indices", "two flat tensors"),
    ("node_copies", "return None, None", "two flat tensors"),
    (
        "node_copies",
        "return torch.zeros(0).long(), torch.tensor([1, -1] + [0] * (nodes - 2))",
        "rows add up to 0, but there are 0 tokens",
    ),
    ("one_f_one_b", "return [('F', 0)]", "a list of text"),
    ("one_f_one_b", "return ['F0'] * 2 * micro_batches", "F0 stands 12 times"),
    (
        "one_f_one_b",
        "return [f'B{i}' for i in range(micro_batches)] + [f'F{i}' for i in range(micro_batches)]",
        "B0 stands before F0",
    ),
    ("bubble", "orders[0].pop()\nreturn (len(orders) - 1) * (t_f + t_b)", "orders was changed"),
    ("place_groups", "return set(sizes)", "the name of every group once"),
    ("place_groups", "sizes.clear()\nreturn ()", "the name of every group once"),
    (
        "hierarchical_all_reduce",
        "reduce_scatter(x)\nreturn all_gather(all_reduce(reduce_scatter(x)))",
        "96 bytes to collectives in all, the budget is 64",
    ),
]


@pytest.mark.parametrize(("name", "body"), RIGHT, ids=lambda text: text[:24].strip())
def test_right_answers_in_other_styles_pass_and_so_do_the_hints_own_words(name, body):
    assert verdict(name, body).status == PASSED, verdict(name, body).line


@pytest.mark.parametrize(("name", "body", "said"), WRONG, ids=lambda text: text[:24].strip())
def test_a_wrong_answer_is_told_so_in_words_and_cannot_hang(name, body, said):
    found = verdict(name, body, seconds=1.0)
    assert found.status != PASSED and said in found.message, found.line


def test_what_a_rank_prints_is_shown_once_and_in_rank_order():
    printed = verdict(*RIGHT[2]).printed.splitlines()
    assert printed[:5] == [f"rank {rank} is done" for rank in (0, 1, 2, 3, 0)]


def test_an_answer_is_checked_from_its_source_alone_as_grade_does():
    cell = '@exercise("parallel.ring_all_reduce")\n' + source(*RIGHT[1])
    found = recheck(["import torch", cell], "parallel.ring_all_reduce")
    assert found["status"] == PASSED
    hangs = cell.replace("range(world - 1)", "range(rank + 1)")
    assert (
        "waits for ever" in recheck(["import torch", hangs], "parallel.ring_all_reduce")["message"]
    )


def _with_real_messages(answer):
    rank, world = dist.get_rank(), dist.get_world_size()
    return answer(torch.arange(8.0) + 100 * rank, rank, world, neighbour_exchange())


def test_a_passed_ring_runs_unchanged_on_real_ranks():
    answer = written(*RIGHT[2])
    assert judge(registry.find("parallel.ring_all_reduce"), answer).status == PASSED
    results = launch(_with_real_messages, 4, answer, echo=False)
    assert all(torch.equal(got, 4 * torch.arange(8.0) + 600) for got in results)


def test_simulated_ranks_meet_message_by_message_and_see_only_what_was_sent():
    seen = []

    def chatty(rank, exchange, all_reduce):
        first = exchange(torch.tensor([rank]))
        total = all_reduce(first * 10)
        seen.append((rank, first.item(), total.item()))
        first += 1  # an answer is the rank's own
        return first, total

    ran = together(
        chatty,
        lambda rank, collective: (rank, collective("exchange"), collective("all_reduce")),
        3,
        {"exchange": pass_on, "all_reduce": add_up},
    )
    assert seen == [(0, 2, 30), (1, 0, 30), (2, 1, 30)]
    assert [result[0].item() for result in ran.results] == [3, 1, 2]
    assert [message.kind for message in ran.sent[0]] == ["exchange", "all_reduce"]
    assert ran.bytes() == 16 and ran.bytes("exchange") == 8


def test_ranks_in_different_collectives_would_hang():
    ran = together(
        lambda rank, exchange, all_reduce: (exchange if rank else all_reduce)(torch.ones(2)),
        lambda rank, collective: (rank, collective("exchange"), collective("all_reduce")),
        2,
        {"exchange": pass_on, "all_reduce": add_up},
    )
    assert "all_reduce of (2,) in float32 on rank 0, exchange of (2,)" in ran.trouble


def test_an_error_of_a_rank_keeps_its_type_and_names_the_rank():
    def fails(rank):
        raise RuntimeError("no") if rank else RuntimeError()

    for ranks, said in (([0], r"^\(rank 0 of 1\)$"), ([1], r"^no \(rank 0 of 1\)$")):
        with pytest.raises(RuntimeError, match=said):
            together(fails, lambda rank, collective, ranks=ranks: (ranks[rank],), 1, {})


@pytest.mark.parametrize(
    ("product", "flops"),
    [
        (lambda x, w: x @ w.T, 240),
        (lambda x, w: torch.matmul(x, w.T), 240),
        (lambda x, w: x.flatten(0, 1).mm(w.T), 240),
        (lambda x, w: F.linear(x, w), 240),
        (lambda x, w: torch.einsum("...d,fd->...f", x, w), 240),
        (lambda x, w: torch.einsum("b s d, f d -> b s f", x, w), 240),
        (lambda x, w: torch.einsum("bsd,fd", x, w), 240),
        (lambda x, w: torch.addmm(torch.zeros(5), x.flatten(0, 1), w.T), 240),
        (lambda x, w: torch.baddbmm(torch.zeros(5), x, w.T.expand(2, 4, 5)), 240),
        (lambda x, w: torch.addbmm(torch.zeros(5), x, w.T.expand(2, 4, 5)), 240),
        (lambda x, w: torch.tensordot(x, w, ([2], [1])), 240),
        (lambda x, w: torch.inner(x, w), 240),
        (lambda x, w: (x[..., None, :] * w).sum(-1), 240),
        (lambda x, w: x * w[0] * 2, 0),
        (lambda x, w: x @ w[0], 48),
        (lambda x, w: F.silu(x), 0),
    ],
)
def test_matrix_products_are_counted_however_they_are_written(product, flops):
    x, w = torch.ones(2, 3, 4), torch.ones(5, 4)
    assert counted_flops(lambda: product(x, w)) == flops


def test_the_core_fits_its_forty_minutes_in_the_lessons_order():
    core = list(registry.load("parallel").values())[:6]
    assert [one.name.partition(".")[2] for one in core] == list(HEADS)[:6]
    assert sum(one.minutes for one in core) <= 40


def test_the_find_the_bug_cell_counts_its_bugs_on_the_first_run():
    found = verdict(
        "find_the_bug",
        """
        replicated, expert = all_reduce(replicated) / world, all_reduce(expert) / world
        norm = (replicated.square().sum() + expert.square().sum()).sqrt()
        shrink = (max_norm / norm).clamp(max=1.0)
        counts = counts.to(bias.dtype)
        bias = bias + gamma * torch.sign(counts.mean() - counts)
        return replicated * shrink, expert * shrink, bias""",
    )
    assert found.status != RAISED and "All three bugs are left." in found.message
