"""A model on some devices: whether it fits, how long a token takes, and which limit binds.

Experts are dealt out evenly over the devices, sequences too; all else lies whole on each device, as
in DeepSeek's own service (data-parallel attention, expert parallelism). With `tensor_parallel`, and
always without experts, each matrix is cut evenly instead, and what the parts then say to each other
is *not* counted. Bounds: perfect overlap, even loads, no latency; `expert_network` says what
travels.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import bill, expert_network, storage
from dsv3_tutorial.cost.expert_network import FLAT, Exchange
from dsv3_tutorial.cost.serving import experts_touched
from dsv3_tutorial.hardware import Chip, HardwareError

USABLE = 0.9  # share of a device's memory for weights and cache; the rest is the runtime's
_FORMS = {"full": "expanded", "latent": None, "fp8": None}


@dataclass(frozen=True)
class Deployment:
    """`batch` sequences of `context` tokens over `devices` chips, `queries` new tokens each.

    weights, cache: out of storage.WEIGHTS and CACHES. mtp: the draft modules are held too, which
    they must be to draft. bandwidth: bytes/s, in one direction, of all that leaves a device. None:
    the chip's own links, scale-up for experts in its domain and scale-out for the others, at once,
    at the effective rate where one is known and at the peak elsewhere. exchange: how tokens reach
    experts. Seconds and bytes; raises ValueError for what cannot be, HardwareError where the chip
    lacks a number.
    """

    cfg: ModelConfig
    chip: Chip
    devices: int = 1
    weights: str = "fp8"
    cache: str = "bf16"
    context: int = 4096
    batch: int = 1
    queries: int = 1
    mtp: bool = False
    bandwidth: float | None = None
    tensor_parallel: bool = False
    exchange: Exchange = FLAT

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(
                f"{self.devices} devices: nothing holds the model. Give 1 or more devices."
            )
        self.lines  # noqa: B018 (checks the other sizes and formats)

    @cached_property
    def lines(self) -> list[bill.Line]:
        """The whole step's bill, all devices together, each weight once."""
        how = (self.batch, self.queries, self.weights, self.cache)
        return bill.decode_bill(self.cfg, self.context, *how)

    @property
    def cut(self) -> bool:
        """Whether each matrix is cut over the devices."""
        return self.tensor_parallel or self.cfg.n_routed_experts is None

    @property
    def cache_share(self) -> float:
        """The fullest device's share of the caches. A latent belongs to all heads: never cut."""
        if not self.cut:
            return -(-self.batch // self.devices) / self.batch
        heads = 1 if self.cfg.is_mla else self.cfg.kv_heads
        return -(-heads // self.devices) / heads

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that one device holds."""
        held = storage.held_bytes(self.cfg, self.weights, self.mtp)
        if self.cut:
            return sum(held.values()) / self.devices
        routed = held.pop("routed experts")
        return sum(held.values()) + routed / self.devices

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence's whole cache."""
        return storage.cache_bytes(self.cfg, self.cache, self.context)

    @property
    def cache_bytes(self) -> float:
        """Bytes of cache that the fullest device holds."""
        return self.batch * self.sequence_bytes * self.cache_share

    @property
    def room(self) -> float:
        """Bytes that one device has left for the cache; below 0 the weights do not fit."""
        return USABLE * _memory(self.chip) - self.weight_bytes

    @property
    def max_batch(self) -> int:
        """Sequences of this context that fit, all devices together; 0 where no weights do."""
        if self.cut:
            return max(0, int(self.room // (self.sequence_bytes * self.cache_share)))
        return self.devices * max(0, int(self.room // self.sequence_bytes))

    @property
    def fits(self) -> bool:
        return self.batch <= self.max_batch

    @cached_property
    def times(self) -> dict[str, float]:
        """Seconds of a step that each limit alone would take: bandwidth, compute, network."""
        return {
            "bandwidth": self.read_bytes / self.chip.bandwidth(),
            "compute": self._compute_s,
            "network": self._network_s,
        }

    @property
    def time_s(self) -> float:
        """Seconds from one step to the next: the slowest of `times` hides the others."""
        return max(self.times.values())

    @property
    def limit(self) -> str:
        """What binds: memory where it does not fit, else bandwidth, compute or network."""
        return max(self.times, key=self.times.get) if self.fits else "memory"

    @property
    def tokens_per_second(self) -> float:
        """Steps times sequences, all devices together: one token a sequence and step."""
        return self.batch / self.time_s

    @property
    def per_user(self) -> float:
        """Tokens a second that one sequence sees."""
        return 1 / self.time_s

    @property
    def read_bytes(self) -> float:
        """Bytes that the fullest device reads in a step, an expert a layer at the least."""
        sizes = {line.part: line.bytes for line in self.lines}
        own = ("latent cache", "key-value cache") + (() if self.cut else ("embedding",))
        of_sequences = sum(sizes.pop(part, 0) for part in own)
        dealt = sizes.pop("routed experts", 0) * self._expert_share
        rest = sum(sizes.values()) / (self.devices if self.cut else 1)
        return of_sequences * self.cache_share + dealt + rest

    @property
    def _expert_share(self) -> float:
        """The fullest device's share of the experts touched: no device reads a part of one."""
        if self.cut:
            return 1 / self.devices
        rows = self.batch * self.queries
        touched = experts_touched(self.cfg.n_routed_experts, self.cfg.num_experts_per_tok, rows)
        return max(1 / self.devices, 1 / round(touched))

    @property
    def _compute_s(self) -> float:
        wide = "fp32" if self.weights == "float32" else "bf16"
        narrow = "fp8" if self.weights == "fp8" and self.chip.rates.get("fp8") else wide
        seconds = 0.0
        for line in self.lines:
            kept = line.part in ("output head", "gate") or line.part.endswith("cache")
            even = self.cut or line.part == "routed experts"
            share = self._expert_share if even else self.cache_share
            if line.part == "routed experts" and not self.cut:
                share *= self.exchange.load
            seconds += share * line.flops / self.chip.rate(wide if kept else narrow)
        return seconds

    @property
    def _network_s(self) -> float:
        if self.cut:
            return 0.0
        tokens = self.batch * self.cache_share * self.queries
        way = (self.devices, tokens, self.bandwidth, self.exchange)
        return expert_network.step_s(self.cfg, self.chip, *way)

    def with_batch(self, batch: int) -> "Deployment":
        """The same with another batch."""
        return replace(self, batch=batch)


def context_that_fits(
    cfg: ModelConfig,
    chip: Chip,
    devices: int = 1,
    weights: str | None = "fp8",
    cache: str = "latent",
    batch: int = 1,
) -> int:
    """Tokens of context for which there is room, in each of `batch` sequences; 0 where is none.

    cache: "full", every head's own key and value in BF16; "latent", what the model caches, in BF16;
    "fp8", the same in FP8 (656 bytes a token and layer for V3). weights None: they lie elsewhere,
    and all memory is the cache's. Sequences are dealt out over devices as in Deployment.
    """
    if cache not in _FORMS:
        raise ValueError(f"no cache {cache!r}: its size is not known. Take one of {tuple(_FORMS)}.")
    room = USABLE * _memory(chip)
    if weights is not None:
        room = Deployment(cfg, chip, devices, weights).room
    placed = Deployment(cfg, chip, devices, batch=batch)
    on_each = batch * placed.cache_share  # sequences of the fullest device
    return max(0, tokens_in(room / on_each, cfg, cache))


def tokens_in(
    size: float, cfg: ModelConfig, cache: str = "latent", layers: int | None = None
) -> int:
    """Whole tokens whose cache takes at most `size` bytes, of all layers or of so many.

    An L2 of 72 MiB (RTX 4090) holds 1,074 of V3's tokens, or 65,536 of one layer's.
    """
    form = _FORMS[cache] if cfg.is_mla else None
    row = storage.cache_row(cfg, "fp8" if cache == "fp8" else "bf16", form)
    return int(size // (row * (layers or cfg.num_hidden_layers)))


def cache_gain(cfg: ModelConfig, chip: Chip, queries: int = 1) -> float:
    """The most that an FP8 cache speeds up attention's core over a BF16 one, on this chip.

    Per cached token: the bytes shrink, the arithmetic does not, and it is done in BF16. V3 on an
    H100: 1.22 of the bytes' 1.76, as 128 heads already stand near the ridge.
    """

    def seconds(cache: str) -> float:
        lines = bill.decode_bill(cfg, 1 << 20, queries=queries, cache=cache)
        line = next(line for line in lines if line.part.endswith("cache"))
        return max(line.flops / chip.rate("bf16"), line.bytes / chip.bandwidth())

    return seconds("bf16") / seconds("fp8")


def _memory(chip: Chip) -> float:
    if chip.memory_bytes is None:
        raise HardwareError(
            f"{chip.title} has no known memory size: nobody can say what fits. Take another chip."
        )
    return chip.memory_bytes
