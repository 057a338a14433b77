"""A step's parts as every figure of lesson 6 draws them: a role's colour, a shade for each part."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from dsv3_tutorial.learn.figures.style import COMMUNICATION, COMPUTE, IDLE, INK, MEMORY

Colour = tuple[float, float, float]


def shade(colour: str, strength: float) -> Colour:
    """The colour mixed with white; 1 leaves it as it is."""
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(colour))
    return red, green, blue


PALE = 0.5  # one shade beside the full colour: a stored picture has 64 colours for all
COLOURS: dict[str, Colour] = {
    "products": shade(COMPUTE, 1),
    "attention": shade(COMPUTE, PALE),
    "memory traffic": shade(MEMORY, 1),
    "recomputation": shade(COMPUTE, PALE),
    "dispatch": shade(COMMUNICATION, 1),
    "combine": shade(COMMUNICATION, PALE),
    "tensor parallel": shade(COMMUNICATION, 1),
    "pipeline sends": shade(COMMUNICATION, PALE),
    "bubble": shade(IDLE, 1),
    "uneven stages": shade(IDLE, PALE),
    "gradients": shade(COMMUNICATION, 1),
    "optimizer": shade(MEMORY, PALE),
}


def stack(
    ax: Axes,
    lane: float,
    parts: Mapping[str, float],
    colours: Mapping[str, Colour | str],
    least: float,
    hatch: str = "",
) -> None:
    """Parts one after another in a lane; those of `least` or more are labelled, others below."""
    left, small = 0.0, []
    for name, size in parts.items():
        if not size:
            continue
        face = "white" if hatch else colours[name]
        edge = colours[name] if hatch else "white"
        ax.barh(lane, size, 0.52, left=left, color=face, edgecolor=edge, hatch=hatch)
        if size >= least:
            ink = INK if hatch or sum(to_rgb(face)) > 1.35 else "white"
            look = {"ha": "center", "va": "center", "fontsize": 10, "color": ink}
            back = {"facecolor": "white", "edgecolor": "none", "pad": 1.5} if hatch else None
            ax.text(left + size / 2, lane, f"{name}\n{size:.2f}", bbox=back, **look)
        else:
            small.append(f"{name} {size:.2f}")
        left += size
    if small:
        said = f"not labelled: {', '.join(small)}"
        ax.text(0, lane + 0.32, said, va="top", fontsize=9, color=INK)
