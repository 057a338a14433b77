"""ISCA table 4, one training step on 2,048 GPUs: what of it follows by arithmetic from the rest."""

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import flops
from dsv3_tutorial.cost.checks import Check
from dsv3_tutorial.cost.schedule import Schedule, Times
from dsv3_tutorial.hardware import chip

NETWORKS = ("mpft", "mrft")
PARTS = ("forward", "bubble", "backward_input", "backward_weight", "overlapped", "optimizer")
SEQUENCE = 4096  # tokens of a training sequence, report section 4.2
SEQUENCES = 15_360  # of a step, once the batch has grown
_DAY = 86_400


def printed(name: str, network: str = "mpft") -> float:
    """A number of the table: printed("step") is 19.926."""
    return paper.row(f"step_time.{network}.{name}").value


def tokens_per_step(network: str = "mpft") -> float:
    """Tokens of a day and seconds of a step give 62.91 million: 15,360 sequences of 4,096."""
    return printed("tokens_per_day", network) * 1e9 * printed("step", network) / _DAY


def sum_of_parts(network: str = "mpft") -> float:
    """Seconds of the step that its parts account for."""
    return sum(printed(part, network) for part in PARTS)


def shares(network: str = "mpft") -> dict[str, float]:
    """Each part's share of the step; the bubble's is 10.3 %."""
    step = printed("step", network)
    return {part: printed(part, network) / step for part in PARTS}


def computing(network: str = "mpft") -> float:
    """Seconds of the step in which a GPU computes: all parts but the bubble and the optimizer."""
    return sum_of_parts(network) - printed("bubble", network) - printed("optimizer", network)


def operation_times(schedule: Schedule, whole: bool, network: str = "mpft") -> Times:
    """The table's seconds over how often a device runs each operation of DualPipe, on average.

    The table's 1B can be read in two ways. whole: each of its operations is a whole backward, of
    which 1W, counted apart, is a part; else it is the input's part alone, and 1W is added.
    """
    ran = [op.kind for order in schedule.orders for op in order]
    count = {kind: ran.count(kind) / schedule.devices for kind in set(ran)}
    back = printed("backward_input", network) / (count["B"] + count["I"])
    weight = printed("backward_weight", network) / count["W"]
    return Times(
        t_f=printed("forward", network) / count["F"],
        t_b=back if whole else back + weight,
        t_w=weight,
        pair=printed("overlapped", network) / count["FB"],
    )


def flops_per_second(network: str = "mpft", causal: bool = True) -> float:
    """FLOP/s of a GPU that the tokens of a day imply, by our count of V3's FLOPs a token."""
    a_token = flops.training_flops_per_token(ModelConfig.named("deepseek-v3"), causal=causal)
    gpus = paper.row("training_cost.gpus").value
    return printed("tokens_per_day", network) * 1e9 / _DAY / gpus * a_token


def checks(network: str = "mpft") -> list[Check]:
    """What can be computed without the row itself, beside the row."""
    day = SEQUENCE * SEQUENCES * _DAY / printed("step", network) / 1e9
    found = [
        ("tokens_per_day", day, "15,360 sequences of 4,096 tokens a step, over its time"),
        ("step", sum_of_parts(network), "the sum of its parts"),
    ]
    peak = chip("h800").rate("bf16")
    for way, causal in (("causal", True), ("non_causal", False)):
        rate = flops_per_second(network, causal)
        how = "tokens of a day, GPUs and our FLOPs a token"
        found.append((f"tflops_{way}", rate / 1e12, how))
        found.append((f"mfu_{way}", 100 * rate / peak, f"{how}, over the BF16 peak"))
    return [Check(paper.row(f"step_time.{network}.{n}"), v, how) for n, v, how in found]
