"""Every schedule, run on real ranks, does what one process does: loss, gradients, time, memory."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.cards import Message
from dsv3_tutorial.cost.comm import Network, Tier
from dsv3_tutorial.cost.schedule import SCHEDULES, Op, Schedule, Times, dual_pipe, one_f_one_b
from dsv3_tutorial.cost.schedule_orders import PAIR
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel import pipeline as module
from dsv3_tutorial.parallel import traffic
from dsv3_tutorial.parallel.launch import RankFailed, launch
from dsv3_tutorial.parallel.pipeline import Pipeline, measured_timeline, virtual_timeline
from dsv3_tutorial.parallel.pipeline_messages import sent_in_order
from dsv3_tutorial.parallel.stage import split

VOCAB, D, S = 11, 6, 3
NETWORK = Network(Tier("inside", 0.1, 1e4), Tier("across", 0.3, 1e3), 2)
TIMES = Times(0.1, 0.27, 0.11, 0.33)
CONFIG = {
    "model_type": "deepseek_v3",
    "num_experts_per_tok": 2,
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "rope_theta": 10000,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


class Piece(nn.Module):
    """A stage with every kind of use of a weight: shared, elementwise, and none at all."""

    def __init__(self, index, stages):
        super().__init__()
        torch.manual_seed(index)
        self.embedding = nn.Embedding(VOCAB, D) if index == 0 else None
        self.norm, self.wide = nn.LayerNorm(D), nn.Linear(D, 2 * D)
        self.narrow, self.twice = nn.Linear(2 * D, D, bias=False), nn.Linear(D, D)
        self.scale = nn.Parameter(torch.randn(D))
        self.head = nn.Linear(D, VOCAB) if index == stages - 1 else None
        self.double()

    def forward(self, x):
        x = self.embedding(x) if self.embedding else x
        x = x + self.narrow(torch.tanh(self.wide(self.norm(x)))) * self.scale
        x = x + self.twice(self.twice(x).sin())
        return self.head(x) if self.head else x


def cross_entropy(logits, tokens):
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def pieces(stages):
    return [Piece(i, stages) for i in range(stages)]


def model_parts(stages):
    torch.manual_seed(0)
    model = DeepSeekV3(ModelConfig.from_dict(CONFIG)).double()
    return [split(model, stages, i) for i in range(stages)]


def batches(micro_batches, even=False):
    """Tokens (B, S + 1) by micro-batch, each of another B unless even; and targets."""
    draw = torch.Generator().manual_seed(1)
    sizes = [2 if even else 1 + i % 3 for i in range(micro_batches)]
    drawn = [torch.randint(VOCAB, (b, S + 1), generator=draw) for b in sizes]
    return [t[:, :-1] for t in drawn], [t[:, 1:] for t in drawn]


def like(inputs, width):
    return [torch.empty(*x.shape, width, dtype=torch.float64, device="meta") for x in inputs]


def grads(stage):
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in stage.named_parameters()
    }


def one_process(make, stages, micro_batches):
    """The loss and every stage's gradients, as the whole in one process has them."""
    parts, (inputs, targets) = make(stages), batches(micro_batches)
    whole = nn.Sequential(*parts)
    loss = sum(cross_entropy(whole(x), t) for x, t in zip(inputs, targets, strict=True))
    (loss / micro_batches).backward()
    return loss.item() / micro_batches, [grads(part) for part in parts]


CASES = {  # world: (schedule, stages, micro-batches), the last one's stages in a real model
    2: [("gpipe", 2, 3), ("1f1b", 2, 5), ("zb1p", 2, 1), ("dualpipe", 2, 6), ("dualpipev", 4, 5)],
    4: [
        *[("gpipe", 4, 6), ("1f1b", 4, 2), ("1f1b", 4, 7), ("zb1p", 4, 7), ("zb1p", 4, 3)],
        *[("dualpipe", 4, 8), ("dualpipe", 4, 10), ("dualpipev", 8, 8), ("dualpipev", 8, 11)],
    ],
    8: [("zb1p", 8, 9), ("dualpipe", 8, 16), ("dualpipev", 16, 17)],
}


def run_case(name, stages, micro_batches, make=pieces, width=D):
    """One step of one schedule on this rank: what is compared with one process."""
    schedule = SCHEDULES[name](stages, micro_batches)
    held = schedule.placement[dist.get_rank()]
    modules = [make(stages)[stage] for stage in held]
    inputs, targets = batches(micro_batches)
    pipeline = Pipeline(schedule, modules, cross_entropy)
    step = pipeline.step(
        inputs if 0 in held else None,
        targets if stages - 1 in held else None,
        like(inputs, width),
    )
    found = dict(zip(held, map(grads, modules), strict=True))
    return step.loss.item(), found, step.kept, measured_timeline(step)


def run_cases(cases):
    return [run_case(*case) for case in cases]


@pytest.fixture(scope="module")
def ran():
    return {world: launch(run_cases, world, cases) for world, cases in CASES.items()}


EVERY = [(world, i) for world, cases in CASES.items() for i in range(len(cases))]


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("world", "i"), EVERY)
def test_loss_and_every_gradient_are_those_of_one_process(ran, world, i):
    name, stages, micro_batches = CASES[world][i]
    loss, expected = one_process(pieces, stages, micro_batches)
    schedule = SCHEDULES[name](stages, micro_batches)
    for rank, results in enumerate(ran[world]):
        found_loss, found, _, _ = results[i]
        assert found_loss == pytest.approx(loss, rel=1e-12)
        assert tuple(found) == schedule.placement[rank]
        for stage, gradients in found.items():
            assert_same_gradients(gradients, expected[stage])


@pytest.mark.parametrize(("world", "i"), EVERY)
def test_a_device_keeps_as_many_micro_batches_as_the_schedule_says(ran, world, i):
    name, stages, micro_batches = CASES[world][i]
    kept = tuple(results[i][2] for results in ran[world])
    assert kept == SCHEDULES[name](stages, micro_batches).memory()


@pytest.mark.parametrize(("world", "i"), EVERY)
def test_the_measured_timeline_is_the_schedule_in_a_possible_order(ran, world, i):
    name, stages, micro_batches = CASES[world][i]
    schedule = SCHEDULES[name](stages, micro_batches)
    slots = ran[world][0][i][3]
    for device, order in enumerate(schedule.orders):
        mine = [slot for slot in slots if slot.device == device]
        assert tuple(slot.op for slot in mine) == order
        assert all(a.start <= a.end <= b.start for a, b in pairwise(mine))
    assert min(slot.start for slot in slots) == 0
    ends = {(p.kind, p.micro_batch, p.stage): s.end for s in slots for p in s.op.parts}
    for slot in slots:
        for p in slot.op.parts:
            if p.kind == "F" and p.stage:
                assert slot.start >= ends["F", p.micro_batch, p.stage - 1]


def test_both_copies_of_a_stage_end_with_the_same_bits(ran):
    """Also where the gradients were there before: they are not summed a second time."""
    for world, cases in CASES.items():
        for i, (name, stages, _) in enumerate(cases):
            if name == "dualpipe":
                for stage in range(stages):
                    copies = [r[i][1][stage] for r in ran[world] if stage in r[i][1]]
                    assert len(copies) == 2
                    assert all(torch.equal(copies[0][k], copies[1][k]) for k in copies[0])


def two_steps():
    schedule = dual_pipe(2, 4)
    modules = pieces(2) if dist.get_rank() == 0 else pieces(2)[::-1]
    pipeline = Pipeline(schedule, modules, cross_entropy)
    inputs, targets = batches(4)
    steps = []
    for _ in range(2):
        pipeline.step(inputs, targets, like(inputs, D))
        steps.append(grads(modules[0]))
    return steps


def real_model():
    """DeepSeek-V3 itself, with MLA and experts, in four stages; and every weight's key."""
    return run_case("zb1p", 4, 5, model_parts, 16), run_case("dualpipe", 4, 8, model_parts, 16)


def on_the_virtual_clock():
    """By schedule: the virtual slots, those of operations' own FLOPs, and the bytes sent."""
    found = {}
    for name in SCHEDULES:
        schedule = SCHEDULES[name](8 if name == "dualpipev" else 4, 8)
        held = schedule.placement[dist.get_rank()]
        inputs, targets = batches(8, even=True)
        modules = [pieces(schedule.stages)[stage] for stage in held]
        pipeline = Pipeline(schedule, modules, cross_entropy)
        with traffic.record(NETWORK, rate=1, matmuls=False) as seen:
            pipeline.step(inputs, targets, like(inputs, D)[0], seen, TIMES)
        messages = sum(call.n for call in seen.calls if call.kind == "send")
        found[name] = [virtual_timeline(schedule, seen), messages]
        if name in ("1f1b", "zb1p"):
            with traffic.record(NETWORK, rate=1e6) as counted:
                pipeline.step(inputs, targets, like(inputs, D)[0], counted)
            found[name].append(virtual_timeline(schedule, counted))
    return found


def refused():
    """What a rank is told instead of hanging."""
    said = []

    def attempt(call):
        with pytest.raises(ValueError) as caught:
            call()
        said.append(str(caught.value))

    schedule, rank = one_f_one_b(4, 2), dist.get_rank()
    mine, (inputs, targets) = [pieces(4)[rank]], batches(2, even=True)
    waits = [list(order) for order in schedule.orders]
    waits[0].sort(key=lambda op: op.kind)
    circle = Schedule("circle", 4, 2, tuple(map(tuple, waits)), schedule.placement)
    attempt(lambda: Pipeline(one_f_one_b(3, 2), mine, cross_entropy))
    attempt(lambda: Pipeline(schedule, [*mine, *mine], cross_entropy))
    attempt(lambda: Pipeline(circle, mine, cross_entropy))
    first_or_last = Pipeline(schedule, mine, cross_entropy)
    if rank in (0, 3):
        attempt(lambda: first_or_last.step(inputs[:1], targets[:1], like(inputs, D)))
        attempt(lambda: first_or_last.step(None, None, like(inputs, D)))
    if rank == 0:
        attempt(lambda: first_or_last.step(inputs, targets, like(inputs, D + 1)))
    return said


def each_way_its_group():
    """NCCL's two groups, on gloo: the same step."""
    module.directions = lambda group: tuple(dist.new_group(range(4)) for _ in range(2))
    pipeline = Pipeline(dual_pipe(4, 8), [pieces(4)[s] for s in held_by_rank()], cross_entropy)
    inputs, targets = batches(8)
    assert pipeline.directions[0] is not pipeline.directions[1]
    return pipeline.step(inputs, targets, like(inputs, D)).loss.item()


def held_by_rank():
    return dual_pipe(4, 8).placement[dist.get_rank()]


def four_ranks():
    return real_model(), on_the_virtual_clock(), refused(), each_way_its_group()


@pytest.fixture(scope="module")
def four():
    return launch(four_ranks, 4)


def test_gradients_add_up_over_steps_also_where_copies_are_summed():
    _, expected = one_process(pieces, 2, 4)
    for rank, (first, second) in enumerate(launch(two_steps, 2)):
        assert_same_gradients(first, expected[rank])
        assert_same_gradients(second, {name: 2 * g for name, g in expected[rank].items()})


@pytest.mark.parametrize(("case", "micro_batches"), [(0, 5), (1, 8)])
def test_deepseek_v3_in_four_stages_has_the_gradients_of_the_whole(four, case, micro_batches):
    loss, expected = one_process(model_parts, 4, micro_batches)
    seen = set()
    for ranks_results, *_ in four:
        found_loss, found, _, _ = ranks_results[case]
        assert found_loss == pytest.approx(loss, rel=1e-12)
        for stage, gradients in found.items():
            seen |= gradients.keys()
            for name, gradient in gradients.items():
                wanted = expected[stage][name]
                if wanted is None or gradient is None:  # an expert that no token chose
                    assert not [g for g in (wanted, gradient) if g is not None and g.any()]
                else:
                    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)
    model = DeepSeekV3(ModelConfig.from_dict(CONFIG))
    assert seen == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_virtual_timeline_of_the_real_run_is_the_simulated_one_exactly(four, name):
    schedule = SCHEDULES[name](8 if name == "dualpipev" else 4, 8)
    n = 2 * S * D * 8
    expected = schedule.timeline(TIMES, Message(n, NETWORK))
    for _, clocks, _, _ in four:
        assert clocks[name][0] == expected


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_device_sends_its_schedule_s_messages_and_a_copied_stage_s_gradients(four, name):
    schedule = SCHEDULES[name](8 if name == "dualpipev" else 4, 8)
    n = 2 * S * D * 8
    for rank, (_, clocks, _, _) in enumerate(four):
        count = sum(len(list(sent_in_order(schedule, rank, to))) for to in range(4))
        weights = 0
        if name == "dualpipe":
            held = [pieces(4)[stage] for stage in schedule.placement[rank]]
            weights = sum(p.numel() for stage in held for p in stage.parameters())
        assert clocks[name][1] == count * n + weights * 8
        inner = 2 if rank in (0, schedule.devices - 1) else 4
        if name in ("gpipe", "1f1b", "zb1p"):
            assert count == inner // 2 * 8


def test_on_the_clock_of_their_own_arithmetic_the_halves_make_the_whole(four):
    """I and W together take what B takes, in FLOPs, but for the weight that is used twice."""
    slots = four[0][1]["zb1p"][2]
    took = {
        kind: {s.end - s.start for s in slots if s.op.kind == kind and s.op.stage == 1}
        for kind in "FIW"
    }
    whole = {s.end - s.start for s in four[0][1]["1f1b"][2] if s.op.kind == "B" and s.op.stage == 1}
    (f,), (i,), (w,), (b,) = (
        {round(t * 1e6) for t in times} for times in (took["F"], took["I"], took["W"], whole)
    )
    twice = 2 * (2 * S) * D * D  # from the later use of the weight back to the earlier one
    assert (b, i, w) == (2 * f, f, f + twice)


def test_what_cannot_run_is_said_before_it_hangs(four):
    for rank, (_, _, said, _) in enumerate(four):
        assert "4 ranks, 1 modules" in said[0] and "on 3 devices" in said[0]
        assert "2 modules" in said[1]
        assert "wait for each other: device 0 at B0 of stage 0" in said[2]
        if rank in (0, 3):
            name = "inputs" if rank == 0 else "targets"
            assert f"1 {name} for the 2 micro-batches" in said[3]
            assert f"no {name} for" in said[4]
    assert "Stage 0 passes on (2, 3, 6) torch.float64, and (2, 3, 7)" in four[0][2][5]


def test_a_group_for_each_direction_changes_nothing(four):
    loss, _ = one_process(pieces, 4, 8)
    assert all(results[3] == pytest.approx(loss, rel=1e-12) for results in four)


class Breaks(Piece):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise ZeroDivisionError("the third micro-batch")
        return super().forward(x)


def with_a_stage_that_raises():
    rank = dist.get_rank()
    stage = Breaks(rank, 4) if rank == 2 else Piece(rank, 4)
    inputs, targets = batches(6)
    Pipeline(one_f_one_b(4, 6), [stage], cross_entropy).step(inputs, targets, like(inputs, D))


def test_a_stage_that_raises_ends_all_ranks_and_says_where():
    with pytest.raises(RankFailed) as caught:
        launch(with_a_stage_that_raises, 4, timeout=60)
    assert caught.value.rank == 2
    assert "the third micro-batch" in str(caught.value)
    assert "In F2 of stage 2, on device 2." in str(caught.value)


def test_a_pair_is_run_as_its_two_parts():
    pairs = [op for order in dual_pipe(4, 8).orders for op in order if op.kind == PAIR]
    assert pairs and all([p.kind for p in op.parts] == ["F", "B"] for op in pairs)
    assert isinstance(pairs[0].backward, Op)
