"""What the planner assumes: every efficiency and every price, by name, settable, with its source.

A share is of a published peak. The defaults are rates that others measured on kernels or parts;
none was chosen so that a training step comes out right. See `validation` for how far off that is.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from dsv3_tutorial.cost.layout import PlanError


@dataclass(frozen=True)
class Assumptions:
    """Shares of peaks, prices and what is left out, by name. Raises PlanError if impossible."""

    fp8_products: float = 0.566
    bf16_products: float = 0.665
    attention_forward: float = 0.51
    attention_backward: float = 0.422
    memory_bandwidth: float = 0.896
    links: float = 0.80
    communication_sms: float = 20 / 132
    expert_load: float = 1.02
    usable_memory: float = 0.90
    rent: float = 2.0
    power_share: float = 1.0
    pue: float = 1.0
    lost: float = 0.0
    mtp: float = 1.0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} = {getattr(self, name)!r} is not {said}"
            for name, (fits, said) in _LIMITS.items()
            if not _number(getattr(self, name)) or not fits(getattr(self, name))
        ]
        if wrong:
            raise PlanError(
                f"Assumptions that cannot be: {'; '.join(wrong)}. A time or a cost would have no "
                "meaning. Give a number within the limits."
            )

    @classmethod
    def parse(cls, pairs: Iterable[str]) -> "Assumptions":
        """The defaults, changed as NAME=VALUE says. Raises PlanError that lists the names."""
        values, wrong = {}, []
        known = {f.name for f in fields(cls)}
        for pair in pairs:
            name, equals, text = pair.partition("=")
            name = name.strip()
            if name not in known or not equals:
                wrong.append(f"{pair!r} is no NAME=VALUE with a name out of {sorted(known)}")
                continue
            try:
                values[name] = float(text)
            except ValueError:
                wrong.append(f"{name} = {text!r} is no number")
        if wrong:
            raise PlanError(
                f"Assumptions that cannot be read: {'; '.join(wrong)}. The plan would silently "
                "use another number. Write for example fp8_products=0.6."
            )
        return replace(cls(), **values)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _share(value: float) -> bool:
    return 0 < value <= 1


_SHARE = (_share, "a share above 0 and at most 1")
_LIMITS = {
    **dict.fromkeys(
        (
            *("fp8_products", "bf16_products", "attention_forward", "attention_backward"),
            *("memory_bandwidth", "links", "usable_memory", "power_share"),
        ),
        _SHARE,
    ),
    "communication_sms": (lambda v: 0 <= v < 1, "a share of at least 0 and below 1"),
    "expert_load": (lambda v: v >= 1, "1 or more"),
    "rent": (lambda v: 0 <= v <= 1e6, "from 0 to a million dollars an hour"),
    "pue": (lambda v: 1 <= v <= 100, "from 1 to 100"),
    "lost": (lambda v: 0 <= v < 1, "a share of at least 0 and below 1"),
    "mtp": (lambda v: v in (0, 1), "1 to train multi-token prediction or 0 not to"),
}
SOURCES: dict[str, tuple[str, str]] = {
    "fp8_products": (
        "calibrated",
        "DeepGEMM's rates on an H800 for V3's own products and their weight gradients, weighted "
        "by V3's FLOPs; the gradient of the input taken to be as fast as the output",
    ),
    "bf16_products": ("calibrated", "cuBLAS on an H100, two shapes; of the BF16 peak"),
    "attention_forward": (
        "calibrated",
        "FlashAttention 4 and TileLang on an H100, heads of 192 and 128, causal, 4,096 tokens",
    ),
    "attention_backward": (
        "calibrated",
        "FlashAttention 3 on an H100 at heads of 128, times what heads of 192 and 128 lose on a "
        "B200; FLOPs counted as 2.5 times the forward's",
    ),
    "memory_bandwidth": ("calibrated", "FlashMLA on an H800, bound by memory: 3,000 of 3,350 GB/s"),
    "links": (
        "calibrated",
        "160 of 200 and 40 of 50 GB/s on the H800 (ISCA section 4.3), for chips of which nobody "
        "says what is reached",
    ),
    "communication_sms": (
        "published",
        "20 of 132 SMs send while a pair is overlapped (V3 report, section 3.2.2); taken off all "
        "computing",
    ),
    "expert_load": (
        "assumed",
        "the busiest GPU's load over the mean: 1 + MaxVio 0.04 (bias balancing, a 1B model) over "
        "the square root of 4 experts a GPU",
    ),
    "usable_memory": ("assumed", "the rest is left to the runtime, buffers and fragments"),
    "rent": ("published", "2 dollars a GPU hour, an assumption of the V3 report's table 1"),
    "power_share": ("assumed", "of the chip's rated power, drawn on average; 1 is the upper limit"),
    "pue": (
        "assumed",
        "power of the whole centre over that of its GPUs; hosts, network and cooling",
    ),
    "lost": ("assumed", "share of the time lost to restarts; V3's report tells of no rollback"),
    "mtp": ("published", "V3 trains one module (V3 report, section 2.2); 0 leaves it out"),
}
