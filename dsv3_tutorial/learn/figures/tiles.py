"""Whose outlier spoils whom: one scale for a tensor, a block or a tile, in E4M3 and in INT8.

Errors are relative and of second order: the norm of what changed over the norm of what was there.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_tutorial.fp8 import quant
from dsv3_tutorial.fp8.errors import relative_error
from dsv3_tutorial.learn.figures.style import IDLE, INK, figure, finish, note, plain_log, series

SCALES = ("tensor", "block", "tile")
SCALE_LOOK = {scale: series(index) for index, scale in enumerate(SCALES)}
CASES = (("e4m3", "tensor"), ("e4m3", "tile"), ("int8", "tensor"), ("int8", "tile"))
CASE_LOOK = dict(zip(CASES, (series(index) for index in (0, 2, 1, 3)), strict=True))
INT8_MAX = 127
ROWS, COLUMNS = 64, 4096
AT = (17, 1000)  # where the outlier stands
OUTLIERS = (1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
LOST = 0.5  # a token is lost that is wrong by over a half
DRAWS, TOKENS, WIDTH = 4, 1024, 512


def restored(x: Tensor, fmt: str = "e4m3", scale: str = "tile") -> Tensor:
    """What a float32 matrix comes back as, stored in eight bits with one scale a part.

    x (m, n) -> (m, n). E4M3 is the package's; INT8 lays a part's largest on 127.
    """
    if fmt not in ("e4m3", "int8") or scale not in SCALES:
        raise ValueError(
            f"{fmt!r} with a scale for each {scale!r} is not known, so nothing can be stored. "
            f"Take e4m3 or int8, and one of {', '.join(SCALES)}."
        )
    if fmt == "e4m3":
        return _restored_e4m3(x, scale)
    each = _largest(x, scale).clamp_min(torch.finfo(x.dtype).tiny) / INT8_MAX
    return (x / each).round() * each


def _restored_e4m3(x: Tensor, scale: str) -> Tensor:
    if scale == "tile":
        return quant.dequantize_tiles(*quant.quantize_tiles(x))
    if scale == "block":
        return quant.dequantize_blocks(*quant.quantize_blocks(x))
    stored, factor = quant.quantize_tensor(x)
    return stored.float() * factor


def _largest(x: Tensor, scale: str) -> Tensor:
    """Each value's part's largest magnitude (m, n), by whole parts of 128: m, n multiples of it."""
    rows = {"tensor": len(x), "block": min(len(x), quant.TILE), "tile": 1}[scale]
    columns = x.shape[1] if scale == "tensor" else quant.TILE
    parts = x.abs().view(len(x) // rows, rows, -1, columns)
    return parts.amax(dim=(1, 3), keepdim=True).expand_as(parts).reshape(x.shape)


@cache
def with_outlier(outlier: float) -> Tensor:
    """N(0, 1), (64, 4096) float32, the same each time, with one value that stands out."""
    drawn = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    x = torch.from_numpy(drawn)
    x[AT] = outlier
    return x


@cache
def others_error(outlier: float, fmt: str, scale: str, own_tile: bool = False) -> float:
    """The relative error of all values but the outlier, or of those of its own tile."""
    x = with_outlier(outlier)
    back = restored(x, fmt, scale)
    row, column = AT
    rest = torch.full_like(x, not own_tile, dtype=torch.bool)
    if own_tile:
        begin = column - column % quant.TILE
        rest[row, begin : begin + quant.TILE] = True
    rest[AT] = False
    return relative_error(x[rest], back[rest])


def outlier(outlier: float = 1000.0, scale: str = "tensor", fmt: str = "e4m3") -> Figure:
    """The outlier's neighbours before and after, and everybody's error against its size."""
    error = others_error(outlier, fmt, scale)
    fig, (left, right) = figure(11, 4.4, columns=2)
    _neighbours(left, outlier, fmt, scale)
    for case, look in CASE_LOOK.items():
        line = [100 * others_error(size, *case) for size in OUTLIERS]
        chosen = (fmt, scale) == case
        name = f"{case[0].upper()}, one scale a {case[1]}"
        right.plot(OUTLIERS, line, label=name, linewidth=3 if chosen else 1.5, **look)
    right.axvline(outlier, color=INK, linestyle=":", linewidth=1.2)
    right.plot([outlier], [100 * error], "o", markersize=15, fillstyle="none", color=INK)
    plain_log(right.xaxis, base=100)
    plain_log(right.yaxis)
    right.set_ylim(0.4, 2000)
    right.legend(fontsize=10, loc="upper left", ncols=2, edgecolor="none", framealpha=1)
    finish(fig, right, "", "outlier, of values spread by 1", "error of the others, %", legend=False)
    title = (
        f"An outlier of {outlier:,.10g}: {fmt.upper()} with one scale a {scale} "
        f"changes the others by {_percent(error)}"
    )
    fig.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    note(fig, f"N(0, 1), {ROWS} x {COLUMNS:,}; error: norm of the change over norm of the values")
    return fig


def _neighbours(ax: Axes, size: float, fmt: str, scale: str) -> None:
    """Values left and right of the end of the outlier's tile, as they were and as they return."""
    row, column = AT
    end = (column // quant.TILE + 1) * quant.TILE
    shown = slice(end - 20, end + 20)
    x = with_outlier(size)
    back = restored(x, fmt, scale)[row, shown]
    at = np.arange(shown.start, shown.stop)
    ax.axvspan(shown.start - 0.5, end - 0.5, color="#F6E3D6", zorder=0)
    ax.plot(at, x[row, shown], "o", color=IDLE, markersize=8, label="before")
    ax.plot(at, back, "x", color=INK, markersize=6, label="after")
    ax.set_ylim(-3.2, 4.6)
    ax.text(end - 1, 3.3, "the outlier's tile", ha="right", fontsize=10)
    ax.text(end + 0.5, 3.3, "the next tile", ha="left", fontsize=10)
    ax.legend(fontsize=10, frameon=False, loc="upper center", ncols=2)
    finish(ax.figure, ax, "", "channel, of one token", "value", legend=False)


def _percent(error: float) -> str:
    return f"{error:.0%}" if error > 0.995 else f"{100 * error:.3g}%"


def outlier_in_words(outlier: float = 1000.0, scale: str = "tensor", fmt: str = "e4m3") -> str:
    """The error of the others in the chosen case, and in the other four-way corners."""
    beside = [
        f"{kind.upper()} a {part} {_percent(others_error(outlier, kind, part))}"
        for kind, part in CASES
        if (kind, part) != (fmt, scale)
    ]
    chosen = _percent(others_error(outlier, fmt, scale))
    near = _percent(others_error(outlier, fmt, scale, own_tile=True))
    return (
        f"One value of {outlier:,.10g} among {ROWS * COLUMNS:,} spread by 1: {fmt.upper()} with "
        f"one scale a {scale} changes the others by {chosen}, those of its own tile "
        f"by {near}. Beside it: {', '.join(beside)}."
    )


def outlier_table(sizes: tuple[float, ...] = (1e2, 1e3, 1e5, 1e6)) -> None:
    """Print the error of all others beside one outlier, and last of the 127 in its own tile."""
    names = "".join(f"{f'{fmt.upper()} {scale}':>13}" for fmt, scale in CASES)
    print(f"{'outlier':>10}{names}   INT8 tile, the outlier's own tile")
    for size in sizes:
        cells = "".join(f"{_percent(others_error(size, *case)):>13}" for case in CASES)
        own = _percent(others_error(size, "int8", "tile", own_tile=True))
        print(f"{size:>10,.0f}{cells}{own:>36}")


class Tokens(NamedTuple):
    """Of one kind of scale: each token's size and error (DRAWS x TOKENS,), each draw's matrix's."""

    size: np.ndarray
    error: np.ndarray
    matrices: tuple[float, ...]

    @property
    def matrix(self) -> float:
        return float(np.mean(self.matrices))

    @property
    def lost(self) -> float:
        """The share of tokens that are wrong by over a half."""
        return float((self.error > LOST).mean())

    @property
    def lost_by_draw(self) -> np.ndarray:
        """The same share of each draw: (DRAWS,)."""
        return (self.error.reshape(DRAWS, TOKENS) > LOST).mean(axis=1)


@cache
def token_errors(decades: float, scale: str) -> Tokens:
    """Gradients whose tokens' magnitudes are lognormal, `decades` one standard deviation.

    Four draws of 1,024 tokens x 512 channels, stored in E4M3; the matrix error is their mean.
    """
    random = np.random.default_rng(0)
    sizes, errors, whole = [], [], []
    for _ in range(DRAWS):
        size = 10 ** (decades * random.standard_normal((TOKENS, 1)))
        x = torch.from_numpy(size * random.standard_normal((TOKENS, WIDTH))).float()
        back = restored(x, "e4m3", scale)
        sizes.append(size[:, 0])
        errors.append(((back - x).norm(dim=1) / x.norm(dim=1)).numpy())
        whole.append(relative_error(x, back))
    return Tokens(np.concatenate(sizes), np.concatenate(errors), tuple(whole))


def lost_tokens(decades: float = 2.0) -> Figure:
    """Each token's error against its magnitude, for one scale a tensor, a block and a tile."""
    fig, panels = figure(11, 4.2, columns=len(SCALES))
    found = {scale: token_errors(decades, scale) for scale in SCALES}
    for ax, (scale, tokens) in zip(panels, found.items(), strict=True):
        at, error = np.log10(tokens.size[:TOKENS]), 100 * tokens.error[:TOKENS]
        ax.plot(at, error, linestyle="none", markersize=3, **SCALE_LOOK[scale])
        ax.axhline(100 * LOST, color=INK, linestyle="--", linewidth=1.2)
        ax.text(at.max(), 53, "lost", fontsize=10, color=INK, ha="right")
        plain_log(ax.yaxis, subs=(1.0, 2.0, 5.0))
        ax.set_ylim(1, 150)
        finish(fig, ax, "", "token's magnitude, decades", "token's error, %")
        title = f"a scale a {scale}: {tokens.lost:.0%} lost, matrix {tokens.matrix:.1%}"
        ax.set_title(title, loc="left", fontsize=11, color=INK)
    title = _lost_title(found)
    fig.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    spread = f"lognormal, one standard deviation {decades:g} decades"
    note(fig, f"E4M3; magnitudes {spread}; {DRAWS} draws of {TOKENS:,} x {WIDTH}, the first drawn")
    return fig


def _lost_title(found: dict[str, Tokens]) -> str:
    lost = [f"{tokens.lost:.0%} by {scale}" for scale, tokens in found.items()]
    spread = [tokens.matrix for tokens in found.values()]
    low, high = f"{min(spread):.1%}", f"{max(spread):.1%}"
    same = low if low == high else f"{low} to {high}"
    return f"Matrix error {same} in all three; tokens lost: {', '.join(lost)}"


def lost_tokens_in_words(decades: float = 2.0) -> str:
    """The share of tokens lost and the matrix error, by the part that shares a scale."""
    parts = [
        f"one scale a {scale} loses {tokens.lost:.0%} of the tokens (matrix error "
        f"{tokens.matrix:.1%})"
        for scale in SCALES
        if (tokens := token_errors(decades, scale))
    ]
    return f"With token magnitudes spread over {decades:g} decades, {', '.join(parts)}."


def lost_tokens_table(decades: float = 2.0) -> None:
    """Print what `lost_tokens` draws: tokens lost and matrix error, mean and range of the draws."""
    print(f"{'one scale a':12}{'tokens lost':>13}{'range':>16}{'matrix error':>15}{'range':>18}")
    for scale in SCALES:
        tokens = token_errors(decades, scale)
        lost, matrix = tokens.lost_by_draw, tokens.matrices
        cells = f"{tokens.lost:>13.0%}{f'{lost.min():.0%} to {lost.max():.0%}':>16}"
        cells += f"{tokens.matrix:>15.2%}{f'{min(matrix):.2%} to {max(matrix):.2%}':>18}"
        print(f"{scale:12}{cells}")
    print(f"{DRAWS} draws of {TOKENS:,} tokens; lost: wrong by over {LOST:.0%}")
