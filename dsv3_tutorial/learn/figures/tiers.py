"""Bandwidths from registers to Ethernet, drawn to one scale.

Registers and shared memory are derived from the chip's FP32 rate: a multiply-add reads three
numbers, and each SM reads 128 bytes of shared memory in the clock in which it does 128 of them. No
bandwidth of the L2 cache is published, so it is left out.
"""

from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsv3_tutorial import hardware
from dsv3_tutorial.learn.figures.style import COMMUNICATION, COMPUTE, INK, MEMORY, figure, note

ETHERNET = 25e9 / 8  # a 25 Gb/s port, the usual one of a server without a cluster's network


class Wire(NamedTuple):
    """One place that a GPU's numbers come from. bandwidth: bytes/s, one direction."""

    name: str
    bandwidth: float
    colour: str


def wires() -> list[Wire]:
    """From the fastest to the slowest, for an H800; the H100's NVLink beside its own."""
    chip, whole = hardware.chip("h800"), hardware.chip("h100-sxm")
    clocked = chip.rate("fp32") / 2  # multiply-adds a second
    return [
        Wire("registers", 12 * clocked, COMPUTE),
        Wire("shared memory", clocked, COMPUTE),
        Wire("HBM", chip.bandwidth(), MEMORY),
        Wire("NVLink of an H100", whole.scale_up.bandwidth, COMMUNICATION),
        Wire("NVLink of an H800", chip.scale_up.effective, COMMUNICATION),
        Wire("InfiniBand", chip.scale_out.effective, COMMUNICATION),
        Wire("Ethernet, 25 Gb/s", ETHERNET, COMMUNICATION),
    ]


def bandwidths() -> Figure:
    """Squares side by side, each one's area its bandwidth; the smallest are drawn, and seen."""
    found = wires()
    fig, ax = figure(10, 4.0)
    unit, left = found[0].bandwidth ** 0.5, 0.0
    for index, wire in enumerate(found):
        side, first = wire.bandwidth**0.5 / unit, index == 0
        ax.add_patch(Rectangle((left, 0), side, side, color=wire.colour, linewidth=0))
        place = {"ha": "center", "va": "center" if first else "bottom", "fontsize": 10}
        said = f"{wire.name.replace(' of', chr(10) + 'of').replace(', ', chr(10))}"
        colour = "white" if first else INK
        height = 0.5 if first else side + 0.03
        ax.text(left + side / 2, height, f"{said}\n{_size(wire.bandwidth)}", color=colour, **place)
        left += side + (0.1 if index == 0 else 0.24)
    ax.set(xlim=(-0.01, left), ylim=(-0.02, 1.02), aspect="equal")
    ax.axis("off")
    ratio = found[0].bandwidth / found[-2].bandwidth
    fig.suptitle(
        f"What the registers deliver is {ratio:,.0f} times what InfiniBand does (areas to scale)",
        **{"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"},
    )
    note(
        fig,
        "H800, one direction; derived from its FP32 rate: registers, shared memory; data sheets: "
        "HBM,\nthe H100's NVLink; as reached (ISCA section 4.3): NVLink, InfiniBand; "
        "line rate: Ethernet",
    )
    return fig


def _size(bandwidth: float) -> str:
    if bandwidth >= 1e12:
        return f"{bandwidth / 1e12:.3g} TB/s"
    return f"{bandwidth / 1e9:.3g} GB/s"
