"""How fast a token can come out when experts lie on other devices: communication alone decides.

ISCA section 2.3.2: a device works on few tokens, each of which goes to its experts and back in
every layer, and two micro-batches take turns so that computation hides behind communication. No
latency, no imbalance and free computation, unless given: a bound, not a forecast.
"""

from dataclasses import dataclass, replace

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.comm_moe import FP8
from dsv3_tutorial.hardware import chip


@dataclass(frozen=True)
class Decode:
    """What the bound is computed from; the defaults are the paper's, 7000 for "7K" included.

    bandwidth: bytes/s of a device, one direction. dispatch, combine: bytes an element. alpha:
    seconds that each dispatch and each combine takes beside its bytes. computation: seconds of one
    micro-batch and layer, hidden as far as communication is longer. experts_per_device: above 1 a
    device has so many times the tokens, as each of its experts is kept as busy as one alone is.
    """

    bandwidth: float = 50e9
    tokens: int = 32
    copies: int = 9
    hidden: int = 7000
    layers: int = 61
    dispatch: float = 1.0
    combine: float = 2.0
    alpha: float = 0.0
    computation: float = 0.0
    experts_per_device: float = 1.0
    micro_batches: int = 2

    def __post_init__(self) -> None:
        counts = ("tokens", "copies", "hidden", "layers", "experts_per_device", "micro_batches")
        wrong = [n for n in ("bandwidth", *counts) if not getattr(self, n) > 0]
        sizes = ("dispatch", "combine", "alpha", "computation")
        wrong += [n for n in sizes if not getattr(self, n) >= 0]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: no token comes out with these values. Give what is counted "
                "above 0, and times and sizes of 0 or more."
            )

    @property
    def communication(self) -> float:
        """Seconds of one micro-batch's dispatch and combine in one layer."""
        elements = self.tokens * self.copies * self.hidden * self.experts_per_device
        return elements * (self.dispatch + self.combine) / self.bandwidth + 2 * self.alpha

    @property
    def layer(self) -> float:
        """Seconds of one layer: micro-batches take turns on the link, and compute meanwhile."""
        return self.micro_batches * max(self.communication, self.computation)

    @property
    def per_token(self) -> float:
        """Seconds from one output token to the next (TPOT)."""
        return self.layers * self.layer

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of one sequence in a second."""
        return 1 / self.per_token


def infiniband() -> Decode:
    """The paper's first case: 400 Gb/s InfiniBand at its full 50 GB/s. 14.76 ms a token."""
    return Decode(bandwidth=_gigabytes("network.infiniband_bandwidth"))


def nvl72() -> Decode:
    """The paper's second: GB200 NVL72 at 900 GB/s. 0.82 ms a token.

    A rack has 72 devices for 257 experts. 32 tokens on each still give this bound; experts as busy
    as with one a device ask for `experts_per_device` = 257 / 72, and then it is 2.9 ms.
    """
    return Decode(bandwidth=chip("gb200-nvl72").scale_up.bandwidth)


def exact(bound: Decode) -> Decode:
    """The same with the model's 7168 channels, and the scales that FP8 carries along."""
    cfg = ModelConfig.named("deepseek-v3")
    return replace(bound, hidden=cfg.hidden_size, layers=cfg.num_hidden_layers, dispatch=FP8)


def effective(bound: Decode) -> Decode:
    """The same at the 40 GB/s that the paper itself calls effective elsewhere (section 4.3)."""
    return replace(bound, bandwidth=_gigabytes("network.infiniband_effective"))


def _gigabytes(id: str) -> float:
    return paper.row(id).value * 1e9
