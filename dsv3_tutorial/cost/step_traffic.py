"""What one GPU sends in one training step, by reason and by tier, and how long its links take.

Ranks are numbered with tensor parallelism innermost, then data, then the pipeline. `ep` GPUs in a
row hold a layer's experts, over tensor parallel ranks too, so that a layout with it is compared at
the same expert parallelism (as in Megatron; our own `parallel.mesh` keeps experts inside dp); each
of these ranks sends its share of the tokens. Tokens reach experts evenly, and nothing overlaps.
Bytes and bandwidths are per GPU and direction; latencies are left out: at these sizes they are
below a percent.
"""

import math
from dataclasses import dataclass

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm_moe, params
from dsv3_tutorial.cost.tiers import Network, NetworkError, whole

WEIGHT, GRADIENT, ACTIVATION = 2, 4, 2  # bytes a number: BF16 gathered, float32 summed, BF16


@dataclass(frozen=True)
class Split:
    """How a run is laid out: pp x dp x tp GPUs; ep of each dp x tp hold a layer's experts together.

    sequences of seq_len tokens make one step of the whole run. copies: stages that a GPU holds in a
    pipeline, 2 in DualPipe, where each stage has two holders in each replica. Raises NetworkError,
    with all that is wrong, where the numbers do not divide.
    """

    pp: int = 16
    dp: int = 128
    ep: int = 64
    tp: int = 1
    sequences: int = 15360
    seq_len: int = 4096
    copies: int = 2

    def __post_init__(self) -> None:
        names = ("pp", "dp", "ep", "tp", "sequences", "seq_len", "copies")
        wrong = [f"{name} = {getattr(self, name)!r}" for name in names]
        wrong = [said for said, name in zip(wrong, names) if not whole(getattr(self, name), 1)]
        fine = not wrong  # whole numbers, so that division can be asked about
        if fine and self.dp * self.tp % self.ep:
            whole_of = "dp" if self.tp == 1 else "dp x tp"
            wrong.append(f"ep = {self.ep} does not divide {whole_of} = {self.dp * self.tp}")
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
    def stages_held(self) -> int:
        """Stages on each GPU; without a pipeline there is but one."""
        return self.copies if self.pp > 1 else 1

    @property
    def tokens(self) -> int:
        """Tokens that pass through each GPU in a step."""
        return self.sequences * self.seq_len // self.dp


@dataclass(frozen=True)
class Traffic:
    """One reason to send. inside, across: bytes a GPU sends a step; seconds on its links alone.

    ranks: of the group; one replica's gradients still travel between holders of the same weights.
    """

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
        "experts": (split.ep, 1, experts(cfg, network, split)),
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
    """Tensor parallelism: all-reduces behind attention and dense FFNs, forward and backward.

    Forward D numbers a token; backward D behind an FFN, and behind MLA its latents (Q + C + R), as
    down-projections are on every rank. Experts, shared ones too, are not split: each rank has its
    share of the tokens there, and reduce-scatter and all-gather are the same bytes together.
    """
    d = cfg.hidden_size
    layers = range(cfg.num_hidden_layers)
    dense = sum(not cfg.is_moe_layer(i) for i in layers)
    latents = (cfg.q_lora_rank or d) + cfg.kv_lora_rank + cfg.qk_rope_head_dim if cfg.is_mla else d
    numbers = (len(layers) * (d + latents) + dense * 2 * d) / split.pp
    ring = 2 * (split.tp - 1) / split.tp
    sent = ring * split.tokens * numbers * ACTIVATION
    return _tier(split.tp <= network.ranks_per_node, sent)


def experts(
    cfg: ModelConfig,
    network: Network,
    split: Split,
    widths: tuple[float, float] = (comm_moe.FP8, comm_moe.BF16),
) -> dict[str, float]:
    """Experts: dispatch in FP8 and combine in BF16, once forward and once backward, two stages.

    The limit is of groups of experts, which are V3's nodes only where ep fills as many. widths:
    bytes a number in dispatch and in combine.
    """
    layers = sum(cfg.is_moe_layer(i) for i in range(cfg.num_hidden_layers)) / split.pp
    sent = {"inside": 0.0, "across": 0.0}
    if not layers or split.ep == 1:
        return sent
    limit = (cfg.topk_group, cfg.n_group) if cfg.n_group and cfg.n_group > 1 else (None, None)
    routed = (cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.hidden_size)
    for width in widths:
        way = comm_moe.sent_bytes(
            *(split.tokens / split.tp, comm_moe.Layer(*routed, *limit), split.ep, network),
            bytes_per_element=width,
        )
        sent = {tier: sent[tier] + 2 * layers * n for tier, n in way.items()}
    return sent


def stages(cfg: ModelConfig, network: Network, split: Split) -> dict[str, float]:
    """The pipeline: activations to the next stage, gradients to the one before."""
    size = split.tokens * cfg.hidden_size * ACTIVATION / split.tp
    return _tier(split.gpus <= network.ranks_per_node, 2 * size * (split.pp > 1))


def gradients(
    cfg: ModelConfig,
    network: Network,
    split: Split,
    numbers: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Data parallelism with ZeRO-1: float32 gradients summed by parts, BF16 weights gathered.

    Inside the nodes first, so that only 1 / g crosses. Experts have dp x tp / ep replicas, the rest
    dp; in DualPipe twice as many hold a stage, and each holds two. The second holder of a stage is
    in another node unless one node holds all. numbers: a stage's on one GPU, routed experts apart,
    where stages are not equally large.
    """
    g = network.ranks_per_node
    if numbers is None:
        counted = params.count(cfg)
        routed = counted.by_part["routed_experts"]
        rest = counted.total - routed
        numbers = rest / split.pp / split.tp, routed / split.pp / split.ep
    sent = {"inside": 0.0, "across": 0.0}
    for held, replicas, near in (
        (numbers[0], split.dp, max(1, g // split.tp)),
        (numbers[1], split.dp * split.tp // split.ep, max(1, g // split.ep)),
    ):
        size = split.stages_held * held * (WEIGHT + GRADIENT)
        holders = split.stages_held * replicas
        near = holders if split.gpus <= g else math.gcd(near, replicas)
        sent["inside"] += size * (near - 1) / near
        sent["across"] += size / near * (1 - near / holders)
    return sent
