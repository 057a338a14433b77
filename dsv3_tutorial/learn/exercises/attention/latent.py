"""What is cached and how it is placed: the joint latent, and the rotation of the shared key."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _compress_case(seed: int, d: int, c: int, r: int):
    return lambda: randn(seed, (2, 5, d), (c + r, d), (c,))


def _tiny_inputs() -> tuple:  # so small that eps decides
    x, weight, gain = randn(6, (1, 3, 8), (9, 8), (6,))
    return x * 1e-3, weight, gain, 1e-4


def _no_bias(x, kv_a_weight, norm_weight, eps=1e-6, bias=None):
    whole, c = F.linear(x, kv_a_weight), len(norm_weight)
    return F.rms_norm(whole[..., :c], (c,), norm_weight, eps), whole[..., c:]


def _key_normed(x, kv_a_weight, norm_weight, eps=1e-6, bias=None):
    whole, c = F.linear(x, kv_a_weight, bias), len(norm_weight)
    key = whole[..., c:]
    return F.rms_norm(whole[..., :c], (c,), norm_weight, eps), F.rms_norm(key, key.shape[-1:])


def _swapped(x, kv_a_weight, norm_weight, eps=1e-6, bias=None):
    whole, c = F.linear(x, kv_a_weight, bias), len(norm_weight)
    return whole[..., c:], F.rms_norm(whole[..., :c], (c,), norm_weight, eps)


def _no_eps(x, kv_a_weight, norm_weight, eps=1e-6, bias=None):
    whole, c = F.linear(x, kv_a_weight, bias), len(norm_weight)
    return F.rms_norm(whole[..., :c], (c,), norm_weight), whole[..., c:]


def _norm_everything(x, kv_a_weight, norm_weight, eps=1e-6, bias=None):
    whole = F.linear(x, kv_a_weight, bias)
    c, r = norm_weight.shape[0], kv_a_weight.shape[0] - norm_weight.shape[0]
    whole = F.rms_norm(whole, (c + r,), None, eps)
    return whole[..., :c] * norm_weight, whole[..., c:]


def _no_norm(x, kv_a_weight, norm_weight, eps=1e-6, bias=None):
    whole = F.linear(x, kv_a_weight, bias)
    return whole[..., : len(norm_weight)], whole[..., len(norm_weight) :]


def _key_first(x, kv_a_weight, norm_weight, eps=1e-6, bias=None):
    whole, c = F.linear(x, kv_a_weight, bias), len(norm_weight)
    k_rope, c_kv = whole[..., :-c], whole[..., -c:]
    return F.rms_norm(c_kv, (c,), norm_weight, eps), k_rope


def _no_gain(x, kv_a_weight, norm_weight, eps=1e-6, bias=None):
    whole, c = F.linear(x, kv_a_weight, bias), len(norm_weight)
    return F.rms_norm(whole[..., :c], (c,), None, eps), whole[..., c:]


def _layer_norm(x, kv_a_weight, norm_weight, eps=1e-6, bias=None):
    whole, c = F.linear(x, kv_a_weight, bias), len(norm_weight)
    return F.layer_norm(whole[..., :c], (c,), norm_weight, None, eps), whole[..., c:]


COMPRESS = Exercise(
    name="attention.compress",
    reference="dsv3_tutorial.attention.latent:compress",
    cases=[
        Case("C 8, R 4", _compress_case(0, 12, 8, 4)),
        Case("C 4, R 8", _compress_case(1, 6, 4, 8)),
        Case(
            "with a bias", lambda: (*randn(4, (2, 3, 12), (12, 12), (8,)), 1e-6, randn(5, (12,))[0])
        ),
        Case("small inputs", lambda: _tiny_inputs()),
        Case("other sizes", _compress_case(2, 16, 10, 2), hidden=True),
        Case(
            "float64", lambda: randn(3, (1, 3, 8), (9, 8), (6,), dtype=torch.float64), hidden=True
        ),
    ],
    hints=[
        "F.linear(x, kv_a_weight, bias) gives (B, S, C + R); C is norm_weight.shape[0].",
        "Slice the last axis: [..., :C] is the latent, [..., C:] the key.",
        "F.rms_norm(latent, (C,), norm_weight, eps), and the key untouched; return both.",
    ],
    difficulty=2,
    importance=5,
    minutes=5,
    lines=4,
    mutants=[
        Mutant("norm over both", _norm_everything, "The norm runs over the key too: latent only."),
        Mutant("no bias", _no_bias, "bias is not used: it is the third argument of F.linear."),
        Mutant("no eps", _no_eps, "eps is not used: hand it to the norm."),
        Mutant("key normed", _key_normed, "The key is normalised as well: it is left as it is."),
        Mutant("swapped", _swapped, "The latent comes first, then the key: return c_kv, k_rope."),
        Mutant("no norm", _no_norm, "The latent is not normalised."),
        Mutant("key first", _key_first, "The key is cut from the front: the latent comes first."),
        Mutant("no gain", _no_gain, "The norm's gain, norm_weight, is not applied."),
        Mutant("LayerNorm", _layer_norm, "The mean is subtracted: that is LayerNorm, not RMSNorm."),
    ],
)


def _rotation(seed: int, s: int, h: int, r: int, b: int = 2, dtype: torch.dtype = torch.float32):
    def make() -> tuple[Tensor, Tensor, Tensor]:
        x, angle = randn(seed, (b, s, h, r), (s, r // 2), dtype=dtype)
        return x, angle.cos(), angle.sin()

    return make


def _halves(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _pairs(x, cos, sin, sign=1, axis=-2, stack=True):
    cos, sin = cos.unsqueeze(axis), sign * sin.unsqueeze(axis)
    a, b = x[..., 0::2], x[..., 1::2]
    one, two = a * cos - b * sin, a * sin + b * cos
    return torch.stack([one, two], -1).flatten(-2) if stack else torch.cat([one, two], -1)


def _overwritten(x, cos, sin):
    cos, sin, out = cos[:, None], sin[:, None], x.clone()
    out[..., 0::2] = out[..., 0::2] * cos - out[..., 1::2] * sin
    out[..., 1::2] = out[..., 0::2] * sin + out[..., 1::2] * cos
    return out


def _no_sine_in_second(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, a * cos + b * sin], -1).flatten(-2)


ROTATE = Exercise(
    name="attention.rotate",
    reference="dsv3_tutorial.attention.rope:rotate_pairs",
    cases=[
        Case("one pair", _rotation(0, 3, 1, 2)),
        Case("four heads of 8", _rotation(1, 5, 4, 8)),
        Case("as many heads as positions", _rotation(2, 4, 4, 6), hidden=True),
        Case("float64, one sequence", _rotation(3, 3, 2, 4, 1, torch.float64), hidden=True),
    ],
    hints=[
        "x[..., 0::2] and x[..., 1::2] are the first and second of each pair.",
        "cos is (S, R / 2) and the pairs are (B, S, H, R / 2): cos.unsqueeze(-2) fits all heads.",
        "torch.stack([first, second], dim=-1).flatten(-2) puts neighbours side by side again.",
    ],
    difficulty=3,
    importance=4,
    minutes=8,
    lines=4,
    mutants=[
        Mutant("halves", _halves, "The two halves are paired, as Llama does; here neighbours are."),
        Mutant(
            "backwards",
            lambda x, cos, sin: _pairs(x, cos, sin, sign=-1),
            "The turn goes the wrong way: the minus sign belongs to the first of the pair.",
        ),
        Mutant(
            "not put back",
            lambda x, cos, sin: _pairs(x, cos, sin, stack=False),
            "The pairs are right, but not where they stood: all firsts come before all seconds.",
        ),
        Mutant(
            "by head",
            lambda x, cos, sin: _pairs(x, cos, sin, axis=0),
            "The angle follows the head, not the position: align cos with axis S of x.",
        ),
        Mutant(
            "overwritten",
            _overwritten,
            "The second line reads a that the first line has already turned: keep the old pair.",
        ),
        Mutant(
            "second coordinate",
            _no_sine_in_second,
            "The second of the pair is a sin + b cos; here it is a cos + b sin.",
        ),
    ],
)

EXERCISES = [COMPRESS, ROTATE]
