"""Figures: drawn from data that is here, titled with a computed finding, and repeatable."""

import pytest
from matplotlib.figure import Figure

from dsv3_tutorial import hardware, receipts
from dsv3_tutorial.learn.figures import (
    cache_size,
    decode_speed,
    latent_flow,
    learning_curves,
    paper_tables,
    start,
)
from dsv3_tutorial.learn.figures.style import figure, finish
from dsv3_tutorial.train.loop import Row

DRAWN = {
    "394x": start.memory_wall,
    "295 FLOP per byte": lambda: start.roofline(hardware.chip("h800")),
    "10.8%": lambda: start.roofline_by_batch("h800", 32),
    "V3 caches 9.2 GB": cache_size.cache_against_context,
    "0 of 4 GPUs": lambda: cache_size.cache_on_gpus("DeepSeek-V3 (MLA)", 131072, 32, 2),
    "keeps 576 numbers": latent_flow.data_flow,
    "1,200 steps": learning_curves.learning,
    "faster than transformers": decode_speed.decode_recorded,
    "where cached heads fit": lambda: decode_speed.where_absorbing_pays("h800"),
    "Arithmetic": lambda: decode_speed.absorption_cost(512, 128, 128),
}


@pytest.mark.parametrize("finding", DRAWN)
def test_a_figure_states_its_finding_and_repeats(finding):
    draw = DRAWN[finding]
    made = draw()
    assert isinstance(made, Figure) and finding in str(made)
    assert made.png() == draw().png()
    for axes in made.axes:
        labels = [axes.get_xlabel(), axes.get_ylabel()]
        assert any(labels) or not axes.axison or axes.get_label() == "<colorbar>"


def test_a_title_that_does_not_fit_is_seen_as_text():
    fig, ax = figure()
    assert str(finish(fig, ax, "57x less")) == "Figure: 57x less"


def test_every_setting_of_the_cache_explorer_draws_and_speaks():
    for model in cache_size.PRESETS:
        words = cache_size.cache_on_gpus_in_words(model, 4096, 1, 1)
        assert model in words and "GB" in words
    words = cache_size.cache_on_gpus_in_words("DeepSeek-V3 (MLA)", 131072, 1, 2)
    assert "9.2 GB" in words


def test_the_absorption_explorer_knows_the_published_ratios():
    words = decode_speed.absorption_cost_in_words(512, 128, 128)
    assert "3.4x" in words and "71 times" in words and "171 new tokens" in words
    assert "never" in decode_speed.absorption_cost_in_words(64, 128, 8)


def test_a_live_run_is_drawn_over_the_recorded_band():
    rows = [Row(step, 8.0 - step / 50, 5.0 if step == 20 else None, 1.0) for step in range(1, 21)]
    made = learning_curves.learning_live(rows)
    assert "20 steps here: 5.00 bits per byte" in str(made)


def test_the_recorded_runs_are_complete_and_paired():
    found = learning_curves.runs()
    ends = learning_curves.final(found)
    assert len(ends) == 5 and all(len(values) >= 3 for values in ends.values())
    mean, error = learning_curves.paired(found)["MLA, latent 96 + 32"]
    assert mean > 2 * error > 0  # what the lesson says: behind, by more than its error


def test_paired_gaps_are_differences_seed_by_seed():
    def receipt(variant, seed, value):
        shapes = {"variant": variant, "seed": seed, "step": 1}
        spread = {"min": value, "max": value}
        facts = {"device": "x", "device_kind": "cpu", "versions": {"torch": "2"}, "threads": 1}
        day = {"date": "2026-11-21", "repeats": 1, "unit": "bits per byte"}
        return receipts.Receipt("loss", shapes=shapes, value=value, spread=spread, **facts, **day)

    values = {"MHA": [2.0, 3.0, 4.0], "MLA": [2.1, 3.2, 4.3]}
    found = {v: {1: [receipt(v, i, x) for i, x in enumerate(xs)]} for v, xs in values.items()}
    mean, error = learning_curves.paired(found)["MLA"]
    assert mean == pytest.approx(0.2) and error == pytest.approx(0.1 / 3**0.5)


def test_the_tables_print_what_does_not_add_up_and_every_base(capsys):
    from dsv3_tutorial.cost import memory

    paper_tables.isca_table_1(memory.kv_cache_bytes_per_token)
    paper_tables.mla_ratios()
    paper_tables.cache_per_gpu(memory.cache_bytes_per_gpu)
    printed = capsys.readouterr().out
    assert printed.count("does not add up") == 1
    for number in ("7.344x", "56.9x", "71.1x", "82.2%", "93.3%", "14.1%", "4.0%", "1.8%", "64.5"):
        assert number in printed


def test_the_recorded_ratios_and_crossovers_print(capsys):
    decode_speed.decode_ratios()
    decode_speed.measured_crossovers()
    printed = capsys.readouterr().out
    assert printed.count("batch") == 4 and printed.count("arithmetic alone says") == 2
