"""This machine's ceilings: how fast it copies memory and multiplies matrices, measured in seconds.

A chip's data sheet is a promise; a roofline drawn on it flatters nobody's code. What a plain copy
and the vendor's own matrix product reach here, now, with these threads, is what code is held to.
"""

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import host, timing
from dsv3_tutorial.hardware import Chip
from dsv3_tutorial.receipts import Receipt

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,  # what float32 is where torch was told that less will do
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
ON_CPU = ("fp32", "bf16")
ON_GPU = ("fp32", "bf16", "fp16", "fp8")
_LIBRARIES = ("torch", "triton", "transformers", "transformer_engine")
_COPY_SHARE = 0.3  # of the seconds; the matrix products share the rest
_SMALLEST, _LARGEST = 2**20, 2**29  # bytes of a copy's buffer


@dataclass(frozen=True)
class Rate:
    """A measured rate, work per second: its median, the quartiles around it, the repeats."""

    value: float
    low: float
    high: float
    repeats: int
    size: int  # bytes of the copy's buffer, or the side of the square matrices


@dataclass(frozen=True)
class Ceilings:
    """What one device reached. copy in bytes/s, read and write both counted; matrix in FLOP/s.

    `missing` says for each format why it has no rate.
    """

    device: str
    device_kind: str
    threads: int
    memory_bytes: int
    cache_bytes: int
    copy: Rate
    matrix: dict[str, Rate]
    missing: dict[str, str]

    def chip(self) -> Chip:
        """These ceilings in the shape of a data sheet, for the cost model and its roofline."""
        return Chip.measured(
            self.device,
            {name: rate.value for name, rate in self.matrix.items()},
            self.copy.value,
            memory_bytes=self.memory_bytes,
            l2_bytes=self.cache_bytes,
            how=f"measured by bench.machine, threads: {self.threads}",
        )


def measure(seconds: float = 4.0, device: str | None = None) -> Ceilings:
    """This device's ceilings in about `seconds`; device None: the GPU where there is one.

    A part that is slower than its share still runs once, on its smallest size, so the total stays
    near `seconds` (0.5 to 6) on any machine. Threads are torch's own setting.
    """
    if not seconds > 0:
        raise ValueError(
            f"seconds={seconds} leaves no time to measure. Nothing ran. Give 0.5 to 6."
        )
    place = torch.device(default_device() if device is None else device)
    timer = timing.timer_for(place)
    memory, cache = _memory(place)
    copy = copy_rate(place, timer, _COPY_SHARE * seconds, _buffer_bytes(memory, cache))
    names = ON_GPU if place.type == "cuda" else ON_CPU
    if place.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        names = ("tf32", *names[1:])
    matrix, missing = {}, {}
    for name in names:
        share = (1 - _COPY_SHARE) * seconds / len(names)
        try:
            matrix[name] = matrix_rate(name, place, timer, share)
        except (RuntimeError, NotImplementedError) as error:
            missing[name] = str(error).strip().partition("\n")[0]
    facts = here(place)
    known = (facts["device"], facts["device_kind"], facts["threads"], memory, cache)
    return Ceilings(*known, copy=copy, matrix=matrix, missing=missing)


def copy_rate(place: torch.device, timer: timing.Timer, seconds: float, size: int) -> Rate:
    """Bytes a second that a copy of `size` bytes moves, every byte read and written: 2 x size.

    Both buffers are written first: pages never touched are all one page of zeros, and that page
    sits in the cache.
    """
    options = {"generator": _random(place), "device": place, "dtype": torch.uint8}
    source = torch.randint(256, (_SMALLEST,), **options).repeat(max(1, size // _SMALLEST))
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), 2 * source.numel(), timer, seconds, source.numel())


def matrix_rate(name: str, place: torch.device, timer: timing.Timer, seconds: float) -> Rate:
    """FLOP/s of a square matrix product in a format, on random data, at the largest size that fits.

    The side doubles while eight times the last product's time fits a sixth of `seconds`. Random
    data, since zeros toggle no transistors and let a GPU clock higher than it will in use. Raises
    RuntimeError where the device does not multiply in this format.
    """
    side, largest = (1024, 8192) if place.type == "cuda" else (128, 4096)
    deadline = time.perf_counter() + seconds
    run = _product(name, side, place)
    run()  # the first product also sets libraries up
    while side < largest and time.perf_counter() < deadline:
        if 8 * min(timer(run) for _ in range(3)) > seconds / 6:  # a busy neighbour slows one of 3
            break
        side *= 2
        run = _product(name, side, place)
    return _rate(run, 2 * side**3, timer, deadline - time.perf_counter(), side)


def here(device: torch.device | str = "cpu") -> dict:
    """The circumstances a Receipt asks for: device, device_kind, versions, date, threads."""
    gpu = torch.device(device).type == "cuda"
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if gpu and torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "device": torch.cuda.get_device_name(device) if gpu else host.cpu_name(),
        "device_kind": "gpu" if gpu else "cpu",
        "versions": versions,
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
    }


def default_device() -> str:
    """The GPU where torch sees one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def as_receipts(ceilings: Ceilings) -> list[Receipt]:
    """The ceilings as receipts: "copy" in B/s, and "matmul" in FLOP/s for each format."""
    facts = here("cuda" if ceilings.device_kind == "gpu" else "cpu")
    rates = [("copy", "B/s", {"bytes": ceilings.copy.size}, ceilings.copy)]
    for name, rate in ceilings.matrix.items():
        rates.append(("matmul", "FLOP/s", {"dtype": name, **dict.fromkeys("mnk", rate.size)}, rate))
    return [
        Receipt(
            what=what,
            shapes=shapes,
            value=rate.value,
            unit=unit,
            spread={"q1": rate.low, "q3": rate.high},
            repeats=rate.repeats,
            **facts,
        )
        for what, unit, shapes, rate in rates
    ]


def lines(ceilings: Ceilings) -> list[str]:
    """The ceilings in words, one a line."""
    threads = "one thread" if ceilings.threads == 1 else f"{ceilings.threads} threads"
    device = ceilings.device + (f", {threads}" if ceilings.device_kind == "cpu" else "")
    text = [device, f"copy  {ceilings.copy.value / 1e9:10.1f} GB/s at {ceilings.copy.size:,} bytes"]
    for name, rate in ceilings.matrix.items():
        text.append(f"{name:<5} {rate.value / 1e9:10.1f} GFLOP/s at {rate.size} x {rate.size}")
    return text + [f"{name:<5} not measured: {why}" for name, why in ceilings.missing.items()]


def main(argv: list[str] | None = None) -> int:
    """`bench machine`: measure the ceilings, print them, keep them as receipts."""
    parser = argparse.ArgumentParser(prog="dsv3_tutorial bench machine", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the receipts (default: data/measured)")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    options = parser.parse_args(argv)
    ceilings = measure(options.seconds, options.device)
    print("\n".join(lines(ceilings)))
    print(receipts.append("machine", as_receipts(ceilings), folder=options.out))
    return 0


def _rate(run: Callable, work: int, timer: timing.Timer, seconds: float, size: int) -> Rate:
    stats = timing.compare({"run": run}, timer=timer, repeats=50, warmup=1, seconds=seconds)["run"]
    value, high, low = (work / max(stats[name], 1e-9) for name in ("median", "q1", "q3"))
    return Rate(value, low, high, int(stats["repeats"]), size)


def _product(name: str, side: int, place: torch.device) -> Callable[[], Tensor]:
    generator = _random(place)
    a, b = (torch.randn(side, side, generator=generator, device=place) for _ in range(2))
    a, b = a.to(DTYPES[name]), b.to(DTYPES[name])
    if name != "fp8":
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)
    one = torch.ones((), device=place)
    # the tensor cores read the second operand by columns, hence the transpose of a row-major one
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _random(place: torch.device) -> torch.Generator:
    return torch.Generator(place).manual_seed(0)  # its own: a notebook's seed is left alone


def _memory(place: torch.device) -> tuple[int, int]:
    """Bytes of memory this process may use, and of the last cache before it."""
    if place.type == "cuda":
        facts = torch.cuda.get_device_properties(place)
        return facts.total_memory, facts.L2_cache_size
    return host.usable_memory_bytes() or 2**32, host.cache_bytes() or 2**25


def _buffer_bytes(memory: int, cache: int) -> int:
    """A copy's buffer: four times the cache where memory allows, so that none of it stays there."""
    wanted = -(-max(4 * cache, 2**26) // _SMALLEST) * _SMALLEST
    return min(wanted, _LARGEST, max(memory // 16 // _SMALLEST, 1) * _SMALLEST)
