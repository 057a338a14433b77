"""Who sends how much over which wire in one step, and what a GPU holds, for V3's layout and others.

Rates are those that are reached: the H800's as its papers say, and of a chip of which nobody says
it the same share of the line rate, so that layouts and not data sheets are compared.
"""

from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import step_memory, step_traffic, tiers
from dsv3_tutorial.cost.step_memory import Held
from dsv3_tutorial.cost.step_traffic import Split, Traffic, traffic
from dsv3_tutorial.cost.tiers import Network
from dsv3_tutorial.learn.figures.style import (
    COMMUNICATION,
    COMPUTE,
    IDLE,
    INK,
    MEMORY,
    figure,
    finish,
    note,
)

TITLES = {
    "experts": "experts\n(tokens, there and back)",
    "stages": "pipeline stages\n(activations between)",
    "gradients": "data parallel\n(gradients, weights)",
    "tensor": "tensor parallel\n(activations in layers)",
}
KEPT = {
    "weights": ("#56B4E9", "weights, BF16"),
    "gradients": (COMPUTE, "gradients, float32"),
    "optimizer": ("#CC79A7", "optimizer, ZeRO-1"),
    "activations": (IDLE, "activations, FP8 (estimate)"),
}


def found(split: Split, chip: str = "h800") -> list[Traffic]:
    """V3's traffic in a layout, on a chip's network: experts, stages, gradients, tensor."""
    kinds = traffic(ModelConfig.named("deepseek-v3"), whole_nodes(chip), split)
    return sorted(kinds, key=lambda kind: list(TITLES).index(kind.name))


def held(split: Split) -> Held:
    """What a GPU holds of V3 in a layout."""
    return step_memory.held(ModelConfig.named("deepseek-v3"), split)


def fits(split: Split, chip: str = "h800") -> bool:
    """Whether a chip's memory holds that."""
    return held(split).total <= hardware.chip(chip).memory_bytes


def reached_share(tier: str) -> float:
    """What an H800's links of a tier ("scale_up", "scale_out") reach of their line rate."""
    link = getattr(hardware.chip("h800"), tier)
    return link.effective / link.bandwidth


def whole_nodes(chip: str) -> Network:
    """A chip's network at the rates that are reached, of nodes that hold 2, 4, 8, ... GPUs.

    So 64 of NVL72's 72 are used: otherwise no group of the report's sizes would end where a node
    does.
    """
    network, links = tiers.network(chip), hardware.chip(chip)
    inside, across = (
        1.0 if getattr(links, tier).effective else 1 / reached_share(tier)
        for tier in ("scale_up", "scale_out")
    )
    per_node = 1 << (network.ranks_per_node.bit_length() - 1)
    return replace(network.slower(inside, across), ranks_per_node=per_node)


def hungriest() -> str:
    """What keeps an H800's links busy longest in V3's own layout."""
    return max(found(Split()), key=lambda kind: kind.seconds).name


def groups(
    tp: int = 8, dp: int = 16, ep: int = 16, pp: int = 16
) -> tuple[dict[str, int], dict[str, float]]:
    """GPUs and bytes a GPU sends a step, by group of V3, wherever the groups will lie.

    So of a token one copy for each rank that has one of its experts: what a node would share is
    known once groups are placed. Groups of one GPU are left out.
    """
    cfg, split = ModelConfig.named("deepseek-v3"), Split(pp, dp, ep, tp)
    apart = replace(whole_nodes("h800"), ranks_per_node=1)
    sizes = {"tp": (tp, step_traffic.tensor), "ep": (ep, step_traffic.experts)}
    sizes["pp"] = (pp, step_traffic.stages)
    sizes = {name: one for name, one in sizes.items() if one[0] > 1}
    sent = {name: sum(of(cfg, apart, split).values()) for name, (_, of) in sizes.items()}
    return {name: size for name, (size, _) in sizes.items()}, sent


def traffic_table() -> None:
    """Print V3's traffic a step and GPU in the report's layout, and tensor parallelism's if any."""
    step, network = paper.row("step_time.mpft.step").value, whole_nodes("h800")
    print("DeepSeek-V3 on 2,048 H800, bytes sent by each GPU in one step, derived")
    print(f"{'':22}{'ranks':>6}{'nodes':>6}{'inside':>11}{'across':>11}{'links busy':>12}")
    _rows(Split())
    print("the same GPUs and experts with tensor parallelism of 8, so 16 replicas instead of 128:")
    _rows(Split(dp=16, tp=8))
    rates = " and ".join(f"{tier.bandwidth / 1e9:g}" for tier in (network.inside, network.across))
    print(f"links busy: the slower of both tiers, {rates} GB/s (gradients: both in turn)")
    print("DualPipe's two stages on each GPU are in gradients, weights and activations")
    print(f"the step takes {step:.1f} s (ISCA table 4); nothing overlaps in this count")


def _rows(split: Split) -> None:
    """Those that send, the busiest first, and what a GPU holds."""
    for kind in sorted(found(split), key=lambda kind: -kind.seconds):
        if kind.seconds:
            inside, across = kind.inside / 1e9, kind.across / 1e9
            ranks = f"{kind.ranks:>6}{kind.nodes:>6}"
            sent = f"{inside:>8,.1f} GB{across:>8,.1f} GB"
            print(f"  {kind.name:20}{ranks}{sent}{kind.seconds:>10.2f} s")
    print(f"  {_kept(held(split))}")


def _kept(one: Held) -> str:
    parts = ", ".join(f"{name} {getattr(one, name) / 1e9:.1f}" for name in KEPT)
    return f"a GPU holds {one.total / 1e9:.1f} GB: {parts}"


def placement(pp: int = 16, dp: int = 128, ep: int = 64, tp: int = 1, chip: str = "h800") -> Figure:
    """Seconds that each kind of traffic keeps a GPU's links busy in a step of V3, and GB held."""
    split, network = Split(pp, dp, ep, tp), whole_nodes(chip)
    fig, (above, below) = figure(10, 5.2, rows=2)
    above.get_gridspec().set_height_ratios([4, 1])
    _links(above, found(split, chip), network)
    _memory(below, held(split), hardware.chip(chip).memory_bytes)
    fig.suptitle(
        f"{_busiest(split, chip)}\n{_room(split, chip)}",
        **{"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"},
    )
    note(fig, f"derived: {split.gpus:,} GPUs, {_node(chip)}, PP {pp} x DP {dp} x TP {tp}, EP {ep}; "
         f"no overlap.\n{_rates(chip)}; DualPipe: weights and gradients twice")  # fmt: skip
    return fig


def _links(ax: Axes, kinds: list[Traffic], network: Network) -> None:
    """Two bars a kind: its bytes inside and across, each over that tier's rate."""
    rates = network.inside.bandwidth, network.across.bandwidth
    for place, kind in enumerate(kinds):
        inside, across = kind.inside / rates[0], kind.across / rates[1]
        ax.barh(place - 0.2, inside, 0.36, color=COMMUNICATION)
        ax.barh(place + 0.2, across, 0.36, color=MEMORY)
        for shift, seconds, sent in ((-0.2, inside, kind.inside), (0.2, across, kind.across)):
            if sent:
                said = f" {sent / 1e9:,.1f} GB"
                ax.text(seconds, place + shift, said, va="center", fontsize=9, color=INK)
    inside, across = (f"{rate / 1e9:g} GB/s" for rate in rates)
    ax.barh(0, 0, color=COMMUNICATION, label=f"inside: {network.inside.name}, {inside}")
    ax.barh(0, 0, color=MEMORY, label=f"across: {network.across.name}, {across}")
    ax.set_yticks(range(len(kinds)), [TITLES[kind.name] for kind in kinds])
    ax.set_ylim(len(kinds) - 0.4, -0.6)
    longest = max(max(k.inside / rates[0], k.seconds) for k in kinds)
    ax.set_xlim(0, longest * 1.18 or 1)
    finish(ax.figure, ax, "", "seconds a step and GPU, each tier alone", "")


def _memory(ax: Axes, one: Held, room: float) -> None:
    """One bar of what a GPU holds, and a line at what its memory has."""
    left = 0.0
    for name, (colour, label) in KEPT.items():
        size = getattr(one, name) / 1e9
        ax.barh(0, size, 0.6, left, color=colour, label=label)
        left += size
    ax.axvline(room / 1e9, color=INK, linewidth=2)
    said = f" {left:,.1f} GB" if one.total <= room else f" {left:,.1f} GB: does not fit"
    ax.text(left, 0, said, va="center", fontsize=9, color=INK)
    ax.set_xlim(0, 1.27 * max(left, room / 1e9))
    ax.set_ylim(-0.5, 0.5)
    ax.set_yticks([0], ["held by a GPU"])
    ax.grid(False, axis="y")
    finish(ax.figure, ax, "", f"GB; the line: {room / 1e9:g} GB of memory", "", legend=False)
    place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 0.95)}
    ax.legend(fontsize=9, frameon=False, ncols=4, columnspacing=1.2, **place)


def _busiest(split: Split, chip: str) -> str:
    worst = max(found(split, chip), key=lambda kind: kind.seconds)
    kind = "node" if _whole(chip) else "rack"
    nodes = f"over {worst.nodes} {kind}s" if worst.nodes > 1 else f"inside a {kind}"
    subject = "Tensor parallelism" if worst.name == "tensor" else worst.name.capitalize()
    return f"{subject} {nodes}: the links are busy for {worst.seconds:.1f} s a step"


def _room(split: Split, chip: str) -> str:
    """Whether a GPU can hold its part, with both numbers."""
    needed, room = held(split).total / 1e9, hardware.chip(chip).memory_bytes / 1e9
    verdict = "It fits" if fits(split, chip) else "It does not fit"
    return f"{verdict}: a GPU has {room:g} GB and would hold {needed:,.1f}"


def _node(chip: str) -> str:
    used, there = (found(chip).ranks_per_node for found in (whole_nodes, tiers.network))
    return f"{used} GPUs a node" if _whole(chip) else f"{used} of a rack's {there}"


def _whole(chip: str) -> bool:
    """Whether all GPUs of a node are used: of a rack of 72 they are not."""
    return whole_nodes(chip).ranks_per_node == tiers.network(chip).ranks_per_node


def _rates(chip: str) -> str:
    share = reached_share("scale_out")
    if hardware.chip(chip).scale_out.effective:
        return f"rates as reached, {share:.0%} of line rate"
    return f"rates: {share:.0%} of line rate, as on the H800"


def placement_in_words(
    pp: int = 16, dp: int = 128, ep: int = 64, tp: int = 1, chip: str = "h800"
) -> str:
    """Where each group lies, which wire takes longest, and whether memory suffices, in words."""
    split, title = Split(pp, dp, ep, tp), hardware.chip(chip).title
    said = ", ".join(
        f"{kind.name} {kind.ranks} ranks on {kind.nodes} node{'s' if kind.nodes > 1 else ''} "
        f"{kind.seconds:.2f} s"
        for kind in found(split, chip)
        if kind.seconds
    )
    state = held(split).state / 1e9
    return (
        f"{split.gpus:,} GPUs ({title}; {_node(chip)}): {said}. {_room(split, chip)} "
        f"({state:,.1f} without activations)."
    )
