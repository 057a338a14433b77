"""What a model serves from some devices when every user is to see so many tokens a second.

The batch is the lever: more sequences share the weights that a step reads, and each waits longer.
So the best deployment is the largest batch that fits and still keeps the promised rate. Decoding
alone, by `deployment.Deployment`: the prompt's own pass is not counted, nor is latency. A bound.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import deployment, speculation
from dsv3_tutorial.cost.deployment import Deployment
from dsv3_tutorial.cost.serving_pass import draft_s, sums_s
from dsv3_tutorial.cost.serving_target import USUAL, Target
from dsv3_tutorial.cost.serving_target import ServingError as ServingError
from dsv3_tutorial.hardware import Chip, Cluster


@dataclass(frozen=True)
class Serving:
    """A deployment at the batch that was found, and what it gives. reason: "" where it serves.

    batch 0: nothing fits, or not even one sequence is as fast as asked; then all rates are 0.
    """

    deployment: Deployment
    target: Target
    batch: int
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether the target is met at all."""
        return self.batch > 0

    @property
    def devices(self) -> int:
        return self.deployment.devices

    @cached_property
    def pass_s(self) -> float:
        """Seconds of one pass: the model over its queries, and each draft after it."""
        placed, drafts = self.deployment, self.deployment.queries - 1
        layer = sums_s(placed) / placed.cfg.num_hidden_layers  # a draft is one more layer
        return placed.time_s + sums_s(placed) + drafts * (draft_s(placed) + layer)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that one sequence gets from a pass; 1 without drafts."""
        drafts = self.deployment.queries - 1
        return speculation.tokens_per_pass(self.target.acceptance, drafts)

    @property
    def per_user(self) -> float:
        """Tokens a second that one sequence sees."""
        return self.tokens_per_pass / self.pass_s if self.fits else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences on all devices of the unit."""
        return self.batch * self.per_user

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_second / self.devices

    @property
    def time_per_token_s(self) -> float:
        """Seconds between one user's tokens, on average; infinite where nothing serves."""
        return 1 / self.per_user if self.fits else float("inf")

    @property
    def limit(self) -> str:
        """What stops a larger batch: memory, or the user's rate, by what a step waits for."""
        if not self.fits:
            return self.deployment.limit
        full = self.batch + self.deployment.devices > self.deployment.max_batch
        return "memory" if full else self.deployment.limit

    def dollars_per_million(self, rent: float) -> float:
        """Of output tokens, at so many dollars a device and hour; infinite where nothing serves."""
        an_hour = 3600 * self.tokens_per_second_per_gpu
        return rent / an_hour * 1e6 if self.fits else float("inf")


def serve(
    cfg: ModelConfig,
    chip: Chip,
    target: Target = USUAL,
    devices: int = 8,
) -> Serving:
    """The largest batch that fits on `devices` chips and keeps the user's rate, by bisection.

    Batches are whole sequences a device, as the fullest device decides. Raises ServingError for a
    target that the model cannot have, HardwareError where the chip lacks a number.
    """
    served = [_serve(cfg, chip, way, devices) for way in target.ways(cfg)]
    return max(served, key=lambda found: found.tokens_per_second)


def best(cfg: ModelConfig, cluster: Cluster, target: Target = USUAL) -> Serving:
    """The unit that gives most tokens a second and device; the smallest of equals.

    Without `target.devices`, the numbers of devices over which the experts divide are tried, up to
    the cluster's, and cut over powers of two inside one scale-up domain; a dense model always is.
    Where nothing serves, the largest unit and its reason. Raises HardwareError where all else would
    need a link of unknown rate.
    """
    ways = [target] if target.cut is not None else [target, replace(target, cut=True)]
    tried, unknown = [], None
    for asked in ways:
        for devices in _counts(cfg, cluster, asked):
            try:
                tried.append(serve(cfg, cluster.chip, asked, devices))
            except ValueError as error:
                unknown = error
    found = max(tried, key=lambda serving: serving.tokens_per_second_per_gpu, default=None)
    if found and found.fits:
        return found
    if unknown:
        raise unknown
    return max(tried, key=lambda serving: serving.devices)


def table(
    cfg: ModelConfig,
    chip: Chip,
    target: Target,
    devices: int,
    batches: Sequence[int],
    contexts: Sequence[int],
) -> list[Serving]:
    """Every batch at every context on so many devices; batch 0 and a reason where it is too much.

    The user's rate is no condition here: it is what the rows show.
    """
    rows = []
    for context in contexts:
        asked = replace(target, context=context)
        ones = [Serving(_deployment(cfg, chip, a, devices), a, 1) for a in asked.ways(cfg)]
        for batch in batches:
            row = min((_at(one, batch) for one in ones), key=lambda r: r.pass_s / r.tokens_per_pass)
            full = replace(row, batch=0, reason=_no_room(row.deployment, batch))
            rows.append(row if row.deployment.fits else full)
    return rows


def _serve(cfg: ModelConfig, chip: Chip, target: Target, devices: int) -> Serving:
    """The same with the drafts that the target names."""
    one = Serving(_deployment(cfg, chip, target, devices), target, 1)
    each = 1 if one.deployment.cut else devices
    most = one.deployment.max_batch // each
    if not most:
        return replace(one, batch=0, reason=_no_room(one.deployment))
    if not one.per_user >= target.tokens_per_second:
        return replace(one, batch=0, reason=_too_slow(one))
    if _at(one, each).per_user < target.tokens_per_second:  # a sequence on each device is too many
        return _largest(lambda batch: _at(one, batch), target, each)
    return _largest(lambda batch: _at(one, batch * each), target, most + 1)


def _deployment(cfg: ModelConfig, chip: Chip, target: Target, devices: int) -> Deployment:
    drafts = target.drafts
    return Deployment(
        cfg,
        chip,
        devices,
        target.weights,
        target.cache,
        max(target.context, drafts + 1),
        queries=drafts + 1,
        mtp=drafts > 0,
        tensor_parallel=bool(target.cut),
        exchange=target.exchange,
    )


def _at(serving: Serving, batch: int) -> Serving:
    return Serving(serving.deployment.with_batch(batch), serving.target, batch)


def _largest(at: Callable[[int], Serving], target: Target, too_many: int) -> Serving:
    """The last of at(1), at(2), ... that keeps the rate; at(1) does, at(too_many) is not asked."""
    low, high = 1, too_many
    while high - low > 1:
        middle = (low + high) // 2
        keeps = at(middle).per_user >= target.tokens_per_second
        low, high = (middle, high) if keeps else (low, middle)
    return at(low)


def _counts(cfg: ModelConfig, cluster: Cluster, target: Target) -> Iterator[int]:
    if target.devices is not None:
        yield target.devices
        return
    if cfg.n_routed_experts is None or target.cut:
        yield from (n for n in _powers(cluster.domain))
        return
    for n in range(1, min(cluster.gpus, cfg.n_routed_experts) + 1):
        if cfg.n_routed_experts % n == 0 and (n <= cluster.domain or n % cluster.domain == 0):
            yield n


def _powers(most: int) -> Iterator[int]:
    n = 1
    while n <= most:
        yield n
        n *= 2


def _no_room(placed: Deployment, batch: int = 1) -> str:
    usable = deployment.USABLE * placed.chip.memory_bytes
    weights = f"{placed.weight_bytes / 1e9:.1f} GB of weights on each of {placed.devices} devices"
    if placed.room < 0:
        return (
            f"{weights}, and {usable / 1e9:.1f} GB of its memory can be used: nothing is left for "
            "a cache. Take more devices, chips of more memory or a narrower format of weights."
        )
    return (
        f"{weights} leave {placed.room / 1e9:.1f} GB, and a sequence of {placed.context:,} tokens "
        f"caches {placed.sequence_bytes / 1e9:.2f} GB: {batch:,} do not fit, {placed.max_batch:,} "
        "would. Take a shorter context, a smaller batch or more devices."
    )


def _too_slow(one: Serving) -> str:
    return (
        f"one sequence alone sees {one.per_user:.1f} tokens/s, below the "
        f"{one.target.tokens_per_second:g} asked for: {one.deployment.limit} binds. Ask for "
        f"{int(one.per_user * 10) / 10:g} or less, or take another number of devices than "
        f"{one.devices}."
    )
