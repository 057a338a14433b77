"""Quality, acceptance and speed from receipts: titles and marks hold what the receipts hold."""

import math
import statistics

import numpy as np
import pytest
import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import inference_model
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import speculation, storage
from dsv3_tutorial.learn.figures import acceptance, laws, quality, rows
from dsv3_tutorial.learn.figures import speculation_measured as drafted
from dsv3_tutorial.learn.figures.inference_records import found, relative_times
from dsv3_tutorial.weights import cpu
from dsv3_tutorial.weights.formats import quantize

STEPS = {"float32": (9e-3, 0.5e-6), "int8": (6e-3, 0.5e-6), "fp8 cache": (10e-3, 1e-6)}
STEPS |= {"transformers sdpa": (12e-3, 30e-6), "transformers eager": (11e-3, 20e-6)}
LOST = {"bf16": (0.0001, 0.0002), "int8": (0.004, 0.001), "int4": (0.02, 0.003)}
KIND = {"all": 0.8, "space": 0.95, "name": 0.6, "number": 0.4}


def receipt(what, shapes, value, spread=None, unit="s"):
    return receipts.Receipt(
        what=what,
        device="a box",
        device_kind="cpu",
        versions={"torch": "2.13.0"},
        date="2026-11-22",
        shapes=shapes,
        value=value,
        unit=unit,
        spread=spread or {"q1": 0.9 * value, "q3": 1.1 * value},
        repeats=5,
        threads=1,
    )


def quality_rows():
    for part, text in (("weights", "library"), ("cache", "library"), ("cache", "module")):
        for form, (more, error) in {"float32": (0.0, 0.0), **LOST, "fp8": (0.0, 0.1)}.items():
            if part == "cache" and form.startswith("int"):
                continue
            at = {"part": part, "text": text, "form": form, "scored_bytes": 9000}
            off = error * quality.QUARTILE
            around = {"q1": more - off, "q3": more + off}
            yield receipt("bits per byte more", at, more, around, "bits per byte")
            kept = 1 - 10 * abs(more)
            yield receipt("top token kept", at, kept, {"min": kept, "max": kept}, "share")


def inference_rows():
    for form, (a, b) in STEPS.items():
        for model, contexts in (("trained", (512,)), ("wide", (512, 2048, 8192))):
            for context in contexts:
                at = {"model": model, "form": form, "batch": 1, "context": context}
                at |= {"weight_bytes": 27_100_000}
                yield receipt("decode step", at, a + b * context)
        at = {"model": "wide", "form": form, "batch": 1, "contexts": [512, 2048, 8192]}
        yield receipt("time per cached token", {**at, "fixed_s": a, "r2": 0.999}, b)
    for batch in (1, 8, 32):
        for k, gain in ((0, 1), (1, 1.5 / batch**0.1), (2, 1.7)):
            at = {"batch": batch, "drafts": k, "acceptance": 0.8, "tokens_per_pass": 1 + 0.8 * k}
            yield receipt("speculation", at, 100 * batch * gain, unit="tokens/s")
    for kind, share in KIND.items():
        at = {"text": "generated", "rule": "greedy", "kind": kind, "tokens": 400}
        off = (0.1 if kind == "number" else 0.01) * acceptance.QUARTILE
        around = {"q1": share - off, "q3": share + off}
        yield receipt("acceptance by kind", at, share, around, "share")
    for form, ratio in (("float32", 1), ("int8 fbgemm", 0.4), ("int8 weight-only", 0)):
        for n in (1, 8, 64):
            at = {"side": 1024, "form": form, "rows": n}
            yield receipt("product by rows", at, 1e-4 * (ratio or 0.5 + n / 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("measured")
    receipts.append("quality", quality_rows(), folder=made)
    receipts.append("inference", inference_rows(), folder=made)
    return made


def test_where_nothing_was_measured_every_figure_says_so_and_how_to(tmp_path, capsys):
    made = [
        quality.quality_speed_size(tmp_path),
        rows.int8_by_rows(tmp_path),
        acceptance.by_kind(tmp_path),
        laws.decode_laws(folder=tmp_path),
        drafted.measured(tmp_path),
    ]
    for fig in made:
        assert str(fig).startswith("Figure: Not measured yet: ")
        assert "python -m dsv3_tutorial bench " in fig.axes[0].texts[0].get_text()
        assert fig.png()
    quality.cache_table(tmp_path)
    assert "Not measured yet: " in capsys.readouterr().out


def test_receipts_are_those_of_the_device_measured_last_and_damage_is_no_absence(tmp_path):
    receipts.append("quality", quality_rows(), folder=tmp_path)
    assert len(found("quality", "top token kept", tmp_path, part="weights", form="int8")) == 1
    assert found("quality", "nothing", tmp_path) == found(
        "quality", "top token kept", tmp_path, x=1
    )
    assert found("quality", "nothing", tmp_path) == []
    (tmp_path / "quality.jsonl").write_text("{")
    with pytest.raises(receipts.ReceiptError):
        found("quality", "top token kept", tmp_path)


def test_a_format_loses_bits_if_it_is_more_than_two_errors(folder):
    assert quality.beyond_errors(folder) == ["int8", "int4"]
    found = quality.lost("weights", folder=folder)
    errors = [quality.error(found[form]) for form in LOST]
    assert errors == pytest.approx([error for _, error in LOST.values()])


def test_quality_is_drawn_against_time_where_it_was_measured(folder):
    times, _ = relative_times(folder)
    at = {form: a + b * 512 for form, (a, b) in STEPS.items()}
    assert times["int8"] == pytest.approx(at["int8"] / at["float32"])
    fig = quality.quality_speed_size(folder)
    rest = "INT4 loses most, 0.020 bits a byte; 1 of the other 4 loses measurably too"
    assert str(fig) == f"Figure: {rest}"
    for ax, model in zip(fig.axes, ("trained", "wide"), strict=True):
        ratios, _ = relative_times(folder, model)
        whose = {"trained": "the small trained model", "wide": "a large random model"}[model]
        assert ax.get_title(loc="left").startswith(f"Time of {whose}:\n")
        assert ax.get_xlabel().endswith("model (6.8 M weights)")
        assert ax.get_ylabel().endswith("of the small trained model")
        assert {0.25, 0.5, 1, 2, 4, 8} <= set(ax.get_xticks())
        assert f"INT8 takes {ratios['int8']:.2f} of float32's" in ax.get_title(loc="left")
        marks = {
            group.get_label(): group.get_offsets()[0].tolist()
            for group in ax.collections
            if not group.get_label().startswith("_")
        }
        assert marks["INT8, by row (4.0%)"] == pytest.approx([ratios["int8"], 4.0])
        assert "cache: FP8, RoPE key BF16 (0.0%)" in marks and len(marks) == 2, "what was timed"
    assert not fig.axes[0].texts
    assert "quality is of inputs in BF16 (W8A16)" in fig.axes[1].texts[0].get_text()


def test_int8_meets_other_inputs_in_large_matrices_than_in_the_model_that_is_judged():
    if not cpu.fbgemm_is_here():
        pytest.skip("this CPU has one product for all sizes")
    wide, small = inference_model.WIDE, ModelConfig.named("small")
    ways = [
        {cpu.path(quantize(torch.zeros(sides), "int8")) for sides in storage.matrices(cfg)[part]}
        for cfg, part in ((wide, "routed experts"), (small, "routed experts"))
    ]
    assert ways == [{"int8"}, {"int8-bf16"}]


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ({"int4": 0.0047, "fp8": 0.0002}, "Only INT4 loses measurably: 0.005 bits a byte"),
        ({"int8": 0.0007}, "Only INT8, by row loses measurably: 0.0007 bits a byte"),
        (
            {"int4": 0.0002, "fp8": -0.1},
            "No format loses measurably: the worst 0.0002 bits a byte, within two errors",
        ),
        (
            {"int4": 0.0047, "fp8": 0.002, "bf16": 0.003},
            "INT4 loses most, 0.005 bits a byte; 2 of the other 3 lose measurably too",
        ),
    ],
)
def test_the_title_of_quality_says_who_loses(lost, says):
    off = 0.0003 * quality.QUARTILE
    rows = {
        form: receipt(
            "bits per byte more", {"form": form}, more, {"q1": more - off, "q3": more + off}
        )
        for form, more in lost.items()
    }
    still = receipt("bits per byte more", {"form": "fp8"}, 0.0, {"q1": -off, "q3": off})
    cache = {"fp8": still} if "bf16" in lost or "int8" in lost else {}
    assert quality.title({"weights": rows, "cache": cache}) == says


def test_quality_is_drawn_against_bytes_where_no_time_is_known(tmp_path):
    receipts.append("quality", quality_rows(), folder=tmp_path)
    fig = quality.quality_speed_size(tmp_path)
    assert "no time measured" in fig.axes[0].get_xlabel()
    at = [list(group.get_offsets()[0]) for group in fig.axes[0].collections if group.get_label()]
    assert any(place[0] == pytest.approx(0.5, abs=1e-3) for place in at), "BF16 is half of float32"


def test_the_cache_table_has_v3s_bytes_and_fits_a_page(folder, capsys):
    quality.cache_table(folder)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith("FP8, RoPE key BF16"))
    assert row.split()[4:6] == ["164", "656"]
    assert lines[-1] == "a box (1 thread), 2026-11-22, torch 2.13"


def test_kinds_are_named_that_differ_for_sure(folder):
    fig = acceptance.by_kind(folder)
    assert str(fig).endswith(
        "own text 80% of drafts are kept. In the model's own text: 60% of names, 95% of spaces"
    )
    widths = sorted(bar.get_width() for bar in fig.axes[0].patches)
    assert widths == pytest.approx(sorted(100 * share for share in KIND.values()))


def test_the_laws_say_what_a_cached_token_costs(folder):
    fig = laws.decode_laws(folder=folder)
    assert str(fig).endswith(
        "beyond 2,048: 20.0 us at best in transformers, 0.5 here: 40 times less"
    )
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert (
        "ours, INT8 weights:\n6.0 ms + 0.50 us a cached token,\nR2 0.999, off by 0% at most"
        in names
    )
    right = fig.axes[1].get_title(loc="left")
    assert right == (
        "INT8 weights save 3.0 ms at 512 tokens;\nFP8 latents cost 5.1 ms at 8,192 tokens"
    )
    lines = [line for line in fig.axes[0].lines if line.get_linestyle() == "-"]
    marks = [line for line in fig.axes[0].lines if line.get_linestyle() == "None"]
    for line, mark in zip(lines, marks, strict=True):
        assert line.get_ydata()[[0, -1]] == pytest.approx([mark.get_ydata()[i] for i in (0, -1)])
    assert str(laws.decode_laws("trained", folder=folder)).startswith("Figure: Not measured yet")


def test_a_fixed_time_within_its_error_is_not_printed(tmp_path):
    times = {256: 0.030, 512: 0.038, 2048: 0.093, 4096: 0.220, 8192: 0.518}  # bent: -7 ms at 0
    fit = statistics.linear_regression(list(times), list(times.values()))
    at = {"model": "wide", "form": "float32", "batch": 1}
    law = {**at, "contexts": list(times), "fixed_s": fit.intercept, "r2": 0.98}
    rows = [
        receipt("decode step", {**at, "context": n, "weight_bytes": 4}, t) for n, t in times.items()
    ]
    rows.append(receipt("time per cached token", law, fit.slope))
    receipts.append("inference", rows, folder=tmp_path)
    fig = laws.decode_laws(folder=tmp_path)
    label = fig.legends[0].get_texts()[0].get_text()
    assert fit.intercept < 0 and label.startswith(
        f"ours, float32:\n{1e6 * fit.slope:.2f} us a cached token,\nR2 0.980"
    )
    missed = max(abs(fit.intercept + fit.slope * n - t) / t for n, t in times.items())
    assert missed > 0.5 and label.endswith(f", off by {missed:.0%} at most")
    steepest = 1e6 * (times[8192] - times[4096]) / 4096
    assert f"A cached token beyond 4,096: {steepest:.1f} us" in str(fig)
    assert all(ax.get_xscale() == ax.get_yscale() == "linear" for ax in fig.axes)


def test_the_error_of_a_fixed_time_is_least_squares_own():
    lengths = [256, 512, 2048, 4096, 8192]
    off = [1e-3, -2e-3, 5e-4, 2e-3, -1.5e-3]
    seconds = [0.02 + 1e-6 * n + one for n, one in zip(lengths, off)]
    design = np.stack([np.ones(5), lengths], axis=1)
    fit, (left,), *_ = np.linalg.lstsq(design, seconds)
    expected = np.sqrt(left / 3 * np.linalg.inv(design.T @ design)[0, 0])
    law = receipt("time per cached token", {"contexts": lengths, "fixed_s": fit[0]}, fit[1])
    found = laws.fixed_error(law, dict(zip(lengths, seconds)))
    assert found == pytest.approx(expected, rel=1e-6)
    two = receipt("time per cached token", {"contexts": lengths[:2], "fixed_s": 0.02}, 1e-6)
    assert laws.fixed_error(two, dict(zip(lengths, seconds))) == math.inf


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_the_bound_of_bytes_is_the_cost_models(batch):
    said = drafted.bytes_bound(batch, 1, 1.8)
    how = {"context": drafted.CONTEXT, "drafted": True, "weights": "float32", "cache": "float32"}
    cfg = ModelConfig.named("small")
    assert said == pytest.approx(speculation.expert_bytes_bound(cfg, batch, 0.8, 1, **how))


def test_drafting_as_measured_stands_beside_its_bound(folder):
    fig = drafted.measured(folder)
    assert "One draft makes one text 1.50 times as fast, 32 texts 1.06 times" in str(fig)
    few, many = (drafted.bytes_bound(batch, 1, 1.8) for batch in (1, 32))
    right = fig.axes[1]
    title = right.get_title(loc="left")
    assert f"one draft would\nbring {few:.2f}x at one text, {many:.2f}x at 32 (dashed)" in title
    shown = (
        [text.get_text() for text in right.get_legend().get_texts()] if right.get_legend() else []
    )
    assert "if bytes alone took time, even routing" in shown
    assert few < 1.5 and "above its dashed line is no error" in fig.get_supxlabel()
    dashed = [
        line for line in right.lines if line.get_linestyle() == "--" and len(line.get_xdata())
    ]
    assert list(dashed[0].get_ydata())[::2] == pytest.approx([few, many])


@pytest.mark.parametrize(
    ("ratios", "says"),
    [
        ({1: 0.5, 8: 0.9}, "faster up to 8 rows"),
        ({1: 1.5, 8: 1.1}, "no faster from 1 row to 8"),
        ({1: 0.5, 8: 1.1, 32: 2}, "no faster from 8 rows on"),
        ({1: 0.5, 8: 0.9, 32: 1.0}, "no faster at 32 rows"),
        ({1: 1.5, 8: 0.5}, "no faster at 1 row"),
    ],
)
def test_where_a_product_is_no_faster_is_said_in_words(ratios, says):
    assert rows.no_faster(ratios) == says


@pytest.mark.parametrize(
    ("only", "real", "gone", "kept"),
    [
        ((0.5, 1.1), (0.4, 0.5), True, True),
        ((1.2, 1.1), (0.4, 0.5), False, True),  # never had a gain
        ((0.5, 0.6), (0.4, 1.2), False, False),
    ],
)
def test_a_gain_is_called_gone_or_kept_only_where_it_is(only, real, gone, kept):
    by = {
        256: {
            "int8 weight-only": dict(zip((1, 64), only)),
            "int8 fbgemm": dict(zip((1, 64), real)),
            "int8 _int_mm": {1: 3.0, 64: 3.0},
        }
    }
    said = rows.finding(by)
    assert ("its gain is gone" in said, "it keeps its gain" in said) == (gone, kept)
    assert f"takes {only[1]:.2f} times" in said and f"two ways, {real[1]:.2f} times" in said
    del by[256]["int8 weight-only"]
    assert rows.finding(by) == "Time of a product against the rows that share its weights"


def test_products_are_drawn_over_float32(folder):
    fig = rows.int8_by_rows(folder)
    assert str(fig) == (
        "Figure: At 64 rows INT8 weight-only takes 2.50 times as long as float32: its gain is "
        "gone; INT8 arithmetic, the faster of two ways, 0.40 times as long: it keeps its gain"
    )
    assert fig.axes[0].get_title(loc="left").endswith("no faster at 64 rows")
    lines = {line.get_label(): list(line.get_ydata()) for line in fig.axes[0].lines}
    assert lines["INT8 weight-only"] == pytest.approx([0.5 + n / 32 for n in (1, 8, 64)])


def test_the_receipts_that_ship_are_drawn():
    for fig in (
        quality.quality_speed_size(),
        rows.int8_by_rows(),
        acceptance.by_kind(),
        laws.decode_laws(),
        drafted.measured(),
    ):
        assert fig.png() and not any(math.isnan(number) for number in fig.get_size_inches())
