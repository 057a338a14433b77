"""DeepSeek-V3 on devices of your choice: what fits, what a step waits for, what a user sees."""

from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import speculation, storage
from dsv3_tutorial.cost.deployment import USABLE, Deployment
from dsv3_tutorial.hardware import Chip
from dsv3_tutorial.learn.figures.bill import EXPERTS, OTHERS
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

GRID = {
    "device": ["h800", "h20", "h200", "b200", "gb200-nvl72"],
    "devices": [1, 8, 16, 32, 72, 144],
    "weights": ["bf16", "fp8", "int4"],
    "cache": ["bf16", "fp8"],
    "context": [4096, 32768, 131072],
    "batch": [1, 32, 128, 1024, 4096, 16384],
    "drafts": [0, 1, 2],
}
START = {
    "device": "h800",
    "devices": 8,
    "weights": "fp8",
    "cache": "bf16",
    "context": 32768,
    "batch": 32,
    "drafts": 0,
}
TIMES = {"bandwidth": MEMORY, "compute": COMPUTE, "network": COMMUNICATION}


def placed(
    device: str, devices: int, weights: str, cache: str, context: int, batch: int, drafts: int
) -> Deployment:
    """V3 there. Links carry what an H800's reach of their peak; cards without one get InfiniBand.

    `drafts` tokens are verified with each new one; making them costs memory for the module alone.
    """
    chip = reached(hardware.chip(device))
    return Deployment(
        *(ModelConfig.named("deepseek-v3"), chip, devices, weights, cache, context, batch),
        queries=drafts + 1,
        mtp=drafts > 0,
    )


def acceptance() -> float:
    """Share of drafts kept: the least that V3's report says of its second token."""
    return paper.row("serving.mtp_acceptance_low").value / 100


def per_user(one: Deployment) -> float:
    """Tokens a second that one conversation sees at most."""
    return one.per_user * speculation.tokens_per_pass(acceptance(), one.queries - 1)


def deployment(
    device: str = "h800",
    devices: int = 8,
    weights: str = "fp8",
    cache: str = "bf16",
    context: int = 32768,
    batch: int = 32,
    drafts: int = 0,
) -> Figure:
    """Memory of the fullest device, and the time of a step by each limit."""
    one = placed(device, devices, weights, cache, context, batch, drafts)
    fig, (left, right) = figure(11, 3.4, columns=2)
    _memory(left, one)
    _times(right, one)
    finish(fig, left, "", "GB on the fullest device", "", legend=False)
    finish(fig, right, "", "ms of a step that each limit alone takes", "")
    left.legend(loc="upper left", ncols=3, fontsize=10, frameon=False)
    title = {"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"}
    fig.suptitle(_finding(one), **title)
    note(fig, "derived: a bound; even loads, perfect overlap, no latency, drafting free")
    return fig


def deployment_in_words(
    device: str = "h800",
    devices: int = 8,
    weights: str = "fp8",
    cache: str = "bf16",
    context: int = 32768,
    batch: int = 32,
    drafts: int = 0,
) -> str:
    """What lies on a device, how many conversations fit, and what each limit takes."""
    one = placed(device, devices, weights, cache, context, batch, drafts)
    times = ", ".join(f"{way} {seconds * 1e3:.3g} ms" for way, seconds in one.times.items())
    room = USABLE * one.chip.memory_bytes
    said = (
        f"{_finding(one)}. The fullest device holds {one.weight_bytes / 1e9:.1f} GB of weights and "
        f"{one.cache_bytes / 1e9:.1f} GB of cache; {room / 1e9:.1f} GB are for both. Of such "
        f"conversations {one.max_batch:,} fit. A step takes at least: {times}."
    )
    if drafts:
        tokens = speculation.tokens_per_pass(acceptance(), drafts)
        said += f" It gives {tokens:.2f} tokens, if {acceptance():.0%} of the drafts are kept."
    if devices > 1:
        everywhere = one.weight_bytes - _routed(one)
        said += (
            " Routed experts and conversations are dealt out evenly; everything else "
            f"({everywhere / 1e9:.0f} GB) lies on every device; "
            f"{1 - USABLE:.0%} of memory is left to the runtime."
        )
        inside, beyond = one.chip.scale_up, one.chip.scale_out
        if one.devices <= (inside.domain or 1):
            said += f" Links carry {inside.effective / 1e9:.0f} GB/s a device."
        else:
            said += f" Links carry {inside.effective / 1e9:.0f} GB/s a device inside a node of "
            said += f"{inside.domain or 1}, {beyond.effective / 1e9:.0f} beyond."
    return said


def _finding(one: Deployment) -> str:
    who = f"{one.devices} {_name(one.chip)}"
    if not one.fits:
        lacking = one.weight_bytes + one.cache_bytes - USABLE * one.chip.memory_bytes
        return f"{who}: {lacking / 1e9:,.1f} GB too much on the fullest device"
    user = per_user(one)
    each = user * one.batch / one.devices
    rates = f"{_short(user)} tokens/s a user, {_short(each)} a device"
    return f"{who}: at most {rates}; {one.limit} binds"


def _memory(ax: Axes, one: Deployment) -> None:
    """What lies on the fullest device, and the line that it may fill."""
    room = USABLE * one.chip.memory_bytes
    routed = _routed(one)
    parts = {
        "routed experts": (routed, EXPERTS),
        "all other weights": (one.weight_bytes - routed, OTHERS),
        "cache": (one.cache_bytes, MEMORY),
        "free": (max(0.0, room - one.weight_bytes - one.cache_bytes), IDLE),
    }
    left = 0.0
    for name, (size, colour) in parts.items():
        ax.barh(0, size / 1e9, 0.5, left=left / 1e9, color=colour, label=name)
        left += size
    label = f"{USABLE:.0%} of its memory"
    ax.vlines(room / 1e9, -0.4, 0.4, color=INK, linewidth=2.5, label=label)
    ax.set_xlim(0, 1.1 * max(left, room) / 1e9)
    ax.set_yticks([])
    ax.set_ylim(-0.4, 0.9)
    ax.grid(False, axis="y")


def _routed(one: Deployment) -> float:
    """Bytes of a device's even share of the routed experts."""
    return storage.held_bytes(one.cfg, one.weights, one.mtp)["routed experts"] / one.devices


def _times(ax: Axes, one: Deployment) -> None:
    """A bar for each limit, pale where nothing runs because it does not fit."""
    values = [one.times[way] * 1e3 for way in TIMES]
    alpha = 1.0 if one.fits else 0.3
    bars = ax.barh(range(len(TIMES)), values, 0.6, color=list(TIMES.values()), alpha=alpha)
    ax.bar_label(bars, [f"{value:,.3g}" for value in values], padding=4, fontsize=11)
    ax.set_yticks(range(len(TIMES)), list(TIMES))
    if one.fits:
        ax.get_yticklabels()[list(TIMES).index(one.limit)].set_fontweight("bold")
    ax.set_xlim(0, 1.2 * max(values))
    ax.set_ylim(len(TIMES) - 0.4, -0.6)
    ax.grid(False, axis="y")


def _short(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:,.0f}"


def _name(chip: Chip) -> str:
    return chip.title.removeprefix("NVIDIA ").split()[0]


def reached(chip: Chip) -> Chip:
    """The chip with links that carry what an H800's reach of their peak, and InfiniBand if none."""
    known = hardware.chip("h800")
    links = {}
    for name in ("scale_up", "scale_out"):
        own, like = getattr(chip, name), getattr(known, name)
        peak = own.bandwidth or like.bandwidth
        effective = peak * like.effective / like.bandwidth
        links[name] = replace(own, bandwidth=peak, effective=effective)
    return replace(chip, **links)
