"""What the measured FP8 amounts to: ratios to float32, BF16 and ceilings, targets beside them."""

from collections.abc import Iterable

import torch

from dsv3_tutorial.bench.moe_table import verdict
from dsv3_tutorial.fp8 import cpu
from dsv3_tutorial.receipts import Receipt

FP32, BF16 = "float32", "bfloat16"
POW2 = "fp8, powers of two, BF16 products"
OURS, SCALED_MM, TENSOR = "ours", "scaled_mm", "scaled_mm, per tensor"
ENGINE = "Transformer Engine"
QUANTISED = ", with quantisation"
OVER_FLOAT32 = {"fp8, float32 scales": 1.35, "fp8, DeepSeek's scales": 1.35, POW2: 0.5}
COPY_SHARE = 0.9  # of a copy's bandwidth, to quantise
LEVEL = 1.0  # with the BF16 ceiling, and with scaled_mm
FROM_M, FROM_K = 4096, 7168  # where a block product is to reach the BF16 ceiling
OVER_BF16 = 1.45  # a training linear


def lines(rows: Iterable[Receipt]) -> list[str]:
    """One run's receipts as aligned tables, each followed by its targets and what was reached."""
    rows = list(rows)
    cpu_rows = [r for r in rows if r.device_kind == "cpu"]
    gpu_rows = [r for r in rows if r.device_kind == "gpu"]
    text = [*_linears(cpu_rows), *_errors(cpu_rows), *_quantisers(cpu_rows), *_products(cpu_rows)]
    text += _load(cpu_rows)
    text += [*_copy_shares(gpu_rows), *_map(gpu_rows), *_gpu_linears(gpu_rows)]
    return text[1:]


def _linears(rows: list[Receipt]) -> list[str]:
    """ms of each form, one table a size, and the ratio to float32 beside its target."""
    text = []
    for (m, n, k), times in _by_size(rows, "training linear").items():
        text += ["", f"Linear {k} to {n}, {m} tokens, forward and backward: ms"]
        text += [f"  {form:<36}{r.value * 1e3:>10.2f}" for form, r in times.items()]
        for form, target in OVER_FLOAT32.items():
            if form in times and FP32 in times:
                ratio = times[form].value / times[FP32].value
                text.append(verdict(f"{form}, over float32", ratio, target, most=True))
        if POW2 in times:
            text.append(f"  (its products: {_products_here()})")
    return text


def _products_here() -> str:
    """What multiplies the form with powers of two on this CPU: its target is one for AMX."""
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return "BF16, AMX"
    if cpu.has_bf16_products():
        return "BF16, AVX512-BF16; the target is one for AMX, which this CPU has not"
    return "float32; this CPU has no instruction for BF16's"


def _errors(rows: list[Receipt]) -> list[str]:
    found: dict[str, list[str]] = {}
    for r in rows:
        if r.what == "training linear error":
            words = f"{r.shapes['product']} {r.value:.2%}"
            found.setdefault(f"{r.shapes['form']}, k {r.shapes['k']}", []).append(words)
    text = [f"  {form:<44}{'  '.join(words)}" for form, words in found.items()]
    return ["", "Distance from float32, of the norm", *text] if text else []


def _quantisers(rows: list[Receipt]) -> list[str]:
    text = []
    for (m, n, _), rates in _by_size(rows, "quantiser").items():
        text += ["", f"{m} x {n}: million values a second"]
        text += [f"  {form:<36}{r.value / 1e6:>10.0f}" for form, r in rates.items()]
    return text


def _products(rows: list[Receipt]) -> list[str]:
    text = []
    for (m, n, k), rates in _by_size(rows, "scaled product").items():
        text += ["", f"{m} x {n}, k {k}: GFLOP/s"]
        text += [f"  {form:<36}{r.value / 1e9:>10.3f}" for form, r in rates.items()]
    return text


def _load(rows: list[Receipt]) -> list[str]:
    return [
        f"{r.value:.1f} processes wanted the {r.shapes['cores']} cores meanwhile"
        for r in rows
        if r.what == "processes that wanted a core"
    ]


def _copy_shares(rows: list[Receipt]) -> list[str]:
    text = []
    for (m, n, _), rates in _by_size(rows, "quantiser").items():
        text += ["", f"Quantising {m} x {n}: GB/s"]
        text += [f"  {form:<36}{r.value / 1e9:>10.0f}" for form, r in rates.items()]
        copy = rates.get("copy")
        if copy is not None and "tiles" in rates:
            share = rates["tiles"].value / copy.value
            text.append(verdict("tiles, over a copy of as many bytes", share, COPY_SHARE))
    return text


def _map(rows: list[Receipt]) -> list[str]:
    """TFLOP/s by m, a table a weight: where FP8 wins, and where quantising eats the gain."""
    rates = [r for r in rows if r.unit == "FLOP/s"]
    bf16 = next(
        (r.value for r in rates if r.what == "matmul" and r.shapes["dtype"] == "bf16"), None
    )
    tables: dict[tuple[int, int], dict[str, dict[int, float]]] = {}
    for (m, n, k), forms in _by_size(rates, "product").items():
        for form, r in forms.items():
            tables.setdefault((k, n), {}).setdefault(form, {})[m] = r.value
    text = []
    for (k, n), forms in tables.items():
        counts = sorted({m for by_rows in forms.values() for m in by_rows})
        text += ["", f"{k} x {n}: TFLOP/s by rows"]
        text.append(f"  {'':<36}{''.join(f'{m:>9}' for m in counts)}")
        for form, by_rows in forms.items():
            cells = (f"{by_rows[m] / 1e12:>9.1f}" if m in by_rows else f"{'':>9}" for m in counts)
            text.append(f"  {form:<36}{''.join(cells)}")
        text += _map_verdicts(k, forms, bf16)
    return text


def _map_verdicts(k: int, forms: dict[str, dict[int, float]], bf16: float | None) -> list[str]:
    text, ours = [], forms.get(OURS, {})
    for m, value in ours.items():
        if bf16 is not None and m >= FROM_M and k >= FROM_K:
            text.append(verdict(f"{OURS}, {m} rows, over the BF16 ceiling", value / bf16, LEVEL))
        peer = forms.get(SCALED_MM, {}).get(m)
        if peer is not None and m >= FROM_M:
            text.append(verdict(f"{OURS}, {m} rows, over {SCALED_MM}", value / peer, LEVEL))
    return text


def _gpu_linears(rows: list[Receipt]) -> list[str]:
    text = []
    for (m, n, k), times in _by_size(rows, "training linear").items():
        text += ["", f"Linear {k} to {n}, {m} tokens, forward and backward: ms"]
        text += [f"  {form:<36}{r.value * 1e3:>10.2f}" for form, r in times.items()]
        if BF16 in times and OURS in times:
            ratio = times[BF16].value / times[OURS].value
            text.append(verdict(f"{BF16} over {OURS}", ratio, OVER_BF16))
    return text


def _by_size(rows: list[Receipt], what: str) -> dict[tuple, dict[str, Receipt]]:
    """Receipts of one kind by (m, n, k), and within these by form; k None where there is none."""
    found: dict[tuple, dict[str, Receipt]] = {}
    for r in (r for r in rows if r.what == what):
        key = tuple(r.shapes.get(side) for side in ("m", "n", "k"))
        found.setdefault(key, {})[r.shapes["form"]] = r
    return found
