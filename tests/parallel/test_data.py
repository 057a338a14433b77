"""Ranks under torchrun train as one process does, go on from each other, and end together."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel import data
from dsv3_tutorial.parallel.launch import launch
from dsv3_tutorial.train import run, sealed

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_type": "deepseek_v3",
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "rope_theta": 10000,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
}
ONE = data.Ranks(0, 1, torch.device("cpu"))


def test_a_process_outside_torchrun_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with data.joined("cpu") as ranks:
        assert ranks == ONE and ranks.first
        assert not torch.distributed.is_initialized()


def test_alone_a_share_is_the_whole_and_a_sum_is_a_copy():
    rows = torch.arange(12).view(6, 2)
    assert torch.equal(ONE.share(rows), rows)
    total = ONE.sum(rows)
    assert torch.equal(total, rows) and total.data_ptr() != rows.data_ptr()
    model = nn.Linear(2, 2)
    assert data.shard(model, ONE) is model
    data.synchronise(model, last=False)
    assert data.gathered_state(model, ONE).keys() == {"weight", "bias"}


def test_the_shares_of_a_batch_are_the_batch_in_order():
    rows = torch.arange(24).view(12, 2)
    ranks = [data.Ranks(i, 4, torch.device("cpu")) for i in range(4)]
    assert torch.equal(torch.cat([r.share(rows) for r in ranks]), rows)
    assert [r.first for r in ranks] == [True, False, False, False]


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    with pytest.raises(ValueError, match="7 rows cannot be shared by 2 ranks"):
        data.Ranks(0, 2, torch.device("cpu")).share(torch.zeros(7, 3))


def test_only_a_failed_collective_is_blamed_on_another_rank():
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    over_it = ValueError("a checkpoint was not written")
    over_it.__context__ = lost
    assert data.from_a_peer(lost) and data.from_a_peer(over_it)
    assert data.from_a_peer(torch.distributed.DistBackendError("NCCL error"))
    assert not data.from_a_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def waits_for_a_rank_that_hangs():
    """In a rank, with a time limit of a second: the second one comes three seconds late."""
    from dsv3_tutorial.parallel import mesh

    mesh.TIMEOUT = timedelta(seconds=1)
    try:
        with data.joined("cpu", mesh.Layout(dp=2)) as ranks:
            time.sleep(3 * ranks.rank)
            ranks.sum(torch.ones(1), "dp")
    except data.RankLost as error:
        return str(error)


def test_a_rank_that_hangs_is_waited_for_no_longer_than_the_limit():
    said = launch(waits_for_a_rank_that_hangs, 2)[0]
    assert said.startswith("Rank 0 of 2 stops: another rank has ended or hangs (")
    assert "hangs (Timed out" in said and "start again with --resume" in said


def test_ranks_that_run_already_are_joined_and_stay(tmp_path):
    assert launch(joins_twice, 2) == [[0, 2, 0, 2], [1, 2, 1, 2]]


def joins_twice():
    found = []
    for _ in range(2):
        with data.joined("cpu") as ranks:
            found += [ranks.rank, ranks.size]
    return found


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A small run in two micro-batches, with experts, a bias that moves, and MTP."""
    folder = tmp_path_factory.mktemp("text")
    words, draw = ("the", "cat", "sat", "on", "a", "mat", "and", "ran"), random.Random(0)
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(words) for _ in range(60)))
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG))
    made = ["--config", config, "--text", folder, "--device", "cpu", "--threads", 1, "--steps", 10]
    size = ["--batch", 8, "--micro-batches", 2, "--seq-len", 16, "--save-every", 4]
    balance = ["--gamma", 0.01, "--evaluate-every", 5, "--evaluate-windows", 4]
    return [str(a) for a in [*made, *size, *balance]]


@contextlib.contextmanager
def torchrun(arguments, said, restarts=0):
    """Two ranks of the train command in a session of their own, of which nothing is left over."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with open(said, "w") as output:
        started = subprocess.Popen(
            [*command, f"--max-restarts={restarts}", "-m", "dsv3_tutorial", "train", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(folder):
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows(folder)]


@pytest.fixture(scope="module")
def one_process(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    assert run.main([*options, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def two_ranks(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with torchrun([*options, "--out", str(folder / "run")], folder / "said") as started:
        assert started.wait(timeout=300) == 0, (folder / "said").read_text()
    return folder


def assert_same_training(one, two, tolerance):
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tokens_per_s"}:
            assert a[name] == pytest.approx(b[name], rel=tolerance), (a["step"], name)
    a, b = (DeepSeekV3.from_pretrained(folder / "model").state_dict() for folder in (one, two))
    for name in a:
        if name.endswith("e_score_correction_bias"):
            assert a[name].abs().max() > 0
            assert torch.equal(a[name], b[name])
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(one_process, two_ranks):
    assert_same_training(one_process, two_ranks / "run", tolerance=1e-5)


@pytest.mark.slow
def test_the_first_rank_alone_speaks_and_each_writes_its_own_shard(two_ranks):
    assert (two_ranks / "said").read_text().count("held out") == 3  # the text, steps 5 and 10
    for step in sealed.whole_steps(two_ranks / "run/checkpoints"):
        folder = sealed.folder_for(two_ranks / "run/checkpoints", step)
        assert sealed.verify(folder)["made_with"]["ranks"] == 2
        shards = [(folder / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
        assert min(shards) > 0.4 * max(shards)


def back_to(source, out, step):
    """A copy of a finished run whose checkpoints end at `step`."""
    shutil.copytree(source, out)
    for later in sealed.whole_steps(out / "checkpoints"):
        if later > step:
            shutil.rmtree(sealed.folder_for(out / "checkpoints", later))
    assert sealed.whole_steps(out / "checkpoints")[-1] == step
    shutil.rmtree(out / "model")
    return out


@pytest.mark.slow
def test_one_process_goes_on_from_the_checkpoint_of_two(options, one_process, two_ranks, tmp_path):
    out = back_to(two_ranks / "run", tmp_path / "run", 8)
    assert run.main([*options, "--out", str(out), "--resume"]) == 0
    assert_same_training(one_process, out, tolerance=1e-5)


def train(arguments):
    return run.main(arguments)


def first_checkpoint(started, out, said):
    """Wait until the run in `out` has one."""
    give_up = time.monotonic() + 200
    while not sealed.whole_steps(out / "checkpoints"):
        assert started.poll() is None and time.monotonic() < give_up, said.read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_two_ranks_go_on_from_the_checkpoint_of_one(options, one_process, tmp_path):
    out = back_to(one_process, tmp_path / "run", 8)
    assert launch(train, 2, [*options, "--out", str(out), "--resume"]) == [0, 0]
    assert_same_training(one_process, out, tolerance=1e-5)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_leaves_a_whole_checkpoint(options, tmp_path):
    long = [*options, "--out", str(tmp_path / "long"), "--save-every", "1", "--steps", "100000"]
    with torchrun(long, tmp_path / "said") as started:
        first_checkpoint(started, tmp_path / "long", tmp_path / "said")
        os.kill(victim := children(started.pid)[-1], signal.SIGKILL)
        assert started.wait(timeout=45) != 0
        assert f"Signal 9 (SIGKILL) received by PID {victim}" in said(tmp_path)
        with pytest.raises(ProcessLookupError):
            os.killpg(started.pid, 0)  # nobody is left of the whole session
    newest = sealed.whole_steps(tmp_path / "long/checkpoints")[-1]
    sealed.verify(sealed.folder_for(tmp_path / "long/checkpoints", newest))


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_again_and_they_go_on_by_themselves(options, tmp_path):
    asked = [*options, "--steps", "20", "--save-every", "2"]
    assert run.main([*asked, "--out", str(tmp_path / "one")]) == 0
    spread = [*asked, "--dp", "2", "--ep", "2", "--out", str(tmp_path / "two")]
    with torchrun(spread, tmp_path / "said", restarts=1) as started:
        first_checkpoint(started, tmp_path / "two", tmp_path / "said")
        os.kill(children(started.pid)[-1], signal.SIGKILL)
        assert started.wait(timeout=120) == 0, said(tmp_path)
    assert "resumed after step" in said(tmp_path)
    assert_same_training(tmp_path / "one", tmp_path / "two", tolerance=1e-5)


def said(folder):
    return (folder / "said").read_text()


def children(pid):
    """The processes that `pid` has started, oldest first."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    pairs = (map(int, line.split()) for line in listed.stdout.splitlines())
    return sorted(child for child, parent in pairs if parent == pid)


@pytest.mark.slow
def test_two_ranks_train_in_fp8_nearly_as_one_process_and_one_goes_on_from_them(options, tmp_path):
    """Nearly: a rank rounds weights to BF16 first, and Wgrad's tiles hold its tokens only."""
    fp8 = [*options, "--precision", "fp8", "--steps", "6", "--save-every", "3"]
    fp8 += ["--peak-lr", "1e-2", "--warmup", "2"]
    assert run.main([*fp8, "--out", str(tmp_path / "one")]) == 0
    assert launch(train, 2, [*fp8, "--out", str(tmp_path / "two")]) == [0, 0]
    again = back_to(tmp_path / "two", tmp_path / "again", 3)
    kept = sealed.verify(sealed.folder_for(again / "checkpoints", 3))["tensors"]
    moments = [kind for name, kind in kept.items() if name.endswith((".exp_avg", ".exp_avg_sq"))]
    assert moments and {dtype for dtype, _ in moments} == {"bfloat16"}
    assert run.main([*fp8, "--out", str(again), "--resume"]) == 0
    one, two, gone_on = (
        [row["loss"] for row in rows(folder)]
        for folder in (tmp_path / "one", tmp_path / "two", again)
    )
    assert gone_on[:3] == two[:3]
    assert gone_on[3:] == pytest.approx(two[3:], rel=1e-3)
    assert one == pytest.approx(two, rel=5e-3) and one[-1] < 0.7 * one[0]


def test_a_model_that_nobody_sharded_gathers_as_it_is():
    model = DeepSeekV3(ModelConfig.from_dict(CONFIG))
    assert data.gathered_state(model, ONE).keys() == model.state_dict().keys()
