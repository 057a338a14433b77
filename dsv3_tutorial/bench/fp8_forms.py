"""Who competes on a GPU: ours, PyTorch's scaled_mm, Transformer Engine, and BF16; and who may.

A contestant that cannot run here is left out with its reason, and one whose result is not BF16's
within FP8's rounding is not timed.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsv3_tutorial.bench.fp8_table import BF16, ENGINE, OURS, QUANTISED, SCALED_MM, TENSOR
from dsv3_tutorial.fp8 import engine, gemm, quant
from dsv3_tutorial.fp8.linear import DEEPSEEK, Fp8Linear, Scaling

WORST = 0.1  # of the BF16 result's norm: FP8's own rounding is 0.04
Run = Callable[[], Any]


def product_forms(x: Tensor, weight: Tensor) -> dict[str, Run]:
    """What computes x @ weight^T in BF16 here: ours, PyTorch's, Transformer Engine's, and BF16."""
    unchecked, bf16 = {"checked": False}, torch.bfloat16
    tiles, blocks = quant.quantize_tiles(x, **unchecked), quant.quantize_blocks(weight, **unchecked)
    whole = *quant.quantize_tensor(x, **unchecked), *quant.quantize_tensor(weight, **unchecked)

    def ready(backend: str) -> Run:
        return lambda: gemm.matmul(*tiles, *blocks, bf16, backend=backend)

    def quantising(backend: str) -> Run:
        return lambda: gemm.matmul(
            *quant.quantize_tiles(x, **unchecked), *blocks, bf16, backend=backend
        )

    forms = {
        BF16: lambda: x @ weight.T,
        OURS: ready("triton"),
        OURS + QUANTISED: quantising("triton"),
        SCALED_MM: ready("scaled_mm"),
        SCALED_MM + QUANTISED: quantising("scaled_mm"),
        TENSOR: lambda: gemm.matmul(*whole, bf16, backend="scaled_mm"),
    }
    if engine.problem() is None:
        forms[ENGINE + QUANTISED] = _engine_product(x, weight)
    return forms


def linear_layers(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """One layer a form, all with this weight (n, k) in BF16."""
    n, k = weight.shape
    plain = torch.nn.Linear(k, n, bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight)
    layers = {
        BF16: plain,
        OURS: Fp8Linear.of(plain, DEEPSEEK),
        f"{OURS}, float32 scales": Fp8Linear.of(plain, Scaling(pow2=False)),
    }
    if engine.problem() is None:
        made = that_run({ENGINE: lambda: _engine_layer(weight)})
        layers |= {form: layer for form, (_, layer) in made.items()}
    return layers


def both_ways(layer: Callable, x: Tensor, dy: Tensor) -> Run:
    """Forward and backward of a layer: () -> (y, dx, dw)."""

    def step() -> tuple[Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, layer.weight), dy)

    return step


def that_run(forms: dict[str, Run]) -> dict[str, tuple[Run, Any]]:
    """Each form with what it gave; one that raises is left out, and the reason printed."""
    found = {}
    for form, run in forms.items():
        try:
            found[form] = run, run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a peer may raise anything; the others go on
            print(f"{form}: left out, {type(error).__name__}: {_first_line(error)}")
    return found


def agrees(form: str, out: Tensor, wanted: Tensor) -> bool:
    """Whether a result is BF16's but for FP8's rounding; a line says so where it is not."""
    off = ((out.float() - wanted.float()).norm() / wanted.float().norm()).item()
    if not off <= WORST:
        print(f"{form}: not timed, its result lies {off:.2f} from BF16's")
    return off <= WORST


def _engine_layer(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Transformer Engine's Linear with this weight, in the recipe of this device."""
    layer = engine.linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)

    def call(x: Tensor, **options: Any) -> Tensor:
        with engine.autocast():
            return layer(x, **options)

    call.weight = layer.weight
    return call


def _engine_product(x: Tensor, weight: Tensor) -> Run:
    """The weight is quantised in the first call and kept, as for the micro-batches of a step."""

    @cache
    def layer() -> Callable[..., Tensor]:
        made = _engine_layer(weight)
        made(x, is_first_microbatch=True)
        return made

    return lambda: layer()(x, is_first_microbatch=False)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
