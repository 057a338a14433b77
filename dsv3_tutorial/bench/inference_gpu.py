"""Inference kernels on a GPU against what they replace: attention core, FP8 latent, narrow weights.

CUDA events, the L2 cache emptied before each run, medians, BF16, DeepSeek-V3's sizes. Receipts
`inference`, device_kind gpu:

  attention core   s; form, heads, batch, context. From queries and cached latent to each head's
                   output; "graph" after a form: its launches replayed as one CUDA graph.
  latent decode    s and B/s; form (bf16, fp8), heads, batch, context.
  weight product   s and B/s; form (bf16 or a format), rows, m, k.
  gpu generation   tokens/s of the trained checkpoint, wall clock; form, batch, new_tokens, same.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.attention import latent as mla
from dsv3_tutorial.attention.decode import latent_decode
from dsv3_tutorial.bench import machine, timing
from dsv3_tutorial.bench.attention_gpu import Device, _seconds, _unless_out_of_memory
from dsv3_tutorial.bench.attention_steps import Layer
from dsv3_tutorial.bench.inference_gpu_cells import (
    Run,
    Sizes,
    generation_rows,
    latent_rows,
    product_rows,
    same,
    timed,
)
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.receipts import Receipt

NAME = "inference"
OURS = "absorbed"
CORE_TARGETS = {8192: 30.0, 32768: 80.0}
PRODUCT_TARGET = 1.7  # INT8 and FP8 against BF16, one row
QUICK = Sizes((1024,), (16,), ((1, 1024),), ((4096, 7168),), (1,), ("int8",), ((1, 16),), 5, 0.5)


def run(folder: Path | None, quick: bool = False) -> None:
    """Measure on the CUDA device, print as it goes, keep what was measured cell by cell."""
    ceilings = machine.measure(4.0, "cuda")
    device = Device("cuda", timing.gpu_timer(), ceilings)
    print("\n".join(machine.lines(ceilings)))
    print(record(ModelConfig.named("deepseek-v3"), QUICK if quick else Sizes(), device, folder))


def record(cfg: ModelConfig, sizes: Sizes, device: Device, folder: Path | None) -> Path | None:
    """All four tables, each cell kept as soon as it is measured; the file."""
    path, parts = None, (core_rows, latent_rows, product_rows, generation_rows)
    with torch.no_grad():
        for rows in chain.from_iterable(part(cfg, sizes, device) for part in parts):
            print("\n".join(words(row) for row in rows), flush=True)
            print("\n".join(verdicts(rows)), end="", flush=True)
            path = receipts.append(NAME, rows, folder=folder) if rows else path
    return path


def core_rows(cfg: ModelConfig, sizes: Sizes, device: Device) -> Iterator[list[Receipt]]:
    """The core of one layer, ours and transformers', at each context."""
    layer = Layer(cfg, device.place, torch.bfloat16)
    if layer.peer_problem is not None:
        print(f"transformers is left out: {layer.peer_problem}")
    for context in sizes.cores:
        args = layer, context, sizes, device
        yield _unless_out_of_memory(f"core, {context}", lambda args=args: core_cell(*args))


def core_cell(layer: Layer, context: int, sizes: Sizes, device: Device) -> list[Receipt]:
    """One context, batch 1; the same output asserted."""
    runs = cores(layer, context, device)
    same(runs)
    if device.place != "cpu":
        runs |= {f"{form}, graph": _graphed(run) for form, run in runs.items()}
    times = timed(runs, sizes, device)
    shapes = {"heads": layer.cfg.num_attention_heads, "batch": 1, "context": context}
    shapes |= {"dtype": "bfloat16"}
    return [_seconds("attention core", {"form": f, **shapes}, s, device) for f, s in times.items()]


def cores(layer: Layer, context: int, device: Device) -> dict[str, Run]:
    """From queries (1, 1, H, N + R) and cached latent to (1, 1, H, V), by each implementation."""
    cfg, numbers = layer.cfg, torch.Generator(device.place).manual_seed(context)
    options = {"generator": numbers, "device": device.place, "dtype": torch.bfloat16}
    heads, c = cfg.num_attention_heads, cfg.kv_lora_rank
    q = torch.randn(1, 1, heads, cfg.qk_head_dim, **options)
    cached = torch.randn(1, context, c + cfg.qk_rope_head_dim, **options)
    lengths = torch.tensor([context], device=device.place)
    q_nope, q_rope = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], dim=-1)
    w_uk, w_uv = layer.ours.up_weights()
    scale = cfg.softmax_scale

    def ours() -> Tensor:
        absorbed = torch.cat([mla.absorb_query(q_nope, w_uk), q_rope], dim=-1)
        mixed = latent_decode(absorbed, cached, lengths, c, scale, device.backend)
        return mla.per_head(mixed, w_uv.mT)

    found: dict[str, Run] = {OURS: ours}
    parts = cached[:, None, :, :c].contiguous(), cached[:, None, :, c:].contiguous()
    for form, (module, _) in layer.peers.items():
        attend = _sdpa if form.endswith("sdpa") else _eager
        found[form] = lambda module=module, attend=attend: attend(
            q.transpose(1, 2), *module.expand_kv(*parts), scale
        ).transpose(1, 2)
    return found


def verdicts(rows: list[Receipt]) -> list[str]:
    """The targets that a cell decides, one line each, and the line's end."""
    found = {r.shapes["form"]: r for r in rows if r.unit == "s"}
    if not rows:
        return []
    what, shapes, text = rows[0].what, rows[0].shapes, []
    peers = [r.value for form, r in found.items() if form.startswith("transformers")]
    if what == "attention core" and peers and shapes["context"] in CORE_TARGETS:
        best = min(r.value for form, r in found.items() if form.startswith(OURS))
        text.append(_verdict("core", min(peers) / best, CORE_TARGETS[shapes["context"]]))
    if what == "weight product" and shapes["rows"] == 1:
        narrow = [form for form in ("int8", "fp8") if form in found]
        text += [_verdict(f, found["bf16"].value / found[f].value, PRODUCT_TARGET) for f in narrow]
    return [*text, ""] if text else []


def words(r: Receipt) -> str:
    """One receipt, one line."""
    kept = {name: value for name, value in r.shapes.items() if name not in ("form", "dtype")}
    at = ", ".join(f"{name} {value:g}" for name, value in kept.items())
    factor, unit = {"s": (1e6, "us"), "B/s": (1e-9, "GB/s")}.get(r.unit, (1, r.unit))
    share = f", {r.fraction:.0%} of measured {r.ceiling}" if r.ceiling else ""
    return f"{r.what:<16}{r.shapes['form']:<28}{r.value * factor:>10.1f} {unit:<9}{at}{share}"


def _verdict(name: str, ratio: float, target: float) -> str:
    return f"  {name}: {ratio:.2f}x; target {target:g}x: {'' if ratio >= target else 'not '}reached"


def _sdpa(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def _eager(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    scores = (q @ keys.mT) * scale
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values


def _graphed(run: Run) -> Run:
    """The same launches, recorded once and replayed."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
