"""Whoever ends the caller, and however: its ranks, what they started, and their files are gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

# Ranks that wait for ever, one in a collective and one in a child process; each tells its pid.
RANKS = """
import os, subprocess, time
from pathlib import Path
import torch.distributed as dist
from dsv3_tutorial.parallel.launch import launch

def hang(folder):
    child = subprocess.Popen(["sleep", "600"])
    for pid in (os.getpid(), os.getppid(), child.pid):
        Path(folder, str(pid)).touch()
    if dist.get_rank() == 0:
        child.wait()
    dist.barrier()
"""
SCRIPT = RANKS + "\nimport sys\nlaunch(hang, 3, sys.argv[1], timeout=300)\n"
PIDS = 7  # three ranks, their three children, the server


def soon(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def pids_in(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def none_lives(pids):
    """No process with these pids but zombies, which only wait for whoever started them."""
    found = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return all(process.status() == psutil.STATUS_ZOMBIE for process in found)


def environment(temporary):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
        "IPYTHONDIR": str(temporary / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(temporary / "runtime"),
    }


@pytest.fixture
def folders(tmp_path):
    """Where the ranks tell their pids, and what the caller's temporary files lie in."""
    for name in ("pids", "temporary"):
        (tmp_path / name).mkdir()
    return tmp_path / "pids", tmp_path / "temporary"


def left_over(temporary):
    return [path.name for path in temporary.glob("dsv3_ranks_*")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "whom"), [(signal.SIGKILL, "the process"), (signal.SIGINT, "its group")]
)
def test_a_script_that_is_ended_leaves_nothing(folders, how, whom):
    told, temporary = folders
    command = [sys.executable, "-c", SCRIPT, str(told)]
    script = subprocess.Popen(
        command, env=environment(temporary), start_new_session=True, stderr=subprocess.PIPE
    )
    try:
        assert soon(lambda: len(pids_in(told)) == PIDS), pids_in(told)
        (os.killpg if whom == "its group" else os.kill)(script.pid, how)
        said = script.communicate(timeout=60)[1].decode()
    finally:
        script.kill()
        script.wait()
    assert script.returncode == -how
    assert said.count("KeyboardInterrupt") == (how == signal.SIGINT)
    assert soon(lambda: none_lives(pids_in(told)))
    assert soon(lambda: left_over(temporary) == [])


@pytest.fixture
def kernel(folders):
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager.connection_file = str(folders[1] / "connection.json")
    manager.start_kernel(env=environment(folders[1]), cwd=str(folders[1]))
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield manager, client
    client.stop_channels()
    if manager.is_alive():
        manager.shutdown_kernel(now=True)
    manager.cleanup_resources()
    manager.context.destroy(linger=0)


def outcome(client, asked):
    while (answer := client.get_shell_msg(timeout=120))["parent_header"]["msg_id"] != asked:
        pass
    return answer["content"]


@pytest.mark.slow
def test_an_interrupted_kernel_ends_its_ranks_and_a_killed_one_leaves_nothing(folders, kernel):
    told, temporary = folders
    manager, client = kernel
    assert outcome(client, client.execute(RANKS))["status"] == "ok"
    hang = f"launch(hang, 3, {str(told)!r}, timeout=300)"

    asked = client.execute(hang, stop_on_error=False)  # or what is asked next may be aborted too
    assert soon(lambda: len(pids_in(told)) == PIDS), pids_in(told)
    manager.interrupt_kernel()
    answer = outcome(client, asked)
    assert answer["ename"] == "KeyboardInterrupt"
    first = pids_in(told)
    assert soon(lambda: none_lives(first)) and left_over(temporary) == []

    cell = "total = lambda: dist.get_rank() + 10\nassert launch(total, 2) == [10, 11]"
    assert outcome(client, client.execute(cell))["status"] == "ok"

    client.execute(hang)
    assert soon(lambda: len(set(pids_in(told)) - set(first)) == PIDS)
    manager.shutdown_kernel(now=True)
    assert soon(lambda: none_lives(pids_in(told)))
    assert soon(lambda: left_over(temporary) == [])
