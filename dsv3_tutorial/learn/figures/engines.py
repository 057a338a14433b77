"""What the experts cost on a machine: engines side by side, by experts and by rows for each."""

import torch
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import timing
from dsv3_tutorial.block import initialize
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.learn.figures.style import figure, finish, note, plain_log, series
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.moe.layer import MoE
from dsv3_tutorial.receipts import Receipt

FORMS = ("loop", "sorted", "grouped_mm", "dense")
PEERS = {"transformers eager": "their loop", "transformers grouped_mm": "their grouped"}
BOTH = "forward and backward"
SIZES = ((16, 4, 2048), (32, 4, 2048), (64, 8, 1024), (64, 8, 256))
LIVE_ROWS = (1, 4, 16, 64, 256)


def _layer(experts: int, tokens: int, passed: str = BOTH) -> dict[str, Receipt]:
    """One size's receipts by form."""
    found = receipts.latest("moe", what="experts", experts=experts, tokens=tokens)
    return {r.shapes["form"]: r for r in found if r.shapes["pass"] == passed}


def eager_over_ours(experts: int = 64, tokens: int = 256) -> float:
    """How many times longer transformers' loop takes than what a CPU gets here, both passes."""
    times = _layer(experts, tokens)
    return round(times["transformers eager"].value / times["grouped_mm"].value, 1)


def engine_table() -> None:
    """Print ms of one layer's forward and backward, per form and size, ours and transformers'."""
    forms = ("loop", "sorted", "grouped_mm", *PEERS)
    print(f"{'E, K, tokens':16}" + "".join(f"{PEERS.get(form, form):>15}" for form in forms))
    for experts, top_k, tokens in SIZES:
        times = _layer(experts, tokens)
        cells = "".join(f"{times[form].value * 1e3:>12.0f} ms" for form in forms)
        print(f"{f'{experts}, {top_k}, {tokens:,}':16}{cells}")
    print(receipts.caption(list(_layer(64, 256).values())))


def growth_table() -> None:
    """Print what four times the experts cost for equal rows, forward and backward."""
    print("\n16 to 64 experts, equally many rows to multiply:")
    for receipt in receipts.latest("moe", what="cost growth"):
        if receipt.shapes["pass"] == BOTH:
            print(f"  {receipt.shapes['form']:24}{receipt.value:6.2f} times as long")


def rows_per_expert() -> Figure:
    """The engines over a dense network of equal arithmetic, by rows per expert: two sizes."""
    found = receipts.latest("moe", what="experts by rows")
    fig, both = figure(11, 4.4, columns=2)
    for ax, hidden in zip(both, (256, 512)):
        times = _by_rows([r for r in found if r.shapes["hidden"] == hidden])
        for index, form in enumerate(FORMS):
            if form != "dense" and form in times:
                at = sorted(times[form])
                ratio = [times[form][n] / times["dense"][n] for n in at]
                ax.plot(at, ratio, label=form, **series(index))
        _axes(ax)
        ratios = [times["grouped_mm"][n] / times["dense"][n] for n in at]
        most, least = max(ratios), min(ratios)
        width = next(r.shapes["width"] for r in found if r.shapes["hidden"] == hidden)
        title = (
            f"D {hidden}, F {width}: grouped_mm takes\n{most:.1f}x to {least:.1f}x a dense layer"
        )
        finish(fig, ax, title, "rows per expert", "time over dense", legend=hidden == 256)
    note(fig, receipts.caption(found))
    return fig


def _by_rows(found: list[Receipt], passed: str = "forward") -> dict[str, dict[int, float]]:
    times: dict[str, dict[int, float]] = {}
    for r in found:
        if r.shapes["pass"] == passed:
            times.setdefault(r.shapes["form"], {})[r.shapes["rows_per_expert"]] = r.value
    return times


def engines_live(seconds: float) -> Figure:
    """The same on this machine, now: 16 experts of `small`, forward only."""
    from dsv3_tutorial.bench.moe import engine_times

    times = engine_times(LIVE_ROWS, seconds)
    fig, ax = figure(8, 4.2)
    for index, form in enumerate(FORMS):
        if form in times:
            ax.plot(
                LIVE_ROWS, [times[form][n] * 1e6 for n in LIVE_ROWS], label=form, **series(index)
            )
    _axes(ax, ratio=False)
    first, last = ({f: times[f][n] for f in times if f != "dense"} for n in (1, LIVE_ROWS[-1]))
    best = [min(times, key=times.get) for times in (first, last)]
    title = f"Fastest sparse engine here: {best[0]} at 1 row, {best[1]} at 256"
    return finish(fig, ax, title, "rows per expert", "microseconds, forward")


def token_cost_live(seconds: float) -> None:
    """Time one layer here, forward and backward, per token: sparse, and dense of two widths."""
    small = ModelConfig.named("small")
    d, f = small.hidden_size, small.moe_intermediate_size
    met, held = (
        n + small.n_shared_experts for n in (small.num_experts_per_tok, small.n_routed_experts)
    )
    layers = {
        f"dense, {met * f} wide: what a token meets": MLP(d, met * f),
        f"sparse, {met} of {held} experts": MoE(small),
        f"dense, {held * f} wide: all that is held": MLP(d, held * f),
    }
    x = torch.randn(1, 2048, d)
    initialize(layers[f"sparse, {met} of {held} experts"], 0.02)
    runs = {name: lambda layer=layer: layer(x).sum().backward() for name, layer in layers.items()}
    times = timing.compare(runs, repeats=50, warmup=1, seconds=seconds)
    for name, found in times.items():
        print(f"{name:42}{found['median'] / x.shape[1] * 1e6:6.2f} microseconds a token")


def _axes(ax, ratio: bool = True) -> None:
    plain_log(ax.xaxis, 4)
    plain_log(ax.yaxis, 10 if not ratio else 2)
    if ratio:
        ax.axhline(1.0, color="#222222", linewidth=1, linestyle=":")
