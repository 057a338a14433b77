"""`plan` as a tool: what it prints, what its JSON says, what an impossible plan complains of."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_tutorial import __main__ as cli
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import cluster_file, decisions, plan_options
from dsv3_tutorial.cost.assumptions import SOURCES, Assumptions
from dsv3_tutorial.cost.decisions import DECISIONS
from dsv3_tutorial.cost.layout import Job, Layout, PlanError
from dsv3_tutorial.cost.plan import plan
from dsv3_tutorial.files import data_path

V3 = ("deepseek-v3", "--cluster", "h800:2048", "--tokens", "14.8T", "--layout", "deepseek-v3")
SMALL = ("deepseek-v2-lite", "--cluster", "h100-sxm:8", "--tokens", "100B", "--sequences", "1024")
KEYS = {
    *("gpu_hours", "step_time_s", "tokens_per_day", "mfu", "cost_usd", "energy_kwh"),
    *("bottleneck", "memory_per_gpu_bytes"),
}


@pytest.fixture
def ran(capsys):
    """Run the command; its status, what it printed and what it complained of."""

    def run(*argv):
        status = cli.main(["plan", *map(str, argv)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_v3_in_the_reports_layout_is_the_plan_itself(ran):
    status, out, err = ran(*V3, "--json")
    made = plan(
        ModelConfig.named("deepseek-v3"),
        cluster_file.read("h800:2048"),
        Job(14.8e12, 4096, 15360),
        Layout.read("deepseek-v3"),
    )
    found = json.loads(out)
    assert (status, err) == (0, "") and set(found) >= KEYS
    assert found == json.loads(json.dumps({**made.as_json(), "model": "deepseek-v3"}))


def test_the_report_is_90_columns_of_everything_that_was_asked(ran):
    status, out, err = ran(*V3, "--serve")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 90
    assert not any(line != line.rstrip() for line in out.splitlines())
    for said in (
        *("deepseek-v3 on 2,048 x NVIDIA H800", "671.0B parameters", "pp 16 x dp 128", "fits"),
        *("bubble", "dispatch", "optimizer", "hidden", "MFU", "GPU hours", "an hour", "GWh"),
        *("bottleneck", "10 % more of", "assumptions", "fp8_products", "tokens/s and GPU"),
        *("a unit", "waits for"),
    ):
        assert said in out, said


def test_auto_is_named_with_its_reasons_and_no_slower_than_a_layout_of_ours(ran, tmp_path):
    status, out, _ = ran(*SMALL)
    assert status == 0 and "why this layout" in out and "layouts were examined" in out
    found = json.loads(ran(*SMALL, "--json")[1])
    own = tmp_path / "ours.json"
    own.write_text(json.dumps({**found["layout"], "recompute": "full"}))
    given = json.loads(ran(*SMALL, "--layout", own, "--json")[1])
    assert given["layout"]["recompute"] == "full"
    assert found["step_time_s"] < given["step_time_s"]


def test_a_config_json_its_folder_and_a_cluster_file_are_read(ran, tmp_path):
    folder = tmp_path / "our-model"
    folder.mkdir()
    (folder / "config.json").write_bytes(data_path("models", "deepseek-v2-lite.json").read_bytes())
    chips = tmp_path / "chips.json"
    chips.write_text('{"chip": "h100-sxm", "gpus": 8}')
    named = json.loads(ran(*SMALL, "--json")[1])
    for model in (folder, folder / "config.json"):
        status, out, _ = ran(model, "--cluster", chips, *SMALL[3:], "--json")
        assert status == 0 and json.loads(out) == {**named, "model": "our-model"}


def test_rent_and_assumptions_are_given_by_name_and_told(ran):
    usual = json.loads(ran(*V3, "--json")[1])
    changed = ("--rent", "3", "--assume", "fp8_products=0.9", "--assume", "pue=1.5")
    found = json.loads(ran(*V3, *changed, "--json")[1])
    assert found["step_time_s"] < usual["step_time_s"]
    assert found["cost_usd"] == pytest.approx(3 * found["gpu_hours"])
    assert found["energy_kwh"] == pytest.approx(
        1.5 * usual["energy_kwh"] * found["gpu_hours"] / usual["gpu_hours"]
    )
    out = ran(*V3, *changed, "--assumptions")[1]
    for name in vars(Assumptions()):
        kind, source = SOURCES[name]
        assert f"  - {name} " in out and kind in out
        assert not source or source.split()[0] in out
    for said in ("published runs", "19.926", "what the planner does not know", "Congestion"):
        assert said in out and max(map(len, out.splitlines())) <= 90
    assert "19.926" in ran(*V3)[1]
    assert "rent 3" in out and "fp8_products 0.9" in out and "(given)" in out


def test_a_decision_taken_back_stands_beside_the_plan_that_has_it(ran):
    whole = json.loads(ran(*SMALL, "--json")[1])
    status, out, err = ran(*SMALL, "--without", "mla", "--without", "fp8", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "") and set(found) >= KEYS
    assert found["without"] == ["mla", "fp8"] and found["layout"]["precision"] == "bf16"
    planned = found["as_planned"]
    assert planned["serving"]["fits"] and planned["without"] == planned["notes"] == []
    assert {name: planned.get(name) for name in whole if name != "model"} == {
        name: value for name, value in whole.items() if name != "model"
    }
    assert found["gpu_hours"] > whole["gpu_hours"]
    status, text, _ = ran(*SMALL, "--without", "mla,fp8")
    assert status == 0 and "without mla, fp8" in text and "tokens/s and GPU" in text
    assert max(map(len, text.splitlines())) <= 90


def test_a_decision_that_leaves_nothing_that_fits_is_null_and_exits_1(ran, tmp_path):
    sizes = {"dp": 8, "ep": 8, "micro_batch": 2}
    needs = [
        plan(
            ModelConfig.named("deepseek-v2-lite"),
            cluster_file.read("h100-sxm:8"),
            Job(1e11, 4096, 1024),
            Layout(**sizes, precision=precision),
        ).memory_per_gpu_bytes
        for precision in ("fp8", "bf16")
    ]
    between = sum(needs) / 2 / Assumptions().usable_memory
    tight, layout = tmp_path / "tight.json", tmp_path / "layout.json"
    changes = {"memory_bytes": round(between)}
    tight.write_text(json.dumps({"chip": "h100-sxm", "gpus": 8, "changes": changes}))
    layout.write_text(json.dumps(sizes))
    argv = (SMALL[0], "--cluster", tight, *SMALL[3:], "--layout", layout)
    assert ran(*argv)[0] == 0
    status, out, err = ran(*argv, "--without", "fp8", "--json")
    found = json.loads(out)
    assert status == 1 and "can be used" in err and found["error"] == err.strip()
    assert {found[key] for key in KEYS} == {None} and not found["fits"]
    assert found["as_planned"]["gpu_hours"] > 0
    status, out, _ = ran(*argv, "--without", "fp8")
    assert status == 1 and "without fp8: does not fit" in out


def test_the_tornado_has_each_decision_in_both_orders(ran):
    small = ("tiny", "--cluster", "h100-sxm:2", "--tokens", "1B", "--sequences", "16")
    status, out, err = ran(*small, "--tornado")
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 90
    found = json.loads(ran(*small, "--tornado", "--json")[1])
    task = plan_options.task(plan_options.parser(DECISIONS).parse_args(small))
    bars = decisions.tornado(task.cfg, task.cluster, task.job)
    assert list(found["decisions"]) == [row.decision for row in bars.rows]
    for row in bars.rows:
        assert found["decisions"][row.decision]["gpu_hours_saved"] == list(row.hours)
        assert f"\n{row.decision} " in out
    assert found["whole"]["gpu_hours"] == json.loads(ran(*small, "--json")[1])["gpu_hours"]
    assert found["bare"]["without"] == [d for d in DECISIONS if d in found["decisions"]]


def test_one_gpu_without_any_link_has_a_plan(ran):
    sizes = ("--sequences", "64", "--seq-len", "512")
    status, out, err = ran("tiny", "--cluster", "rtx-4090", "--tokens", "1B", *sizes, "--serve")
    assert (status, err) == (0, "") and "1 x NVIDIA GeForce RTX 4090" in out


IMPOSSIBLE = {
    "no model": (("gpt-5", *V3[1:]), "no preset 'gpt-5'"),
    "no chip": ((V3[0], "--cluster", "h900:8", *V3[3:]), "no chip 'h900'"),
    "no count": ((V3[0], "--cluster", "h800:many", *V3[3:]), "no number of GPUs"),
    "no cluster file": ((V3[0], "--cluster", "none.json", *V3[3:]), "no cluster file"),
    "no tokens": ((*V3[:4], "lots", *V3[5:]), "--tokens 'lots'"),
    "tokens below 0": ((*V3[:4], "-5T", *V3[5:]), "--tokens '-5T'"),
    "half a sequence": ((*V3, "--sequences", "0.5"), "--sequences '0.5'"),
    "no layout": ((*V3[:6], "fancy"), "no layout 'fancy'"),
    "other GPUs": ((V3[0], "--cluster", "h800:1024", *V3[3:]), "1024"),
    "sequences do not divide": ((*V3, "--sequences", "15361"), "15361"),
    "too few micro-batches": ((*V3, "--sequences", "128"), "micro"),
    "tornado on one layout": ((*V3, "--tornado"), "Leave out --layout"),
    "no decision": ((*V3, "--without", "hope"), "No decision 'hope'"),
    "a decision not made": ((*SMALL, "--without", "mtp"), "has no mtp to take back"),
    "no assumption": ((*V3, "--assume", "luck=1"), "luck=1"),
    "impossible assumption": ((*V3, "--assume", "fp8_products=2"), "fp8_products = 2"),
    "rent below 0": ((*V3, "--rent", "-1"), "rent = -1"),
    "context of nothing": ((*V3, "--context", "0"), "--context '0'"),
    "no user": ((*V3, "--user-rate", "nan"), "--user-rate 'nan'"),
    "does not fit": (("qwen2.5-72b", "--cluster", "l4:1", "--tokens", "1T"), "GB"),
    "sequence too long": ((*V3, "--seq-len", "1M"), "does not fit"),
    "unknown link": (("deepseek-v3", "--cluster", "h20:1024", "--tokens", "1T"), "scale_out"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_plan_exits_1_and_says_which_number_to_change(ran, name):
    argv, said = IMPOSSIBLE[name]
    status, _, err = ran(*argv)
    assert status == 1 and said in err, err
    assert err.count(".") + err.count("\n  - ") >= 2  # what, why, and what to do


@pytest.mark.parametrize(
    ("text", "value"),
    [("14.8T", 14.8e12), ("500b", 5e11), ("2048", 2048), ("1e3", 1000), ("0.5K", 500)],
)
def test_numbers_are_read_with_their_unit(text, value):
    assert plan_options.number(text, "tokens") == value


@pytest.mark.parametrize("text", ["", "T", "1TT", "inf", "nan", "0", "-1", "1 Q", "0x10", "1e999"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(PlanError, match="is no number above 0"):
        plan_options.number(text, "tokens")


WORDS = st.sampled_from(
    ["0", "1", "3", "7", "64", "100", "4096", "1M", "9T", "-2", "0.3", "x", "", "1e400", "٣", "5.5"]
)
OPTIONS = st.one_of(
    st.tuples(
        st.sampled_from(["--seq-len", "--sequences", "--rent", "--context", "--user-rate"]), WORDS
    ),
    st.tuples(
        st.just("--assume"),
        st.builds("{}={}".format, st.sampled_from([*vars(Assumptions()), "x"]), WORDS),
    ),
    st.tuples(st.just("--without"), st.sampled_from([*DECISIONS, "", ",", "x"])),
    st.tuples(st.just("--serve")),
    st.tuples(st.just("--json")),
)


@given(
    st.sampled_from(["deepseek-v2-lite", "tiny", "qwen2.5-72b"]),
    st.sampled_from(["h100-sxm", "h20", "a100", "rtx-4090", "nothing", ""]),
    st.sampled_from(["", ":1", ":4", ":7", ":0", ":-1", ":x"]),
    WORDS,
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("pp", "dp", "ep", "tp", "micro_batch"), st.integers(-1, 9)),
            "schedule": st.sampled_from(["1f1b", "dualpipe", "x", 5]),
            "zero": st.integers(-1, 4),
            "precision": st.sampled_from(["fp8", "bf16", None]),
            "gpus": st.just(8),
        },
    ),
    st.lists(OPTIONS, max_size=3),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_input_ends_in_a_traceback(ran, tmp_path, model, chip, count, tokens, layout, options):
    own = tmp_path / "layout.json"
    own.write_text(json.dumps(layout))
    more = [word.replace("--without", "--assume") for option in options for word in option]
    argv = (model, f"--cluster={chip}{count}", f"--tokens={tokens}", f"--layout={own}", *more)
    try:
        status, out, err = ran(*argv)
    except SystemExit as end:  # argparse: a value that looks like an option
        assert end.code == 2
        return
    assert status == (1 if err else 0), err
    assert out if status == 0 else len(err) > 60, err


def test_the_short_plan_holds_the_long_ones_step_and_bill(capsys):
    asked = ["deepseek-v3", "--cluster", "h800:2048", "--tokens", "14.8T", "--layout"]
    asked.append("deepseek-v3")
    assert cli.main(["plan", *asked]) == 0
    long = capsys.readouterr().out
    assert cli.main(["plan", *asked, "--short"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") < 20 < long.count("\n")
    for line in said.splitlines():
        if line.startswith(("deepseek-v3 on", "a day", "whole run", "bottleneck")):
            assert line in long
