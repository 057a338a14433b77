"""Two "nodes" of two ranks on one machine: each rank in a network of its own, its cable throttled.

As in a real cluster every rank has its own card, all cards hang on one switch, and the two ranks of
a node have a fast link beside it. The networks have no name: they live as long as the ranks in
them, so nothing can be left behind. Linux and root; the machine's own network is not touched.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys

import torch.distributed as dist

from dsv3_tutorial.bench.attention_steps import BenchError

PER_NODE = 2
WORLD = 2 * PER_NODE
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_QUEUE = ("burst", "128kb", "latency", "50ms")  # what passes at once, and how long the rest waits
_SETTINGS = {  # pauses between exchanges must not make a connection start slowly again
    "tcp_slow_start_after_idle": "0",
    "tcp_congestion_control": "cubic",
}


def problem() -> str | None:
    """Why this machine cannot show two nodes, or None."""
    if sys.platform != "linux":
        return "networks of their own for processes are Linux's"
    if os.geteuid() != 0:
        return "networks of their own for processes need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} of iproute2 is not here" if missing else None


def enter() -> None:
    """Move this rank into its own network; groups made from now on talk over its cables.

    All WORLD ranks call it; ranks 0 and 1 are one node, 2 and 3 the other. No limit at first.
    Raises BenchError with what the system said.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if world != WORLD:
        raise BenchError(f"{world} ranks are not two nodes of two. Start {WORLD} ranks.")
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_NEW_NETWORK):  # of this thread: Python 3.11 has no call for it
        raise BenchError(
            f"unshare failed: {os.strerror(ctypes.get_errno())}. Ranks in one network have no "
            "cables. A container may forbid it: try on a plain machine."
        )
    pids: list[int] = [0] * world
    dist.all_gather_object(pids, os.getpid())  # also waits until every network is there
    if rank == 0:
        _switch(pids)
    if rank % PER_NODE == 0:
        run("ip", "link", "add", "near", *_pair("near", pids[rank + 1]))
    dist.barrier()
    _address(rank)
    os.environ["GLOO_SOCKET_IFNAME"] = "nic"
    dist.barrier()


def limit(megabits: int | None) -> None:
    """Throttle every card, in both directions, to so many Mbit/s; None: as fast as memory."""
    ports = [f"port{i}" for i in range(WORLD)] if dist.get_rank() == 0 else []
    for device in ("nic", *ports):  # what leaves a rank, and what the switch hands to it
        root = ("dev", device, "root")
        if megabits is None:
            subprocess.run(["tc", "qdisc", "del", *root], capture_output=True)
        else:
            run("tc", "qdisc", "replace", *root, "tbf", "rate", f"{megabits}mbit", *_QUEUE)
    dist.barrier()


def run(*command: str) -> None:
    """Run a command; BenchError with its own words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(
            f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}. Without it no "
            "link is throttled. A container may forbid it: try on a plain machine."
        )


def _switch(pids: list[int]) -> None:
    """A switch in rank 0's network, and from each of its ports a cable to a rank."""
    run("ip", "link", "add", "switch", "type", "bridge")
    run("ip", "link", "set", "switch", "up")
    for i, pid in enumerate(pids):
        run("ip", "link", "add", f"port{i}", *_pair("nic", pid))
        run("ip", "link", "set", f"port{i}", "master", "switch", "up")


def _address(rank: int) -> None:
    """This rank's address on its card, and the fast way to the other rank of its node."""
    mine, mate = _ip(rank), _ip(rank ^ 1)
    for device in ("lo", "nic", "near"):
        run("ip", "link", "set", device, "up")
    run("ip", "address", "add", f"{mine}/24", "dev", "nic")
    run("ip", "route", "add", f"{mate}/32", "dev", "near", "src", mine)
    for name, value in _SETTINGS.items():
        with contextlib.suppress(OSError), open(f"/proc/sys/net/ipv4/{name}", "w") as setting:
            setting.write(value)


def _ip(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


def _pair(name: str, pid: int) -> tuple[str, ...]:
    """The arguments that make a link's other end, `name`, in the network of process `pid`."""
    return ("type", "veth", "peer", "name", name, "netns", str(pid))
