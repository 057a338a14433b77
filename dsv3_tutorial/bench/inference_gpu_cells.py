"""Cells of the GPU benchmark: FP8 latent, narrow weights, and the trained checkpoint writing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.attention.decode import latent_decode
from dsv3_tutorial.attention.decode_fp8 import fp8_latent_decode
from dsv3_tutorial.attention.rows_fp8 import RowLayout
from dsv3_tutorial.bench import attention_steps, inference_text, timing
from dsv3_tutorial.bench.attention_gpu import Device, _rate, _seconds, _unless_out_of_memory
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.inference.generate import Generation, generate
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.receipts import Receipt
from dsv3_tutorial.weights.formats import quantize
from dsv3_tutorial.weights.matmul import quantized_matmul

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    cores: tuple[int, ...] = (1024, 8192, 32768)  # cached tokens, batch 1
    heads: tuple[int, ...] = (16, 128)
    decoded: tuple[tuple[int, int], ...] = ((1, 8192), (1, 32768), (32, 8192))  # batch, context
    products: tuple[tuple[int, int], ...] = ((4096, 7168), (7168, 2048), (18432, 7168))  # m, k
    rows: tuple[int, ...] = (1, 4, 16, 64)
    formats: tuple[str, ...] = ("int8", "fp8", "int4")
    generated: tuple[tuple[int, int], ...] = ((1, 128), (32, 128))  # batch, new tokens
    repeats: int = 21
    seconds: float = 2.0  # a cell


def latent_rows(cfg: ModelConfig, sizes: Sizes, device: Device) -> Iterator[list[Receipt]]:
    """Decoding over FP8 rows of 656 bytes beside BF16's 1,152."""
    for heads in sizes.heads:
        for batch, context in sizes.decoded:
            args = cfg, heads, batch, context, sizes, device
            where = f"latent, {heads} heads, batch {batch}, {context} tokens"
            yield _unless_out_of_memory(where, lambda args=args: latent_cell(*args))


def latent_cell(
    cfg: ModelConfig, heads: int, batch: int, context: int, sizes: Sizes, device: Device
) -> list[Receipt]:
    """Both kernels at one size, and the bytes that each reads a second."""
    c, r = cfg.kv_lora_rank, cfg.qk_rope_head_dim
    options = {"device": device.place, "dtype": torch.bfloat16}
    q = torch.randn(batch, 1, heads, c + r, **options)
    cached = torch.randn(batch, context, c + r, **options)
    rows = RowLayout(c, r).pack(cached[..., :c], cached[..., c:])
    lengths = torch.full((batch,), context, device=device.place)
    rest = lengths, c, cfg.softmax_scale, device.backend
    runs: dict[str, Run] = {
        "bf16": lambda: latent_decode(q, cached, *rest),
        "fp8": lambda: fp8_latent_decode(q, rows, *rest),
    }
    same(runs, 0.1)  # the codes are rounded
    shapes = {"heads": heads, "batch": batch, "context": context}
    moved = {"bf16": cached.nbytes, "fp8": rows.nbytes}
    return _with_rates("latent decode", shapes, timed(runs, sizes, device), moved, device)


def product_rows(cfg: ModelConfig, sizes: Sizes, device: Device) -> Iterator[list[Receipt]]:
    """Weight-only products of few rows beside BF16's."""
    for m, k in sizes.products:
        weight = torch.randn(m, k, device=device.place, dtype=torch.bfloat16)
        for rows in sizes.rows:
            yield product_cell(weight, rows, sizes, device)


def product_cell(weight: Tensor, rows: int, sizes: Sizes, device: Device) -> list[Receipt]:
    """One weight and number of rows, every format."""
    m, k = weight.shape
    x = torch.randn(rows, k, device=device.place, dtype=torch.bfloat16)
    codes = {fmt: quantize(weight, fmt) for fmt in sizes.formats}
    runs: dict[str, Run] = {"bf16": lambda: F.linear(x, weight)}
    for fmt, q in codes.items():
        runs[fmt] = lambda q=q: quantized_matmul(x, q, device.backend)
    same(runs, 0.3)  # four bits on random weights
    moved = {"bf16": weight.nbytes} | {fmt: q.nbytes for fmt, q in codes.items()}
    shapes = {"rows": rows, "m": m, "k": k}
    return _with_rates("weight product", shapes, timed(runs, sizes, device), moved, device)


def generation_rows(cfg: ModelConfig, sizes: Sizes, device: Device) -> Iterator[list[Receipt]]:
    """The trained checkpoint: eager, as CUDA graphs, and with one draft; float32 and BF16."""
    for dtype in (torch.float32, torch.bfloat16):
        folder = inference_text.folder()
        model = DeepSeekV3.from_pretrained(folder, dtype, device.place).eval()
        for batch, new in sizes.generated:
            yield generation_cell(model, batch, new, device)


def generation_cell(model: DeepSeekV3, batch: int, new: int, device: Device) -> list[Receipt]:
    """Tokens a second behind the prompts, the best of three calls; wall clock."""
    prompts, dtype = inference_text.prompts(batch), str(model.lm_head.weight.dtype)[6:]
    graphs = device.place != "cpu"
    ways = {"eager": {}, "speculation": {"speculate": 1}}
    if graphs:
        ways |= {"graph": {"compiled": True}}
        ways |= {"graph, speculation": {"compiled": True, "speculate": 1}}
    rows, wanted = [], None
    for form, options in ways.items():
        done = [generate(model, prompts, new, **options) for _ in range(3)]
        wanted = wanted or done[0].sequences
        rates = sorted(_rate_of(one) for one in done)
        shapes = {"form": form, "batch": batch, "new_tokens": new, "dtype": dtype}
        same = torch.tensor(done[0].sequences) == torch.tensor(wanted)
        shapes |= {"same": float(same.double().mean())}
        stats = {"median": rates[1], "q1": rates[0], "q3": rates[2], "repeats": len(rates)}
        made = _seconds("gpu generation", shapes, stats, device)
        rows.append(replace(made, unit="tokens/s"))
    return rows


def _with_rates(
    what: str,
    shapes: dict,
    times: Mapping[str, dict[str, float]],
    moved: Mapping[str, int],
    device: Device,
) -> list[Receipt]:
    """Seconds of every form, and the bytes it reads a second as a share of a copy's."""
    timed = [_seconds(what, {"form": f, **shapes}, s, device) for f, s in times.items()]
    copied = device.ceilings.copy.value
    return timed + [_rate(r, "B/s", moved[r.shapes["form"]], "copy", copied) for r in timed]


def timed(runs: Mapping[str, Run], sizes: Sizes, device: Device) -> dict[str, dict[str, float]]:
    options = {"timer": device.timer, "repeats": sizes.repeats, "seconds": sizes.seconds}
    return timing.compare(runs, **options)


def same(runs: Mapping[str, Run], tolerance: float = 0.03) -> None:
    steps = {form: attention_steps.Step(run, lambda: None, 0) for form, run in runs.items()}
    attention_steps.check_agreement(steps, tolerance)


def _rate_of(done: Generation) -> float:
    return done.decoded / done.decode_s
