"""Which expert lies on which device, and which ones twice: load balancing without retraining.

While a model serves, some experts are asked for more than others, and the busiest device sets the
pace of all. So the busiest experts get replicas, each taking an equal part of the expert's tokens,
and replicas are dealt out so that devices carry alike. Loads are statistics of the last minutes;
the V3 report (section 3.4) does this about every ten minutes, with 32 redundant experts in
prefill: 256 + 32 on 32 GPUs, 8 + 1 each. The idea is that of DeepSeek's EPLB repository.

E experts. A *slot* is the place of one replica; slots s to s + n - 1 of n lie on one device.

The hierarchical policy keeps each expert group on one node, so that routing that is limited to a
few groups also is to a few nodes. The global policy forgets groups: better loads, more traffic.
"""

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Where the replicas of every layer's experts are, and what load each device then carries.

    physical_to_logical (layers, slots) int64: the expert in a slot. logical_count (layers, E)
    int64: an expert's replicas. device_of (slots,) int64. device_load (layers, devices) float64, in
    the unit of the loads it was made for.
    """

    physical_to_logical: Tensor
    logical_count: Tensor
    device_of: Tensor
    device_load: Tensor

    @property
    def imbalance(self) -> Tensor:
        """The busiest device's load over the mean, (layers,): 1.0 is perfect, 2.0 halves speed."""
        return self.device_load.amax(dim=1) / self.device_load.mean(dim=1).clamp(min=1e-300)


def rebalance(
    loads: Tensor, n_replicas: int, n_groups: int, n_nodes: int, n_devices: int
) -> Placement:
    """Place `n_replicas` replicas of each layer's experts on `n_devices` devices, evenly loaded.

    loads (layers, E): tokens that each expert has had, of any real dtype -> Placement.

    Hierarchical where nodes divide groups, else global. Greedy, and within one replica's load of
    even on each node. A second or two for 58 layers of 256 experts: beside serving, not in a step.
    Raises ValueError with every number that makes the request impossible.
    """
    problems = _problems(loads, n_replicas, n_groups, n_nodes, n_devices)
    if problems:
        raise ValueError(
            f"These experts cannot be placed: {'; '.join(problems)}. Every device must hold the "
            "same number of slots, and every expert must have one. Change the numbers named."
        )
    if n_groups % n_nodes:
        n_groups = n_nodes = 1  # global: one node holds everything
    loads = loads.double().cpu()
    rows = [_place_layer(row, n_replicas, n_groups, n_nodes, n_devices) for row in loads]
    return _placement(torch.stack(rows), loads, n_devices)


def in_order(loads: Tensor, n_devices: int) -> Placement:
    """The placement that asks for nothing: no replicas, experts dealt out by their number.

    loads (layers, E) -> Placement, the base that `rebalance` is compared with.
    """
    n_experts = loads.shape[-1]
    if n_devices < 1 or n_experts % n_devices:
        raise ValueError(
            f"{n_experts} experts cannot be dealt out evenly to {n_devices} devices. Every device "
            "must hold the same number of slots. Change n_devices to a divisor."
        )
    return _placement(torch.arange(n_experts).expand(len(loads), -1), loads, n_devices)


def replicate(loads: Tensor, replicas_total: int, limit: int | None = None) -> Tensor:
    """Give each next replica to the expert whose replicas are the busiest.

    loads (E,) -> counts (E,) int64, at least 1 each, `replicas_total` in sum. No other counts make
    the busiest replica's load smaller. `limit` is the most that one expert may have: as many as
    there are devices, since a second replica on one device takes no load off it.
    Raises ValueError where the total leaves an expert without one, or exceeds the limit for all.
    """
    n_experts = len(loads)
    limit = replicas_total if limit is None else limit
    if not n_experts <= replicas_total <= n_experts * limit:
        raise ValueError(
            f"{replicas_total} replicas of {n_experts} experts, at most {limit} of each, cannot "
            "be. Every expert needs one, and a device holds no expert twice. Change the number "
            f"of replicas to one from {n_experts} to {n_experts * limit}."
        )
    counts = [1] * n_experts
    heap = [(-load, 1, expert) for expert, load in enumerate(loads.tolist())]
    heapq.heapify(heap)
    for _ in range(replicas_total - n_experts):
        while heap[0][1] == limit:
            heapq.heappop(heap)
        per_replica, count, expert = heap[0]
        counts[expert] = count + 1
        heapq.heapreplace(heap, (per_replica * count / (count + 1), count + 1, expert))
    return torch.tensor(counts)


def place(loads: Tensor, counts: Tensor, n_devices: int) -> Tensor:
    """Fill devices with equally many replicas, none of one expert twice, and equal loads.

    loads (E,), counts (E,) -> experts (n_devices, slots of a device) int64.

    The busiest device carries at most one replica's load more than the idlest (`deal`); swaps then
    bring that down further. Not the optimum, which is a bin packing and not to be had in time.
    Raises ValueError for counts that fill no whole rounds, or exceed the devices.
    """
    counts = counts.tolist()
    if sum(counts) % n_devices or max(counts) > n_devices:
        raise ValueError(
            f"{sum(counts)} replicas, up to {max(counts)} of one expert, do not fit {n_devices} "
            "devices: each must hold the same number, and none an expert twice. Change the counts."
        )
    weight = loads.double() / torch.tensor(counts)  # (E,), of one replica
    order = weight.argsort(descending=True, stable=True).tolist()
    replicas = [expert for expert in order for _ in range(counts[expert])]
    return swap_down(deal(replicas, weight, n_devices), weight)


def deal(replicas: list[int], weight: Tensor, n_devices: int) -> Tensor:
    """Deal in rounds of one replica per device, each to the device that carries least.

    replicas: experts, heaviest first, those of one expert together; weight (E,) the load of one
    replica -> experts (n_devices, slots) int64.

    A device gets from each round no more than its heaviest, which is no more than the lightest of
    the round before: so differences cannot add up, and the busiest device carries at most the
    heaviest minus the lightest replica more than the idlest.
    """
    held: list[list[int]] = [[] for _ in range(n_devices)]
    carried = [0.0] * n_devices
    for start in range(0, len(replicas), n_devices):
        free = set(range(n_devices))
        # Only the round's first expert can already lie somewhere, so a device is always left.
        for expert in replicas[start : start + n_devices]:
            device = min((carried[d], d) for d in free if expert not in held[d])[1]
            free.remove(device)
            held[device].append(expert)
            carried[device] += weight[expert].item()
    return torch.tensor(held)


def swap_down(held: Tensor, weight: Tensor) -> Tensor:
    """Swap one replica of the busiest device for a lighter one elsewhere, while that lowers it.

    held (devices, slots) experts, weight (E,) the load of one replica -> held, improved.

    Both loads of a swap end between what they were, so the bound of `deal` still holds. For 256
    experts of log-normal load on 32 devices, the busiest device comes from 0.4 % above the mean to
    0.04 % with 32 extra replicas, and from 97 % to 59 % without any.
    """
    held = held.clone()
    for _ in range(held.numel()):  # a swap a replica: far more than any load has needed
        each = weight[held]  # (devices, slots)
        carried = each.sum(dim=1)
        top = carried.argmax()
        moved = each[top, :, None, None] - each  # (slots of the busiest, devices, slots)
        after = torch.maximum(carried[top] - moved, carried[:, None] + moved)
        twice = (held[top, :, None, None] == held).any(dim=-1, keepdim=True)
        twice = twice | (held[..., None] == held[top]).any(dim=-1)  # an expert twice on a device
        after = after.masked_fill(twice, torch.inf)
        if after.min() >= carried[top] * (1 - 1e-9):
            break
        mine, device, theirs = torch.unravel_index(after.argmin(), after.shape)
        held[top, mine], held[device, theirs] = (
            held[device, theirs].clone(),
            held[top, mine].clone(),
        )
    return held


def _place_layer(
    loads: Tensor, n_replicas: int, n_groups: int, n_nodes: int, n_devices: int
) -> Tensor:
    """One layer's slots (n_replicas,): groups to nodes, then each node's experts to its devices."""
    members = torch.arange(len(loads)).view(n_groups, -1)  # (G, E / G)
    one_each = torch.ones(n_groups, dtype=torch.int64)
    nodes = place(loads[members].sum(dim=1), one_each, n_nodes)  # (nodes, G / nodes)
    slots = []
    for groups in nodes:
        experts = members[groups].flatten()  # (E / nodes,)
        devices = n_devices // n_nodes
        counts = replicate(loads[experts], n_replicas // n_nodes, limit=devices)
        slots.append(experts[place(loads[experts], counts, devices)].flatten())
    return torch.cat(slots)


def _placement(slots: Tensor, loads: Tensor, n_devices: int) -> Placement:
    """The Placement of slots (layers, slots): counts and device loads follow from it."""
    loads = loads.double().cpu()
    counts = torch.zeros_like(loads, dtype=torch.int64).scatter_add(
        1, slots, torch.ones_like(slots)
    )
    device_of = torch.arange(n_devices).repeat_interleave(slots.shape[1] // n_devices)
    per_slot = (loads / counts).gather(1, slots)  # (layers, slots)
    carried = loads.new_zeros(len(loads), n_devices).index_add(1, device_of, per_slot)
    return Placement(slots, counts, device_of, carried)


def _problems(
    loads: Tensor, n_replicas: int, n_groups: int, n_nodes: int, n_devices: int
) -> list[str]:
    """Everything that is wrong with a request, each naming its number."""
    sizes = {"n_replicas": n_replicas, "n_groups": n_groups, "n_nodes": n_nodes}
    sizes["n_devices"] = n_devices
    found = [f"{name} is {size}, not a positive number" for name, size in sizes.items() if size < 1]
    if loads.ndim != 2 or not loads.numel():
        return [*found, f"loads have shape {tuple(loads.shape)}, not (layers, E)"]
    if not bool((loads.isfinite() & (loads >= 0)).all()):
        found.append("loads are negative or not finite")
    if found:
        return found
    n_experts = loads.shape[1]
    if n_replicas < n_experts:
        found.append(f"n_replicas is {n_replicas}, fewer than the {n_experts} experts")
    if n_experts % n_groups:
        found.append(f"n_groups is {n_groups}, which does not divide the {n_experts} experts")
    if n_devices % n_nodes:
        found.append(f"n_nodes is {n_nodes}, which does not divide the {n_devices} devices")
    if n_replicas % n_devices:
        found.append(f"n_replicas is {n_replicas}, no multiple of the {n_devices} devices")
    at_most = n_experts * (n_devices if n_groups % n_nodes else n_devices // n_nodes)
    if n_replicas > at_most:
        found.append(
            f"n_replicas is {n_replicas}; an expert on each of its devices makes {at_most}"
        )
    return found
