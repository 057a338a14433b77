"""What a model serves, in words and in a table by context and batch, and as JSON."""

import math
from typing import Any

from dsv3_tutorial.cost import plan_text as text
from dsv3_tutorial.cost import serving_plan
from dsv3_tutorial.cost.serving_plan import Serving

_EACH = (1, 8, 32, 128)  # sequences a device; of a unit whose matrices are cut, of the unit
_CONTEXTS = (0.25, 1, 4)  # of the target's


def report(served: Serving, rent: float) -> str:
    """The unit that was found, or why none is, and what it would do at other sizes."""
    target, placed = served.target, served.deployment
    asked = f"{target.context:,} tokens of context, {target.tokens_per_second:g} tokens/s a user"
    rows = {"serving": f"{asked}; weights {target.weights}, cache {target.cache}"}
    if not served.fits:
        return "\n".join(text.fields(rows | {"": f"NOTHING SERVES: {served.reason}"}))
    cut = ", each matrix cut over them" if placed.cut and served.devices > 1 else ""
    rows["a unit"] = (
        f"{served.devices:,} GPUs{cut}: {placed.weight_bytes / 1e9:.1f} GB of weights and "
        f"{placed.cache_bytes / 1e9:.1f} GB of cache on each, {served.batch:,} sequences"
    )
    drafts = f", {target.drafts} draft a pass" if target.drafts else ""
    rows["gives"] = (
        f"{served.per_user:.1f} tokens/s a user ({text.seconds(served.time_per_token_s)} a token), "
        f"{served.tokens_per_second_per_gpu:,.0f} tokens/s and GPU{drafts}"
    )
    rows["costs"] = f"${served.dollars_per_million(rent):,.3f} a million tokens, decoding alone"
    rows["binds"] = f"{served.limit} ends the batch; a step waits for {_limit(served)}"
    return "\n".join([*text.fields(rows), "", *_table(served)])


def as_json(served: Serving) -> dict[str, Any]:
    """The same for programs; null where nothing serves."""
    found = {
        "fits": served.fits,
        "reason": served.reason,
        "devices": served.devices,
        "batch": served.batch,
        "context": served.target.context,
        "drafts": served.target.drafts,
        "time_per_token_s": served.time_per_token_s,
        "tokens_per_second_per_user": served.per_user,
        "tokens_per_second_per_gpu": served.tokens_per_second_per_gpu,
        "limit": served.limit,
    }
    return {name: None if value == math.inf else value for name, value in found.items()}


def _table(served: Serving) -> list[str]:
    placed = served.deployment
    each = 1 if placed.cut else placed.devices
    contexts = [max(2, round(share * served.target.context)) for share in _CONTEXTS]
    batches = [n * each for n in _EACH]
    rows = serving_plan.table(
        placed.cfg, placed.chip, served.target, placed.devices, batches, contexts
    )
    head = ("context", "sequences", "ms a token", "tokens/s a user", "and GPU", "waits for")
    asked = [(context, batch) for context in contexts for batch in batches]
    shown = [_row(*pair, row) for pair, row in zip(asked, rows, strict=True)]
    return text.columns(head, shown, first=10)


def _row(context: int, batch: int, row: Serving) -> tuple[str, ...]:
    sizes = (f"{context:,}", f"{batch:,}")
    if not row.fits:
        return (*sizes, "-", "-", "-", "does not fit")
    speed = (1e3 * row.time_per_token_s, row.per_user, row.tokens_per_second_per_gpu)
    return (*sizes, *(f"{value:,.1f}" for value in speed), _limit(row))


def _limit(row: Serving) -> str:
    return max(row.deployment.times, key=row.deployment.times.get)
