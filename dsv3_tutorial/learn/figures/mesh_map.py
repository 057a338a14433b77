"""Who sends how much over which wire in one step, for V3's layout and for others."""

from dataclasses import replace

from matplotlib.figure import Figure

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import tiers
from dsv3_tutorial.cost.step_traffic import Split, Traffic, traffic
from dsv3_tutorial.cost.tiers import Network
from dsv3_tutorial.learn.figures.style import COMMUNICATION, INK, MEMORY, figure, finish, note

TITLES = {
    "tensor": "tensor parallel\n(activations in layers)",
    "experts": "experts\n(tokens, there and back)",
    "stages": "pipeline stages\n(activations between)",
    "gradients": "data parallel\n(gradients, weights)",
}


def found(split: Split, chip: str = "h800") -> list[Traffic]:
    """V3's traffic in a layout, on a chip's network."""
    return traffic(ModelConfig.named("deepseek-v3"), whole_nodes(chip), split)


def whole_nodes(chip: str) -> Network:
    """A chip's network, of each node as many GPUs as groups of 2, 4, 8, ... fill: 64 of NVL72's 72.

    Otherwise no group of the report's sizes would end where a node does.
    """
    network = tiers.network(chip)
    return replace(network, ranks_per_node=1 << (network.ranks_per_node.bit_length() - 1))


def hungriest() -> str:
    """What keeps an H800's links busy longest in V3's own layout."""
    return max(found(Split()), key=lambda kind: kind.seconds).name


def traffic_table() -> None:
    """Print V3's traffic a step and GPU in the report's layout, and tensor parallelism's if any."""
    step = paper.row("step_time.mpft.step").value
    print("DeepSeek-V3 on 2,048 H800, bytes sent by each GPU in one step, derived")
    print(f"{'':22}{'ranks':>6}{'nodes':>6}{'inside':>11}{'across':>11}{'links busy':>12}")
    for kind in found(Split()):
        _row(kind.name, kind)
    print("the same GPUs with tensor parallelism of 8, and 16 replicas instead of 128:")
    for kind in found(Split(dp=16, ep=16, tp=8)):
        _row(kind.name, kind)
    print(f"the step takes {step:.1f} s (ISCA table 4); nothing overlaps in this count")


def _row(name: str, kind: Traffic) -> None:
    inside, across = kind.inside / 1e9, kind.across / 1e9
    ranks = f"{kind.ranks:>6}{kind.nodes:>6}"
    print(f"  {name:20}{ranks}{inside:>8,.1f} GB{across:>8,.1f} GB{kind.seconds:>10.2f} s")


def placement(pp: int = 16, dp: int = 128, ep: int = 64, tp: int = 1, chip: str = "h800") -> Figure:
    """Seconds that each kind of traffic keeps a GPU's links busy in a step of V3, by tier."""
    split, network = Split(pp, dp, ep, tp), whole_nodes(chip)
    kinds = found(split, chip)
    fig, ax = figure(10, 3.8)
    for place, kind in enumerate(kinds):
        inside = kind.inside / network.inside.bandwidth
        across = kind.across / network.across.bandwidth
        ax.barh(place - 0.2, inside, 0.36, color=COMMUNICATION)
        ax.barh(place + 0.2, across, 0.36, color=MEMORY)
        for shift, seconds, sent in ((-0.2, inside, kind.inside), (0.2, across, kind.across)):
            if sent:
                said = f" {sent / 1e9:,.1f} GB"
                ax.text(seconds, place + shift, said, va="center", fontsize=9, color=INK)
    ax.barh(0, 0, color=COMMUNICATION, label=f"inside: {network.inside.name}")
    ax.barh(0, 0, color=MEMORY, label=f"across: {network.across.name}")
    ax.set_yticks(range(len(kinds)), [TITLES[kind.name] for kind in kinds])
    ax.set_ylim(len(kinds) - 0.4, -0.6)
    longest = max(max(k.inside / network.inside.bandwidth, k.seconds) for k in kinds)
    ax.set_xlim(0, longest * 1.18 or 1)
    worst = max(kinds, key=lambda kind: kind.seconds)
    nodes = f"over {worst.nodes} nodes" if worst.nodes > 1 else "inside a node"
    subject = "Tensor parallelism" if worst.name == "tensor" else worst.name.capitalize()
    title = f"{subject} {nodes}: the links are busy for {worst.seconds:.1f} s a step"
    used = f"{network.ranks_per_node} GPUs a node"
    layout = f"PP {pp} x DP {dp} x TP {tp}, EP {ep}"
    note(fig, f"derived: {split.gpus:,} GPUs, {used}, {layout}; no overlap")
    return finish(fig, ax, title, "seconds a step and GPU, each tier alone", "")


def placement_in_words(
    pp: int = 16, dp: int = 128, ep: int = 64, tp: int = 1, chip: str = "h800"
) -> str:
    """Where each group lies and which wire takes longest, in words."""
    split, title = Split(pp, dp, ep, tp), hardware.chip(chip).title
    kinds = found(split, chip)
    said = ", ".join(
        f"{kind.name} {kind.ranks} ranks on {kind.nodes} node{'s' if kind.nodes > 1 else ''} "
        f"{kind.seconds:.2f} s"
        for kind in kinds
        if kind.ranks > 1
    )
    return f"{split.gpus:,} GPUs ({title}): {said}."
