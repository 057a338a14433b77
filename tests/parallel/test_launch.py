"""Ranks started from one process: what comes back, in which order, and how failures read."""

import ctypes
import functools
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsv3_tutorial.parallel import launch as module
from dsv3_tutorial.parallel import launch_pickle, launch_report
from dsv3_tutorial.parallel.launch import ParallelError, RankFailed, RankTimeout, launch

STEP = 7.0


@pytest.fixture(autouse=True)
def no_rank_is_left():
    yield
    client = module._client
    if client is not None and client.process.poll() is None:
        assert psutil.Process(client.process.pid).children(recursive=True) == []
        deadline = time.monotonic() + 20  # the server clears up after launch has returned
        while list(client.folder.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(client.folder.iterdir()) == []


@dataclass(frozen=True)
class Pair:
    rank: int
    total: torch.Tensor


def summed(step, scale=1.0):
    rank = dist.get_rank()
    total = torch.tensor([rank + step + STEP], dtype=torch.float64) * scale
    dist.all_reduce(total)
    return Pair(rank, total)


def where_others_wait(what):
    if dist.get_rank() == 1:
        what()
    dist.barrier()


def raises():
    raise ValueError("the third expert is missing")


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_rank_takes_part_and_results_come_in_rank_order(world):
    found = launch(functools.partial(summed, scale=2.0), world, 0.5)
    assert [pair.rank for pair in found] == list(range(world))
    assert all(type(pair) is Pair for pair in found)  # a class of this very module
    expected = 2.0 * (sum(range(world)) + world * (0.5 + STEP))
    assert all(pair.total.dtype == torch.float64 for pair in found)
    assert all(pair.total.item() == expected for pair in found)


def test_a_function_may_be_a_closure_and_carry_what_it_closes_over():
    weight, seen = torch.arange(6.0).view(2, 3), {}

    def product(x):
        seen["rank"] = dist.get_rank()
        return x @ weight, (lambda y: y + 1)(seen["rank"])

    (first, one), (second, two) = launch(product, 2, torch.eye(2))
    assert torch.equal(first, weight) and torch.equal(second, weight) and (one, two) == (1, 2)
    assert seen == {}  # a rank's memory is its own


def test_a_rank_has_one_thread_the_imports_and_the_callers_surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("DSV3_TEST_WORD", "here")
    monkeypatch.setenv("RANK", "5")  # as if the caller were itself a rank of torchrun
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside_the_notebook.py").write_text("answer = 42\n")

    def look():
        loaded = "torch.distributed.fsdp" in sys.modules
        import beside_the_notebook

        environment = os.environ.get("DSV3_TEST_WORD"), os.environ.get("RANK"), os.getcwd()
        return loaded, beside_the_notebook.answer, environment, torch.get_num_threads()

    first, second = launch(look, 2)
    assert first == second and first[:2] == (True, 42)
    assert first[2] == ("here", None, str(tmp_path)) and first[3] == 1


def test_ranks_draw_other_random_numbers_and_the_same_in_every_launch():
    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    first = launch(draw, 3)
    for place in range(3):
        assert len({repr(drawn[place]) for drawn in first}) == 3
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert launch(draw, 3) == first and launch(draw, 2) == first[:2]


def test_one_server_serves_every_launch_and_the_ranks_are_new_processes():
    one = launch(os.getpid, 2)
    server = module._client.process.pid
    two = launch(os.getpid, 2)
    assert module._client.process.pid == server and not set(one) & set(two)
    assert launch(os.getppid, 1) == [server]


def test_what_a_rank_imports_late_the_next_ranks_find_imported():
    def late():
        before = "torch._dynamo" in sys.modules
        import torch._dynamo  # noqa: F401

        return before

    launch(late, 1)
    assert launch(late, 1) == [True]


def test_what_ranks_print_is_printed_once_in_rank_order(capfd):
    def speak():
        for line in range(2):
            time.sleep(0.02 * (3 - dist.get_rank()))
            print("line", line, "of rank", dist.get_rank())
        print("aside", dist.get_rank(), file=sys.stderr)
        ctypes.CDLL(None).write(1, b"from C\n", 7)
        os.write(1, "größer\n".encode())

    launch(speak, 3)
    said = capfd.readouterr()
    ranks = [f"line 0 of rank {r}\nline 1 of rank {r}\nfrom C\ngrößer\n" for r in range(3)]
    assert said.out == "".join(ranks)
    assert said.err == "aside 0\naside 1\naside 2\n"
    launch(speak, 2, echo=False)
    assert capfd.readouterr() == ("", "")


def test_words_of_a_rank_that_fails_are_printed_too(capsys):
    def speak():
        print("before the fall")
        raise KeyError("x")

    with pytest.raises(RankFailed):
        launch(speak, 1)
    assert capsys.readouterr().out == "before the fall\n"


def test_a_rank_that_raises_is_named_with_its_own_traceback_once():
    with pytest.raises(RankFailed) as caught:
        launch(where_others_wait, 4, raises)
    assert caught.value.rank == 1
    text = str(caught.value)
    assert text.startswith("Rank 1 failed, and the others were ended: ValueError: the third expert")
    assert text.count("Traceback") == 1 and 'raise ValueError("the third expert' in text
    assert "launch_rank" not in text and "Connection closed" not in text
    assert caught.value.traceback in text
    assert len(launch(summed, 2, 0.0)) == 2  # and the server serves on


def test_of_ranks_that_all_fail_the_first_is_named():
    with pytest.raises(RankFailed, match="Rank 0 failed") as caught:
        launch(raises, 4)
    assert caught.value.rank == 0


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda: os._exit(3), "exit 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda: ctypes.string_at(0), "SIGSEGV"),
    ],
)
def test_a_rank_that_dies_without_a_word_is_named_with_how_it_died(what, says):
    with pytest.raises(RankFailed, match=rf"Rank 1 ended without .* \({says}\)") as caught:
        launch(where_others_wait, 2, what, echo=False)
    assert caught.value.rank == 1 and caught.value.traceback == ""
    assert str(caught.value).endswith("It wrote nothing to stderr.")


def test_the_last_words_of_a_rank_that_was_killed_are_quoted_to_a_limit():
    def speaks():
        os.write(2, b"x" * 4000 + b"\nno room for the experts\n")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankFailed, match="lack of memory") as caught:
        launch(where_others_wait, 2, speaks, echo=False)
    assert (
        str(caught.value).endswith("x\nno room for the experts") and len(str(caught.value)) < 2000
    )


@pytest.mark.parametrize("like", [torch.ones(7), torch.ones(4, dtype=torch.float64)])
def test_tensors_that_are_unlike_are_suspected_where_a_collective_aborts(like):
    def unlike():
        dist.all_reduce(like if dist.get_rank() else torch.ones(4))

    with pytest.raises(RankFailed, match="SIGABRT") as caught:
        launch(unlike, 2, echo=False)
    assert "different shapes or dtypes" in str(caught.value) and "memory" not in str(caught.value)
    assert "Received data size doesn't match" in str(caught.value)


def test_even_a_rank_that_exits_well_has_failed():
    with pytest.raises(RankFailed, match=r"Rank 1 failed.*SystemExit: 0"):
        launch(where_others_wait, 2, lambda: sys.exit(0))


def sleeps():
    time.sleep(60)


def test_ranks_that_hang_are_ended_at_the_limit_and_each_says_where_it_stood():
    begin = time.monotonic()
    with pytest.raises(RankTimeout, match=r"3 of 3 ranks did not end within 1 s") as caught:
        launch(where_others_wait, 3, sleeps, timeout=1)
    assert time.monotonic() - begin < 30
    assert caught.value.ranks == (0, 1, 2)
    assert "in sleeps (time.sleep(60))" in caught.value.stacks[1]
    assert "in where_others_wait (dist.barrier())" in caught.value.stacks[0]
    assert f"\nrank 1: {caught.value.stacks[1]}" in str(caught.value)


def test_only_ranks_that_hang_are_named():
    def one_sleeps():
        return time.sleep(60) if dist.get_rank() == 1 else 1

    with pytest.raises(RankTimeout) as caught:
        launch(one_sleeps, 2, timeout=0.5)
    assert caught.value.ranks == (1,) and "rank 0:" not in str(caught.value)


def test_a_failure_counts_more_than_those_who_wait_for_it():
    def slow_to_fail():
        if dist.get_rank() == 0:
            time.sleep(0.3)
            raise OSError("no such expert")
        time.sleep(60)

    with pytest.raises(RankFailed, match=r"Rank 0 failed.*OSError: no such expert"):
        launch(slow_to_fail, 2, timeout=20)


@pytest.mark.parametrize("world", [0, -1, 65, 2.0, "2", None, True])
def test_a_world_that_cannot_be_is_refused_with_its_reason(world):
    with pytest.raises(ParallelError, match=r"ranks cannot be started.*from 1 to 64") as caught:
        launch(summed, world, 0.0)
    assert repr(world) in str(caught.value)


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan"), None, "60", True])
def test_a_time_limit_that_is_none_is_refused(timeout):
    with pytest.raises(ParallelError, match="is no time limit"):
        launch(summed, 2, 0.0, timeout=timeout)


def test_what_cannot_be_sent_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(module, "_client", None)
    lock = threading.Lock()
    with pytest.raises(ParallelError, match=r"<lambda> or its arguments cannot be sent.*lock"):
        launch(lambda: lock, 2)
    with pytest.raises(ParallelError, match="cannot be sent"):
        launch(summed, 2, (i for i in range(3)))
    with pytest.raises(ParallelError, match="3 is no function"):
        launch(3, 2)
    assert module._client is None


def test_a_result_that_cannot_be_sent_back_is_refused_with_the_rank():
    with pytest.raises(RankFailed, match=r"Rank 0 failed.*cannot be sent back .*lock"):
        launch(threading.Lock, 2)


def test_a_sharded_tensor_is_refused_as_a_result_and_says_what_to_return():
    def sharded():
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        return distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)])

    with pytest.raises(RankFailed, match=r"DTensor means nothing outside.*full_tensor\(\)"):
        launch(sharded, 2)
    full = launch(lambda: sharded().full_tensor(), 2)
    assert all(torch.equal(tensor, torch.ones(4)) for tensor in full)


def test_ranks_do_not_start_ranks():
    def nested():
        return launch(os.getpid, 2)

    with pytest.raises(RankFailed, match="launch was called inside rank 0") as caught:
        launch(nested, 1)
    assert "ParallelError" in caught.value.traceback


def test_ranks_treat_warnings_as_their_caller_does():
    def warn():
        warnings.warn("mind the gap", UserWarning, stacklevel=1)
        return "went on"

    with pytest.raises(RankFailed, match="UserWarning: mind the gap"):
        launch(warn, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert launch(warn, 1) == ["went on"]


def test_an_unknown_backend_fails_in_the_rank_and_nccl_wants_a_gpu_each():
    with pytest.raises(RankFailed, match=r"(?i)backend"):
        launch(summed, 2, 0.0, backend="carrier_pigeon")
    if torch.cuda.device_count() < 2:
        with pytest.raises(ParallelError, match="needs a GPU for each of 2 ranks"):
            launch(summed, 2, 0.0, backend="nccl")
        assert launch(torch.cuda.is_available, 2) == [False, False]


def test_a_server_that_was_killed_is_replaced():
    launch(os.getpid, 1)
    first = module._client.process
    first.kill()
    first.wait()
    assert launch(os.getppid, 1) != [first.pid]


def test_a_server_that_dies_under_its_ranks_takes_them_along_and_is_an_error(tmp_path):
    launch(os.getpid, 1)
    folder = module._client.folder

    def orphaned():
        (tmp_path / str(os.getpid())).touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(ParallelError, match="The process that starts ranks ended"):
        launch(orphaned, 2)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert pids and not any(map(psutil.pid_exists, pids))
    assert not folder.exists()


def test_stop_leaves_no_process_and_no_file(monkeypatch, tmp_path):
    module.stop()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = set(psutil.Process().children(recursive=True))
    assert launch(summed, 1, 0.0)[0].total.item() == STEP
    assert len(list(tmp_path.glob("dsv3_ranks_*"))) == 1
    module.stop()
    module.stop()  # twice is once
    assert set(psutil.Process().children(recursive=True)) <= before
    assert list(tmp_path.glob("dsv3_ranks_*")) == []


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(plain)
def test_plain_objects_come_back_equal(value):
    assert pickle.loads(launch_pickle.dumps(value)) == value


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(
        [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16]
    ),
    st.booleans(),
)
def test_tensors_come_back_with_the_same_bits(shape, dtype, transposed):
    made = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    made = made.mT if transposed and made.dim() > 1 else made
    back = pickle.loads(launch_pickle.dumps({"x": made}))["x"]
    assert back.dtype == dtype and back.shape == made.shape
    same = {1: torch.uint8, 2: torch.int16, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(back.view(same), made.view(same))


def test_a_slice_travels_without_the_rest_of_its_storage():
    whole = torch.randn(1000, 100)
    assert len(launch_pickle.dumps(whole[3])) < 5000
    assert torch.equal(pickle.loads(launch_pickle.dumps(whole[3:5, ::2])), whole[3:5, ::2])


def test_gradients_flags_and_parameters_survive():
    leaf = torch.ones(2, requires_grad=True)
    parameter = nn.Parameter(torch.zeros(3), requires_grad=False)
    back = pickle.loads(launch_pickle.dumps((leaf, leaf * 2, (leaf * 2)[:1], parameter)))
    assert [t.requires_grad for t in back] == [True, True, True, False]
    assert type(back[3]) is nn.Parameter and torch.equal(back[2], torch.tensor([2.0]))


def test_a_notebook_cell_is_named_without_its_process_number():
    text = 'File "/tmp/ipykernel_4711/123456.py", line 3, in f'
    failure = launch_report.Failure("E", text, False)
    report = launch_report.Report(0, "failed", "", "", pickle.dumps(failure), "")
    message = str(launch_report.problem([report], 1.0))
    assert 'File "notebook cell", line 3, in f' in message and not re.search("4711|123456", message)
