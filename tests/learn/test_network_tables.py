"""Tables of lesson 3: what papers print, beside what our own code makes of it."""

from dsv3_tutorial import paper
from dsv3_tutorial.cost import deepep, limits, step_time, tiers, topology
from dsv3_tutorial.cost.schedule import SCHEDULES
from dsv3_tutorial.learn.figures import (
    mesh_map,
    network_tables,
    overlap,
    timelines,
)


def test_the_table_of_latencies_prints_where_bytes_weigh_as_much(capsys):
    assert network_tables.lower_latency() == "InfiniBand"
    network_tables.latencies()
    rows = capsys.readouterr().out.splitlines()[2:]
    link = tiers.network("h800").inside
    assert f"{link.alpha * link.bandwidth / 1e3:.0f} KB" in rows[0] and "3.33" in rows[0]
    assert [float(row[28:36]) for row in rows] == [3.33, 2.8, 3.7, 3.6, 5.6]
    network_tables.latencies()
    assert capsys.readouterr().out.splitlines()[1].endswith("bytes that take that long")


def test_the_table_of_topologies_counts_as_printed_and_says_what_nobody_can_wire(capsys):
    network_tables.topologies()
    _, *rows = capsys.readouterr().out.splitlines()
    for row, (name, made) in zip(rows, topology.PRINTED.items()):
        counts = [f"{n:,}" for n in (made().endpoints, made().switches, made().links)]
        assert row[24:54].split() == counts
        assert made().endpoints == paper.row(f"topology.{name}.endpoints").value
    assert "28 is no power of a prime; 27: 30,618 endpoints" in rows[5]
    assert "all counts as printed: True" in rows[6]
    network_tables.topologies(["ft2"])
    assert "prime" not in capsys.readouterr().out


def test_the_tables_of_steps_limits_and_deepep_stand_beside_ours(capsys):
    network_tables.step()
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == len(step_time.checks()) and all("%" in row for row in rows)
    network_tables.decode_limits()
    rows = capsys.readouterr().out.splitlines()[1:]
    assert "14.76" in rows[0] and f"{limits.infiniband().tokens_per_second:.1f}" in rows[0]
    assert "241.92" in rows[0] and "1219.8" in rows[3]
    # (3 x 32 x 9 x 7000 bytes / 900 GB/s + 2 x 3.33 us) x 2 x 61; and 257 / 72 of the bytes
    once = 3 * 32 * 9 * 7000 / 900e9
    assert f"{1 / (122 * (once + 6.66e-6)):.1f}" in rows[5] and "3.33 us four times" in rows[5]
    assert f"{1 / (122 * once * 257 / 72):.1f}" in rows[6] and "2.93" in rows[6]


def test_the_table_of_deepep_shows_where_the_model_fails_too(capsys):
    network_tables.deep_ep()
    rows = capsys.readouterr().out.splitlines()[2:]
    checks, family, shown = {check.row.id: check for check in deepep.checks()}, "", []
    for row in rows:
        if not row.startswith("  "):
            names = {"decoding": "latency", "the same": "latency_nvlink", "training": "rate"}
            family = next(name for said, name in names.items() if row.startswith(said))
            continue
        ranks, quoted, ours, off, back, *_ = row.split()
        one = checks[f"deepep.{family}.dispatch.{ranks}"]
        assert float(quoted) == one.quoted and float(ours) == round(one.computed)
        assert off == f"{one.off:.1%}"
        assert float(back) == checks[f"deepep.{family}.combine.{ranks}"].quoted
        shown.append(f"{family} {ranks}")
    assert len(shown) == 14 and rows[8].split()[3] == "-41.9%" and "29.2%" in rows[14]


def test_the_measured_bubble_stands_beside_what_its_own_times_give(capsys):
    network_tables.bubble_measured()
    printed = " ".join(capsys.readouterr().out.split())
    assert "2.06 s, 10.3% of the step; 3.7% with F 1" in printed
    schedule = SCHEDULES["dualpipe"](16, 120)
    waits = [schedule.bubble(step_time.operation_times(schedule, w)) for w in (True, False)]
    assert f"{waits[0]:.2f} to {waits[1]:.2f} s" in printed and "unexplained" in printed


def test_every_table_fits_a_hundred_columns(capsys):
    tables = (
        *(network_tables.latencies, network_tables.topologies, network_tables.step),
        *(network_tables.decode_limits, network_tables.deep_ep, mesh_map.traffic_table),
        timelines.bubble_table,
        *(network_tables.bubble_measured, overlap.ratios_table),
    )
    for table in tables:
        table()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
