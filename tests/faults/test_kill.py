"""SIGKILL at random moments, many times: what comes out is the run that was never killed."""

import contextlib
import json
import os
import random
import shutil
import signal
import time

import pytest

from dsv3_tutorial.train import sealed

KILLS = 22  # every second one is aimed at the asynchronous write


def whole(run):
    """Every name in the run's checkpoint folder, having checked each final one byte for byte."""
    folder = run / "checkpoints"
    for step in sealed.whole_steps(folder):
        assert sealed.verify(sealed.folder_for(folder, step))["step"] == step
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def log(run):
    """The run's log without the one column that is a time."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def last_state(run):
    """What the last checkpoint holds, byte for byte: weights, moments, bias, position, random."""
    folder = run / "checkpoints"
    newest = sealed.folder_for(folder, sealed.whole_steps(folder)[-1])
    facts = sealed.verify(newest)
    files = {name: made for name, made in facts["files"].items() if name.endswith(".distcp")}
    return facts["step"], facts["plain"], facts["tensors"], files


def model_bytes(run):
    return {p.name: p.read_bytes() for p in (run / "model").iterdir()}


@pytest.fixture(scope="module")
def undisturbed(server, small_run, tmp_path_factory):
    """The run that nobody kills, and how long it takes."""
    out = tmp_path_factory.mktemp("undisturbed")
    began = time.perf_counter()
    status = server.run([*small_run, "--out", out / "run"], out / "said")
    assert status == 0, (out / "said").read_text()
    return out / "run", time.perf_counter() - began


def kill_in_a_write(pid, run, delay):
    """Kill a moment after a half-written checkpoint is seen, or when the run ends without one."""
    give_up = time.perf_counter() + 60
    while time.perf_counter() < give_up and not (run / "model").exists():
        with contextlib.suppress(FileNotFoundError):
            if any(name.startswith(".writing") for name in os.listdir(run / "checkpoints")):
                break
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_many_times_ends_as_if_it_never_had_been(
    server, small_run, undisturbed, tmp_path
):
    reference, seconds = undisturbed
    draw = random.Random(20)
    kills, halves, finished, lives = 0, 0, 0, 0
    out = tmp_path / "run0"
    while kills < KILLS or finished == 0:
        arguments = [*small_run, "--out", out, *(["--resume"] if out.exists() else [])]
        said = tmp_path / f"said{lives}"
        pid = server.start(arguments, said)
        if kills < KILLS and kills % 2:
            kill_in_a_write(pid, out, draw.uniform(0, 0.02))
        elif kills < KILLS:
            time.sleep(draw.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        status = server.end(pid)
        lives += 1
        names = whole(out)
        assert status in (0, -signal.SIGKILL), said.read_text()
        if status == -signal.SIGKILL:
            kills += 1
            halves += any(name.startswith(".writing") for name in names)
            continue
        assert [n for n in names if not n.startswith("step-")] == []
        assert last_state(out) == last_state(reference)
        assert log(out) == log(reference)
        assert model_bytes(out) == model_bytes(reference)
        finished += 1
        out = tmp_path / f"run{finished}"
    assert halves >= KILLS // 4, f"only {halves} of {kills} kills met a write under way"


def finished_run(undisturbed, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(undisturbed[0], tmp_path / "run")


def flip_a_byte(folder):
    path = next(folder.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(folder):
    path = next(folder.glob("*.distcp"))
    os.truncate(path, path.stat().st_size // 2)


def lose_the_table(folder):
    (folder / ".metadata").unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, lose_the_table])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used(
    server, small_run, undisturbed, tmp_path, damage
):
    run = finished_run(undisturbed, tmp_path)
    older, newest = sealed.whole_steps(run / "checkpoints")
    damage(sealed.folder_for(run / "checkpoints", newest))
    said = tmp_path / "said"
    assert server.run([*small_run, "--out", run, "--resume"], said) == 0, said.read_text()
    assert f"step-{newest:08d} is damaged" in said.read_text()
    assert f"step {older}" in said.read_text()
    assert f"damaged-step-{newest:08d}" in whole(run)
    assert last_state(run) == last_state(undisturbed[0])
    assert log(run) == log(undisturbed[0])


def test_a_second_process_on_the_same_run_is_refused_and_a_killed_one_leaves_no_lock(
    server, small_run, undisturbed, tmp_path
):
    run = finished_run(undisturbed, tmp_path)
    flip_a_byte(sealed.folder_for(run / "checkpoints", 24))  # so that there are steps left
    flip_a_byte(sealed.folder_for(run / "checkpoints", 21))
    with sealed.RunLock(run):
        said = tmp_path / "refused"
        assert server.run([*small_run, "--out", run, "--resume"], said) == 1
        assert f"Another process (pid {os.getpid()})" in said.read_text()
    said = tmp_path / "none_left"
    assert server.run([*small_run, "--out", run, "--resume"], said) == 1
    assert "No whole checkpoint is left" in said.read_text()
    with sealed.RunLock(run):
        pass
