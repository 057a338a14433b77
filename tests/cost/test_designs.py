"""The design game: worked answers hold with room, and every demand turns somebody away."""

import re
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3_tutorial.config import ConfigError, ModelConfig, preset_names
from dsv3_tutorial.cost import bill, designs, params, search, serving_plan
from dsv3_tutorial.cost.design_model import FIELDS, model, shape_problems
from dsv3_tutorial.cost.designs import BRIEFS, PARTS, cluster_design, judge, lab_design
from dsv3_tutorial.cost.layout import Job
from dsv3_tutorial.cost.serving_target import Target

MODEL, SERVICE, TRAINING = PARTS
WORKED = {"lab": lab_design(), "h20": cluster_design()}
each = pytest.mark.parametrize("name", BRIEFS)
V3 = {
    **{"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128},
    **{"kv_lora_rank": 512, "q_lora_rank": 1536, "intermediate_size": 18432},
    **{"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
    **{"first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "num_nextn_predict_layers": 1},
}


def split(design):
    fields = dict(design)
    return fields.pop("tokens"), model(**fields)


def plain(design, **changes):
    return {**{k: v for k, v in design.items() if k != "kv_lora_rank"}, **changes}


def users(name, design):
    brief, (_, cfg) = BRIEFS[name], split(design)
    target = Target(brief.context, brief.rate, brief.devices)
    return serving_plan.serve(cfg, brief.cluster.chip, target, brief.devices)


@each
def test_a_worked_design_meets_every_demand_with_room(name):
    brief, (tokens, cfg) = BRIEFS[name], split(WORKED[name])
    assert judge(WORKED[name], brief) == []
    plan = designs.planned(cfg, brief, Job(tokens=tokens, sequences=brief.sequences))
    counted = params.count(cfg)
    assert 1.05 * plan.days < brief.days
    assert brief.budget_usd is None or 1.05 * plan.cost_usd < brief.budget_usd
    assert users(name, WORKED[name]).batch >= 1.05 * brief.users
    for have, least in ((counted.total, brief.total), (counted.activated, brief.activated)):
        assert have > least
    assert tokens > 1.05 * brief.tokens


@pytest.mark.parametrize(
    ("name", "part", "design", "says"),
    [
        ("lab", SERVICE, {**V3, "tokens": 14.8e12}, "not one of 48 users"),
        ("lab", TRAINING, {**V3, "tokens": 14.8e12}, "14 bytes for each parameter"),
        ("lab", SERVICE, plain(WORKED["lab"]), "and 48 are asked for: memory binds"),
        ("lab", TRAINING, {**WORKED["lab"], "tokens": 2e12}, "times the 14.0 days"),
        ("lab", TRAINING, {**WORKED["lab"], "tokens": 2e10}, "20 B tokens, and 300 B"),
        ("lab", TRAINING, plain(WORKED["lab"], tokens=None), "'tokens' is missing"),
        ("lab", TRAINING, {**WORKED["lab"], "tokens": "1e12"}, "tokens = '1e12' is no number"),
        ("lab", TRAINING, {**WORKED["lab"], "n_routed_experts": 250}, "or a multiple of 8 experts"),
        ("lab", SERVICE, {**WORKED["lab"], "kv_lora_rank": 40_000}, "leave 55.3 GB"),
        ("lab", MODEL, plain(WORKED["lab"], num_key_value_heads=2), "2 key-value heads"),
        ("lab", MODEL, plain(WORKED["lab"], num_attention_heads=4), "4 key-value heads"),
        ("lab", MODEL, {**WORKED["lab"], "num_experts_per_tok": 1}, "1 routed and 1 shared"),
        ("lab", MODEL, {**WORKED["lab"], "n_shared_experts": 7}, "6 routed and 7 shared"),
        ("lab", MODEL, {**WORKED["lab"], "moe_intermediate_size": 4096}, "14.0 times hidden_size"),
        ("lab", MODEL, {**WORKED["lab"], "n_routed_experts": 32}, "B parameters, and 10 B"),
        ("lab", MODEL, {**WORKED["lab"], "kv_lora_rank": 32}, "caches 96 numbers in a layer"),
        ("lab", MODEL, {**WORKED["lab"], "q_lora_rank": 255}, "is 255, and 1/8 of hidden_size"),
        ("lab", MODEL, {**WORKED["lab"], "first_k_dense_replace": 6}, "6 of 24 layers, and"),
        ("lab", MODEL, {**WORKED["lab"], "layers": 3}, "the nearest is 'num_hidden_layers'"),
        ("lab", MODEL, {"tokens": 1e12}, "'hidden_size' is missing"),
        ("lab", TRAINING, {"tokens": 1e12}, "there is no model yet"),
        ("lab", MODEL, {**WORKED["lab"], "num_hidden_layers": 10**9}, "at most 200"),
        ("lab", MODEL, {**WORKED["lab"], "moe_intermediate_size": 64}, "64 wide, and 1/8"),
        ("lab", MODEL, {**WORKED["lab"], "num_hidden_layers": 24.0}, "must be int, got 24.0"),
        ("lab", MODEL, {**WORKED["lab"], "num_attention_heads": 4}, "queries are 768"),
        ("h20", MODEL, {**WORKED["h20"], "num_hidden_layers": 16}, "320 for each layer"),
        ("h20", SERVICE, {**WORKED["h20"], "num_attention_heads": 128}, "arithmetic binds"),
        ("h20", SERVICE, {**WORKED["h20"], "n_routed_experts": 130}, "do not divide by the 8"),
        ("h20", SERVICE, plain(WORKED["h20"], num_key_value_heads=4), "memory binds"),
        ("h20", TRAINING, {**WORKED["h20"], "tokens": 14.8e12}, "times the $560,000"),
    ],
)
def test_an_unmet_demand_is_one_sentence_that_says_what_lacks(name, part, design, says):
    found = judge(design, BRIEFS[name], part)
    assert says in " | ".join(found)
    for one in found:
        assert "\n" not in one and re.search(r"\d|there is no|missing|None", one)


def test_v3s_fields_make_v3():
    made, v3 = model(**V3), ModelConfig.named("deepseek-v3")
    assert params.count(made) == params.count(v3)
    assert judge({**V3, "tokens": 14.8e12}, BRIEFS["h20"], MODEL) == []


@pytest.mark.parametrize("name", preset_names())
def test_published_models_keep_to_the_shapes_that_are_asked_for(name):
    assert shape_problems(ModelConfig.named(name)) == []


def test_the_edges_of_query_ranks_and_dense_layers_are_where_they_are_said_to_be():
    def shape(**changes):
        return judge({**WORKED["lab"], **changes}, BRIEFS["lab"], MODEL)

    for rank, fine in ((256, True), (255, False)):  # 2048 / 8
        assert (shape(q_lora_rank=rank) == []) == fine
    for dense, fine in ((5, True), (6, False)):  # 24 / 10 + 3
        assert (shape(first_k_dense_replace=dense, n_routed_experts=80) == []) == fine
    one = {"first_k_dense_replace": 23, "intermediate_size": 16_384, "n_routed_experts": 2048}
    assert any("23 of 24 layers" in said for said in shape(**one))


def test_what_the_worked_answers_say_of_themselves_is_so():
    assert users("lab", plain(WORKED["lab"])).batch == 9
    h20 = BRIEFS["h20"].cluster.chip
    assert round(h20.rate("bf16") / h20.bandwidth()) == 37
    for heads, said in ((128, 242), (64, 121), (32, 60)):
        _, cfg = split({**WORKED["h20"], "num_attention_heads": heads})
        lines = bill.decode_bill(cfg, 1 << 20)
        cache = next(line for line in lines if line.part == "latent cache")
        assert round(cache.flops / cache.bytes) == said
    assert users("h20", {**WORKED["h20"], "num_attention_heads": 64}).batch == 160
    for name, (activated, total) in {"lab": (1.7, 10), "h20": (14, 147)}.items():
        counted = params.count(split(WORKED[name])[1])
        assert counted.activated / 1e9 == pytest.approx(activated, rel=0.03)
        assert counted.total / 1e9 == pytest.approx(total, rel=0.04)


def test_days_in_a_sentence_are_the_planners():
    design = {**WORKED["lab"], "tokens": 2e12}
    tokens, cfg = split(design)
    brief = BRIEFS["lab"]
    plan = designs.planned(cfg, brief, Job(tokens=tokens, sequences=brief.sequences))
    assert f"takes {plan.days:.1f} days" in judge(design, brief, TRAINING)[0]


@each
def test_what_the_game_does_not_try_would_not_be_faster(name):
    brief, (tokens, cfg) = BRIEFS[name], split(WORKED[name])
    job = Job(tokens=tokens, sequences=brief.sequences)
    best = search.best(cfg, brief.cluster, job).plan
    assert designs.planned(cfg, brief, job).step_time_s <= 1.02 * best.step_time_s


@each
def test_a_brief_says_all_that_is_asked_for(name):
    brief, said = BRIEFS[name], str(BRIEFS[name])
    for number in (brief.days, brief.users, brief.rate, brief.total / 1e9, brief.activated / 1e9):
        assert f"{number:g}" in said
    assert f"{brief.context:,}" in said and f"{brief.cluster.gpus} x" in said
    assert max(map(len, said.splitlines())) <= 100


def test_a_harder_brief_never_asks_for_less():
    brief = BRIEFS["lab"]
    harder = replace(brief, users=brief.users * 2, context=brief.context * 2)
    assert not judge(WORKED["lab"], brief, SERVICE) and judge(WORKED["lab"], harder, SERVICE)


junk = st.one_of(
    st.integers(-2, 300), st.floats(), st.none(), st.text(max_size=3), st.booleans(), st.just([1])
)


@given(st.dictionaries(st.sampled_from((*FIELDS, "tokens", "odd")), junk, max_size=9))
@example({"first_k_dense_replace": 24})
@settings(max_examples=60, deadline=None)
def test_whatever_is_handed_in_is_told_and_raises_nothing(changes):
    found = judge({**WORKED["lab"], **changes}, BRIEFS["lab"])
    assert all(isinstance(one, str) and one for one in found)


def test_a_model_of_unknown_fields_is_refused_with_all_of_them():
    with pytest.raises(ConfigError, match="'heads'") as caught:
        model(hidden_size=64, heads=2, layers=3)
    assert len(caught.value.problems) == 3  # two are misspelt, and not missing as well


@pytest.mark.parametrize(
    ("written", "meant"),
    [("top_k", "num_experts_per_tok"), ("heads", "num_attention_heads"), ("layers", "num_hidden")],
)
def test_what_people_write_is_led_to_the_field_they_mean(written, meant):
    with pytest.raises(ConfigError, match=f"'{written}'; the nearest is '{meant}"):
        model(**{written: 6})


@pytest.mark.parametrize("name", BRIEFS)
@pytest.mark.parametrize("change", [{"layers": 3}, {"num_experts_per_tok": 999}])
def test_without_a_model_each_thing_is_said_once(name, change):
    found = designs.missed({**WORKED[name], **change}, BRIEFS[name])
    assert len(found) == 1 and found[0].kind == "fields"


@pytest.mark.parametrize(
    "change",
    [{"n_routed_experts": 2048}, {"kv_lora_rank": 30_000}, {"num_hidden_layers": 200}],
)
@each
def test_nobody_is_told_to_change_what_is_given(name, change):
    found = " ".join(judge({**WORKED[name], **change}, BRIEFS[name]))
    assert found and not re.search("more devices|shorter context|narrower format|more GPUs", found)


def test_plain_attention_of_eight_heads_would_need_a_shape_that_is_refused():
    wide = plain(WORKED["h20"], num_key_value_heads=8, num_hidden_layers=15, hidden_size=2400)
    wide |= {"moe_intermediate_size": 8192, "n_routed_experts": 144}
    assert judge(wide, BRIEFS["h20"], SERVICE) == judge(wide, BRIEFS["h20"], TRAINING) == []
    assert next(one.kind for one in designs.missed(wide, BRIEFS["h20"], MODEL)) == "shape"


def test_more_heads_than_reading_asks_for_pass_while_the_step_keeps_its_time():
    brief, chip = BRIEFS["h20"], BRIEFS["h20"].cluster.chip
    for heads, limit in ((32, "memory"), (40, "compute"), (64, "compute")):
        served = users("h20", {**WORKED["h20"], "num_attention_heads": heads})
        times = served.deployment.times
        assert served.limit == limit and times["compute"] > times["bandwidth"]
        caches = brief.users / brief.devices * brief.context * 48 * heads * 2 * 1088
        in_time = caches / chip.rate("bf16") < 1 / brief.rate
        assert in_time == (served.batch >= brief.users) == (heads <= 40)
    assert round(2 * 1088 * 20 / 1152) == 38  # and an H20 does 37 for a byte
