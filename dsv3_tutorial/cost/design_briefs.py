"""What the design game asks for: two clusters, each with a budget and a service.

Each demand excludes an answer that people give, and leaves room around the worked one. Demands and
rents are ours: nobody quotes them.
"""

from dataclasses import dataclass, replace

from dsv3_tutorial import hardware
from dsv3_tutorial.hardware import Cluster, Link


@dataclass(frozen=True)
class Brief:
    """What is given and what is asked for.

    days, budget_usd: for training on the cluster, at `rent` dollars a GPU hour; None: the machine
    is the designer's own. sequences: of 4,096 tokens, in a step. activated, total, tokens: the
    least of each. users at once, each with `context` tokens in its cache and `rate` tokens a
    second, from `devices` GPUs of the same kind.
    """

    title: str
    cluster: Cluster
    days: float
    budget_usd: float | None
    rent: float
    sequences: int
    activated: float
    total: float
    tokens: float
    users: int
    context: int
    rate: float
    devices: int

    def __str__(self) -> str:
        gpus = f"{self.devices} of its GPUs" if self.devices > 1 else "one of its GPUs"
        price = ""
        if self.budget_usd is not None:
            price = f" and ${self.budget_usd:,.0f} at ${self.rent:.2f} a GPU hour"
        return (
            f"{self.title}: {self.cluster.gpus} x {self.cluster.chip.title}\n"
            f"  model     {self.total / 1e9:g} B parameters or more, "
            f"{self.activated / 1e9:g} B or more of them for each token\n"
            f"  training  {self.tokens / 1e9:,.0f} B tokens or more, within {self.days:g} days"
            f"{price}\n"
            f"  service   {self.users} users at once from {gpus}: "
            f"{self.context:,} tokens of context and {self.rate:g} tokens/s each"
        )


def _h20_cluster(gpus: int) -> Cluster:
    """H20 in servers with a 400 Gb/s card for each GPU: their maker names no card."""
    card = Link("InfiniBand 400 Gb/s a GPU", 50e9, effective=40e9)
    return Cluster(replace(hardware.chip("h20"), scale_out=card), gpus)


BRIEFS = {
    "lab": Brief(
        title="An eight-GPU lab",
        cluster=hardware.cluster("h100-sxm:8"),
        days=14,
        budget_usd=None,
        rent=2.0,
        sequences=512,
        activated=1.2e9,
        total=10e9,
        tokens=300e9,
        users=48,
        context=32_768,
        rate=40,
        devices=1,
    ),
    "h20": Brief(
        title="An H20 cluster",
        cluster=_h20_cluster(512),
        days=40,
        budget_usd=560e3,
        rent=1.2,
        sequences=2048,
        activated=10e9,
        total=120e9,
        tokens=1.8e12,
        users=240,
        context=32_768,
        rate=30,
        devices=8,
    ),
}
