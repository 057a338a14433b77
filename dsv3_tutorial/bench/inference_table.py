"""What the engines' receipts amount to: tables, and each target beside what was reached."""

from collections.abc import Sequence

from dsv3_tutorial.bench.inference_model import PEERS, PLAIN
from dsv3_tutorial.bench.moe_table import verdict
from dsv3_tutorial.receipts import Receipt

SHORT, SHORT_TARGET = 256, 2.1  # INT8 against our float32, wide
PEER_TARGETS = {2048: 4.5, 8192: 15.0}  # INT8 against the best of transformers, wide
GAIN_TARGET, PASS_TARGET = 1.5, 1.9  # one draft at batch 1: speed, and tokens a pass
FIT = 0.98


def lines(rows: Sequence[Receipt]) -> list[str]:
    """One run's receipts as aligned tables, targets below each."""
    parts = (_steps, _fits, _generation, _speculation, _acceptance, _rows, _batching, _phases)
    return [line for part in parts for line in part(rows)]


def _of(rows: Sequence[Receipt], what: str) -> list[Receipt]:
    return [r for r in rows if r.what == what]


def _steps(rows: Sequence[Receipt]) -> list[str]:
    text, steps = [], _of(rows, "decode step")
    for model, batch in dict.fromkeys((r.shapes["model"], r.shapes["batch"]) for r in steps):
        here = [r for r in steps if (r.shapes["model"], r.shapes["batch"]) == (model, batch)]
        contexts = sorted({r.shapes["context"] for r in here})
        text += ["", f"{model}, batch {batch}: ms a step behind so many cached tokens, and the MB"]
        head = "".join(f"{context:>9,}" for context in contexts)
        text.append(f"  {'':<20}{head}{'weights':>10}{'cache':>9}{'at work':>9}")
        at = {(r.shapes["form"], r.shapes["context"]): r for r in here}
        for form in dict.fromkeys(r.shapes["form"] for r in here):
            cells = (at.get((form, context)) for context in contexts)
            times = "".join(f"{'':>9}" if r is None else f"{r.value * 1e3:>9.2f}" for r in cells)
            last = [r for r in here if r.shapes["form"] == form][-1].shapes
            held = (last[f"{part}_bytes"] / 1e6 for part in ("weight", "cache", "working"))
            text.append(f"  {form:<20}{times}" + "{:>10.1f}{:>9.1f}{:>9.1f}".format(*held))
        text += _verdicts(model, batch, at)
    return text


def _verdicts(model: str, batch: int, at: dict[tuple[str, int], Receipt]) -> list[str]:
    if (model, batch) != ("wide", 1):
        return []
    text = []
    short, narrow = (at.get((form, SHORT)) for form in (PLAIN, "int8"))
    if short and narrow:
        name = f"float32 over int8 behind {SHORT}"
        text.append(verdict(name, short.value / narrow.value, SHORT_TARGET))
    for context, target in PEER_TARGETS.items():
        peers = {form: at[form, context].value for form in PEERS if (form, context) in at}
        if peers and ("int8", context) in at:
            best = min(peers, key=peers.get)
            ratio = peers[best] / at["int8", context].value
            text.append(verdict(f"{best}, the best, over int8 behind {context:,}", ratio, target))
    return text


def _fits(rows: Sequence[Receipt]) -> list[str]:
    found = _of(rows, "time per cached token")
    text = ["", "a step as a line, t = a + b L, batch 1"] if found else []
    for r in found:
        line = f"  {r.shapes['model']:<9}{r.shapes['form']:<20}{r.shapes['fixed_s'] * 1e3:>8.2f} ms"
        line += f" +{r.value * 1e6:>8.3f} us a token, R2 {r.shapes['r2']:.4f}"
        text.append(f"{line}; target {FIT}: {'' if r.shapes['r2'] >= FIT else 'not '}reached")
    return text


def _generation(rows: Sequence[Receipt]) -> list[str]:
    found, text = _of(rows, "generation"), []
    for batch in dict.fromkeys(r.shapes["batch"] for r in found):
        here = [r for r in found if r.shapes["batch"] == batch]
        plain = next(r.value for r in here if r.shapes["form"] == PLAIN)
        shapes = here[0].shapes
        text += ["", f"trained, batch {batch}, {shapes['new_tokens']} tokens each: tokens/s"]
        for r in here:
            line = f"  {r.shapes['form']:<20}{r.value:>9.1f}{r.value / plain:>8.2f}x float32"
            text.append(f"{line}{r.shapes['same']:>9.1%} as float32's, place by place")
    return text


def _speculation(rows: Sequence[Receipt]) -> list[str]:
    found = _of(rows, "speculation")
    gains = {(r.shapes["batch"], r.shapes["drafts"]): r for r in _of(rows, "speculation gain")}
    if not found:
        return []
    text = ["", "trained, speculation: output identical"]
    head = ("batch", "drafts", "tokens/s", "ms/token", "accepted", "a pass", "gain", "law", "bound")
    text.append("  {:>5}{:>7}{:>10}{:>9}{:>9}{:>8}{:>8}{:>8}{:>8}".format(*head))
    for r in found:
        s = r.shapes
        line = (
            f"  {s['batch']:>5}{s['drafts']:>7}{r.value:>10.1f}{1e3 * s['batch'] / r.value:>9.2f}"
        )
        gain = gains.get((s["batch"], s["drafts"]))
        if gain is not None:
            line += f"{s['acceptance']:>9.1%}{s['tokens_per_pass']:>8.2f}{gain.value:>7.2f}x"
            line += f"{gain.shapes['predicted']:>7.2f}x{s['bound']:>7.2f}x"
        text.append(line)
    text += _gain_verdicts(found, gains)
    for r in _of(rows, "law"):
        reached = "" if r.value >= FIT else "not "
        text.append(
            f"  {r.shapes['law']}: R2 {r.value:.3f} unfitted; target {FIT}: {reached}reached"
        )
    return [*text, *_costs(rows)]


def _gain_verdicts(found: list[Receipt], gains: dict[tuple[int, int], Receipt]) -> list[str]:
    text, one = [], gains.get((1, 1))
    if one is not None:
        text.append(verdict("one draft at batch 1", one.value, GAIN_TARGET))
        best = max((r for (batch, _), r in gains.items() if batch == 1), key=lambda r: r.value)
        name = f"the best number of drafts at batch 1, {best.shapes['drafts']}"
        text.append(verdict(name, best.value, GAIN_TARGET))
        same = [r for r in found if (r.shapes["batch"], r.shapes["drafts"]) == (1, 1)]
        passed = same[0].shapes["tokens_per_pass"]
        reached = "" if round(passed, 1) >= PASS_TARGET else "not "
        text.append(f"  tokens a pass: {passed:.2f}; target {PASS_TARGET}: {reached}reached")
    return text


def _costs(rows: Sequence[Receipt]) -> list[str]:
    found = [*_of(rows, "pass cost"), *_of(rows, "draft cost")]
    text = ["", "trained, passes and drafts over so many tokens, in plain steps"]
    for batch in dict.fromkeys(r.shapes["batch"] for r in found):
        here = [r for r in found if r.shapes["batch"] == batch]
        at = {(r.what.split()[0], r.shapes["queries"]): r.value for r in here}
        plain = at["pass", 1]
        for what in ("pass", "draft"):
            cells = "".join(f"{n:>7}: {t / plain:.2f}" for (w, n), t in at.items() if w == what)
            text.append(f"  batch {batch:>2} {what:<6}{cells}   of {plain * 1e3:.2f} ms")
    return text


def _acceptance(rows: Sequence[Receipt]) -> list[str]:
    found = _of(rows, "acceptance by kind")
    columns = list(dict.fromkeys((r.shapes["text"], r.shapes["rule"]) for r in found))
    if not found:
        return []
    at = {(r.shapes["text"], r.shapes["rule"], r.shapes["kind"]): r for r in found}
    heads = "".join(f"{f'{text}, {rule}':>26}" for text, rule in columns)
    text = ["", "trained, acceptance of the first draft", f"  {'':<18}{heads}"]
    for kind in dict.fromkeys(r.shapes["kind"] for r in found):
        cells = (at.get((*column, kind)) for column in columns)
        shown = ("" if r is None else f"{r.value:.1%} of {r.shapes['tokens']}" for r in cells)
        text.append(f"  {kind:<18}" + "".join(f"{cell:>26}" for cell in shown))
    return text


def _rows(rows: Sequence[Receipt]) -> list[str]:
    found, text = _of(rows, "product by rows"), []
    for side in dict.fromkeys(r.shapes["side"] for r in found):
        here = [r for r in found if r.shapes["side"] == side]
        counts = sorted({r.shapes["rows"] for r in here})
        head = "".join(f"{count:>9}" for count in counts)
        text += [
            "",
            f"{side} x {side}, streamed: us by rows",
            f"  {'':<18}{head}  beats float32 at",
        ]
        at = {(r.shapes["form"], r.shapes["rows"]): r.value for r in here}
        for form in dict.fromkeys(r.shapes["form"] for r in here):
            cells = (at.get((form, count)) for count in counts)
            shown = "".join(f"{'':>9}" if c is None else f"{c * 1e6:>9.1f}" for c in cells)
            wins = [n for n in counts if at.get((form, n), 1e9) < at[PLAIN, n]]
            own = "" if form == PLAIN else f"  {', '.join(map(str, wins)) or 'none'}"
            text.append(f"  {form:<18}{shown}{own}")
    return text


def _batching(rows: Sequence[Receipt]) -> list[str]:
    found = _of(rows, "batching")
    if not found:
        return []
    s = found[0].shapes
    text = ["", f"trained, {s['requests']} uneven requests, {s['slots']} at a time: tokens/s"]
    return text + [f"  {r.shapes['form']:<20}{r.value:>9.1f}" for r in found]


def _phases(rows: Sequence[Receipt]) -> list[str]:
    found = _of(rows, "phase")
    text = ["", "phases, and the share of this machine's ceilings"] if found else []
    powers = {"tokens/s": (1, "tokens/s"), "FLOP/s": (1e-9, "GFLOP/s"), "bytes/s": (1e-9, "GB/s")}
    for r in found:
        factor, unit = powers[r.unit]
        s = r.shapes
        line = f"  {s['model']:<9}{s['phase']:<9}batch {s['batch']:>2}, {s['tokens']} tokens"
        share = f"{r.fraction:>8.1%} of {r.ceiling}" if r.ceiling else ""
        text.append(f"{line}{r.value * factor:>11.1f} {unit:<9}{share}")
    return text
