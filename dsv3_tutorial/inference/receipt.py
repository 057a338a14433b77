"""What one generation took, as a few lines to read."""

import torch

from dsv3_tutorial.inference import quantize
from dsv3_tutorial.inference.generate import Generation
from dsv3_tutorial.model import DeepSeekV3


def report(made: Generation, model: DeepSeekV3, prompt: int, drafts: int) -> str:
    """Time per token, tokens a second, acceptance and bytes, one thing a line.

    prompt: tokens read; drafts: asked for a pass. The first token counts as the prefill's.
    """
    weight = model.lm_head.weight
    where = "cuda" if weight.is_cuda else f"cpu, {torch.get_num_threads()} thread(s)"
    lines = {
        "computed in": f"{str(weight.dtype).removeprefix('torch.')} on {where}",
        "prompt": f"{prompt} tokens read in {1e3 * made.prefill_s:.1f} ms",
        "new tokens": f"{sum(map(len, made.sequences))}, ended by {', '.join(made.reasons)}",
        "time per token": _pace(made),
        "passes": _passes(made),
        "cache": f"{made.cache_bytes:,} bytes, {made.row_bytes:,.0f} a token and layer",
        "weights": f"{quantize.nbytes(model):,} bytes",
    }
    if drafts:
        share = made.accepted / max(made.drafted, 1)
        lines["drafts"] = f"{made.drafted} tokens, {made.accepted} accepted: {share:.1%}"
    return "\n".join(f"{name:<15}{said}" for name, said in lines.items())


def _pace(made: Generation) -> str:
    if not made.decoded:
        return "none was decoded: the first is the prefill's"
    each = made.decode_s / made.decoded
    return f"{1e3 * each:.3f} ms, {1 / each:.1f} tokens a second"


def _passes(made: Generation) -> str:
    a_pass = f", {made.decoded / made.passes:.2f} tokens a pass" if made.passes else ""
    return f"{made.passes}{a_pass}"
