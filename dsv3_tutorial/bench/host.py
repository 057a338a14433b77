"""What the operating system says about this machine: cores, memory, caches. No torch, no guesses.

Every fact may be missing (a container without /sys, macOS, a limit nobody set); it is then None.
Paths start at `root`, so that a test can show this module any machine.
"""

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path("/")
_NO_LIMIT = 2**60  # cgroup v1 writes a huge number where there is no limit


def cpu_name(root: Path = ROOT) -> str:
    """The processor's name, as the maker wrote it, else the architecture."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == "model name" and value.strip():
            return value.strip()
    return _sysctl("machdep.cpu.brand_string") or platform.machine() or "unknown processor"


def logical_cores() -> int:
    """Cores the operating system counts, hyper-threads included."""
    return os.cpu_count() or 1


def allowed_cores() -> int:
    """Cores this process may run on: taskset and cpusets make it fewer."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # macOS has no affinity
        return logical_cores()


def physical_cores(root: Path = ROOT) -> int | None:
    """Cores with arithmetic units of their own; two hyper-threads share one."""
    found = set()
    for cpu in (root / "sys/devices/system/cpu").glob("cpu[0-9]*"):
        names = ("physical_package_id", "core_id")
        place = tuple(_number(_read(cpu / "topology" / name)) for name in names)
        if None not in place:
            found.add(place)
    return len(found) or _number(_sysctl("hw.physicalcpu"))


def core_limit(root: Path = ROOT) -> float | None:
    """How many cores' worth of time the control group grants, or None: no limit."""
    limits = []
    for folder in _groups(root, "cpu"):
        quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
        quota = _number(quota or _read(folder / "cpu.cfs_quota_us"))
        period = _number(period or _read(folder / "cpu.cfs_period_us"))
        if quota and period and quota > 0 and period > 0:
            limits.append(quota / period)
    return min(limits, default=None)


def memory_bytes() -> int | None:
    """Main memory of the machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """What the control group lets this process hold, or None: no limit."""
    names = ("memory.max", "memory.limit_in_bytes")
    texts = [_read(folder / name) for folder in _groups(root, "memory") for name in names]
    limits = [limit for limit in map(_number, texts) if limit and 0 < limit < _NO_LIMIT]
    return min(limits, default=None)


def usable_memory_bytes(root: Path = ROOT) -> int | None:
    """The smaller of the machine's memory and the limit on this process."""
    known = [size for size in (memory_bytes(), memory_limit_bytes(root)) if size]
    return min(known, default=None)


def cache_bytes(root: Path = ROOT) -> int | None:
    """The largest cache that the first core sees: data beyond it comes from memory."""
    caches = (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [_size(_read(path)) for path in caches]
    return max((size for size in sizes if size), default=None)


def _groups(root: Path, controller: str) -> list[Path]:
    """This process's control groups for a controller, innermost first, both versions' layouts."""
    folders = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = base / path.strip("/")
        folders += [inner, *(parent for parent in inner.parents if parent.is_relative_to(base))]
    return folders or [root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.removeprefix("-").isdecimal() else None


def _size(text: str | None) -> int | None:
    """Bytes of "32768K" or "32M", as /sys writes cache sizes."""
    if not text:
        return None
    scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1)
    number = _number(text.rstrip("KMG"))
    return None if number is None else number * scale


def _sysctl(name: str) -> str | None:
    """One of macOS's facts; None elsewhere."""
    if platform.system() != "Darwin":
        return None
    try:
        run = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None
