"""The trained pair: equal FLOPs on every rung, what a run holds, its receipts, and its table."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsv3_tutorial import __main__ as cli
from dsv3_tutorial import receipts
from dsv3_tutorial.bench import codesign, codesign_bytes, codesign_ladder, codesign_table
from dsv3_tutorial.bench.codesign_ladder import BASELINE, FULL, training_flops_per_token, with_flops
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import flops, memory, params
from dsv3_tutorial.fp8.linear import Fp8Linear
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.experts import Experts
from dsv3_tutorial.train import corpus

NAMES = [BASELINE, "+ MLA", "+ MoE", "+ FP8", FULL]


@pytest.mark.parametrize("seq_len", [16, 128, 512])
def test_every_rung_costs_a_token_the_same_training_flops_within_one_percent(seq_len):
    each = [training_flops_per_token(r.cfg, seq_len) for r in codesign.ladder(seq_len).values()]
    assert max(each) / min(each) < 1.01


@pytest.mark.parametrize("name", NAMES)
def test_the_flops_of_a_rung_are_those_that_torch_counts_in_its_forward(name):
    """Torch counts matrix products: no norm, and attention over all positions, causal or not.

    In one kernel MLA's values are padded to the width of its keys: run, and not asked for.
    """
    cfg, length = codesign.ladder()[name].cfg, 128
    model, ids = DeepSeekV3(cfg), torch.randint(256, (1, length))
    for experts in (m for m in model.modules() if isinstance(m, Experts)):
        experts.engine = "sorted"  # torch counts no grouped product, and no attention in one kernel
    counting = FlopCounterMode(display=False)
    with counting as counted, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(ids, drafts=cfg.num_nextn_predict_layers > 0)
    asked, padded = cfg.qk_head_dim + cfg.value_dim, 2 * cfg.qk_head_dim
    layers = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    more = layers * length * cfg.num_attention_heads * (2 * padded - asked)
    ours = training_flops_per_token(cfg, length) / 3 + more
    assert counted.get_total_flops() / length == pytest.approx(ours, rel=3e-3)


def test_a_module_costs_a_block_a_projection_and_the_head_on_one_position_less():
    cfg = codesign.ladder()[FULL].cfg
    plain = replace(cfg, num_nextn_predict_layers=0)
    deeper = replace(plain, num_hidden_layers=cfg.num_hidden_layers + 1)
    block = flops.forward_flops_per_token(deeper, 127) - flops.forward_flops_per_token(plain, 127)
    d, v = cfg.hidden_size, cfg.vocab_size
    module = block + 2 * (2 * d * d + 3 * d + v * d)
    main = flops.training_flops_per_token(plain, 128)
    assert training_flops_per_token(plain, 128) == main
    assert training_flops_per_token(cfg, 128) == pytest.approx(main + 3 * module * 127 / 128)


@settings(max_examples=30)
@given(st.sampled_from(["tiny", "small"]), st.floats(1.0, 8.0), st.sampled_from([32, 128, 500]))
def test_the_feed_forward_takes_up_a_budget_to_within_half_a_step(name, factor, seq_len):
    cfg = ModelConfig.named(name)
    budget = factor * training_flops_per_token(cfg, seq_len)
    made = with_flops(cfg, budget, seq_len)
    layers = cfg.num_hidden_layers if name == "tiny" else cfg.first_k_dense_replace
    step = 18 * cfg.hidden_size * layers * codesign_ladder.GRAIN
    assert abs(training_flops_per_token(made, seq_len) - budget) <= step / 2 * (1 + 1e-9)
    widths = made.intermediate_size, made.moe_intermediate_size
    assert made == replace(cfg, intermediate_size=widths[0], moe_intermediate_size=widths[1])


def test_each_rung_adds_one_decision_to_the_one_before():
    rungs = codesign.ladder()
    assert [*rungs] == NAMES and (NAMES[0], NAMES[-1]) == codesign.ENDS
    has = {
        name: (
            rung.cfg.is_mla,
            rung.cfg.n_routed_experts is not None,
            rung.precision == "fp8",
            rung.mtp_weight > 0 and rung.cfg.num_nextn_predict_layers == 1,
        )
        for name, rung in rungs.items()
    }
    assert [sum(decisions) for decisions in has.values()] == [0, 1, 2, 3, 4]
    assert rungs["+ FP8"].cfg == rungs["+ MoE"].cfg
    frames = {
        (r.cfg.hidden_size, r.cfg.num_hidden_layers, r.cfg.vocab_size) for r in rungs.values()
    }
    assert len(frames) == 1
    assert memory.kv_cache_bytes_per_token(rungs[BASELINE].cfg) == 4096
    assert memory.kv_cache_bytes_per_token(rungs[FULL].cfg) == 1024


@pytest.fixture
def text():
    """A few thousand bytes with some order in them."""
    data = torch.arange(4000) % 61 + torch.randint(0, 3, (4000,))
    return corpus.Corpus(data[:3000].byte(), data[3000:].byte(), 1, 1)


@pytest.fixture
def tiny(monkeypatch):
    """Rungs of two layers, batches of 2 x 16 tokens, means of two steps, a tail of three."""
    rungs = {
        name: replace(rung, cfg=_small(rung.cfg))
        for name, rung in codesign_ladder.ladder(16).items()
    }
    monkeypatch.setattr(codesign, "ladder", lambda seq_len=16: rungs)
    sizes = {"BATCH": 2, "SEQ_LEN": 16, "EVERY": 2, "LOOK": 3, "TAIL": 3, "WINDOWS": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(codesign, name, value)
    return rungs


def _small(cfg):
    experts = {"n_routed_experts": 4} if cfg.n_routed_experts else {"first_k_dense_replace": 2}
    return replace(cfg, num_hidden_layers=2, intermediate_size=64, **experts)


def test_a_run_has_its_curve_its_looks_and_what_it_held(tiny, text):
    made = codesign.run(FULL, 0, text, steps=6)
    assert made.steps == [2, 4, 6] and len(made.loss) == 3
    assert made.held_out_steps == [3, 4, 6] and made.tail() == made.held_out[1:]
    assert 5 < made.held_out[-1] < 12 and made.mtp_held_out > 5  # hardly trained, near 8 bits
    assert made.violation >= 0 and made.processor_seconds > 0
    again = codesign.run(FULL, 0, text, steps=6)
    times = {"seconds": 0, "processor_seconds": 0}
    assert replace(made, **times) == replace(again, **times)


def test_a_dense_run_has_neither_drafts_nor_a_balance(tiny, text):
    made = codesign.run(BASELINE, 0, text, steps=2)
    assert made.mtp_held_out is None and made.violation is None


def test_a_live_run_is_the_recorded_ones_side_by_side(tiny, text, monkeypatch):
    monkeypatch.setattr(codesign, "STEPS", 4)
    shown = list(codesign.live(seconds=600, seed=0, text=text))
    assert [step for step, _ in shown] == [1, 2, 3, 4]
    for name in codesign.ENDS:
        losses = [row[name] for _, row in shown]
        blocks = [sum(losses[at : at + 2]) / 2 for at in (0, 2)]
        assert blocks == pytest.approx(codesign.run(name, 0, text, steps=4).loss, abs=2e-5)


def test_a_live_run_without_time_still_takes_one_step_of_both(tiny, text):
    ((step, losses),) = codesign.live(seconds=0.0, text=text)
    assert step == 1 and tuple(losses) == codesign.ENDS


def test_one_seed_gives_all_rungs_one_text_and_fp8_the_weights_of_bf16(tiny, text):
    states = {name: codesign.begin(rung, 3, text, 10) for name, rung in tiny.items()}
    first, *others = [state.sampler.draw() for state in states.values()]
    assert all(torch.equal(first, other) for other in others)
    bf16, fp8 = (states[name].model.parameters() for name in ("+ MoE", "+ FP8"))
    assert all(map(torch.equal, bf16, fp8))
    computes = {
        name: any(isinstance(m, Fp8Linear) for m in state.worker.modules())
        for name, state in states.items()
    }
    assert [*computes.values()] == [False, False, False, True, True]
    assert [s.recipe.moments_in for s in states.values()] == [*["float32"] * 3, "bf16", "bf16"]
    assert [s.recipe.mtp_weight for s in states.values()] == [0, 0, 0, 0, 0.3]


def test_an_unknown_rung_names_those_there_are(text):
    with pytest.raises(ValueError, match=r"'GPT-5'.*dense MHA, BF16; \+ MLA"):
        next(codesign.live(["GPT-5"], 1, text=text))


def test_weights_and_optimizer_are_counted_to_the_byte(tiny, text):
    held = {}
    for name in ("+ MoE", "+ FP8"):
        state = codesign.begin(tiny[name], 0, text, 10)
        codesign._step(state)
        held[name] = codesign_bytes.held_bytes(state, state.sampler.draw())
    counted = params.count(tiny["+ MoE"].cfg)
    learned = counted.total - 4  # the balance biases are no parameters
    assert held["+ MoE"]["weight_bytes"] == (4 + 2) * learned
    assert held["+ MoE"]["optimizer_bytes"] == (4 + 4) * learned
    kept = sum(counted.by_part[p] for p in ("embedding", "head", "gate", "norms")) - 4
    assert held["+ FP8"]["weight_bytes"] == 4 * learned + 2 * kept  # the rest reads the masters
    assert held["+ FP8"]["optimizer_bytes"] == (2 + 2) * learned


def test_activations_are_what_grows_with_the_tokens_and_no_weight(monkeypatch):
    """Kept for backward: 10 float32 a token, twice; the constant and the weight do not grow."""
    worker, constant = nn.Linear(10, 3, bias=False), torch.ones(10)

    def forward(model, rows, recipe, step):
        x = torch.randn(rows[:, 1:].numel(), 10, requires_grad=True)
        return model(x * x * constant).sum()

    monkeypatch.setattr(codesign_bytes, "losses", forward)
    state = SimpleNamespace(worker=worker, recipe=None)
    found = codesign_bytes.activation_bytes_per_token(state, torch.zeros(4, 9))
    assert found == 2 * 10 * 4


def test_a_dense_model_keeps_as_much_for_every_token(tiny, text):
    state = codesign.begin(tiny[BASELINE], 0, text, 10)
    few, many = (torch.randint(256, (rows, 17)) for rows in (4, 8))
    each = [codesign_bytes.activation_bytes_per_token(state, rows) for rows in (few, many)]
    assert each[0] == each[1] >= memory.activation_bytes_per_token(tiny[BASELINE].cfg, False)


@pytest.fixture
def quick(tiny, monkeypatch, text, tmp_path):
    """The command on that text, three steps of each end."""
    monkeypatch.setattr(corpus, "load", lambda: text)
    few = ["bench", "codesign", "--steps", "3", "--out", str(tmp_path)]
    return lambda *more: cli.main([*few[:2], *more, *few[2:]])


def test_receipts_read_back_and_an_interrupted_run_is_taken_up(quick, tmp_path, capsys):
    assert quick("--seeds", "0", "1") == 0
    said = capsys.readouterr().out
    assert said.count("held out") == 4 and f"{FULL}: " in said and "over 2 seeds" in said
    whole = receipts.read("codesign", folder=tmp_path)
    assert [(r.shapes["variant"], r.shapes["seed"]) for r in whole] == [
        *((BASELINE, 0), (FULL, 0), (BASELINE, 1), (FULL, 1)),
    ]
    path = tmp_path / "codesign.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert quick("--seeds", "0", "1") == 0
    assert capsys.readouterr().out.count("held out") == 1
    again = receipts.read("codesign", folder=tmp_path)
    assert [r.value for r in again] == [r.value for r in whole]


def test_another_learning_rate_is_another_run(quick, tmp_path, capsys):
    for rate in ("3e-3", "1e-3"):
        quick("--seeds", "0", "--rungs", BASELINE, "--lr", rate)
    rates = [r.shapes["peak_lr"] for r in receipts.read("codesign", folder=tmp_path)]
    assert rates == [3e-3, 1e-3]
    assert capsys.readouterr().out.count("1 run") == 2


def receipt(name, seed, value, device="a"):
    shapes = {"variant": name, "seed": seed, "length": 10, "tokens_per_step": 64}
    shapes |= {"processor_seconds": 5.0 + seed, "parameters": 7, "training_flops_per_token": 6e6}
    held = ("weight_bytes", "optimizer_bytes", "activation_bytes_per_token")
    shapes |= {**dict.fromkeys(held, 2e4), "cache_bytes_per_token": 1024}
    shapes["mtp_held_out"] = value - 0.25 if name == FULL else None
    return receipts.Receipt(
        what="held-out loss",
        device=device,
        device_kind="cpu",
        versions={"torch": "2"},
        date="2026-11-22",
        shapes=shapes,
        value=value,
        unit="bits per byte",
        spread={"min": value, "max": value},
        repeats=1,
        threads=1,
    )


def test_a_row_has_the_mean_over_seeds_with_its_standard_error():
    one = [receipt(BASELINE, seed, 2.0 + 0.1 * seed) for seed in range(3)]
    row, alone, far = codesign_table.rows(
        [receipt(FULL, 0, 1.9), *one, receipt(FULL, 0, 1.0, device="b")]
    )
    assert (row.name, row.seeds, row.loss) == (BASELINE, [0, 1, 2], pytest.approx(2.1))
    assert row.error == pytest.approx(0.1 / math.sqrt(3)) and alone.error == math.inf
    assert row.seconds == pytest.approx(0.6) and (alone.loss, far.loss) == (1.9, 1.0)
    assert (row.draft, alone.draft) == (None, pytest.approx(1.65))
    head, *lines = codesign_table.table([*one, receipt(FULL, 0, 1.9)]).splitlines()
    assert len(lines) == 2 and len({len(line) for line in (head, *lines)}) == 1
    assert "2.1000 0.0577" in lines[0] and "1 run" in lines[1] and len(head) <= 90


def test_a_difference_is_paired_by_seed_and_says_what_it_cannot_exclude():
    base = [receipt(BASELINE, seed, 2.0 + seed) for seed in range(3)]
    full = [
        receipt(FULL, seed, (2.0 + seed) * (1 + d)) for seed, d in enumerate((0.01, 0.02, 0.03))
    ]
    (pairs,) = codesign_table.compared([*base, *full]).values()
    assert pairs.differences == pytest.approx([0.01, 0.02, 0.03])
    said = codesign_table.sentence(pairs)
    assert said == "+ MTP: +2.00% +- 0.58% over 3 seeds; between -0.61% and +4.61%"
    (single,) = codesign_table.compared([*base, full[0]]).values()
    assert "one seed, and no error" in codesign_table.sentence(single)


def test_the_runs_on_record_are_three_seeds_of_both_ends_of_this_ladder():
    found = receipts.latest("codesign", length=codesign.STEPS, peak_lr=codesign.PEAK_LR)
    by_name = {row.name: row for row in codesign_table.rows(found)}
    assert all(len(by_name[name].seeds) >= 3 for name in codesign.ENDS)
    for name, row in by_name.items():
        cfg, counted = codesign.ladder()[name].cfg, params.count(codesign.ladder()[name].cfg)
        assert row.training_flops_per_token == training_flops_per_token(cfg)
        assert row.parameters == counted.total + counted.mtp
    assert {r.shapes["tokens_per_step"] for r in found} == {codesign.BATCH * codesign.SEQ_LEN}
