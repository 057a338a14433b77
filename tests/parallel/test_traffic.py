"""What ranks send is seen whoever sends it, and the virtual clock is `cost.comm`, exactly."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dsv3_tutorial.cost import comm
from dsv3_tutorial.cost.comm import Network, Tier
from dsv3_tutorial.parallel import traffic
from dsv3_tutorial.parallel.calls import Call, sent_by
from dsv3_tutorial.parallel.clock import Compute, Mark, TraceError, Wait, retime, timeline
from dsv3_tutorial.parallel.launch import launch
from dsv3_tutorial.parallel.rings import neighbour_exchange, ring_all_reduce

INSIDE, ACROSS = Tier("inside", 3e-6, 160e9), Tier("across", 5e-6, 40e9)
TWO_NODES = Network(INSIDE, ACROSS, 2)
SLOWER = TWO_NODES.slower(across=10)
RATE = 1e12
WORLD = (0, 1, 2, 3)
# PyTorch 2.13 warns of the old names; 2.11 knows no others.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
N = 64  # float32 numbers, 256 bytes


def collectives():
    """One block per collective, by torch.distributed's own functions."""
    x, y, rows = torch.ones(N), torch.empty(4 * N), [torch.empty(N) for _ in WORLD]
    rank = dist.get_rank()
    splits = [rank + 1, 0, 2, 3]
    into = [[1, 2, 3, 4], [0] * 4, [2] * 4, [3] * 4][rank]
    return {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: all_gather(y, x),
        "all_gather_list": lambda: dist.all_gather(rows, x),
        "reduce_scatter": lambda: reduce_scatter(torch.empty(N // 4), x),
        "broadcast": lambda: dist.broadcast(x, 1),
        "reduce": lambda: dist.reduce(x, 1),
        "gather": lambda: dist.gather(x, rows if rank == 2 else None, 2),
        "scatter": lambda: dist.scatter(torch.empty(N), rows if rank == 2 else None, 2),
        "barrier": lambda: dist.barrier(),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(N), x),
        "uneven": lambda: dist.all_to_all_single(
            torch.empty(sum(into), 8), torch.ones(sum(splits), 8), into, splits
        ),
    }


def see(block, network=TWO_NODES, **options):
    dist.barrier()
    with traffic.record(network, **options) as seen:
        block()
    return seen


def compute_then_meet(seen):
    """Rank r computes r times as long; an all-reduce waits for the last."""
    seen.compute(dist.get_rank() * 1e9)
    dist.all_reduce(torch.ones(N))
    seen.mark("met")


def pass_on():
    """A message handed from rank to rank, each waiting for it before sending on."""
    x, rank = torch.ones(N), dist.get_rank()
    if rank:
        dist.recv(x, rank - 1)
    if rank < 3:
        dist.send(x, rank + 1)


def swap(seen):
    """Neighbours exchange messages, receives first, and compute before they wait."""
    x, other = torch.ones(N), dist.get_rank() ^ 1
    ops = [dist.P2POp(dist.irecv, torch.empty(N), other), dist.P2POp(dist.isend, x, other)]
    works = dist.batch_isend_irecv(ops)
    seen.compute(1e3)
    for work in works:
        work.wait()


def hide(seen):
    """An all-reduce under way while the rank computes longer than it takes."""
    work = dist.all_reduce(torch.ones(N), async_op=True)
    seen.compute(1e9)
    work.wait()


def fan():
    """Ten messages of one rank to another, each send waited for."""
    x, rank = torch.ones(N), dist.get_rank()
    for tag in range(10):
        if rank == 0:
            dist.isend(x, 2, tag=tag).wait()
        if rank == 2:
            dist.recv(x, 0, tag=tag)


def ring():
    """A ring all-reduce of messages, by the reference of the lesson."""
    ring_all_reduce(torch.ones(4 * N), dist.get_rank(), 4, neighbour_exchange())


def unlike():
    """What is sent as float64 (2,) arrives as float32 (4,): equal bytes, other numbers."""
    with pytest.raises(TraceError) as caught, traffic.record(TWO_NODES):
        if dist.get_rank() == 0:
            dist.send(torch.ones(2, dtype=torch.float64), 1)
        if dist.get_rank() == 1:
            dist.recv(torch.ones(4), 0)
    return str(caught.value)


def by_dtensor():
    mesh = init_device_mesh("cpu", (4,))
    x = distribute_tensor(torch.ones(8, N), mesh, [Shard(0)])
    w = distribute_tensor(torch.ones(N, N), mesh, [Replicate()]).requires_grad_()
    with traffic.record(TWO_NODES) as seen:
        (x @ w).redistribute(placements=[Replicate()]).sum().backward()
        w.grad.full_tensor()
    return seen


def inside_dtensor():
    """A product that leaves partial sums, and a relu that makes DTensor add them by itself."""
    mesh = init_device_mesh("cpu", (4,))
    x = distribute_tensor(torch.ones(8, N), mesh, [Shard(1)])
    w = distribute_tensor(torch.ones(N, N), mesh, [Shard(0)])
    with traffic.record(TWO_NODES) as seen:
        torch.relu(x @ w).to_local()
    return seen


def by_fsdp():
    mesh = init_device_mesh("cpu", (4,))
    layer = nn.Linear(N, N, bias=False)
    fully_shard(layer, mesh=mesh)
    with traffic.record(TWO_NODES) as seen:
        layer(torch.ones(2, N)).sum().backward()
    return seen


def by_ddp():
    layer = DistributedDataParallel(nn.Linear(N, N, bias=False))
    with traffic.record(TWO_NODES) as seen:
        layer(torch.ones(2, N)).sum().backward()
    return seen


def groups():
    """Two groups in two nodes, then one across for each place: a hierarchical all-reduce."""
    rank, x = dist.get_rank(), torch.ones(N)
    nodes = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rails = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    part = torch.empty(N // 2)
    with traffic.record(TWO_NODES) as seen:
        reduce_scatter(part, x, group=nodes[rank // 2])
        dist.all_reduce(part, group=rails[rank % 2])
        all_gather(x, part, group=nodes[rank // 2])
    return seen, x


def alone():
    """Only one rank records, without a network; and the matrix products of one."""
    found = None
    if dist.get_rank() == 1:
        with traffic.record() as found:
            a = torch.ones(4, 8, requires_grad=True)
            (a @ torch.ones(8, 2)).sum().backward()
            q, k = torch.ones(1, 4, 8, 4), torch.ones(1, 2, 8, 4, requires_grad=True)
            nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True).sum().backward()
    dist.barrier()
    return found


def all_of_it(network):
    """Every collective and message in one recording, with computing between them."""
    dist.barrier()
    with traffic.record(network, rate=RATE) as seen:
        for block in (*collectives().values(), pass_on):
            torch.ones(64, 64) @ torch.ones(64, 64 * dist.get_rank())
            block()
        compute_then_meet(seen), swap(seen), hide(seen)
    return seen


def everything():
    """All cases in one launch."""
    seen = {name: see(block) for name, block in collectives().items()}
    for name, block in {"met": compute_then_meet, "swap": swap, "hide": hide}.items():
        dist.barrier()
        with traffic.record(TWO_NODES, rate=RATE) as seen[name]:
            block(seen[name])
    seen["pass_on"], seen["fan"], seen["ring"] = see(pass_on), see(fan), see(ring)
    seen["dtensor"], seen["fsdp"], seen["ddp"] = by_dtensor(), by_fsdp(), by_ddp()
    seen["inside"] = inside_dtensor()
    seen["groups"], summed = groups()
    seen["all"], seen["slower"] = (all_of_it(network) for network in (TWO_NODES, SLOWER))
    return seen, summed, alone(), unlike()


@pytest.fixture(scope="module")
def ranks():
    return launch(everything, 4)


@pytest.fixture(scope="module")
def seen(ranks):
    return [seen for seen, *_ in ranks]


SENT = {  # what rank 0 sends of 256 bytes, by tier: rank 1 shares its node
    "all_reduce": (2 * 3 * 64, 0),
    "all_gather": (3 * 256, 0),
    "all_gather_list": (3 * 256, 0),
    "reduce_scatter": (3 * 64, 0),
    "broadcast": (0, 0),
    "reduce": (0, 256),  # counted from the root, 1, it is fourth, and its parent second
    "gather": (0, 256),
    "scatter": (0, 0),
    "barrier": (0, 0),
    "all_to_all": (64, 2 * 64),
    "uneven": (0, (2 + 3) * 32),
}
UNEVEN = [[(r + 1) * 32, 0, 64, 96] for r in WORLD]
TIMES = {
    "all_reduce": comm.all_reduce(256, WORLD, TWO_NODES),
    "all_gather": comm.all_gather(1024, WORLD, TWO_NODES),
    "all_gather_list": comm.all_gather(1024, WORLD, TWO_NODES),
    "reduce_scatter": comm.reduce_scatter(256, WORLD, TWO_NODES),
    "broadcast": comm.broadcast(256, WORLD, TWO_NODES),
    "reduce": comm.broadcast(256, WORLD, TWO_NODES),
    "gather": comm.all_to_all([[0, 0, 256, 0]] * 4, WORLD, TWO_NODES),
    "scatter": comm.all_to_all([[0] * 4, [0] * 4, [256, 256, 256, 256], [0] * 4], WORLD, TWO_NODES),
    "barrier": comm.all_reduce(0, WORLD, TWO_NODES),
    "all_to_all": comm.all_to_all_uniform(64, WORLD, TWO_NODES),
    "uneven": comm.all_to_all(UNEVEN, WORLD, TWO_NODES),
}


@pytest.mark.parametrize("name", SENT)
def test_a_collective_is_seen_once_with_its_bytes_and_takes_what_the_model_says(seen, name):
    assert [len(each[name].calls) for each in seen] == [1] * 4
    assert tuple(seen[0][name].bytes.values()) == SENT[name]
    assert [each[name].clock for each in seen] == [TIMES[name]] * 4


@pytest.mark.parametrize("name", ["broadcast", "reduce", "gather", "scatter"])
def test_the_ranks_of_a_rooted_collective_send_three_times_its_bytes_together(seen, name):
    assert sum(sum(each[name].bytes.values()) for each in seen) == 3 * 256


def test_a_collective_starts_at_the_latest_clock_and_sets_them_all(seen):
    end = 3 * 1e9 / RATE + comm.all_reduce(256, WORLD, TWO_NODES)
    assert seen[0]["met"].clocks == [end] * 4
    assert all(each["met"].marks == [("met", end), ("end", end)] for each in seen)


def test_a_message_arrives_after_its_sender_sent_it(seen):
    """And the first rank is done with it when its card has sent it."""
    inside, across = (comm.point_to_point(256, *pair, TWO_NODES) for pair in [(0, 1), (1, 2)])
    arrived = [256 / 160e9, inside, inside + across, inside + across + inside]
    arrived[1] += 256 / 40e9
    arrived[2] += 256 / 160e9
    assert seen[0]["pass_on"].clocks == arrived
    assert [each["pass_on"].bytes["across"] for each in seen] == [0, 256, 0, 0]


def test_ten_messages_over_one_card_take_ten_times_their_bytes(seen):
    alpha, busy = TWO_NODES.across.alpha, 10 * 256 / 40e9
    assert seen[0]["fan"].clocks == pytest.approx([busy, 0, alpha + busy, 0])


def test_a_real_ring_with_long_chunks_goes_at_the_slow_cards_pace(seen):
    long = TWO_NODES.slower(inside=1e4, across=1e4)  # chunks as if of 2.56 MB
    clock = max(retime([each["ring"].trace for each in seen], long))
    assert clock == pytest.approx(5e-6 + 6 * 256 * 1e4 / 40e9)
    assert 0 < comm.all_reduce(1024, WORLD, long) - clock <= 5 * 5e-6 * (1 + 1e-9)


def test_every_rank_is_told_of_a_message_that_is_taken_as_another(ranks):
    assert all(
        "One message, and rank 0 has 16 bytes of float64 for it, rank 1 16 bytes of float32" in said
        for *_, said in ranks
    )


def test_receives_may_be_posted_before_sends_and_hide_behind_computing(seen):
    assert seen[0]["swap"].clocks == [comm.point_to_point(256, 0, 1, TWO_NODES)] * 4
    assert comm.all_reduce(256, WORLD, TWO_NODES) < 1e9 / RATE
    assert seen[0]["hide"].clocks == [1e9 / RATE] * 4


def test_dtensor_is_seen_with_its_backward(seen):
    calls = [(call.kind, call.n) for call in seen[0]["dtensor"].calls]
    assert calls == [("all_gather", 8 * N * 4), ("all_reduce", N * N * 4)]


def test_what_dtensor_does_by_itself_is_seen_and_counted_as_this_ranks_part(seen):
    inside = seen[0]["inside"]
    assert sum(call.n for call in inside.calls) == 8 * N * 4
    assert inside.flops == 2 * 8 * N * N // 4


def test_fsdp_gathers_twice_and_scatters_once(seen):
    calls = [(call.kind, call.n) for call in seen[0]["fsdp"].calls]
    whole = N * N * 4
    assert calls in (  # a root keeps its weights between forward and backward
        [("all_gather", whole), ("reduce_scatter", whole)],
        [("all_gather", whole), ("all_gather", whole), ("reduce_scatter", whole)],
    )


def test_ddp_reduces_its_gradients_from_cpp_and_is_seen(seen):
    calls = [call for call in seen[0]["ddp"].calls if call.kind == "all_reduce"]
    assert N * N * 4 in [call.n for call in calls]


def test_a_hierarchical_all_reduce_takes_what_the_model_says_and_less_across(seen, ranks):
    expected = comm.all_reduce(256, WORLD, TWO_NODES, "hierarchical")
    assert [each["groups"].clock for each in seen] == [expected] * 4
    assert all(torch.equal(summed, torch.full((N,), 4.0)) for _, summed, *_ in ranks)
    flat = sum(each["all_reduce"].bytes["across"] for each in seen)
    assert sum(each["groups"].bytes["across"] for each in seen) == 512 < flat == 768


def test_another_network_needs_no_other_run(seen):
    """Traces of one network, played on another, give the clocks of a run on that one."""
    traces = [each["all"].trace for each in seen]
    assert retime(traces, SLOWER, RATE) == seen[0]["slower"].clocks
    assert retime(traces, TWO_NODES, RATE) == seen[0]["all"].clocks
    assert min(seen[0]["slower"].clocks) > max(seen[0]["all"].clocks)
    for name in ("pass_on", "fan", "ring", "fsdp", "ddp", "dtensor"):
        traces = [each[name].trace for each in seen]
        assert retime(traces, TWO_NODES) == seen[0][name].clocks
        assert max(retime(traces, SLOWER)) > max(seen[0][name].clocks)


def test_a_rank_may_record_alone_without_a_network(ranks):
    found = ranks[1][2]
    products = 2 * (2 * 4 * 8 * 2)  # forward, and a's gradient; the ones need none
    assert found.flops == products + (2 + 5) * 2 * (4 * 8 * 8 * 4)
    assert found.bytes == {"inside": 0, "across": 0}
    with pytest.raises(TraceError, match="There is no clock"):
        _ = found.clock


def test_nothing_of_the_recording_stays_behind():
    before = dist.Work.wait
    with pytest.raises(KeyError), traffic.record(TWO_NODES):
        raise KeyError
    assert dist.Work.wait is before


def test_one_process_has_a_clock_of_its_own():
    with traffic.record(TWO_NODES, rate=RATE, matmuls=False) as seen:
        torch.ones(8, 8) @ torch.ones(8, 8)
        seen.compute(2e12)
        seen.compute(1e12)
    assert seen.clocks == [3.0] and seen.trace == [Compute(3e12)]


def test_what_has_no_time_is_refused():
    with pytest.raises(TraceError, match="cannot be computed"), traffic.record() as seen:
        seen.compute(-1)
    with pytest.raises(TraceError, match="received from anyone"):
        retime([[Call("recv_any", 8, (-1, 0)), Wait(0)]], TWO_NODES)
    with pytest.raises(TraceError, match="rank 0 waits in all_reduce"):
        retime([[Call("all_reduce", 8, (0, 1)), Wait(0)], []], TWO_NODES)
    with pytest.raises(TraceError, match="each is in another"):
        retime([[Call("all_reduce", 8, (0, 1))], [Call("broadcast", 8, (0, 1), root=0)]], TWO_NODES)
    with pytest.raises(TraceError, match="1 traces are here"):
        retime([[Call("all_reduce", 8, (0, 1)), Wait(0)]], TWO_NODES)
    with pytest.raises(TraceError, match="rate above 0"):
        retime([[]], TWO_NODES, rate=0)


def test_a_timeline_names_what_a_rank_did_when():
    trace = [Compute(1e12), Mark("a"), Call("all_reduce", 0, (0,)), Wait(0)]
    (spans,) = timeline([trace], TWO_NODES, RATE)
    assert [(span.start, span.end) for span in spans] == [(0, 1), (1, 1), (1, 1), (1, 1), (1, 1)]
    assert [span.event for span in spans] == [*trace, Mark("end")]


def test_collectives_of_one_rank_follow_each_other():
    """Two at once would have the links twice."""
    trace = [Call("all_reduce", 256, (0, 1)), Call("all_reduce", 256, (0, 1)), Wait(0), Wait(1)]
    one = comm.all_reduce(256, (0, 1), TWO_NODES)
    assert retime([trace, trace], TWO_NODES) == [one + one] * 2


@given(st.integers(1, 9), st.integers(0, 8), st.sampled_from(["broadcast", "reduce"]))
def test_a_tree_reaches_every_rank_once(p, root, kind):
    ranks = tuple(range(p))
    call = Call(kind, 8, ranks, root=root % p)
    edges = [(a, b) for a in ranks for b in sent_by(call, a)]
    pairs = edges if kind == "broadcast" else [(b, a) for a, b in edges]
    assert sorted(b for _, b in pairs) == [r for r in ranks if r != root % p]
    reached = {root % p}
    for _ in range((p - 1).bit_length()):  # ceil(log2 p) steps
        reached |= {b for a, b in pairs if a in reached}
    assert reached == set(ranks)


@given(st.integers(2, 8), st.integers(0, 4096), st.data())
def test_ring_bytes_are_the_models_steps_times_their_size(p, n, data):
    ranks = tuple(data.draw(st.permutations(range(p))))
    for kind, steps in {
        "all_gather": p - 1,
        "reduce_scatter": p - 1,
        "all_reduce": 2 * p - 2,
    }.items():
        sent = [sent_by(Call(kind, n, ranks), rank) for rank in ranks]
        assert sum(sum(each.values()) for each in sent) == pytest.approx(steps * n)
        assert all(each.keys() <= {ranks[(i + 1) % p]} for i, each in enumerate(sent))
