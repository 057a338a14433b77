"""Which experts each kind of text goes to, in the recorded runs of six ways to balance them.

Whether experts specialise and whether their load is even are two things: an even load over a whole
batch leaves room for an expert of e-mail, an even load inside every sequence does not.
"""

from statistics import mean

import numpy as np
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.bench.balance import CONFIG
from dsv3_tutorial.learn.figures.balance_runs import Runs, runs, seeds_in_words
from dsv3_tutorial.learn.figures.style import INK, figure, finish, note

SPREAD = np.log2([0.25, 0.5, 1, 2, 4])  # an expert's share: at most E / K = 4 times the even one


def relative_use(receipt: receipts.Receipt) -> dict[str, np.ndarray]:
    """Each kind of text's share of every expert over the even one: {kind: (layers, E)}."""
    even = CONFIG.n_routed_experts
    return {kind: np.array(use) * even for kind, use in receipt.shapes["domains"].items()}


def domain_heat_map(
    variant: str = "bias, gamma 0.01", seed: int = 0, layer: int = -1, found: Runs | None = None
) -> Figure:
    """Which experts each kind of text goes to in one layer with experts, against an even share."""
    receipt = _chosen(found, variant, seed, layer)
    use = {kind: layers[layer] for kind, layers in relative_use(receipt).items()}
    table = np.array(list(use.values()))  # (kinds, E)
    fig, ax = figure(11, 3.8)
    ax.grid(False)
    colours = CenteredNorm(0, halfrange=SPREAD[-1])
    clipped = np.log2(table.clip(2 ** SPREAD[0], 2 ** SPREAD[-1]))
    drawn = ax.imshow(clipped, cmap="PuOr_r", norm=colours, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        ink = "white" if abs(clipped[row, column]) > 1.4 else INK
        ax.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color=ink)
    ax.set_xticks(range(table.shape[1]))
    ax.set_yticks(range(len(use)), list(use))
    bar = fig.colorbar(drawn, ax=ax, ticks=SPREAD)
    bar.ax.set_yticklabels([f"{share:g}" for share in 2**SPREAD])
    bar.set_label("share of an even one", fontsize=10)
    note(fig, f"seed {seed}; {receipts.caption([receipt])}")
    title = f"{variant}, {_layer_name(receipt, layer)}:\n{_widest(use)}"
    return finish(fig, ax, title, "expert", "", legend=False)


def domain_heat_map_in_words(
    variant: str = "bias, gamma 0.01", seed: int = 0, layer: int = -1, found: Runs | None = None
) -> str:
    """The heat map as sentences: the widest gap, and each kind's most and least used expert."""
    receipt = _chosen(found, variant, seed, layer)
    use = {kind: layers[layer] for kind, layers in relative_use(receipt).items()}
    each = [
        f"{kind}: most to expert {row.argmax()} ({row.max():.1f}x an even share), "
        f"least to {row.argmin()} ({row.min():.1f}x)"
        for kind, row in use.items()
    ]
    where = f"{variant}, seed {seed}, {_layer_name(receipt, layer)}"
    return f"{where}: {_widest(use)}. {'; '.join(each)}."


def _chosen(found: Runs | None, variant: str, seed: int, layer: int) -> receipts.Receipt:
    """The receipt of one run, or an error that says which there are."""
    found = found or runs()
    receipt = found.get(variant, {}).get(seed)
    layers = _layers(receipt) if receipt else 0
    if receipt and -layers <= layer < layers:
        return receipt
    known = "; ".join(f"{name} (seeds {', '.join(map(str, s))})" for name, s in found.items())
    raise ValueError(
        f"There is no recorded run of {variant!r} with seed {seed} and a layer {layer}, so there "
        f"is nothing to draw. There are {known}; layers go from 0 to {max(layers - 1, 0)}."
    )


def _layers(receipt: receipts.Receipt) -> int:
    return len(next(iter(receipt.shapes["domains"].values())))


def _layer_name(receipt: receipts.Receipt, layer: int) -> str:
    """Layers as the model counts them: the dense ones come first and have no experts."""
    return f"layer {CONFIG.first_k_dense_replace + layer % _layers(receipt)}"


def _widest(use: dict[str, np.ndarray]) -> str:
    """The expert whose use differs most between two kinds, and how much each gives it."""
    table, kinds = np.array(list(use.values())), list(use)
    expert = int((table.max(axis=0) - table.min(axis=0)).argmax())
    most, least = (int(pick(table[:, expert])) for pick in (np.argmax, np.argmin))
    high, low = table[most, expert], table[least, expert]
    best = f"expert {expert} gets {high:.1f}x an even share of {kinds[most]}"
    return f"{best}, {low:.1f}x of {kinds[least]}"


def distances(receipt: receipts.Receipt) -> dict[str, float]:
    """How far each kind's use of the experts lies from the average kind's, mean over layers.

    Total variation: the share of a kind's tokens that would have to go to other experts; 0 where
    all kinds use the same ones, however unevenly.
    """
    shares = {kind: np.array(use) for kind, use in receipt.shapes["domains"].items()}
    average = np.mean(list(shares.values()), axis=0)  # (layers, E)
    return {k: float(np.abs(s - average).sum(axis=-1).mean() / 2) for k, s in shares.items()}


def specialisation(found: Runs | None = None) -> dict[str, dict[str, float]]:
    """`distances` of each variant, mean over its seeds: {variant: {kind: distance}}."""
    made = {}
    for variant, seeds in (found or runs()).items():
        each = [distances(receipt) for receipt in seeds.values()]
        made[variant] = {kind: mean(one[kind] for one in each) for kind in each[0]}
    return made


def specialisation_table(found: Runs | None = None) -> None:
    """Print how far apart the kinds of text are in the experts they use, for each variant."""
    found = found or runs()
    table = specialisation(found)
    kinds = list(next(iter(table.values())))
    print(
        f"{'balanced by':20}" + "".join(f"{kind:>{len(kind) + 3}}" for kind in kinds) + "    mean"
    )
    for variant, by_kind in table.items():
        cells = "".join(f"{by_kind[kind]:>{len(kind) + 3}.1%}" for kind in kinds)
        print(f"{variant:20}{cells}{mean(by_kind.values()):>8.1%}")
    means = {variant: mean(by_kind.values()) for variant, by_kind in table.items()}
    flat, wide = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    print(
        f"share of a kind's tokens that the average kind sends elsewhere; {seeds_in_words(found)}"
    )
    print(f"kinds differ least with {flat}, most with {wide}: {means[wide] / means[flat]:.2f}x")
