"""What the measured experts and models amount to: ratios to transformers, targets beside them."""

from collections.abc import Iterable, Sequence

from dsv3_tutorial.bench.attention_table import crossing
from dsv3_tutorial.bench.moe_layer import DENSE
from dsv3_tutorial.bench.moe_model import OURS
from dsv3_tutorial.receipts import Receipt

BOTH = "forward and backward"
SERVED = "grouped_mm"  # the engine that a CPU gets (moe.experts.fastest)
EAGER, GROUPED = "transformers eager", "transformers grouped_mm"
# (experts, tokens, peer): how much longer the peer is to take, forward and backward
LAYER_TARGETS = {(64, 1024, EAGER): 12.0, (64, 256, EAGER): 26.0}
LEVEL = 0.95  # of transformers' grouped_mm, everywhere
GROWTH_TARGET = 1.25
STEP_TARGETS = {("small", 2048): 5.0, ("small", 8192): 15.0, ("v3-like", 8192): 30.0}


def lines(rows: Iterable[Receipt]) -> list[str]:
    """One run's receipts as aligned tables, each followed by its targets and what was reached."""
    rows = list(rows)
    text = [*_layers(rows), *_growth(rows), *_by_rows(rows), *_decode(rows), *_training(rows)]
    return text[1:]


def verdict(name: str, ratio: float, target: float, most: bool = False) -> str:
    """One line: what was reached, the target, and whether that is enough (`most`: not too much)."""
    enough = ratio <= target if most else ratio >= target
    bound = "at most " if most else ""
    reached = "reached" if enough else "not reached"
    return f"  {name}: {ratio:.2f}x; target {bound}{target:g}x: {reached}"


def _layers(rows: list[Receipt]) -> list[str]:
    """ms of each form, one line a size and pass, and how much longer transformers takes."""
    found = _grouped(rows, "experts", ("experts", "top_k", "tokens", "pass"))
    text = []
    for (experts, top_k, tokens, passed), times in found.items():
        text += ["", f"{experts} experts, top {top_k}, {tokens} tokens, {passed}: ms"]
        text += [f"  {form:<26}{r.value * 1e3:>10.2f}" for form, r in times.items()]
        for peer in (EAGER, GROUPED):
            target = LAYER_TARGETS.get((experts, tokens, peer), LEVEL if peer == GROUPED else None)
            if passed == BOTH and target is not None and peer in times and SERVED in times:
                ratio = times[peer].value / times[SERVED].value
                text.append(verdict(f"{peer} over {SERVED}", ratio, target))
    return text


def _growth(rows: list[Receipt]) -> list[str]:
    found = [r for r in rows if r.what == "cost growth" and r.shapes["pass"] == BOTH]
    text = []
    for r in found:
        name = f"{r.shapes['form']}, {r.shapes['from']} to {r.shapes['to']} experts, equal rows"
        ours = r.shapes["form"] == SERVED
        plain = f"  {name}: {r.value:.2f}x"
        text.append(verdict(name, r.value, GROWTH_TARGET, most=True) if ours else plain)
    return ["", "What more experts cost, " + BOTH, *text] if text else []


def _by_rows(rows: list[Receipt]) -> list[str]:
    found = _grouped(rows, "experts by rows", ("hidden", "width", "pass"), "rows_per_expert")
    text = []
    for (hidden, width, passed), times in found.items():
        counts = sorted({count for _, count in times})
        head = "".join(f"{count:>9}" for count in counts)
        text += ["", f"hidden {hidden}, width {width}, {passed}: us by rows per expert"]
        text.append(f"  {'':<26}{head}")
        for form in dict.fromkeys(form for form, _ in times):
            cells = (times.get((form, count)) for count in counts)
            row = (f"{r.value * 1e6:>9.0f}" if r is not None else f"{'':>9}" for r in cells)
            text.append(f"  {form:<26}{''.join(row)}")
        text += _crossings(times)
    return text


def _crossings(times: dict[tuple[str, int], Receipt]) -> list[str]:
    """Where the engine that is served overtakes the others, if it does."""
    by_form: dict[str, dict[int, float]] = {}
    for (form, count), r in times.items():
        by_form.setdefault(form, {})[count] = r.value
    ours, text = by_form.get(SERVED, {}), []
    for form in ("loop", "sorted", DENSE):
        at = crossing(ours, by_form.get(form, {}))
        if at is not None:
            text.append(f"  {SERVED} and {form} cross at {at.value:.0f} rows per expert")
    return text


def _decode(rows: list[Receipt]) -> list[str]:
    found = _grouped(rows, "model decode step", ("config", "context"))
    text = []
    for (config, context), times in found.items():
        text += ["", f"{config}, decode step behind {context:,} tokens: ms"]
        text += [f"  {form:<32}{r.value * 1e3:>10.2f}" for form, r in times.items()]
        peers = {form: r.value for form, r in times.items() if form != OURS}
        if peers:
            best = min(peers, key=peers.get)
            ratio, target = peers[best] / times[OURS].value, STEP_TARGETS.get((config, context))
            plain = f"  {best} over ours: {ratio:.2f}x"
            text.append(plain if target is None else verdict(f"{best} over ours", ratio, target))
    return text


def _training(rows: list[Receipt]) -> list[str]:
    found = _grouped(rows, "model training step", ("config", "batch", "length"))
    text = []
    for (config, batch, length), rates in found.items():
        text += ["", f"{config}, training step, {batch} x {length} tokens: tokens/s"]
        for form, r in rates.items():
            ratio = f"{rates[OURS].value / r.value:>8.2f}x slower than ours" * (form != OURS)
            text.append(f"  {form:<32}{r.value:>10.0f}{ratio}")
    return text


def _grouped(
    rows: list[Receipt], what: str, names: Sequence[str], also: str | None = None
) -> dict[tuple, dict]:
    """Receipts of one kind by the values of `names`, and within these by form (and `also`)."""
    found: dict[tuple, dict] = {}
    for r in (r for r in rows if r.what == what):
        key = tuple(r.shapes[name] for name in names)
        form = r.shapes["form"]
        found.setdefault(key, {})[form if also is None else (form, r.shapes[also])] = r
    return found
