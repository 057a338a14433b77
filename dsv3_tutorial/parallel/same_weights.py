"""Whether ranks that are to hold the same weights do: asked once, before they share work.

Ranks with different weights run too, and what they compute together is no model's.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

Sums = dict[str, tuple]  # by a weight's name: its dtype, its shape, the sum of its bits
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightsDiffer(ValueError):
    """Ranks hold different weights where they must hold the same."""


def check_same(parts: dict[str, nn.Module], group: dist.ProcessGroup) -> None:
    """Compare the modules that ranks of the group hold under the same name; every rank calls it.

    Parameters and buffers, without those that are spread over ranks already. Each is read once, and
    its bits are added up as integers: exact, in whatever order. One exchange of these sums, which
    `traffic.record` does not count. Raises WeightsDiffer, on every rank, with the first one.
    """
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return
    everyones: list = [None] * len(ranks)
    with _disable_current_modes(), torch.no_grad():
        mine = {name: _sums(module) for name, module in parts.items()}
        dist.all_gather_object(everyones, mine, group=group)
    held: dict[str, tuple[int, Sums]] = {}
    for rank, theirs in zip(ranks, everyones, strict=True):
        for part, sums in theirs.items():
            first, expected = held.setdefault(part, (rank, sums))
            if sums != expected:
                raise WeightsDiffer(_said(part, first, rank, expected, sums))


def _sums(module: nn.Module) -> Sums:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: (t.dtype, tuple(t.shape), _sum_of_bits(t))
        for name, t in named
        if not hasattr(t, "placements")
    }


def _sum_of_bits(t: Tensor) -> int:
    if t.device.type == "meta":
        return 0
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.detach().view(_BITS[t.element_size()]).sum(dtype=torch.int64).item()


def _said(part: str, first: int, rank: int, expected: Sums, sums: Sums) -> str:
    names = dict.fromkeys([*expected, *sums])
    differ = [name for name in names if expected.get(name) != sums.get(name)]
    return (
        f"Ranks {first} and {rank} must hold the same weights{part and f' of {part}'}, and "
        f"{len(differ)} of {len(names)} differ, {differ[0]} first. Each would compute with its "
        "own, and the whole would be no model. Seed all ranks alike before the weights are drawn, "
        "or load one checkpoint on all; check=False goes on as they are."
    )
