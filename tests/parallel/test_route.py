"""Rows on their way: rounded as the wire rounds them, and every byte by tier as predicted."""

import pytest
import torch
import torch.distributed as dist

from dsv3_tutorial.cost.comm import all_to_all, tier_bytes
from dsv3_tutorial.cost.tiers import Network, Tier
from dsv3_tutorial.moe.experts import Experts, experts_loop
from dsv3_tutorial.parallel import traffic
from dsv3_tutorial.parallel.dispatch import backward_bytes, forward_bytes, messages
from dsv3_tutorial.parallel.exchange import (
    BF16_COMBINE,
    FP8_DISPATCH,
    decode,
    encode,
    pack_fp8,
    row_bytes,
    unpack_fp8,
)
from dsv3_tutorial.parallel.expert import expert_parallel
from dsv3_tutorial.parallel.launch import launch

E, D = 16, 8
SIZES = [4, 2, 7, 5]  # tokens of each rank
WAYS = [("flat", None), ("deduplicated", None), ("two_stage", 2)]


def experts(dtype=torch.float64, hidden=D):
    made, draw = Experts(E, hidden, 6), torch.Generator().manual_seed(3)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=dtype)
    return made


class Layer(torch.nn.Module):
    """Something that has experts."""

    def __init__(self, own):
        super().__init__()
        self.experts = own


def tokens(sizes, dtype=torch.float64, width=D):
    """Each rank's x, indices, weights and the gradient that its output gets."""
    draw, made = torch.Generator().manual_seed(7), []
    for m in sizes:
        indices = torch.rand(m, E, generator=draw).argsort(dim=1)[:, :3]
        x, given = torch.randn(2, m, width, generator=draw, dtype=dtype)
        made.append((x, indices, torch.rand(m, 3, generator=draw, dtype=dtype), given))
    return made


def together(parts):
    x, indices, weights, given = (torch.cat(part) for part in zip(*parts))
    return x.requires_grad_(), indices, weights.requires_grad_(), given


def distance(a, b):
    return (a - b).abs().max().item() if a.numel() else 0.0


# FP8 on the way, BF16 on the way back


class Rounded(torch.autograd.Function):
    """A row as it would arrive, and its gradient: the form of the wire without the wire."""

    @staticmethod
    def forward(ctx, rows, wire):
        ctx.wire = wire
        return decode(encode(rows, wire.there), wire.there, rows)

    @staticmethod
    def backward(ctx, grad):
        return decode(encode(grad, ctx.wire.back), ctx.wire.back, grad), None


def rounded_visit(x, indices, weights, compute, owners):
    """One process: each owner in turn gets its rows rounded, and its sums are rounded too.

    owners: sets of experts, each an owner's; or a list of such lists, owners within owners.
    """
    out = torch.zeros_like(x)
    for owner in owners:
        inside = owner if isinstance(owner[0], list) else None
        held = torch.tensor(owner).flatten()
        mine = torch.isin(indices, held)
        row = mine.any(dim=1).nonzero()[:, 0]
        sent = Rounded.apply(x[row], FP8_DISPATCH)
        kept = torch.where(mine, weights, 0.0)[row]
        if inside:
            made = rounded_visit(sent, indices.where(mine, -1)[row], kept, compute, inside)
        else:
            made = compute(sent, indices[row], kept)
        out = out.index_add(0, row, Rounded.apply(made, BF16_COMBINE))
    return out


def rounded_once(way, per_node, world, x, indices, weights, compute):
    """What one process makes of x with the rounding of a dispatch."""
    if way == "flat":
        row = torch.arange(len(x)).repeat_interleave(indices.shape[1])
        sent = Rounded.apply(x[row], FP8_DISPATCH)
        made = compute(sent, indices.reshape(-1, 1), torch.ones(len(row), 1, dtype=x.dtype))
        made = Rounded.apply(made, BF16_COMBINE) * weights.reshape(-1, 1)
        return torch.zeros_like(x).index_add(0, row, made)
    ranks = [list(range(r * E // world, (r + 1) * E // world)) for r in range(world)]
    if way == "two_stage":
        ranks = [ranks[n : n + per_node] for n in range(0, world, per_node)]
    return rounded_visit(x, indices, weights, compute, ranks)


def fp8_case(way, per_node):
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = tokens([4, 1, 0, 5], width=136)
    whole, (x, indices, weights, given) = experts(hidden=136), together(parts)

    def compute(rows, chosen, weight):
        return experts_loop(rows, chosen, weight, whole.gate_up_proj, whole.down_proj)

    out = rounded_once(way, per_node, world, x, indices, weights, compute)
    (out * given).sum().backward()
    begin = sum(len(p[0]) for p in parts[:rank])
    mine = slice(begin, begin + len(parts[rank][0]))
    held = slice(rank * E // world, (rank + 1) * E // world)

    layer = Layer(experts(hidden=136))
    expert_parallel(layer, dispatch=way, ranks_per_node=per_node, fp8=True)
    own_x, own_indices, own_weights, own_given = together(parts[rank : rank + 1])
    own = layer.experts(own_x, own_indices, own_weights)
    (own * own_given).sum().backward()
    exact = compute(x, indices, weights)
    return {
        "output": distance(own, out[mine]),
        "x": distance(own_x.grad, x.grad[mine]),
        "weights": distance(own_weights.grad, weights.grad[mine]),
        "gate_up": distance(
            layer.experts.gate_up_proj.grad.to_local(), whole.gate_up_proj.grad[held]
        ),
        "down": distance(layer.experts.down_proj.grad.to_local(), whole.down_proj.grad[held]),
    }, distance(out, exact) / exact.abs().max().item()


def test_fp8_dispatch_equals_one_process_that_rounds_likewise():
    for found in launch(lambda: {way: fp8_case(*way) for way in WAYS}, 4):
        for way, (errors, rounding) in found.items():
            assert max(errors.values()) < 1e-10, (way, errors)
            assert 1e-3 < rounding < 0.1, (way, rounding)  # it was rounded at all


def test_a_row_of_fp8_is_one_message_and_survives_a_second_hop():
    rows = torch.randn(5, 300) * torch.logspace(-6, 6, 300)
    message = pack_fp8(rows)
    assert message.dtype == torch.uint8 and message.shape == (5, row_bytes(300, "fp8"))
    assert row_bytes(300, "fp8") == 300 + 3 * 4
    once = unpack_fp8(message, 300)
    assert torch.equal(pack_fp8(once)[:, 300:] <= message[:, 300:], torch.ones(5, 12).bool())
    assert torch.equal(unpack_fp8(pack_fp8(once), 300), once)
    assert torch.equal(once.bfloat16().float(), once)
    largest = rows.unflatten(1, (3, 100)).abs().amax()
    assert distance(once, rows) <= largest / 16
    assert unpack_fp8(pack_fp8(rows[:0]), 300).shape == (0, 300)


# bytes


def bytes_case(way, per_node, fp8):
    """What one forward and backward sends by tier, seen and predicted; and the flat one's time."""
    rank = dist.get_rank()
    parts = tokens(SIZES, torch.float32)
    layer = Layer(experts(torch.float32))
    expert_parallel(layer, dispatch=way, ranks_per_node=per_node, fp8=fp8)
    x, indices, weights, given = together(parts[rank : rank + 1])
    with traffic.record(NETWORK) as seen:
        out = layer.experts(x, indices, weights)
    with traffic.record(NETWORK) as seen_back:
        (out * given).sum().backward()
    return seen.bytes, seen_back.bytes, seen.clock


NETWORK = Network(Tier("nvlink", 1e-6, 160e9), Tier("infiniband", 2e-6, 40e9), 2)


@pytest.fixture(scope="module")
def seen_bytes():
    cases = [(way, n, fp8) for fp8 in (False, True) for way, n in WAYS]
    return launch(lambda: {case: bytes_case(*case) for case in cases}, 4)


def predicted(way, per_node, fp8, passes):
    indices = [part[1] for part in tokens(SIZES, torch.float32)]
    there, back = ("fp8", "bf16") if fp8 else ("as is", "as is")
    rows = row_bytes(D, there), row_bytes(D, back)
    return passes(messages(indices, E, way, per_node), *rows)


def by_tier(matrices):
    each = [tier_bytes(matrix, range(4), NETWORK) for matrix in matrices]
    return {tier: sum(found[tier] for found in each) for tier in ("inside", "across")}


def test_the_bytes_seen_by_tier_are_those_predicted_from_the_choice_alone(seen_bytes):
    for case in seen_bytes[0]:
        for which, passes in ((0, forward_bytes), (1, backward_bytes)):
            total = {
                tier: sum(rank[case][which][tier] for rank in seen_bytes)
                for tier in ("inside", "across")
            }
            assert total == by_tier(predicted(*case, passes)), (case, which)


def test_fewer_bytes_cross_when_rows_are_sent_once_a_rank_and_fewest_once_a_node(seen_bytes):
    rows = {}
    for way, n in WAYS:
        stages = messages([part[1] for part in tokens(SIZES, torch.float32)], E, way, n)
        rows[way] = by_tier([s.rows for s in stages])["across"]
    assert rows["flat"] > rows["deduplicated"] > rows["two_stage"] > 0


def test_the_virtual_time_of_a_flat_pass_is_that_of_its_messages(seen_bytes):
    case = ("flat", None, False)
    time = 0.0
    for matrix in predicted(*case, forward_bytes):
        time += all_to_all(matrix, range(4), NETWORK)
    assert {rank[case][2] for rank in seen_bytes} == {time}
