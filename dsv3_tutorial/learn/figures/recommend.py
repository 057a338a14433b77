"""What the authors ask of future hardware, as knobs: what each would buy.

ISCA sections 4.4 to 6: links between nodes that come near those inside, larger scale-up domains,
compression of what experts return in the network's own hardware, and lower latency.
"""

from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm_moe, limits, step_traffic, tiers
from dsv3_tutorial.cost.precision import SCALE_BYTES, TILE
from dsv3_tutorial.cost.step_traffic import Split
from dsv3_tutorial.cost.tiers import Network
from dsv3_tutorial.learn.figures.style import COMMUNICATION, IDLE, INK, figure, finish, note

DEVICES = 256  # that serve: a routed expert each
BF16_BITS = 16


@dataclass(frozen=True)
class Hardware:
    """A cluster like DeepSeek-V3's, but for four numbers. The defaults are today's H800.

    bandwidth_ratio: links inside over links across, those inside as they are. domain: GPUs of a
    node. bits: of a number on its way back from an expert, with a scale for every 128 below 16.
    latency_us: microseconds of each dispatch and combine. Raises ValueError for what cannot be.
    """

    bandwidth_ratio: float = 4.0
    domain: int = 8
    bits: int = BF16_BITS
    latency_us: float = 2.8

    def __post_init__(self) -> None:
        if not (self.bandwidth_ratio > 0 and self.bits > 0 and self.latency_us >= 0):
            raise ValueError(
                f"{self}: nothing would arrive. Give a ratio and bits above 0, and 0 us or more."
            )
        if self.domain < 1 or DEVICES % self.domain:
            raise ValueError(
                f"{DEVICES} GPUs in nodes of {self.domain}: the last node would hold fewer, and "
                f"they share the experts. Give a domain that divides {DEVICES}."
            )

    @property
    def network(self) -> Network:
        """Its two tiers."""
        today = tiers.network("h800")
        across = replace(today.across, bandwidth=today.inside.bandwidth / self.bandwidth_ratio)
        return replace(today, across=across, ranks_per_node=self.domain)

    @property
    def returned(self) -> float:
        """Bytes of a number on its way back from an expert."""
        return self.bits / 8 + (SCALE_BYTES / TILE if self.bits < BF16_BITS else 0)

    @property
    def decode(self) -> float:
        """Tokens/s of one sequence at most: each tier alone would allow so many, the lower counts.

        The bound of ISCA 2.3.2 with V3's exact sizes: 32 tokens a GPU, 9 copies (8 routed experts
        and the shared one), spread evenly over 256 GPUs and sent to each expert by itself.
        """
        base = limits.exact(limits.infiniband())
        layer = comm_moe.Layer(DEVICES, base.copies, base.hidden)
        return min(
            replace(
                base,
                bandwidth=getattr(self.network, tier).bandwidth,
                copies=copies,
                combine=self.returned,
                alpha=self.latency_us * 1e-6,
            ).tokens_per_second
            for tier, copies in comm_moe.copies(layer, DEVICES, self.network, "flat").items()
            if copies
        )

    @property
    def all_to_all(self) -> float:
        """Seconds a training step that V3's expert traffic keeps a GPU's slower tier busy."""
        widths, network = (comm_moe.FP8, self.returned), self.network
        sent = step_traffic.experts(ModelConfig.named("deepseek-v3"), network, Split(), widths)
        return max(n / getattr(network, tier).bandwidth for tier, n in sent.items())


TODAY = Hardware()


def future(
    bandwidth_ratio: float = TODAY.bandwidth_ratio,
    domain: int = TODAY.domain,
    bits: int = TODAY.bits,
    latency_us: float = TODAY.latency_us,
) -> Figure:
    """Decoding's bound and training's all-to-all on a cluster of these four, beside today's."""
    asked = Hardware(bandwidth_ratio, domain, bits, latency_us)
    fig, (left, right) = figure(10, 2.6, columns=2)
    for ax, quantity, unit in ((left, "decode", "tokens/s"), (right, "all_to_all", "s")):
        values = [getattr(one, quantity) for one in (TODAY, asked)]
        ax.barh([0, 1], values, 0.6, color=[IDLE, COMMUNICATION])
        for place, value in enumerate(values):
            look = {"va": "center", "fontsize": 11, "color": INK}
            ax.text(value, place, f" {value:,.3g} {unit}", **look)
        ax.set_xlim(0, max(values) * 1.5)
        ax.set_yticks([0, 1], ["today", "asked"])
        ax.set_ylim(1.6, -0.6)
        ax.grid(False, axis="y")
    finish(fig, left, "", "decoding at most, tokens/s of one sequence", "")
    finish(fig, right, "", "all-to-all of a training step, s", "")
    gains = asked.decode / TODAY.decode, TODAY.all_to_all / asked.all_to_all
    fig.suptitle(
        f"Decoding {gains[0]:.2f} times as fast, the all-to-all of training {gains[1]:.2f} times",
        **{"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"},
    )
    note(fig, "derived: bounds from bytes and latency alone; computation is free and balance even")
    return fig


def future_in_words(
    bandwidth_ratio: float = TODAY.bandwidth_ratio,
    domain: int = TODAY.domain,
    bits: int = TODAY.bits,
    latency_us: float = TODAY.latency_us,
) -> str:
    """What the four knobs make of both bounds, and which tier still decides decoding."""
    asked = Hardware(bandwidth_ratio, domain, bits, latency_us)
    across = asked.network.across.bandwidth / 1e9
    paper = limits.effective(limits.exact(limits.infiniband())).tokens_per_second
    free = replace(TODAY, latency_us=0.0).decode
    where = "all in one node" if domain == DEVICES else f"{DEVICES // domain} nodes of {domain}"
    return (
        f"{across:.4g} GB/s between nodes, {DEVICES} GPUs as {where}, {bits} bits back, "
        f"{latency_us:g} us: decoding at most {asked.decode:.1f} tokens/s (today "
        f"{TODAY.decode:.1f}), the all-to-all of a training step {asked.all_to_all:.2f} s "
        f"({TODAY.all_to_all:.2f}). The paper's {paper:.1f} at today's rate has no latency, and "
        f"all copies cross; here 1 in {DEVICES // TODAY.domain} stays in its node (alone: "
        f"{free:.1f})."
    )
