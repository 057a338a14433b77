"""The decode kernel on a GPU: bytes and FLOPs a second, as fractions of what the device can do.

CUDA events, the L2 cache emptied before each run, medians. Beside it PyTorch's SDPA over expanded
heads, and the whole layer against transformers'. BF16, DeepSeek-V3's latent: C = 512, R = 64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.attention.decode import latent_decode, latent_decode_reference
from dsv3_tutorial.bench import attention_steps, machine, timing
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.receipts import Receipt

OURS, SDPA = "latent_decode", "sdpa, expanded heads"
_HEADROOM = 0.8  # of the free memory


@dataclass(frozen=True)
class Sizes:
    """What is measured of the kernel (heads x batches x contexts) and of the whole layer."""

    heads: tuple[int, ...] = (16, 128)
    batches: tuple[int, ...] = (1, 8, 32, 128)
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536)
    layer_contexts: tuple[int, ...] = (1024, 8192, 32768)
    repeats: int = 21
    seconds: float = 2.0  # a cell


QUICK = Sizes((16,), (1, 8), (1024, 4096), (1024, 4096), 5, 0.5)


@dataclass(frozen=True)
class Device:
    """Where to run, how to time it, and the measured ceilings to hold it against."""

    place: str
    timer: timing.Timer
    ceilings: machine.Ceilings
    backend: str | None = None


def run(folder: Path | None, quick: bool = False) -> None:
    """Measure on the CUDA device, print as it goes, keep what was measured cell by cell."""
    ceilings = machine.measure(4.0, "cuda")
    device = Device("cuda", timing.gpu_timer(), ceilings)
    print("\n".join(machine.lines(ceilings)))
    print(record(ModelConfig.named("deepseek-v3"), QUICK if quick else Sizes(), device, folder))


def record(cfg: ModelConfig, sizes: Sizes, device: Device, folder: Path | None) -> Path | None:
    """Both tables, each cell kept as soon as it is measured; the file, None if nothing fitted."""
    path = None
    with torch.no_grad():
        for rows in chain(kernel_rows(cfg, sizes, device), layer_rows(cfg, sizes, device)):
            for row in rows:
                print(words(row), flush=True)
            path = receipts.append("attention", rows, folder=folder)
    return path


def kernel_rows(cfg: ModelConfig, sizes: Sizes, device: Device) -> Iterator[list[Receipt]]:
    """The kernel at every size that fits, one list of receipts a cell; what does not is printed."""
    for heads in sizes.heads:
        narrow = replace(cfg, num_attention_heads=heads, num_key_value_heads=heads)
        check_kernel(narrow, device)
        for batch in sizes.batches:
            for context in sizes.contexts:
                where = f"{heads} heads, batch {batch}, {context:,} tokens"
                cell = (narrow, batch, context, sizes, device)
                yield _unless_out_of_memory(where, lambda cell=cell: kernel_cell(*cell))


def kernel_cell(
    cfg: ModelConfig, batch: int, context: int, sizes: Sizes, device: Device
) -> list[Receipt]:
    """The kernel, and SDPA where its heads fit, at one size."""
    heads, rank, width = cfg.num_attention_heads, cfg.kv_lora_rank, _width(cfg)
    q, latent, lengths = _inputs(cfg, batch, context, device.place)
    scale = cfg.softmax_scale
    runs = {OURS: lambda: latent_decode(q, latent, lengths, rank, scale, device.backend)}
    elements = batch * context * heads * (cfg.qk_head_dim + cfg.v_head_dim)
    if 2 * elements <= _HEADROOM * _free_bytes(device.place):
        runs[SDPA] = _sdpa(cfg, batch, context, device.place)
    else:
        print(f"{heads} heads, batch {batch}, {context:,} tokens: {SDPA} left out, no memory")
    options = {"timer": device.timer, "repeats": sizes.repeats, "seconds": sizes.seconds}
    times = timing.compare(runs, **options)
    shapes = {"heads": heads, "batch": batch, "context": context, "dtype": "bfloat16"}
    rows = [_seconds("decode kernel", {"form": f, **shapes}, s, device) for f, s in times.items()]
    moved = 2 * (batch * context * width + q.numel() + batch * heads * rank)
    flops = 2 * batch * context * heads * (width + rank)
    ceilings = device.ceilings
    rates = [("B/s", moved, "copy", ceilings.copy.value)]
    if "bf16" in ceilings.matrix:
        rates.append(("FLOP/s", flops, "matmul bf16", ceilings.matrix["bf16"].value))
    return rows + [_rate(rows[0], *rate) for rate in rates]


def check_kernel(cfg: ModelConfig, device: Device) -> None:
    """Two sequences, unequal lengths: the kernel against the reference, or BenchError."""
    q, latent, lengths = _inputs(cfg, 2, 300, device.place)
    lengths[0] = 77
    rest = (latent, lengths, cfg.kv_lora_rank, cfg.softmax_scale)
    wanted = latent_decode_reference(q, *rest)
    runs = {"reference": wanted, OURS: latent_decode(q, *rest, backend=device.backend)}
    steps = {
        form: attention_steps.Step(lambda out=out: out, lambda: None, 0)
        for form, out in runs.items()
    }
    attention_steps.check_agreement(steps, attention_steps.TOLERANCE[torch.bfloat16])


def layer_rows(cfg: ModelConfig, sizes: Sizes, device: Device) -> Iterator[list[Receipt]]:
    """The whole layer at batch 1, our forms and transformers', BF16: receipts as on the CPU.

    Both are eager PyTorch around their attention, so these times have the launches in them.
    """
    layer = attention_steps.Layer(cfg, device.place, torch.bfloat16)
    if layer.peer_problem is not None:
        print(f"transformers is left out: {layer.peer_problem}")
    for context in sizes.layer_contexts:
        where = f"whole layer, {context:,} tokens"
        yield _unless_out_of_memory(
            where, lambda context=context: layer_cell(layer, context, sizes, device)
        )


def layer_cell(
    layer: attention_steps.Layer, context: int, sizes: Sizes, device: Device
) -> list[Receipt]:
    """All forms that fit at one context, in turn."""
    limit = _HEADROOM * _free_bytes(device.place)
    fits = attention_steps.fitting(layer.cfg, context, 1, attention_steps.FORMS, limit, element=2)
    steps = layer.steps(context, 1, fits)
    attention_steps.check_agreement(steps, attention_steps.TOLERANCE[torch.bfloat16])
    times = attention_steps.compare(steps, device.timer, sizes.repeats, sizes.seconds)
    shapes = {"config": "v3", "context": context, "batch": 1, "dtype": "bfloat16"}
    return [
        _seconds(
            "decode step",
            {"form": form, **shapes, "cache_bytes": steps[form].cache_bytes},
            stats,
            device,
        )
        for form, stats in times.items()
    ]


def words(r: Receipt) -> str:
    """One receipt, one aligned line."""
    at = f"batch {r.shapes['batch']:>4}{r.shapes['context']:>8,} tokens"
    heads = f"{r.shapes['heads']:>4} heads  " if "heads" in r.shapes else f"{'layer':>10}  "
    powers = {"s": (1e6, "us"), "B/s": (1e-9, "GB/s"), "FLOP/s": (1e-12, "TFLOP/s")}
    factor, unit = powers[r.unit]
    share = f"  {r.fraction:.0%} of measured {r.ceiling}" if r.ceiling else ""
    return f"{heads}{at}  {r.shapes['form']:<22}{r.value * factor:>10.1f} {unit:<8}{share}"


def _unless_out_of_memory(where: str, cell: Callable[[], list[Receipt]]) -> list[Receipt]:
    try:
        return cell()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        print(f"{where}: left out, out of memory")
        return []


def _inputs(cfg: ModelConfig, batch: int, context: int, place: str) -> tuple[Tensor, ...]:
    """q (B, 1, H, C + R), latent (B, T, C + R), lengths (B,), as a decode step has them."""
    where = {"device": place, "dtype": torch.bfloat16}
    q = torch.empty(batch, 1, cfg.num_attention_heads, _width(cfg), **where).normal_()
    latent = torch.empty(batch, context, _width(cfg), **where).normal_()
    return q, latent, torch.full((batch,), context, device=place)


def _sdpa(cfg: ModelConfig, batch: int, context: int, place: str) -> Callable[[], Tensor]:
    """PyTorch's fused attention over keys (B, H, T, N + R) and values (B, H, T, V) of all heads."""
    where = {"device": place, "dtype": torch.bfloat16}
    heads, wide = cfg.num_attention_heads, cfg.qk_head_dim
    q = torch.empty(batch, heads, 1, wide, **where).normal_()
    keys = torch.empty(batch, heads, context, wide, **where).normal_()
    values = torch.empty(batch, heads, context, cfg.v_head_dim, **where).normal_()
    return lambda: F.scaled_dot_product_attention(q, keys, values, scale=cfg.softmax_scale)


def _width(cfg: ModelConfig) -> int:
    return cfg.kv_lora_rank + cfg.qk_rope_head_dim


def _free_bytes(place: str) -> int:
    return torch.cuda.mem_get_info()[0] if place == "cuda" else 2**28


def _seconds(what: str, shapes: dict, stats: dict[str, float], device: Device) -> Receipt:
    return Receipt(
        what=what,
        shapes=shapes,
        value=stats["median"],
        unit="s",
        spread={"q1": stats["q1"], "q3": stats["q3"]},
        repeats=int(stats["repeats"]),
        **machine.here(device.place),
    )


def _rate(timed: Receipt, unit: str, work: int, name: str, ceiling: float) -> Receipt:
    """The same run as work a second, and as a share of the measured ceiling."""
    low, high = (work / timed.spread[name] for name in ("q3", "q1"))
    value = work / timed.value
    return replace(
        timed,
        value=value,
        unit=unit,
        spread={"q1": low, "q3": high},
        ceiling=name,
        fraction=value / ceiling,
    )
