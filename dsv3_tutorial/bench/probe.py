"""How this machine's FP8 matmul sums: asked, five questions at a time, and kept as receipts.

PyTorch's scaled_mm has two ways on Hopper: use_fast_accum=True leaves the sum in the tensor core,
False has it promoted to float32 on the way. Both are read by the prober of `fp8.probe`, and their
error over 4096 products is measured beside what the emulation of the accumulator found would err.
Where there is no FP8 matmul, the emulated Hopper is asked instead, and that is said.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import machine
from dsv3_tutorial.fp8.accumulate import HOPPER, HOPPER_PROMOTED, TensorCore, matmul_emulated
from dsv3_tutorial.fp8.probe import Chip, identify

NAME = "probe"
SIDE = 2048  # the dot product asked for is one element of a product this wide
K, ROWS = 4096, 64
INPUTS = {
    "positive": torch.rand,  # uniform in [0, 1)
    "half zero": lambda *shape, generator: torch.randn(*shape, generator=generator).relu(),
    "zero-mean": torch.randn,
}
Matmul = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reading:
    """What one matmul answered. core None: `problem` says why its answers fit no TensorCore.

    errors: of K = 4096 products, norm of the error over norm of the result, by kind of input;
    expected: the same by the emulation of `core`.
    """

    matmul: str
    core: TensorCore | None
    problem: str
    answers: tuple[float, ...]
    errors: dict[str, float]
    expected: dict[str, float]


class Recorder(Chip):
    """A chip that remembers what it answered."""

    def __init__(self, matmul: Matmul):
        super().__init__(matmul)
        self.answers: list[float] = []

    def dot(self, products) -> float:
        self.answers.append(super().dot(products))
        return self.answers[-1]


def main(argv: list[str] | None = None) -> int:
    """`probe`: read the FP8 matmul, print what it is, keep receipts where it is a GPU's."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial probe", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the receipts (default: data/measured)")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    options = parser.parse_args(argv)
    reason = why_not()
    readings = _emulated() if reason else [read(name, it) for name, it in _scaled_mms().items()]
    kept = None
    if not reason:
        kept = receipts.append(NAME, as_receipts(readings), folder=options.out)
    if options.json:
        rows = [asdict(reading) for reading in readings]
        print(json.dumps({"emulated": bool(reason), "reason": reason, "readings": rows}))
    else:
        print("\n".join([*lines(readings, reason), *([str(kept)] if kept else [])]))
    return 0


def why_not() -> str | None:
    """Why no FP8 matmul can be asked on this machine; None where one can."""
    if not torch.cuda.is_available():
        return "No CUDA GPU is here, and a CPU has no FP8 tensor core."
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 9):
        name = torch.cuda.get_device_name()
        return f"{name} is SM{major}{minor}; tensor cores multiply FP8 from SM89 on (Ada, Hopper)."
    try:
        scaled_mm(True)(torch.ones(1, 32), torch.ones(1, 32))
    except (RuntimeError, AttributeError) as error:
        first = str(error).strip().partition("\n")[0]
        return f"PyTorch {torch.__version__} does not multiply FP8 here: {first}"
    return None


def scaled_mm(fast: bool, side: int = SIDE, device: str = "cuda") -> Matmul:
    """PyTorch's FP8 product as a matmul(a (m, k), b (n, k)) of E4M3 values -> float32 (m, n).

    It wants a by rows, b by columns and sizes in sixteens. The operands are put into zeros, `side`
    rows each: a product this wide fills the GPU, and no library has cause to split k between
    processors, which would look like promotion.
    """

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        m, n, k = len(a), len(b), a.shape[1]
        rows = [max(side - len(x), -len(x) % 16) for x in (a, b)]  # of zeros, below each
        wide = [F.pad(x.to(device), (0, -k % 16, 0, more)) for x, more in zip((a, b), rows)]
        left, right = (x.to(torch.float8_e4m3fn) for x in wide)
        one = torch.ones((), device=device)
        out = torch._scaled_mm(
            left,
            right.t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.float32,
            use_fast_accum=fast,
        )
        return out[:m, :n].cpu()

    return matmul


def read(name: str, matmul: Matmul, emulated: bool = False) -> Reading:
    """Ask one matmul everything: its accumulator, its error, and what the emulation expects.

    `emulated` says that it is the emulation: what that would err is not worked out a second time.
    """
    chip = Recorder(matmul)
    core, problem = None, ""
    try:
        core = identify(chip)
    except ValueError as error:  # answers that no TensorCore gives
        problem = str(error)
    expected = {}
    if core is not None and not emulated:
        expected = sum_errors(lambda a, b: matmul_emulated(a, b, core))
    return Reading(name, core, problem, tuple(chip.answers), sum_errors(matmul), expected)


def sum_errors(matmul: Matmul) -> dict[str, float]:
    """The error of 4096-term sums: norm of the error over norm of the result, by kind of input."""
    return {kind: _error(matmul, *inputs(kind)) for kind in INPUTS}


def inputs(kind: str, k: int = K, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Random E4M3 values in float32, (rows, k) twice, of one kind of INPUTS."""
    a, b = (x.to(torch.float8_e4m3fn).float() for x in unrounded(kind, k, rows))
    return a, b


def unrounded(kind: str, k: int = K, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """The float32 values that `inputs` rounds to E4M3."""
    draw = torch.Generator().manual_seed(0)
    return INPUTS[kind](rows, k, generator=draw), INPUTS[kind](rows, k, generator=draw)


def _error(matmul: Matmul, a: Tensor, b: Tensor) -> float:
    exact = a.double() @ b.double().T
    return float((matmul(a, b).double() - exact).norm() / exact.norm())


def lines(readings: list[Reading], reason: str | None) -> list[str]:
    """What was found, in words."""
    text = [reason, "So the emulation is asked, which shows what the probe would find:"]
    text = text if reason else [f"{machine.here('cuda')['device']}, PyTorch {torch.__version__}"]
    for reading in readings:
        text += [reading.matmul, *(f"  {line}" for line in _found(reading))]
    return text


def _found(reading: Reading) -> list[str]:
    answers = ", ".join(f"{answer:.10g}" for answer in reading.answers)
    if reading.core is None:
        found = [f"no accumulator of ours answers so: {reading.problem}", f"answers: {answers}"]
    else:
        found = [*described(reading.core), f"{len(reading.answers)} probes; answers: {answers}"]
    for kind, error in reading.errors.items():
        beside = reading.expected.get(kind)
        emulated = "" if beside is None else f" (the emulation of this accumulator: {beside:.3%})"
        found.append(f"error of {K} products, {kind} inputs: {error:.3%}{emulated}")
    return found


def described(core: TensorCore) -> list[str]:
    """An accumulator in words, one property a line."""
    together = "together with" if core.joint else "before they meet"
    how = {"truncate": "cut off", "nearest": "rounded to nearest"}[core.rounding]
    often = "never" if core.promote is None else f"every {core.promote} products"
    width = f"{core.bits} fraction bits are kept"
    return [
        width + (", all that float32 can show" if core.bits == 23 else f"; the rest is {how}"),
        f"{core.group} products are summed at once, aligned {together} the running sum",
        f"promoted to float32: {often}",
    ]


def as_receipts(readings: list[Reading]) -> list[receipts.Receipt]:
    """For each matmul its width in bits, where it was found, and its error by kind of input."""
    facts = machine.here("cuda" if torch.cuda.is_available() else "cpu")
    kept = []
    for reading in readings:
        found = asdict(reading.core) if reading.core else {}
        asked = {"matmul": reading.matmul, "answers": list(reading.answers)}
        if found:
            shapes = asked | found
            kept.append(_receipt("accumulator", shapes, found["bits"], "fraction bits", facts))
        for kind, error in reading.errors.items():
            shapes = asked | {"inputs": kind, "k": K, "emulated": reading.expected.get(kind)}
            kept.append(_receipt("error of a long sum", shapes, error, "relative error", facts))
    return kept


def _receipt(what: str, shapes: dict, value: float, unit: str, facts: dict) -> receipts.Receipt:
    number = float(value)
    spread = {"min": number, "max": number}
    return receipts.Receipt(
        what=what, shapes=shapes, value=number, unit=unit, spread=spread, repeats=1, **facts
    )


def _scaled_mms() -> dict[str, Matmul]:
    return {f"scaled_mm, use_fast_accum={fast}": scaled_mm(fast) for fast in (True, False)}


def _emulated() -> list[Reading]:
    cores = {"Hopper, emulated": HOPPER, "Hopper, emulated, promoted": HOPPER_PROMOTED}
    return [
        read(name, lambda a, b, core=core: matmul_emulated(a, b, core), emulated=True)
        for name, core in cores.items()
    ]
