"""What one GPU sends in one training step, by reason and by tier, and how long its links take.

Ranks are numbered with tensor parallelism innermost, then data (experts split inside it), then the
pipeline. Tokens reach experts evenly, and nothing overlaps. Bytes and bandwidths are per GPU and
direction; latencies are left out: at these sizes they are below a percent.
"""

import math
from dataclasses import dataclass, replace

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm_moe, params
from dsv3_tutorial.cost.tiers import Network, NetworkError, whole

WEIGHT, GRADIENT, ACTIVATION = 2, 4, 2  # bytes a number: BF16 gathered, float32 summed, BF16


@dataclass(frozen=True)
class Split:
    """How a run is laid out: pp x dp x tp GPUs; ep of each dp hold a layer's experts together.

    sequences of seq_len tokens make one step of the whole run. Raises NetworkError, with all that
    is wrong, where the numbers do not divide.
    """

    pp: int = 16
    dp: int = 128
    ep: int = 64
    tp: int = 1
    sequences: int = 15360
    seq_len: int = 4096

    def __post_init__(self) -> None:
        names = ("pp", "dp", "ep", "tp", "sequences", "seq_len")
        wrong = [f"{name} = {getattr(self, name)!r}" for name in names]
        wrong = [said for said, name in zip(wrong, names) if not whole(getattr(self, name), 1)]
        fine = not wrong  # whole numbers, so that division can be asked about
        if fine and self.dp % self.ep:
            wrong.append(f"ep = {self.ep} does not divide dp = {self.dp}")
        if fine and self.sequences % self.dp:
            wrong.append(f"dp = {self.dp} does not divide the step's {self.sequences} sequences")
        if wrong:
            raise NetworkError(
                f"This layout cannot be: {'; '.join(wrong)}. Each GPU needs a whole place in it. "
                "Give whole numbers of 1 or more that divide."
            )

    @property
    def gpus(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def tokens(self) -> int:
        """Tokens that pass through each GPU in a step."""
        return self.sequences * self.seq_len // self.dp


@dataclass(frozen=True)
class Traffic:
    """One reason to send. inside, across: bytes a GPU sends a step; seconds on its links alone."""

    name: str
    ranks: int
    nodes: int
    inside: float
    across: float
    seconds: float


def traffic(cfg: ModelConfig, network: Network, split: Split) -> list[Traffic]:
    """What each kind of parallelism sends: tensor, experts, stages, gradients, in this order."""
    per_node = network.ranks_per_node
    groups = {
        "tensor": (split.tp, 1, tensor(cfg, network, split)),
        "experts": (split.ep, split.tp, experts(cfg, network, split)),
        "stages": (split.pp, split.dp * split.tp, stages(cfg, network, split)),
        "gradients": (split.dp, split.tp, gradients(cfg, network, split)),
    }
    found = []
    for name, (ranks, stride, sent) in groups.items():
        nodes = ranks if stride >= per_node else math.ceil(ranks * stride / per_node)
        times = (
            sent["inside"] / network.inside.bandwidth,
            sent["across"] / network.across.bandwidth,
        )
        seconds = sum(times) if name == "gradients" else max(times)  # one after the other, or both
        found.append(Traffic(name, ranks, nodes, sent["inside"], sent["across"], seconds))
    return found


def _tier(inside: bool, sent: float) -> dict[str, float]:
    return {"inside": sent if inside else 0.0, "across": 0.0 if inside else sent}


def tensor(cfg: ModelConfig, network: Network, split: Split) -> dict[str, float]:
    """Tensor parallelism: two all-reduces of the activations a layer forward, two backward."""
    layers = cfg.num_hidden_layers / split.pp
    size = split.tokens * cfg.hidden_size * ACTIVATION
    ring = 2 * (split.tp - 1) / split.tp
    return _tier(split.tp <= network.ranks_per_node, 4 * layers * ring * size)


def experts(
    cfg: ModelConfig,
    network: Network,
    split: Split,
    widths: tuple[float, float] = (comm_moe.FP8, comm_moe.BF16),
) -> dict[str, float]:
    """Experts: dispatch in FP8 and combine in BF16, once forward and once backward, two stages.

    The tp ranks of a replica send a share of its tokens each (sequence parallelism). widths: bytes
    a number in dispatch and in combine.
    """
    layers = sum(cfg.is_moe_layer(i) for i in range(cfg.num_hidden_layers)) / split.pp
    sent = {"inside": 0.0, "across": 0.0}
    if not layers or split.ep == 1:
        return sent
    near = replace(network, ranks_per_node=max(1, network.ranks_per_node // split.tp))
    limit = cfg.topk_group if cfg.n_group and cfg.n_group > 1 else None
    routed = (cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.hidden_size)
    for width in widths:
        way = comm_moe.sent_bytes(
            *(split.tokens / split.tp, comm_moe.Layer(*routed, limit), split.ep, near),
            bytes_per_element=width,
        )
        sent = {tier: sent[tier] + 2 * layers * n for tier, n in way.items()}
    return sent


def stages(cfg: ModelConfig, network: Network, split: Split) -> dict[str, float]:
    """The pipeline: activations to the next stage, gradients to the one before."""
    size = split.tokens * cfg.hidden_size * ACTIVATION / split.tp
    return _tier(split.gpus <= network.ranks_per_node, 2 * size * (split.pp > 1))


def gradients(cfg: ModelConfig, network: Network, split: Split) -> dict[str, float]:
    """Data parallelism with ZeRO-1: float32 gradients summed by parts, BF16 weights gathered.

    Inside the nodes first, so that only 1 / g crosses. Experts have dp / ep replicas, the rest dp.
    """
    counted = params.count(cfg)
    routed = counted.by_part["routed_experts"]
    sent = {"inside": 0.0, "across": 0.0}
    for numbers, replicas, stride in (
        ((counted.total - routed) / split.pp / split.tp, split.dp, split.tp),
        (routed / split.pp / split.ep, split.dp // split.ep, split.ep * split.tp),
    ):
        size, near = numbers * (WEIGHT + GRADIENT), max(1, network.ranks_per_node // stride)
        near = math.gcd(near, replicas)
        sent["inside"] += size * (near - 1) / near
        sent["across"] += size / near * (1 - near / replicas)
    return sent
