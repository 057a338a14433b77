"""Measured exchanges beside the cost model: what two fitted numbers say of everything else."""

from collections.abc import Iterable, Sequence

from dsv3_tutorial.bench.exchanges import Case, predicted
from dsv3_tutorial.cost.tiers import Network, Tier
from dsv3_tutorial.receipts import Receipt

Key = tuple[int, int, int | None]  # ranks, nodes, Mbit/s


def networks(rows: Iterable[Receipt]) -> dict[Key, Network]:
    """{(ranks, nodes, Mbit/s): the network} that the point-to-point fits among the rows describe.

    Everything else is then predicted: no collective is fitted to itself.
    """
    rows, found = list(rows), {}
    for key in dict.fromkeys(_key(r) for r in rows):
        tiers = {form: _tier(rows, key, form) for form in ("inside", "across")}
        inside, across = tiers["inside"], tiers["across"] or tiers["inside"]
        if inside and across:
            found[key] = Network(inside, across, key[0] // key[1])
    return found


def prediction(receipt: Receipt, network: Network) -> float:
    """The cost model's seconds for what an "exchange" receipt measured."""
    s = receipt.shapes
    return predicted(Case(s["op"], s["form"], s["bytes"]), network, s["ranks"])


def lines(rows: Iterable[Receipt]) -> list[str]:
    """One table for each set of ranks and rate: the fits, then measured and predicted."""
    rows = list(rows)
    text = []
    for key, network in networks(rows).items():
        ranks, nodes, mbit = key
        limit = f", cables of {mbit} Mbit/s" if mbit else ", cables without a limit"
        text += ["", f"{ranks} ranks on {nodes} node{'s' if nodes > 1 else ''}"]
        text[-1] += limit if nodes > 1 else ""
        tiers = {"inside": network.inside, "across": network.across}
        text += [_fitted(*tier) for tier in list(tiers.items())[:nodes]]
        text.append(f"  {'':<26}{'bytes':>10}{'measured':>13}{'predicted':>13}{'off by':>9}")
        here = [r for r in rows if r.what == "exchange" and _key(r) == key]
        text += [_line(r, prediction(r, network)) for r in here]
    return text[1:]


def _key(receipt: Receipt) -> Key:
    s = receipt.shapes
    return s["ranks"], s["nodes"], s["mbit"]


def _tier(rows: Sequence[Receipt], key: Key, form: str) -> Tier | None:
    fits = {
        r.what: r.value
        for r in rows
        if _key(r) == key and (r.shapes["op"], r.shapes["form"]) == ("p2p", form)
    }
    if "alpha" not in fits:
        return None
    return Tier(form, fits["alpha"], fits.get("bandwidth", float("inf")), "measured, bench network")


def _fitted(name: str, tier: Tier) -> str:
    return f"  {name}: {tier.alpha * 1e6:.0f} us + bytes / {tier.bandwidth / 1e6:.0f} MB/s"


def _line(r: Receipt, seconds: float) -> str:
    name = f"{r.shapes['op']}, {r.shapes['form']}"
    off = seconds / r.value - 1
    times = f"{r.value * 1e3:>10.3f} ms{seconds * 1e3:>10.3f} ms"
    return f"  {name:<26}{r.shapes['bytes']:>10}{times}{off:>+9.0%}"
