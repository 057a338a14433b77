"""A run taken up again goes on bit for bit, from the newest checkpoint that is whole."""

import errno
import itertools
import json
import os
import pickle
import random
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dsv3_tutorial.train import contents, sealed, storage
from dsv3_tutorial.train.state import Checkpoints, changed_fields, reason

RECIPE = {"batch": 4, "save_every": 1, "config": {"hidden_size": 8, "layers": 2}}


class Sampler:
    def __init__(self):
        self.generator, self.drawn = torch.Generator().manual_seed(1), 0

    def draw(self):
        self.drawn += 1
        return torch.randn(4, 8, generator=self.generator)

    def state_dict(self):
        return {"generator": self.generator.get_state(), "drawn": self.drawn}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.drawn = state["drawn"]


def made(seed=0, width=16, recipe=RECIPE, dtype=torch.float32):
    """A run before its first step: two matrices, a tied one, and a bias that is a buffer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 4, bias=False), nn.RMSNorm(4))
    model.register_module("tied", nn.Linear(8, width))
    model.tied.weight = model[0].weight
    model.register_buffer("balance", torch.zeros(3))
    model.to(dtype)
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == big]} for big in (1, 0)]
    return SimpleNamespace(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-2, fused=True),
        sampler=Sampler(),
        recipe=SimpleNamespace(to_dict=lambda: recipe),
        step=0,
    )


def train(run, steps):
    """Losses of `steps` steps that draw from every generator there is."""
    losses = []
    for _ in range(steps):
        noise = torch.rand(()) + random.random() + float(np.random.standard_normal())
        out = nn.Sequential(*list(run.model)[:3])(run.sampler.draw().to(run.model[0].weight.dtype))
        loss = (out.square().mean() * noise).float()
        run.optimizer.zero_grad()
        loss.backward()
        run.step += 1
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-2 / run.step
        run.optimizer.step()
        run.model.balance += loss.item()
        losses.append(loss.item())
    return losses


def tensors(run):
    return contents.tensor_state(run, 0)


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name


@pytest.fixture
def reported():
    return []


@pytest.fixture
def opened(tmp_path, reported):
    """Checkpoints in one folder, as each start of a run opens them."""
    return lambda **options: Checkpoints(tmp_path / "kept", report=reported.append, **options)


@pytest.fixture
def three(opened):
    """Checkpoints of the steps 1, 2 and 3, the run at step 6, and its losses after the first."""
    run, saved = made(), opened(keep=3)
    train(run, 1)
    saved.save(run)
    losses = []
    for _ in range(2):
        losses += train(run, 1)
        saved.save(run)
    losses += train(run, 3)
    saved.wait()
    assert saved.steps() == [1, 2, 3]
    return run, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_bit_for_bit_in_another_process_state(opened, dtype):
    run, saved = made(dtype=dtype), opened()
    train(run, 3)
    saved.save(run)
    losses = train(run, 5)
    saved.wait()
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    again = made(seed=7, dtype=dtype)
    train(again, 2)  # moments, positions and generators of its own, to be replaced
    assert opened().restore_latest(again) == 3 == again.step
    assert again.sampler.drawn == 3
    assert [group["lr"] for group in again.optimizer.param_groups] == [1e-2 / 3] * 2
    assert again.model.tied.weight is again.model[0].weight
    assert train(again, 5) == losses
    same(tensors(again), tensors(run))


def test_a_fresh_optimizer_is_restored_before_its_first_step(opened, three):
    run, losses = three
    again = made(seed=7)
    assert not again.optimizer.state
    opened().restore_latest(again)
    assert train(again, 3) == losses[2:]
    same(tensors(again), tensors(run))


def test_a_checkpoint_of_a_run_that_has_not_stepped_starts_it_again(opened):
    run, saved = made(), opened()
    saved.save(run)
    saved.wait()
    losses = train(run, 2)
    again = made(seed=3)
    train(again, 1)
    assert opened().restore_latest(again) == 0
    assert train(again, 2) == losses


def test_what_happens_right_after_a_save_does_not_reach_the_checkpoint(opened):
    run, saved = made(), opened()
    train(run, 1)
    before = {name: tensor.clone() for name, tensor in tensors(run).items()}
    saved.save(run)
    with torch.no_grad():
        for tensor in tensors(run).values():
            tensor.zero_()
    saved.wait()
    again = made(seed=2)
    opened().restore_latest(again)
    same(tensors(again), before)


def test_equal_states_make_equal_files(opened, three, tmp_path):
    again, saved = made(seed=7), opened(keep=3)
    saved.restore_latest(again)
    other = Checkpoints(tmp_path / "other")
    other.save(again)
    other.wait()
    one, two = (tmp_path / d / "step-00000003" / "__0_0.distcp" for d in ("kept", "other"))
    assert one.read_bytes() == two.read_bytes()


def test_a_checkpoint_holds_nothing_of_the_machine_it_was_made_on(three, tmp_path):
    for path in (tmp_path / "kept" / "step-00000003").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_only_the_newest_are_kept(opened):
    run, saved = made(), opened(keep=2)
    for _ in range(4):
        train(run, 1)
        saved.save(run)
    saved.wait()
    assert saved.steps() == [3, 4]


def test_without_a_checkpoint_a_run_is_left_as_it_is(opened, reported):
    run = made()
    before = {name: tensor.clone() for name, tensor in tensors(run).items()}
    assert opened().restore_latest(run) == 0
    same(tensors(run), before)
    assert reported == []


def damage(folder):
    path = next(folder.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def test_damaged_checkpoints_are_named_and_set_aside_and_their_steps_written_again(
    opened, three, reported, tmp_path
):
    _, losses = three
    damage(tmp_path / "kept/step-00000003")
    (tmp_path / "kept/step-00000002/.metadata").unlink()
    again, saved = made(seed=7), opened(keep=3)
    assert saved.restore_latest(again) == 1
    for line, step, file in zip(reported, (3, 2), ("__0_0.distcp", ".metadata"), strict=True):
        assert f"step-0000000{step} is damaged: {file} " in line
        assert f"Set aside as damaged-step-0000000{step}" in line
    for _ in range(2):
        train(again, 1)
        saved.save(again)
    assert train(again, 3) == losses[2:]
    saved.wait()
    assert saved.steps() == [1, 2, 3]


def test_a_checkpoint_under_the_name_of_another_step_is_not_used(opened, three, reported, tmp_path):
    (tmp_path / "kept/step-00000003").rename(tmp_path / "kept/step-00000009")
    assert opened().restore_latest(made()) == 2
    assert "step-00000009 is damaged" in reported[0]


def test_when_none_is_whole_the_run_does_not_begin_again_in_silence(opened, three, tmp_path):
    for step in (1, 2, 3):
        damage(tmp_path / f"kept/step-0000000{step}")
    for _ in range(2):  # the second start finds them set aside already
        with pytest.raises(sealed.StateError, match="No whole checkpoint is left"):
            opened().restore_latest(made())


def test_another_recipe_is_refused_with_each_field_that_differs(opened, three, reported):
    other = {"batch": 8, "save_every": 7, "config": {"hidden_size": 8, "layers": 3}, "new": None}
    run = made(recipe=other)
    with pytest.raises(sealed.StateError) as refused:
        opened(free=("save_every",)).restore_latest(run)
    assert "batch (4 in the checkpoint, 8 now)" in str(refused.value)
    assert "config.layers (2 in the checkpoint, 3 now)" in str(refused.value)
    assert "new ('absent' in the checkpoint, None now)" in str(refused.value)
    assert "save_every" not in str(refused.value) and "hidden_size" not in str(refused.value)
    assert reported == [] and opened().steps() == [1, 2, 3]


def test_a_free_field_may_change_and_another_text_may_not(opened):
    run, saved = made(), opened(identity={"text": "one"}, free=("save_every",))
    train(run, 1)
    saved.save(run)
    saved.wait()
    changed = made(recipe={**RECIPE, "save_every": 5})
    assert opened(identity={"text": "one"}, free=("save_every",)).restore_latest(changed) == 1
    with pytest.raises(sealed.StateError, match=r"text \('one' in the checkpoint, 'two' now\)"):
        opened(identity={"text": "two"}, free=("save_every",)).restore_latest(changed)


def test_fields_are_equal_when_json_says_so():
    assert changed_fields({"a": 1.0, "b": {}}, {"a": 1, "b": {}}) == []
    assert changed_fields({"a": {"b": 1}}, {"a": 2}) == ["a ({'b': 1} in the checkpoint, 2 now)"]


def test_a_model_of_other_shapes_is_refused_before_a_weight_changes(opened, three):
    run = made(seed=7, width=12)
    before = {name: tensor.clone() for name, tensor in tensors(run).items()}
    with pytest.raises(sealed.StateError, match=r"another model: 5 tensors differ, model\.0\.bias"):
        opened().restore_latest(run)
    same(tensors(run), before)


@pytest.mark.parametrize("limit", [0, 10_000])
def test_a_write_that_fails_costs_no_checkpoint_and_the_next_is_tried_again(
    opened, three, reported, limit
):
    run, _ = three
    saved, step = opened(keep=3), run.step
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        saved.save(run)
        error = saved.pending[1].exception()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error is not None
    saved.poll()
    assert f"The checkpoint of step {step} could not be written" in reported[0]
    assert "step 3 stands" in reported[0]
    assert sorted(p.name for p in saved.folder.iterdir()) == [
        "step-00000001", "step-00000002", "step-00000003"
    ]  # fmt: skip
    with pytest.raises(sealed.StateError, match="could not be written"):
        saved.wait()
    saved.wait()  # told once
    train(run, 1)
    saved.save(run)
    saved.wait()
    assert saved.steps() == [2, 3, step + 1]


@pytest.mark.parametrize("broken", ["fsync", "rename", "mkdir"])
def test_a_full_disk_at_any_stage_leaves_no_final_name(
    opened, three, reported, monkeypatch, broken
):
    run, _ = three
    saved = opened(keep=3)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, full)
        saved.save(run)
        assert saved.pending[1].exception() is not None
    saved.poll()
    assert "No space left on device" in reported[0]
    assert saved.steps() == [1, 2, 3]
    assert not list(saved.folder.glob(".*"))


def test_the_reason_of_a_failure_is_found_under_what_wraps_it(tmp_path):
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("the archive is at a strange place") from None
    except RuntimeError as error:
        assert reason(error, tmp_path).startswith("No space left on device; ")
    assert reason(KeyError(), tmp_path).startswith("KeyError; ")


def test_leftovers_of_a_killed_write_are_removed_at_the_next_start_and_named(opened, reported):
    half = opened().folder / ".writing-step-00000009"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    opened()
    assert not half.exists()
    assert reported == ["Removed .writing-step-00000009: a write that was interrupted."]


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_hidden_in_a_checkpoint_is_not_executed(opened, three, tmp_path):
    folder = tmp_path / "kept/step-00000003"
    facts = sealed.verify(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "executed")))
    os.rename(folder, temporary := tmp_path / "resealed")
    for name in (sealed.MANIFEST, sealed.SEAL):
        (temporary / name).unlink()
    sealed.seal(temporary, folder, {k: v for k, v in facts.items() if k != "files"})
    with pytest.raises(sealed.StateError, match=r"asks for posix\.mkdir"):
        storage.Reader(folder).read_metadata()
    assert not (tmp_path / "executed").exists()


def test_every_random_state_comes_back():
    torch.rand(3), random.gauss(0, 1), np.random.standard_normal()  # each has half a pair in store
    states = contents.random_states()
    assert all(state.dtype == torch.uint8 for state in states.values())

    def drawn():
        numbers = [random.gauss(0, 1) for _ in range(3)] + np.random.standard_normal(3).tolist()
        return [*numbers, *torch.randn(3).tolist()]

    first = drawn()
    contents.restore_random_states(states)
    assert drawn() == first


def test_the_manifest_lists_what_a_reader_wants_to_know(three, tmp_path):
    facts = json.loads((tmp_path / "kept/step-00000003" / sealed.MANIFEST).read_text())
    assert facts["step"] == 3 and facts["asked"] == RECIPE
    assert facts["plain"]["sampler"] == {"drawn": 3}
    assert facts["made_with"] == {"torch": torch.__version__, "ranks": 1}
    assert facts["tensors"]["model.balance"] == ["float32", [3]]
    kinds = {name.partition(".")[0] for name in facts["tensors"]}
    assert kinds == {"model", "optimizer", "sampler", "random"}
    steps = [name for name in facts["tensors"] if name.endswith(".step")]
    assert len(steps) == 4  # the fifth parameter never had a gradient
    assert all(a <= b for a, b in itertools.pairwise(facts["tensors"]))
