"""A pipeline of real processes trains as one process does: losses, every gradient, every update."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel.data import Ranks
from dsv3_tutorial.parallel.launch import launch
from dsv3_tutorial.parallel.mesh import Layout, grid
from dsv3_tutorial.parallel.replicas import Replicas
from dsv3_tutorial.parallel.stage import gathered, split
from dsv3_tutorial.train import log, run
from dsv3_tutorial.train.fault import NotFinite
from dsv3_tutorial.train.pipelined import ZERO_BUBBLE_NEEDS, Pipeline, problems
from dsv3_tutorial.train.precision import recompute_blocks, worker_for
from dsv3_tutorial.train.recipe import Recipe
from dsv3_tutorial.train.step import (
    TrainingState,
    accumulate,
    draft_nats,
    nats,
    optimizer_for,
    predict,
    train_step,
)

EMBEDDING = "model.embed_tokens.weight"
CPU = torch.device("cpu")
SMALL = {
    "model_type": "deepseek_v3",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
EXPERTS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group")
DENSE = dict.fromkeys((*EXPERTS, "moe_intermediate_size")) | {"first_k_dense_replace": 4}
SPLIT_BACKWARD = ("zb1p",) if torch.__version__ >= ZERO_BUBBLE_NEEDS else ()
TWO = [
    ("1f1b", {}, {}),
    ("gpipe", {}, {"micro_batches": 1}),
    ("1f1b", {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}, {}),
    ("1f1b", {"tie_word_embeddings": True, "num_nextn_predict_layers": 2}, {"balance": "batch"}),
    ("1f1b", {}, {"mtp_weight": 0.0, "balance": "none"}),
    ("1f1b", {}, {"recompute": True, "alpha": 0.0}),
    ("1f1b", DENSE, {"micro_batches": 8}),
]
FOUR = [
    ("1f1b", {}, {}),
    ("gpipe", {"num_hidden_layers": 5}, {"micro_batches": 2}),
    *((name, {"num_hidden_layers": 5}, {"micro_batches": 8}) for name in SPLIT_BACKWARD),
    *((name, {}, {"mtp_weight": 0.0}) for name in SPLIT_BACKWARD),
]
ROWS = torch.randint(0, 256, (8, 12), generator=torch.Generator().manual_seed(1))


def quiet(phase):
    return nullcontext()


def asked(config, recipe):
    values = {"steps": 20, "batch": 8, "micro_batches": 4, "seq_len": 11, "alpha": 0.3, "warmup": 2}
    return ModelConfig.from_dict({**SMALL, **config}), Recipe(**{**values, **recipe})


def begin(cfg, recipe, schedule=None, dtype=torch.float64):
    """A state before its first step: the whole model, or with a schedule a stage on each rank."""
    torch.manual_seed(0)
    model = DeepSeekV3(cfg).to(dtype)
    if schedule is None:
        return finished(model, recipe, None, None)
    layout = Layout(pp=dist.get_world_size(), schedule=schedule)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), CPU, grid(layout, "cpu"))
    return finished(split(model, layout.pp, ranks.grid.index("pp")), recipe, schedule, ranks)


def finished(model, recipe, schedule, ranks):
    worker = worker_for(model, recipe.precision)
    if recipe.recompute:
        recompute_blocks(worker)
    replicas = Replicas(model, ranks or Ranks(0, 1, CPU))
    optimizer = optimizer_for(model, recipe.peak_lr, recipe.moments_in, replicas.owned())
    pipe = schedule and Pipeline(worker, model, recipe, ranks.grid.group("pp"), CPU, schedule)
    return TrainingState(model, optimizer, Rows(), recipe, 0, worker, replicas, pipe)


class Rows:
    """A text that is read from its start again at every step."""

    starts = torch.zeros(1)
    place = str


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def held_out(model, rows):
    logits, drafts = predict(model, rows[:, :-1], drafts=True)
    return nats(logits, rows[:, 1:]).item(), draft_nats(drafts, rows).item()


def _gradients_of_ranks(cases):
    """Each case on this rank: twice the same step, as the second meets what the first has left."""
    found = []
    for schedule, config, recipe in cases:
        state = begin(*asked(config, recipe), schedule)
        for _ in range(2):
            state.model.zero_grad()
            means, counts = state.pipe.accumulate(state, ROWS, quiet)
        outside = [loss.item() for loss in state.pipe.held_out(ROWS[:3])]
        found.append((means, counts, gradients(state.model), outside))
    return found


def of_all(counts):
    """The counts of every stage's gates, in the whole model's order; (0, 0) for a dense one."""
    return torch.cat([own for own in counts if own.numel()] or counts[:1])


def assert_same_gradients(of_ranks, wanted, rtol, embedding=None):
    """Each parameter on its stage; the embedding on the first, to `embedding` where it is given."""
    seen = set()
    for rank, found in enumerate(of_ranks):
        for name, grad in found.items():
            if rank and name == EMBEDDING:
                assert grad is None  # the copy has handed it over
                continue
            seen.add(name)
            assert (grad is None) == (wanted[name] is None), name
            near = embedding if embedding and name == EMBEDDING else rtol
            if grad is not None:
                scale = wanted[name].abs().max().item()
                torch.testing.assert_close(grad, wanted[name], rtol=near, atol=near * scale)
    assert seen == wanted.keys()


@pytest.mark.parametrize("world, cases", [(2, TWO), (4, FOUR)])
def test_every_gradient_is_that_of_one_process(world, cases):
    of_ranks = launch(_gradients_of_ranks, world, cases, timeout=120)
    for (_, config, recipe), *found in zip(cases, *of_ranks, strict=True):
        one = begin(*asked(config, recipe))
        means, counts = accumulate(one, ROWS, quiet)
        for of_rank in found:
            torch.testing.assert_close(of_rank[0], means, rtol=1e-6, atol=1e-7)
            with torch.no_grad():
                assert of_rank[3] == pytest.approx(held_out(one.model, ROWS[:3]), rel=1e-6)
        assert torch.equal(of_all([of_rank[1] for of_rank in found]), counts)
        assert_same_gradients([of_rank[2] for of_rank in found], gradients(one.model), 1e-10)


def _narrow_gradients(precisions):
    found = []
    for precision in precisions:
        state = begin(*asked({}, {"precision": precision}), "1f1b", torch.float32)
        state.pipe.accumulate(state, ROWS, quiet)
        found.append(gradients(state.model))
    return found


def test_a_bf16_or_fp8_worker_gives_the_masters_its_gradients_micro_batch_by_micro_batch():
    """As in one process: only the embedding's two parts are there added in BF16, and here not."""
    precisions = ["bf16", "fp8"]
    for precision, *found in zip(precisions, *launch(_narrow_gradients, 2, precisions)):
        one = begin(*asked({}, {"precision": precision}), dtype=torch.float32)
        accumulate(one, ROWS, quiet)
        assert_same_gradients(found, gradients(one.model), rtol=1e-5, embedding=1e-2)


def _updates(config, recipe):
    """Three updates of this rank's stage, and the whole model after them on the first rank."""
    state = begin(*asked(config, recipe), "1f1b")
    updated = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert id(state.model.copy) not in updated
    ranks = state.replicas.ranks
    updates = [train_step(state, ROWS, ranks, quiet) for _ in range(3)]
    copies = state.model.state_dict().get(EMBEDDING)
    return updates, gathered(state.model.state_dict(), ranks.grid.group("pp")), copies


@pytest.mark.parametrize("tied", [False, True])
def test_updates_clip_by_the_whole_norm_and_move_every_bias_as_one_process_does(tied):
    config, recipe = {"tie_word_embeddings": tied}, {"peak_lr": 0.05, "gamma": 0.01}
    of_ranks = launch(_updates, 3, config, recipe)
    one = begin(*asked(config, recipe))
    wanted = [train_step(one, ROWS, one.replicas.ranks, quiet) for _ in range(3)]
    assert min(update.grad_norm for update in wanted) > 1  # all are clipped
    for updates, _, _ in of_ranks:
        for found, update in zip(updates, wanted, strict=True):
            assert found[:4] == pytest.approx(update[:4], rel=1e-6)
            assert torch.equal(found.counts, update.counts)
    whole, after = of_ranks[0][1], one.model.state_dict()
    assert whole.keys() == after.keys() and of_ranks[1][1] == of_ranks[2][1] == {}
    for name, tensor in after.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-8, atol=1e-10)
        if name.endswith("e_score_correction_bias"):
            assert tensor.abs().max() > 0 and torch.equal(whole[name], tensor)
    assert of_ranks[1][2] is None and torch.equal(of_ranks[0][2], of_ranks[2][2])


def test_a_stage_that_is_not_finite_is_named():
    """The stage that is broken says where; all of them stop, and none has moved a weight."""

    def on_rank():
        state = begin(*asked({}, {}), "1f1b")
        before = [p.detach().clone() for p in state.model.parameters()]
        if dist.get_rank() == 0:
            state.worker.model.layers[0].register_forward_hook(lambda *of: of[2] * float("nan"))
        with pytest.raises(NotFinite) as error:
            train_step(state, ROWS, state.replicas.ranks, quiet)
        after = state.model.parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return str(error.value)

    first, last = launch(on_rank, 2)
    assert "the output of model.layers.0" in first
    assert "the output of model.layers.2" in last


def layout(pp=4, schedule="1f1b"):
    return Layout(pp=pp, schedule=schedule)


def test_a_recipe_that_a_schedule_cannot_run_is_told_beforehand():
    cfg, recipe = asked({}, {"batch": 12, "micro_batches": 3})
    (found,) = problems(cfg, recipe, layout())
    assert "micro_batches = 3" in found and "give 4 or more, or take pp_schedule = gpipe" in found
    assert not list(problems(cfg, recipe, layout(3))) and not list(problems(cfg, recipe, layout(1)))
    assert not list(problems(cfg, recipe, layout(schedule="gpipe")))
    cfg, recipe = asked({}, {"batch": 9, "micro_batches": 9, "recompute": True})
    found = list(problems(cfg, recipe, layout(schedule="zb1p")))
    assert "micro_batches = 9: zb1p deals them out in 2 rounds" in found[0]
    assert "recompute together with pp_schedule = zb1p" in found[1]


def test_zb1p_is_refused_on_a_pytorch_that_cannot_split_a_backward(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    (found,) = problems(*asked({}, {}), layout(schedule="zb1p"))
    assert "torch 2.11.0+cu130 cannot split" in found and "take 1f1b" in found
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    assert not list(problems(*asked({}, {}), layout(schedule="zb1p")))


@pytest.fixture(scope="module")
def tied_run(tmp_path_factory):
    """The options of a run whose embedding is also its head, in three sittings of two steps."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_bytes(b" ".join([b"token", b"gate", b"stage"][i % 3 :] * 20))
    config = {**SMALL, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    named = ["--config", folder / "config.json", "--text", folder, "--device", "cpu"]
    size = ["--batch", 4, "--micro-batches", 2, "--seq-len", 12, "--warmup", 2, "--peak-lr", 0.01]
    rest = ["--save-every", 2, "--evaluate-every", 2, "--evaluate-windows", 4, "--gamma", 0.01]
    return [str(value) for value in [*named, *size, *rest]]


def sitting(world, out, until, *options):
    argv = ["--out", str(out), "--steps", str(until), "--threads", "1", *options]
    ended = [run.main(argv)] if world == 1 else launch(run.main, world, argv, echo=False)
    assert ended == [0] * world


@pytest.mark.slow
def test_a_tied_run_is_taken_up_by_stages_and_by_one_process(tied_run, tmp_path):
    """The second copy of the embedding must not keep moments of its own, nor save them."""
    one, two = tmp_path / "one", tmp_path / "two"
    sitting(1, one, 2, *tied_run)
    sitting(2, two, 2, *tied_run, "--pp", "2")
    sitting(2, two, 4, "--resume")
    shutil.copytree(two, tmp_path / "back")
    sitting(2, two, 6, "--resume")
    sitting(1, tmp_path / "back", 6, "--resume", "--dp", "1")
    for until in (4, 6):
        sitting(1, one, until, "--resume")
    expected = log.read(one)
    assert len(expected) == 6
    for folder in (two, tmp_path / "back"):
        for a, b in zip(expected, log.read(folder), strict=True):
            kept = a.keys() - {"tokens_per_s"}
            assert {n: b[n] for n in kept} == pytest.approx({n: a[n] for n in kept}, rel=1e-5)
        a, b = (DeepSeekV3.from_pretrained(f / "model").state_dict() for f in (one, folder))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
