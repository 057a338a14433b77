"""Attention over a latent that lies in eight bits, without a dequantised copy of it."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.attempt import first_line
from dsv3_tutorial.learn.compare import difference
from dsv3_tutorial.learn.exercises.inference.latent_cases import cached, scaled_tiles
from dsv3_tutorial.learn.exercises.inference.latent_copies import COPIES, opened, tiles_of
from dsv3_tutorial.learn.registry import Budget, Case, Exercise, Mutant


def _a_softmax_each(*args):
    """As if a tile were a sequence of its own."""
    tiles, position = tiles_of(*args)
    parts = []
    for q, c, s in tiles:
        probs = (((q @ c.T) * s + position) * args[-1]).softmax(dim=-1)
        parts.append((probs * s) @ c)
    return torch.cat(parts, dim=-1).to(args[0].dtype)


def _sums_to_one(*args):
    """Scaled probabilities are normalised once more."""
    tiles, position = tiles_of(*args)
    scores = position + sum((q @ c.T) * s for q, c, s in tiles)
    probs = (scores * args[-1]).softmax(dim=-1)
    parts = [(probs * s / (probs * s).sum(dim=-1, keepdim=True)) @ c for _, c, s in tiles]
    return torch.cat(parts, dim=-1).to(args[0].dtype)


def _scaled_before_softmax(*args):
    """The values' scales are multiplied into the scores, in front of the softmax."""
    tiles, position = tiles_of(*args)
    scores = (position + sum((q @ c.T) * s for q, c, s in tiles)) * args[-1]
    parts = [(scores * s).softmax(dim=-1) @ c for _, c, s in tiles]
    return torch.cat(parts, dim=-1).to(args[0].dtype)


def _position_scaled(*args):
    tiles, position = tiles_of(*args)
    scores = sum((q @ c.T + position / len(tiles)) * s for q, c, s in tiles)
    probs = (scores * args[-1]).softmax(dim=-1)
    return torch.cat([(probs * s) @ c for _, c, s in tiles], dim=-1).to(args[0].dtype)


def _equal_parts(*args):
    """As many parts as there are scales, all of them equally wide."""
    count = args[3].shape[1]
    queries, tiles = args[0].float().chunk(count, 1), args[2].float().chunk(count, 1)
    scores = args[1].float() @ args[4].float().T
    for i, (q, c) in enumerate(zip(queries, tiles, strict=True)):
        scores = scores + (q @ c.T) * args[3][:, i]
    probs = (scores * args[-1]).softmax(dim=-1)
    mixed = [(probs * args[3][:, i]) @ c for i, c in enumerate(tiles)]
    return torch.cat(mixed, dim=-1).to(args[0].dtype)


def _short_tile(error: BaseException, arguments: tuple) -> str | None:
    """After shapes that do not fit: that the last tile may be short, and the dtypes."""
    text = first_line(error)
    if "dtype" in text or "Float8" in text or "not implemented for" in text:
        return "E4M3 codes only store: .float() widens them, and rounds nothing."
    if "shape" in text or "size" in text:
        return "A tile is 128 numbers wide, the last one what is left: split(128, dim=1)."
    return None


def _dtype_is_named(got: Tensor, expected: Tensor) -> str | None:
    """Beside the difference: how to end, where only the dtype is another."""
    wrong = difference(got, expected)
    if got.shape == expected.shape and got.dtype != expected.dtype:
        return f"{wrong}. Hint: {END.removesuffix('.')}"
    return wrong


def _wide_answer(*args):
    return FP8_ATTEND.function(*args).float()


def _turned(scores: Tensor) -> Tensor:
    return scores.softmax(dim=0)


END = "Compute in float32, and end with .to(q_latent.dtype)."

FP8_ATTEND = Exercise(
    name="inference.fp8_attend",
    reference="dsv3_tutorial.attention.decode_fp8:fp8_attend",
    cases=[
        Case("one tile", cached(0, 2, 128, 4, 5)),
        Case("four tiles", cached(1, 3, 512, 8, 7)),
        Case("a short last tile", cached(2, 4, 200, 6, 6)),
        Case("BF16", cached(3, 2, 256, 4, 5, torch.bfloat16)),
        Case("less than a tile", cached(4, 4, 96, 32, 9), hidden=True),
        Case("one head, one token", cached(5, 1, 256, 4, 1), hidden=True),
        Case("as many heads as tokens", cached(6, 6, 300, 6, 6), hidden=True),
        Case("many tokens", cached(7, 2, 384, 8, 150), hidden=True),
    ],
    hints=[
        "Go tile by tile: q_latent.split(128, dim=1) and codes.split(128, dim=1) belong together, "
        "tile i with scales[:, i]. Widen each with .float(); that rounds nothing.",
        "A token's scale is the same for all of a tile, so it can be multiplied behind the sum: "
        "(q @ c.T) * scales[:, i]. Add these up, then q_rope @ k_rope.T, then softmax_scale and "
        "one softmax.",
        "The values are the same tiles: (probs * scales[:, i]) @ c for each, and torch.cat.",
    ],
    difficulty=4,
    importance=5,
    minutes=10,
    lines=8,
    mutants=[
        *(
            Mutant(
                name,
                function,
                "A scaled copy of the codes is made here: multiply the scores and the "
                "probabilities instead.",
            )
            for name, function in COPIES.items()
        ),
        Mutant(
            "no scales",
            opened(lambda c, s: c, lambda c, s: c),
            "scales is not used: the codes alone are all of one size.",
        ),
        Mutant(
            "values without scales",
            opened(values=lambda c, s: c),
            "The scores have their scales, the values do not: the same tiles are summed up there.",
        ),
        Mutant(
            "keys without scales",
            opened(keys=lambda c, s: c),
            "The values have their scales, the scores do not.",
        ),
        Mutant(
            "the first scale",
            opened(lambda c, s: c * s[:, :1], lambda c, s: c * s[:, :1]),
            "All tiles have the first one's scale: tile i has scales[:, i].",
        ),
        Mutant(
            "the mean scale",
            opened(
                lambda c, s: c * s.mean(dim=1, keepdim=True),
                lambda c, s: c * s.mean(dim=1, keepdim=True),
            ),
            "A mean of the scales is used for all tiles: tile i has scales[:, i].",
        ),
        Mutant(
            "divided",
            opened(lambda c, s: c / s, lambda c, s: c / s),
            "The codes are divided by their scales: a value is code * scale.",
        ),
        Mutant(
            "no position",
            opened(scores=lambda content, position, s: content * s),
            "The position part, q_rope with k_rope, is missing.",
        ),
        Mutant(
            "no content",
            opened(scores=lambda content, position, s: position * s),
            "The content part, q_latent with the codes, is missing.",
        ),
        Mutant(
            "no softmax scale",
            opened(scores=lambda content, position, s: content + position),
            "softmax_scale is not used.",
        ),
        Mutant(
            "softmax scale on content",
            opened(scores=lambda content, position, s: content * s + position),
            "softmax_scale belongs to the whole score, content and position.",
        ),
        Mutant(
            "equal parts",
            _equal_parts,
            "The latent is cut into equal parts: a tile is 128 wide, and only the last is shorter.",
        ),
        Mutant(
            "one softmax a tile",
            _a_softmax_each,
            "Each tile has a softmax of its own: the tiles are parts of one score, so add first.",
        ),
        Mutant(
            "made probabilities again",
            _sums_to_one,
            "Scaled probabilities need not sum to 1: do not normalise them again.",
        ),
        Mutant(
            "scaled before the softmax",
            _scaled_before_softmax,
            "The values' scales go into the softmax here: multiply the probabilities behind it.",
        ),
        Mutant(
            "position scaled",
            _position_scaled,
            "The position part is multiplied by scales as well: k_rope is no code and has none.",
        ),
        Mutant("over the heads", opened(probs=_turned), "The softmax runs over heads: dim=-1."),
        Mutant("no softmax", opened(probs=lambda scores: scores), "There is no softmax."),
        Mutant(
            "bits",
            opened(wide=lambda codes: codes.view(torch.uint8).float()),
            "The bytes are read as integers: .to(dtype) reads them as the numbers they code.",
        ),
        Mutant("float32", _wide_answer, END),
    ],
    budget=Budget(scaled_tiles, 0, "products as large as a tile of the cache"),
    compare=_dtype_is_named,
    raised=_short_tile,
)
