"""A linear layer whose weight stays in eight or four bits: nothing is dequantised ahead of time."""

import torch
from torch import Tensor, nn

from dsv3_tutorial.weights import cpu
from dsv3_tutorial.weights.formats import Quantized, dequantize, pack_int4, quantize, spread


class QuantizedLinear(nn.Module):
    """x (..., k) -> (..., m), the weight as codes and scales; for inference, without a gradient.

    On a GPU `weights.matmul` dequantises in registers. On a CPU `weights.cpu` says which product
    runs, and from the first call on the codes may lie in its order alone. `weight` is made on
    demand, and stands in `state_dict()`: what is saved of it is a plain checkpoint.
    """

    def __init__(self, q: Quantized, bias: Tensor | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.fmt, self.shape, self.dtype, self.nbytes = q.fmt, q.shape, dtype, q.nbytes
        self.register_buffer("codes", q.codes, persistent=False)
        self.register_buffer("scale", q.scale, persistent=False)
        self.register_buffer("bias", bias)
        self.product: cpu.Product | None = None

    @classmethod
    def of(cls, linear: nn.Linear, fmt: str) -> "QuantizedLinear":
        """The same layer with its weight in `fmt`, one of weights.formats.FORMATS."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(quantize(linear.weight.detach(), fmt), bias, linear.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            product = self.product or self._prepare()
            out = product.multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.shape[0])
        else:
            out = _on_gpu(x, self.quantized)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _prepare(self) -> cpu.Product:
        self.product = cpu.product(self.quantized)
        if self.product.owns:
            self.codes = None  # one copy is enough
        return self.product

    @property
    def quantized(self) -> Quantized:
        """The weight as it is stored. Codes that their product alone holds are taken out: slow."""
        if self.codes is not None:
            return Quantized(self.fmt, self.codes, self.scale, self.shape)
        stands_for = cpu.unpacked(self.product.multiply, self.shape)
        step = spread(Quantized(self.fmt, torch.empty(0), self.scale, self.shape))
        codes = (stands_for / step).round().to(torch.int8)
        codes = pack_int4(codes) if self.fmt == "int4" else codes
        return Quantized(self.fmt, codes, self.scale, self.shape)

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, (m, k) in the dtype of the weight that they were made from."""
        return dequantize(self.quantized, self.dtype or torch.float32)

    def extra_repr(self) -> str:
        m, k = self.shape
        return f"in_features={k}, out_features={m}, fmt={self.fmt}"

    def _apply(self, fn, recurse=True):
        return _move(self, fn, super()._apply)

    def __getstate__(self) -> dict:
        """For a copy and for pickle: codes, and no product, which the next call makes anew."""
        q = self.quantized
        kept = {**self._buffers, "codes": q.codes, "scale": q.scale}
        return {**self.__dict__, "product": None, "_buffers": kept}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight


class QuantizedStack(nn.Module):
    """Matrices of one shape, as a layer's experts are. forward: x (M, k), which (M,) -> (M, m).

    Row i meets matrix which[i]: the codes of just these matrices are read, M times over where rows
    share one. `weight` (E, m, k) is for many rows. Large ones on a CPU lie `apart`, each a
    QuantizedLinear, for a caller that goes from one to the next.
    """

    def __init__(self, q: Quantized, dtype: torch.dtype | None = None):
        super().__init__()
        self.fmt, self.shape, self.dtype, self.nbytes = q.fmt, q.shape, dtype, q.nbytes
        self.apart = nn.ModuleList()
        if q.codes.device.type == "cpu" and q.shape[1] * q.shape[2] >= cpu.LARGE:
            ones = (Quantized(q.fmt, c, s, q.shape[1:]) for c, s in zip(q.codes, q.scale))
            self.apart.extend(QuantizedLinear(one, dtype=dtype) for one in ones)
            q = None
        self.register_buffer("codes", None if q is None else q.codes, persistent=False)
        self.register_buffer("scale", None if q is None else q.scale, persistent=False)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        codes = self.codes.view(torch.uint8)[which].view(self.codes.dtype)  # indexing wants no FP8
        scale = self.scale[which]
        if self.fmt == "int8":  # the scale can wait until the sum is done
            return torch.bmm(codes.to(x.dtype), x[:, :, None])[..., 0] * scale.to(x.dtype)
        q = Quantized(self.fmt, codes, scale, (len(which), *self.shape[1:]))
        return torch.bmm(dequantize(q, x.dtype), x[:, :, None])[..., 0]  # (M, m)

    @property
    def quantized(self) -> Quantized:
        """All matrices as they are stored, (E, m, k)."""
        if not self.apart:
            return Quantized(self.fmt, self.codes, self.scale, self.shape)
        every = [one.quantized for one in self.apart]
        codes = torch.stack([q.codes for q in every])
        return Quantized(self.fmt, codes, torch.stack([q.scale for q in every]), self.shape)

    @property
    def weight(self) -> Tensor:
        """What the codes stand for: (E, m, k)."""
        return dequantize(self.quantized, self.dtype or torch.float32)

    def _apply(self, fn, recurse=True):
        return super()._apply(fn, recurse) if self.apart else _move(self, fn, super()._apply)

    def state_dict(self, *args, destination=None, **options):
        """Nothing: the layer that these matrices belong to knows their names."""
        return {} if destination is None else destination

    def extra_repr(self) -> str:
        return f"shape={self.shape}, fmt={self.fmt}"


def _move(module: nn.Module, fn, apply) -> nn.Module:
    """Codes and scales follow to another device, and never to another dtype."""
    q = module.quantized
    module.product = module.codes = module.scale = None
    apply(fn)
    device = fn(torch.empty(1, device=q.scale.device)).device
    module.codes, module.scale = q.codes.to(device), q.scale.to(device)
    return module


def _on_gpu(x: Tensor, q: Quantized) -> Tensor:
    from dsv3_tutorial.weights.matmul import quantized_matmul  # its kernels load where they run

    return quantized_matmul(x, q)
