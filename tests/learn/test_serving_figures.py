"""Lesson 5's figures of bills, contexts and services: they draw what the package computes."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import bill as cost_bill
from dsv3_tutorial.cost import deployment as cost_deployment
from dsv3_tutorial.cost import flops, limits, roofline, serving, speculation, storage
from dsv3_tutorial.learn.figures import (
    bill,
    contexts,
    deployment,
    ridge,
    service_roofline,
    services,
    speculation_bounds,
)

V3 = ModelConfig.named("deepseek-v3")
SERVED = {"devices": 72, "context": 4096, "batch": 4096}  # where InfiniBand decides
DRAWN = {
    "From 1 to 32 conversations a token's expert bytes fall 1.57 times": bill.per_token,
    "128 heads an FP8 latent buys 1.22x, with 16 heads 1.76x": ridge.heads,
    "16 heads, 2 tokens, FP8 latent: 106 FLOP a byte, memory": lambda: ridge.point(16, "fp8", 2),
    "all heads, 3.6 times as many as GQA with 8 heads; in FP8 1.76": contexts.context_that_fits,
    "With even routing a draft is worth 1.21x to V3 at batch 1, and 1.82x": (
        speculation_bounds.bounds
    ),
    "With even routing 4 drafts are worth 0.64x to V3": (
        lambda: speculation_bounds.bounds(0.5, 4, "h20")
    ),
    "and 131,072 cached tokens a draft is worth 1.30x to V3 at batch 1, and 1.71x at 128": (
        lambda: speculation_bounds.bounds(context=131072)
    ),
    "a byte of weights and cache serves 498 operations in prefill, 3.8 in decoding": (
        service_roofline.prefill_and_decode
    ),
    "8 H800: 38.1 GB too much on the fullest device": deployment.deployment,
    "72 H800: at most 78.3 tokens/s a user, 4,455 a device; network binds": (
        lambda: deployment.deployment(**SERVED)
    ),
}


def _at(**changed):
    return {**deployment.START, **changed}


@pytest.mark.parametrize("finding", DRAWN)
def test_a_figure_states_its_finding_with_axes_and_finite_data_and_repeats(finding):
    draw = DRAWN[finding]
    made = draw()
    assert isinstance(made, Figure) and finding in str(made)
    assert made.png() == draw().png()
    for axes in made.axes:
        assert axes.get_xlabel() or axes.get_xticklabels()
        numbers = [line.get_ydata() for line in axes.lines]
        numbers += [[bar.get_height(), bar.get_width()] for bar in axes.patches]
        assert numbers and all(np.isfinite(np.asarray(each, dtype=float)).all() for each in numbers)


def test_the_receipt_is_the_bill_s_and_experts_are_its_largest_line(capsys):
    for batch in (1, 256):
        bill.receipt(batch)
        printed = capsys.readouterr().out
        whole = cost_bill.total(cost_bill.decode_bill(V3, 32768, batch, weights="fp8")).bytes
        assert f"{whole / 1e9:,.3f}" in printed and "largest: routed experts" in printed
        assert max(map(len, printed.splitlines())) <= 100
    assert bill.largest(1) == "routed experts"
    assert "256 conversations, 32,768 tokens each" in printed and "a token, of 256" in printed


def test_bytes_a_token_add_up_to_the_bill_and_only_the_cache_is_not_shared():
    lines = {line.get_label(): line.get_ydata() for line in bill.per_token().axes[0].lines}
    for index, batch in enumerate(bill.BATCHES):
        parts = {n.part: n.bytes for n in bill.lines(batch)}
        rest = (sum(parts.values()) - parts["embedding"]) / batch / 1e9
        assert sum(values[index] for values in lines.values()) == pytest.approx(rest)
    assert len(set(np.round(lines["latent cache"], 9))) == 1
    shared = lines["all other weights"]
    assert shared[0] / shared[-1] == pytest.approx(1024)
    touched = round(serving.experts_touched(256, 8, 32))
    assert bill.expert_bytes_fall() == pytest.approx(8 / (touched / 32), rel=1e-12)


@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("chip", ["h100-sxm", "h20", "l4"])
@pytest.mark.parametrize("queries", [1, 2])
def test_the_ridge_figure_s_gain_is_the_cost_model_s(heads, chip, queries):
    few = {"num_attention_heads": heads, "num_key_value_heads": heads}
    cfg = ModelConfig.from_dict({**V3.to_dict(), **few})
    expected = cost_deployment.cache_gain(cfg, hardware.chip(chip), queries)
    assert ridge.gain(heads, chip, queries) == pytest.approx(expected)
    words = ridge.ridge_in_words(heads, "bf16", queries, chip)
    assert f"at most {expected:.2f} times" in words and "1.76 times fewer bytes" in words


def test_heads_are_drawn_for_one_token_and_a_point_for_as_many_as_are_asked():
    assert len(ridge.heads().axes[0].lines) == len(ridge.CACHES) + 1  # and the ridge
    twice = ridge.point(16, "bf16", 2).axes[0].lines[0].get_ydata()
    assert list(twice) == [ridge.intensity(n, "bf16", 2) for n in ridge.HEADS]


def test_the_ridge_figure_has_the_paper_s_two_numbers_and_rings_what_is_asked():
    assert ridge.intensity(128) == pytest.approx(2 * 128 * (2 * 512 + 64) / 1152)
    assert "242 FLOP a byte, memory binds (ridge: 295)" in ridge.ridge_in_words()
    assert "arithmetic binds (ridge: 37)" in ridge.ridge_in_words(chip="h20")
    for line in ridge.point(32, "fp8", 4, "h20").axes[0].lines:
        if line.get_label() == "this setting":
            assert list(line.get_xdata()) == [32]
            assert line.get_ydata()[0] == pytest.approx(4 * 2 * 32 * 1088 / 656)
            break
    else:
        pytest.fail("nothing is ringed")


def test_contexts_fill_nine_tenths_of_each_device_and_no_more():
    rows = {"full": 2 * 128 * (192 + 128), "gqa": 2 * 8 * 128 * 2, "latent": 1152, "fp8": 656}
    for device, fits in contexts.tokens_that_fit().items():
        room = cost_deployment.USABLE * hardware.chip(device).memory_bytes
        for form, row in rows.items():
            assert fits[form] * 61 * row <= room < (fits[form] + 1) * 61 * row
    heights = [bar.get_height() for bar in contexts.context_that_fits().axes[0].patches]
    assert sorted(heights) == sorted(
        n for f in contexts.tokens_that_fit().values() for n in f.values()
    )
    assert "latent holds 71 times as many tokens" in str(contexts.context_that_fits())


def test_the_tables_of_claims_say_what_an_l2_holds_and_what_the_checklist_forgets(capsys):
    contexts.l2_table()
    heads, *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split()[-2:] for row in rows] == [
        ["1,074", "65,536"],
        ["1,432", "87,381"],
    ]
    read = cost_bill.total(cost_bill.decode_bill(V3, 4096, weights="fp8")).bytes
    assert f"{read / 1e9:.0f} GB" in last and max(map(len, (heads, *rows, last))) <= 100
    contexts.short_table()
    printed = capsys.readouterr().out
    assert "512 a token" in printed and "70,272 bytes a token, 137 times that" in printed


def test_the_bounds_of_drafts_are_the_cost_model_s_and_say_what_binds():
    lines = speculation_bounds.bounds().axes[0].lines
    drawn = dict(zip(speculation_bounds.BATCHES, lines[0].get_ydata()))
    for batch in (1, 4, 32, 128):
        expected = speculation.expert_bytes_bound(V3, batch, 0.85, weights="fp8")
        assert drawn[batch] == pytest.approx(expected)
    assert speculation_bounds.at_batch_one() == drawn[1]
    dense = dict(zip(speculation_bounds.BATCHES, lines[1].get_ydata()))
    assert dense[1] == pytest.approx(1.85) and dense[256] == pytest.approx(0.925)
    assert min(drawn, key=drawn.get) == 4096 and drawn[4] < drawn[1] < drawn[128]
    assumed = speculation_bounds.bounds().get_supxlabel()
    assert assumed.endswith("assumed: drafts cost nothing, even routing, no cache")
    words = speculation_bounds.bounds_in_words()
    assert "1.85 tokens" in words and "1,024: 0.93x (compute)" in words
    assert "at most" not in words + str(speculation_bounds.bounds())


@pytest.mark.parametrize("context", [4096, 131072])
def test_with_a_context_the_gains_are_the_cost_model_s(context):
    fig = speculation_bounds.bounds(0.7, 2, "h20", context)
    for line, name in zip(fig.axes[0].lines, speculation_bounds.MODELS):
        for batch, value in zip(speculation_bounds.BATCHES, line.get_ydata()):
            how = {"context": context, "drafted": False, "weights": "fp8", "cache": "bf16"}
            of = ModelConfig.named(name), hardware.chip("h20"), batch, 0.7, 2
            assert value == speculation.gain(*of, **how).value
    assert f"a BF16 cache of {context:,} tokens each" in fig.get_supxlabel()
    one = speculation_bounds.gain("deepseek-v3", 32, 0.7, 2, "h20", context)
    words = speculation_bounds.bounds_in_words(0.7, 2, "h20", context)
    assert f"32: {one.value:.2f}x ({one.verify})" in words


def test_a_long_context_makes_a_dense_model_gain_at_every_batch_and_v3_less_at_large_ones():
    drawn = {
        context: [list(line.get_ydata()) for line in figure.axes[0].lines[:2]]
        for context in (0, 131072)
        for figure in [speculation_bounds.bounds(context=context)]
    }
    assert min(drawn[131072][1]) == pytest.approx(1.85, abs=0.01) and min(drawn[0][1]) < 1
    at = speculation_bounds.BATCHES.index(1024)
    assert drawn[131072][0][at] < 1.2 < 1.8 < drawn[0][0][at]
    assert speculation_bounds.gain("deepseek-v3", 1024, chip="h20", context=131072).value < 1


def test_where_tokens_share_all_experts_the_gain_is_the_tokens_of_a_pass(monkeypatch):
    monkeypatch.setattr(speculation, "experts_touched", lambda *_: 8)
    tokens = speculation.tokens_per_pass(0.85, 1)
    shared = speculation_bounds.gain("deepseek-v3", 1)
    assert shared.verify == "bandwidth" and shared.value == pytest.approx(tokens, rel=1e-4)


def test_prefill_has_the_arithmetic_of_a_forward_pass_but_for_all_heads_but_one():
    whole = cost_bill.total(service_roofline.prefill())
    head = 2 * V3.vocab_size * V3.hidden_size
    expected = 4096 * flops.forward_flops_per_token(V3, 4097) - 4095 * head
    assert whole.flops == pytest.approx(expected, rel=1e-3)
    eight = cost_bill.total(service_roofline.prefill(8))
    assert eight.flops == pytest.approx(8 * whole.flops)
    assert eight.bytes / whole.bytes == pytest.approx(1, abs=0.01)  # all experts are read anyway


@pytest.mark.parametrize("chip", ["h800", "h20", "a100"])
def test_no_point_lies_above_its_roof_and_decode_lies_on_the_slope(chip):
    made = hardware.chip(chip)
    best = "fp8" if made.rates["fp8"] else "bf16"
    for lines in (service_roofline.prefill(8), *map(service_roofline.decode, (1, 32, 256))):
        whole = cost_bill.total(lines)
        roof = roofline.attainable_flops(whole.intensity, made, best)
        assert service_roofline.reached(lines, made) <= roof * (1 + 1e-12)
    one = service_roofline.decode(1)
    slope = cost_bill.total(one).intensity * made.bandwidth()
    assert service_roofline.reached(one, made) == pytest.approx(slope)
    legend = service_roofline.prefill_and_decode(chip).legends[0].get_texts()
    roofs = [text.get_text() for text in legend if "roof" in text.get_text()]
    assert len(roofs) == (2 if made.rates["fp8"] else 1)
    said = service_roofline.prefill_and_decode(chip).get_supxlabel()
    where = {
        "h800": "(498) is beyond BF16's ridge (295) and short of FP8's ridge (591)",
        "h20": "(498) is beyond BF16's ridge (37) and FP8's ridge (74)",
        "a100": "(498) is beyond BF16's ridge (153)",
    }
    assert said.endswith(where[chip]) and "all at 4,096 tokens" in said
    assert "activations that go through memory are left out" in said


def test_the_live_cell_prints_both_rates_and_their_ratio(capsys):
    service_roofline.live(seconds=0.0)
    first, second, last, read = capsys.readouterr().out.splitlines()
    fast, slow = (float(row.split()[-2].replace(",", "")) for row in (first, second))
    assert fast > slow > 0 and first.startswith("prefill, 256 tokens at once")
    ratio = float(re.search(r"is ([\d.]+) times as fast \(median of 1 rounds", last)[1])
    assert ratio == pytest.approx(fast / slow, rel=0.1)
    assert re.fullmatch(r"a decode step reads 15\.2 MB, [\d.]+ GB in a second", read)


@pytest.mark.parametrize("changed", [{}, SERVED, {"device": "h20", "devices": 16, "drafts": 1}])
def test_the_deployment_s_bars_are_the_cost_model_s(changed):
    setting = _at(**changed)
    one = deployment.placed(**setting)
    left, right = deployment.deployment(**setting).axes
    held = [bar.get_width() * 1e9 for bar in left.patches]
    assert sum(held[:2]) == pytest.approx(one.weight_bytes)
    assert held[2] == pytest.approx(one.cache_bytes)
    assert (held[3] > 0) == one.fits
    if one.fits:
        assert sum(held) == pytest.approx(cost_deployment.USABLE * one.chip.memory_bytes)
    times = [bar.get_width() / 1e3 for bar in right.patches]
    assert times == pytest.approx(list(one.times.values()))
    assert list(one.times) == list(deployment.TIMES)
    words = deployment.deployment_in_words(**setting)
    everywhere = f"everything else ({held[1] / 1e9:.0f} GB) lies on every device; 10% of memory"
    assert everywhere in words
    assert f"{one.max_batch:,} fit" in words and str(left.figure)[8:] in words


def test_every_choice_of_the_explorer_can_be_drawn_and_the_start_is_one():
    for name, choices in deployment.GRID.items():
        assert deployment.START[name] in choices
        for choice in choices:
            one = deployment.placed(**_at(**{name: choice}))
            assert one.time_s > 0 and deployment.deployment_in_words(**_at(**{name: choice}))
    for device in deployment.GRID["device"]:
        assert deployment.placed(**_at(device=device, devices=144)).times["network"] > 0


def test_links_carry_the_share_of_their_peak_that_an_h800_s_reach():
    chips = {name: deployment.placed(**_at(device=name)).chip for name in ("h800", "h20")}
    chips["rack"] = deployment.placed(**_at(device="gb200-nvl72")).chip
    rates = {name: (c.scale_up.effective, c.scale_out.effective) for name, c in chips.items()}
    assert rates["h800"] == (160e9, 40e9)
    assert rates["h20"] == (360e9, 40e9)  # nobody publishes its network: as the others'
    assert rates["rack"] == (720e9, 40e9)


def _smallest(**changed):
    counts = deployment.GRID["devices"]
    return next(n for n in counts if deployment.placed(**_at(devices=n, **changed)).fits)


def test_where_weights_lie_is_said_of_several_devices_alone():
    assert "dealt out evenly; everything else (19 GB)" in deployment.deployment_in_words()
    assert "dealt out" not in deployment.deployment_in_words(**_at(devices=1))


def test_task_one_sixteen_h800_are_the_fewest_for_32_long_conversations_in_fp8():
    assert _smallest() == 16
    assert _smallest(weights="int4") == 8 and _smallest(weights="bf16") == 72
    assert _smallest(device="h200") == 8
    one = deployment.placed(**_at(devices=16))
    assert one.limit == "bandwidth" and f"{deployment.per_user(one):.1f}" == "70.0"


def test_task_two_on_72_h800_the_cache_is_the_larger_part_from_1024_conversations_on():
    sizes = {n: deployment.placed(**_at(devices=72, batch=n)) for n in (32, 128, 1024)}
    assert [one.cache_bytes > one.weight_bytes for one in sizes.values()] == [False, False, True]
    narrow = deployment.placed(**_at(devices=72, batch=1024, cache="fp8"))
    assert narrow.cache_bytes < narrow.weight_bytes
    assert all(one.fits for one in (*sizes.values(), narrow))


@pytest.mark.parametrize(
    ("changed", "limit", "rates"),
    [
        (SERVED, "network", ("78.3", "78.3", "72.4")),
        (
            {"device": "h20", "devices": 16, "batch": 128},
            "compute",
            ("31.1", "31.1", "28.8"),
        ),
        ({"devices": 72, "batch": 1024}, "bandwidth", ("55.1", "72.9", "101.8")),
    ],
)
def test_task_three_an_fp8_cache_and_a_draft_gain_only_where_bandwidth_binds(changed, limit, rates):
    settings = (_at(**changed), _at(**changed, cache="fp8"), _at(**changed, drafts=1))
    made = [deployment.placed(**setting) for setting in settings]
    assert all(one.fits for one in made) and made[0].limit == limit
    assert tuple(f"{deployment.per_user(one):.1f}" for one in made) == rates


def test_the_papers_bounds_stand_beside_ours_in_a_dozen_lines(capsys):
    services.services()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) <= 12 and max(map(len, rows)) <= 100
    infiniband, rack = (row.split() for row in rows[1:3])
    assert infiniband[-3:] == ["67", "67.8", "+1.1%"]
    assert rack[-4:] == ["about", "1,200", "1,220", "+1.6%"]
    for row, bound in zip((infiniband, rack), (limits.infiniband(), limits.nvl72()), strict=True):
        ours = float(row[-2].replace(",", ""))
        assert ours == pytest.approx(bound.tokens_per_second, rel=1e-3)


def test_the_service_s_users_follow_from_its_rates_and_the_bound_lies_above(capsys):
    services.services()
    printed = capsys.readouterr().out
    rows = printed.splitlines()
    fewest, most = services.users()
    assert fewest * 22 == pytest.approx(1850) and most * 20 == pytest.approx(1850)
    assert "1,850 / 22 to 1,850 / 20 = 84 to 92 conversations on each GPU" in printed
    assert "20 to 22 tokens/s for a user, 1,850 from an H800" in printed
    for name, one in services.cases().items():
        row = next(row for row in rows if row.startswith(name))
        user = services.tokens_of_a_user(one)
        assert one.fits and one.batch == 88 * one.devices and user > 22
        assert row.split()[-1] == services.BINDS[one.limit] and f"{user:.1f}" in row
        assert f"{user * 88:,.0f}" in row
    served, drafted, joined, racked = services.cases().values()
    assert drafted.cfg == V3 and drafted.times["network"] == 2 * served.times["network"]
    others, beyond = 143 / 144, 136 / 144  # of the copies: all but its own, all but its node's
    slower = served.times["network"] / joined.times["network"]
    assert slower == pytest.approx(beyond / 40 / (others / 160))
    assert racked.devices == 72 and racked.limit == "bandwidth"


def test_the_day_s_tokens_at_the_printed_rates_need_the_nodes_that_are_printed(capsys):
    assert sum(services.nodes()) == pytest.approx(paper.row("serving.nodes").value, rel=2e-3)
    services.more()
    printed = capsys.readouterr().out
    assert "95.5 + 131.4 = 226.9 nodes; quoted: 226.75" in printed
    assert services.computed_input() == pytest.approx(73700 / 8 * 0.437)
    assert "56.3% of input" in printed and "9,212 a GPU" in printed and "4,026 a GPU" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_a_cache_that_is_drawn_is_one_that_storage_knows():
    assert set(ridge.CACHES) | set(deployment.GRID["cache"]) <= set(storage.CACHES)
    assert set(deployment.GRID["weights"]) <= set(storage.WEIGHTS)
