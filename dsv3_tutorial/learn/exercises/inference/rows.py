"""The 656 bytes of a token: codes, scales and key, one after another."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.learn.attempt import first_line
from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.exercises.inference.latent_cases import quantized
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _tokens(seed: int, rank: int, rope: int, *lead: int, key: torch.dtype = torch.float32):
    """Codes, scales and keys of tokens (*lead)."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        latent, k_rope = randn(seed, (*lead, rank), (*lead, rope))
        codes, scales = quantized(latent.flatten(0, -2) if lead else latent[None])
        return codes.view(*lead, rank), scales.view(*lead, -1), k_rope.to(key)

    return make


def _any_memory_order() -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, k_rope = _tokens(4, 256, 8, 3, 5)()
    return codes.transpose(0, 1), scales.transpose(0, 1), k_rope.transpose(0, 1)


def _bytes(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.uint8)


def _open(codes=_bytes, scales=_bytes, key=lambda k: _bytes(k.to(torch.bfloat16)), order=(0, 1, 2)):
    """`pack_rows` with its parts open to be got wrong."""

    def pack(c: Tensor, s: Tensor, k: Tensor) -> Tensor:
        parts = codes(c), scales(s), key(k)
        return torch.cat([parts[i] for i in order], dim=-1)

    return lambda codes, scales, k_rope: pack(codes, scales, k_rope)


def _as_numbers(part: Tensor) -> Tensor:
    return part.float().to(torch.int32).to(torch.uint8)


def _interleaved(codes, scales, k_rope):
    """Each tile's scale right behind its codes."""
    tiles = codes.contiguous().view(torch.uint8).split(128, dim=-1)
    four = _bytes(scales).unflatten(-1, (-1, 4)).unbind(dim=-2)
    parts = [part for pair in zip(tiles, four, strict=True) for part in pair]
    return torch.cat([*parts, _bytes(k_rope.to(torch.bfloat16))], dim=-1)


def _padded(codes: Tensor) -> Tensor:
    return F.pad(_bytes(codes), (0, -codes.shape[-1] % 128))


def _all_of_one_kind(codes, scales, k_rope):
    """All tokens' codes, then all scales, then all keys."""
    parts = codes, scales, k_rope.to(torch.bfloat16)
    flat = torch.cat([_bytes(part).flatten() for part in parts])
    return flat.view(*codes.shape[:-1], -1)


def _of_one_kind(error: BaseException, arguments: tuple) -> str | None:
    """After an error about dtypes: bytes first, then side by side."""
    text = first_line(error)
    if "romot" in text or "dtype" in text or "Float8" in text:
        return "torch.cat converts numbers of different kinds: .view(torch.uint8) each part first."
    return None


PACK_ROWS = Exercise(
    name="inference.pack_rows",
    reference="dsv3_tutorial.fp8.latent:pack_rows",
    cases=[
        Case("DeepSeek-V3's sizes", _tokens(0, 512, 64, 3)),
        Case("a short last tile", _tokens(1, 200, 6, 4)),
        Case("a batch of sequences", _tokens(2, 256, 8, 2, 3, key=torch.bfloat16)),
        Case("in another memory order", _any_memory_order),
        Case("one token", _tokens(3, 96, 32, 1), hidden=True),
        Case("no lead axes", _tokens(5, 128, 4), hidden=True),
        Case("float64 keys", _tokens(6, 384, 2, 2, 2, key=torch.float64), hidden=True),
        Case("no key", _tokens(7, 256, 0, 5), hidden=True),
    ],
    hints=[
        "tensor.contiguous().view(torch.uint8) shows the bytes of a tensor without changing one: "
        "the last axis gets longer by the bytes of a number.",
        "The key is rounded first: k_rope.to(torch.bfloat16).",
        "torch.cat of the three, dim=-1: codes, scales, key.",
    ],
    difficulty=2,
    importance=3,
    minutes=5,
    lines=2,
    mutants=[
        Mutant(
            "key first",
            _open(order=(2, 0, 1)),
            "The key comes first here: codes, scales, then the key.",
        ),
        Mutant(
            "scales last",
            _open(order=(0, 2, 1)),
            "The scales come last here: codes, scales, then the key.",
        ),
        Mutant(
            "scales first",
            _open(order=(1, 0, 2)),
            "The scales come first here: codes, scales, then the key.",
        ),
        Mutant(
            "no scales", _open(order=(0, 2)), "The scales are missing: codes mean nothing alone."
        ),
        Mutant(
            "key as it came",
            _open(key=_bytes),
            "The key is stored in the dtype it came in: BF16, two bytes a number.",
        ),
        Mutant(
            "key in float16",
            _open(key=lambda k: _bytes(k.to(torch.float16))),
            "The key is in float16, two bytes as well, but other ones: BF16.",
        ),
        Mutant(
            "key in E4M3",
            _open(key=lambda k: _bytes(k.to(torch.float8_e4m3fn))),
            "The key is in eight bits: it stays in BF16.",
        ),
        Mutant(
            "scales in BF16",
            _open(scales=lambda s: _bytes(s.to(torch.bfloat16))),
            "The scales are in BF16: they stay float32, four bytes.",
        ),
        Mutant(
            "codes as numbers",
            _open(codes=_as_numbers),
            "The codes are converted to whole numbers: .view(torch.uint8) keeps their bits.",
        ),
        Mutant(
            "everything as numbers",
            _open(_as_numbers, _as_numbers, lambda k: _as_numbers(k.to(torch.bfloat16))),
            "Numbers are converted: .view(torch.uint8) keeps the bits.",
        ),
        Mutant(
            "scale behind its tile",
            _interleaved,
            "Each scale stands behind its own tile: all codes come first.",
        ),
        Mutant(
            "padded",
            _open(codes=_padded),
            "The last tile is filled up to 128: a row holds only the codes that there are.",
        ),
        Mutant(
            "not token by token",
            _all_of_one_kind,
            "All codes of all tokens come first: a row belongs to one token.",
        ),
    ],
    raised=_of_one_kind,
)
