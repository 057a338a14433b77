"""Exchanges between ranks: what they leave, what the model gives them, what is kept of a run."""

import json
import subprocess

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import exchanges, machine, network, network_table, throttle
from dsv3_tutorial.bench.attention_steps import BenchError
from dsv3_tutorial.bench.exchanges import BY_NODE, FLAT, Case
from dsv3_tutorial.cost.tiers import Network, Tier
from dsv3_tutorial.parallel.launch import RankFailed, launch
from dsv3_tutorial.receipts import Receipt

TWO = Network(Tier("inside", 1e-6, 1e9), Tier("across", 1e-5, 1e7), 2)
FREE = Network(Tier("inside", 0.0, float("inf")), Tier("across", 0.0, 1e7), 2)
FORMS = [
    Case(op, form, 64)
    for op in ("all_reduce", "all_to_all", "dispatch")
    for form in (FLAT, BY_NODE)
]


# What the ranks hold


def held_and_sampled():
    here = exchanges.place(2)
    exchanges.check(FORMS, here)
    held = {case: exchanges.exchange(case, here)() for case in FORMS}
    pings = [Case("p2p", form, 8) for form in ("inside", "across")]
    timed = exchanges.sampled([*pings, *FORMS], here, 3, 60.0)
    short = exchanges.sampled(pings, here, 1000, 0.0)
    return held, timed, {case: len(times) for case, times in short.items()}


@pytest.fixture(scope="module")
def ranks():
    return launch(held_and_sampled, 4)


def test_a_sum_by_node_is_the_sum(ranks):
    total = 4 * torch.arange(16, dtype=torch.int32) + sum(range(4))
    for held, _, _ in ranks:
        assert torch.equal(held[Case("all_reduce", FLAT, 64)], total)
        assert torch.equal(held[Case("all_reduce", BY_NODE, 64)], total)


@pytest.mark.parametrize("form", [FLAT, BY_NODE])
def test_every_rank_gets_its_share_of_every_rank_in_their_order(ranks, form):
    sent = [torch.arange(16, dtype=torch.int32).add(i).view(torch.uint8) for i in range(4)]
    for rank, (held, _, _) in enumerate(ranks):
        shares = torch.cat([x.chunk(4)[rank] for x in sent])
        assert torch.equal(held[Case("all_to_all", form, 64)], shares)
        assert torch.equal(held[Case("dispatch", form, 64)], torch.cat(sent))


def test_all_ranks_agree_on_the_number_of_rounds(ranks):
    for _, timed, short in ranks:
        assert {len(times) for times in timed.values()} == {3}
        assert set(short.values()) == {1}  # the time is up after the first
        assert all(seconds > 0 for times in timed.values() for seconds in times)


def test_a_form_that_computes_something_else_is_not_timed():
    def wrong():
        right = exchanges._sum_by_node
        exchanges._sum_by_node = lambda x, here: right(x, here) + 1
        exchanges.check(FORMS, exchanges.place(2))

    with pytest.raises(RankFailed, match="all_reduce of 64 bytes, hierarchical, gives other numb"):
        launch(wrong, 4)


# What the model says


def test_predictions_are_the_cost_models_closed_forms():
    n = 4e6
    a, b = TWO.inside, TWO.across
    case = lambda op, form: exchanges.predicted(Case(op, form, int(n)), TWO, 4)  # noqa: E731
    assert case("p2p", "inside") == pytest.approx(a.time(n))
    assert case("p2p", "across") == pytest.approx(b.time(n))
    assert case("all_reduce", FLAT) == pytest.approx(6 * b.time(n / 4))
    rails = 2 * b.time(n / 4)
    assert case("all_reduce", BY_NODE) == pytest.approx(2 * a.time(n / 2) + rails)
    assert case("all_to_all", FLAT) == pytest.approx(b.alpha + 2 * (n / 4) / b.bandwidth)
    assert case("dispatch", FLAT) == pytest.approx(b.alpha + 2 * n / b.bandwidth)
    once = b.alpha + n / b.bandwidth
    assert case("dispatch", BY_NODE) == pytest.approx(once + a.alpha + 2 * n / a.bandwidth)


@given(st.integers(1, 10**9).map(lambda k: 16 * k))
def test_by_node_a_copy_crosses_once_and_a_share_not_less(n):
    time = {
        case.op + case.form: exchanges.predicted(Case(case.op, case.form, n), FREE, 4)
        for case in FORMS
    }
    assert time["dispatch" + FLAT] == pytest.approx(2 * time["dispatch" + BY_NODE])
    assert time["all_reduce" + FLAT] == pytest.approx(3 * time["all_reduce" + BY_NODE])
    assert time["all_to_all" + FLAT] == pytest.approx(time["all_to_all" + BY_NODE])


# The fit


@given(
    st.floats(1e-7, 1e-2),
    st.floats(1e5, 1e11),
    st.sets(st.integers(1, 2**26), min_size=2, max_size=8),
)
def test_a_fit_of_exact_times_finds_their_alpha_and_bandwidth(alpha, bandwidth, sizes):
    times = {n: alpha + n / bandwidth for n in sizes}
    found = network.fit(times)
    for n, seconds in times.items():
        assert found.time(n) == pytest.approx(seconds, rel=1e-6)


def test_a_fit_has_no_negative_latency_and_no_negative_cost_of_a_byte():
    assert network.fit({1: 1.0, 4: 16.0}).alpha == 0.0
    assert network.fit({1: 1.0, 1000: 0.9}).bandwidth == float("inf")
    with pytest.raises(ValueError, match=r"1 size\(s\) cannot tell a latency from a bandwidth"):
        network.fit({4: 1.0})


def test_an_exchange_lasts_until_its_slowest_rank_and_a_ping_is_half_of_there_and_back():
    ping, total = Case("p2p", "inside", 4), Case("all_reduce", FLAT, 4)
    ranks = [{ping: [2.0, 4.0], total: [1.0, 5.0]}, {ping: [1.0, 6.0], total: [3.0, 2.0]}]
    assert network._slowest(ranks) == {ping: [1.0, 3.0], total: [3.0, 5.0]}


# Receipts and their table


def made(what, value, unit="s", **shapes):
    spread = {"q1": value, "q3": value}
    common = {"ranks": 4, "nodes": 2, "mbit": 200}
    facts = {"unit": unit, "spread": spread, "repeats": 3, **machine.here()}
    return Receipt(what=what, shapes={**common, **shapes}, value=value, **facts)


def test_collectives_are_predicted_from_point_to_point_alone():
    rows = [made("exchange", 2.0, op="all_reduce", form=FLAT, bytes=4000)]
    rows += [made("alpha", 9.0, op="all_reduce", form=FLAT)]
    for form, tier in (("inside", TWO.inside), ("across", TWO.across)):
        rows += [made("alpha", tier.alpha, op="p2p", form=form)]
        rows += [made("bandwidth", tier.bandwidth, "B/s", op="p2p", form=form)]
    (key, found), *more = network_table.networks(rows).items()
    assert key == (4, 2, 200) and not more and found.ranks_per_node == 2
    expected = 6 * TWO.across.time(1000)
    assert network_table.prediction(rows[0], found) == pytest.approx(expected)
    text = "\n".join(network_table.lines(rows))
    assert "4 ranks on 2 nodes, cables of 200 Mbit/s" in text
    assert "2000.000 ms" in text and f"{expected * 1e3:.3f} ms" in text


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The receipts and the printed lines of one quick run."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        before = links()
        assert network.main(["--quick", "--out", str(folder)]) == 0
        assert links() == before  # the machine's own network is as it was
    return receipts.read("network", folder=folder), "\n".join(printed)


def links():
    if throttle.problem() is not None:
        return None
    names = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in (("ip", "-br", "link"), ("ip", "netns"))
    ]
    return [sorted(line.split()[0] for line in text.splitlines()) for text in names]


def test_a_quick_run_keeps_every_exchange_and_a_fit_of_each_operation(quick):
    rows, printed = quick
    found = {(r.shapes["op"], r.shapes["nodes"]) for r in rows if r.what == "exchange"}
    assert {("p2p", 1), ("all_reduce", 1), ("all_to_all", 1)} <= found
    fitted = {r.shapes["op"] for r in rows if r.what == "alpha" and r.shapes["nodes"] == 1}
    assert fitted == {"p2p", "all_reduce", "all_to_all"}
    assert all(r.threads == 1 and r.device_kind == "cpu" for r in rows)
    assert "2 ranks on 1 node" in printed and "predicted" in printed


@pytest.mark.skipif(throttle.problem() is not None, reason=f"{throttle.problem()}")
def test_a_throttled_cable_passes_no_more_than_its_rate(quick):
    rows, printed = quick
    if "left out" in printed:
        pytest.skip(printed[printed.index("The throttled link") :])
    size, burst = 2**18, 2**17  # the burst passes at once
    times = {
        (r.shapes["form"], r.shapes["mbit"]): r.value
        for r in rows
        if r.what == "exchange" and r.shapes["op"] == "p2p" and r.shapes["bytes"] == size
        if r.shapes["nodes"] == 2
    }
    assert set(times) == {(form, mbit) for form in ("inside", "across") for mbit in (None, 100)}
    assert times["across", 100] > (size - burst) * 8 / 100e6
    assert times["across", 100] > times["across", None]
    kinds = {(r.shapes["op"], r.shapes["form"]) for r in rows if r.shapes["nodes"] == 2}
    assert {(case.op, case.form) for case in FORMS} <= kinds


@pytest.mark.parametrize(
    ("platform", "user", "tools", "says"),
    [
        ("darwin", 0, True, "networks of their own for processes are Linux's"),
        ("linux", 1000, True, "networks of their own for processes need root"),
        ("linux", 0, False, "ip and tc of iproute2 is not here"),
    ],
)
def test_without_root_or_tools_the_link_is_left_out_and_says_why(
    monkeypatch, capsys, platform, user, tools, says
):
    monkeypatch.setattr(throttle.sys, "platform", platform)
    monkeypatch.setattr(throttle.os, "geteuid", lambda: user)
    monkeypatch.setattr(throttle.shutil, "which", lambda name: name if tools else None)
    assert network.main(["--quick", "--parts", "link"]) == 0
    assert f"The throttled link is left out: {says}." in capsys.readouterr().out


def test_a_container_that_forbids_it_leaves_the_link_out_with_its_words(monkeypatch, capsys):
    def forbidden(*_, **__):
        raise RankFailed(0, "Rank 0 failed: unshare failed: Operation not permitted")

    monkeypatch.setattr(throttle, "problem", lambda: None)
    monkeypatch.setattr(network, "launch", forbidden)
    assert network.main(["--quick", "--parts", "link"]) == 0
    assert "left out: Rank 0 failed: unshare failed" in capsys.readouterr().out


def test_a_command_that_fails_is_told_with_its_own_words():
    with pytest.raises(BenchError, match=r"`ls /nowhere/at/all` failed: .*No such file"):
        throttle.run("ls", "/nowhere/at/all")


def test_two_nodes_need_four_ranks():
    with pytest.raises(RankFailed, match="2 ranks are not two nodes of two"):
        launch(throttle.enter, 2)
    assert not dist.is_initialized()  # and the caller is no rank


def test_live_measurements_come_by_case():
    cases = [Case("all_reduce", FLAT, n) for n in (8, 1024)]
    found = network.measure(cases, 2, seconds=0.1, rounds=3)
    assert list(found) == cases and all(1 <= len(times) <= 3 for times in found.values())
    assert json.dumps(network.fit({c.bytes: min(t) for c, t in found.items()}).alpha)
