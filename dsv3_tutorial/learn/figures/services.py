"""A real service beside the bounds: what users and GPUs get, and what the machine would allow."""

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import limits, speculation
from dsv3_tutorial.cost.deployment import Deployment
from dsv3_tutorial.hardware import chip
from dsv3_tutorial.learn.figures.deployment import reached

GPUS_OF_A_NODE = 8
DAY = 24 * 3600
BINDS = {"bandwidth": "memory", "compute": "arithmetic", "network": "messages"}


def services() -> None:
    """Print the paper's two bounds beside ours, DeepSeek's own service, and bounds for its load."""
    _paper()
    _quoted()
    print()
    _bounds()


def more() -> None:
    """Print the service's prefill, and that its day adds up to the nodes that it says."""
    for name, way in (("prefill", "input"), ("decode", "output")):
        node = _service(f"{way}_per_node")
        print(
            f"{name:8}{node:>8,.0f} tokens/s of a node with {GPUS_OF_A_NODE} H800,"
            f"{node / GPUS_OF_A_NODE:>7,.0f} a GPU (quoted)"
        )
    print(
        f"prefill counts the {_service('cached_input'):g}% of input that a disk cache answered: "
        f"{computed_input():,.0f} a GPU were computed"
    )
    read, wrote = nodes()
    print(
        f"a day's {_service('input_tokens'):g} billion tokens read and "
        f"{_service('output_tokens'):g} billion written at these rates (derived):"
    )
    print(f"{read:.1f} + {wrote:.1f} = {read + wrote:.1f} nodes; quoted: {_service('nodes')}")


def users() -> tuple[float, float]:
    """Conversations of a decoding GPU at a time: its tokens/s over one user's, by Little's law."""
    return tuple(_of_a_gpu() / _rate(end) for end in ("high", "low"))


def nodes() -> tuple[float, float]:
    """Nodes that the day's tokens need at the printed rates: in prefill, in decoding."""
    kinds = (("input_tokens", "input_per_node"), ("output_tokens", "output_per_node"))
    return tuple(_service(day) * 1e9 / DAY / _service(rate) for day, rate in kinds)


def computed_input() -> float:
    """Tokens a second that a GPU in prefill computes, what the disk cache had left out."""
    return _service("input_per_node") / GPUS_OF_A_NODE * (1 - _service("cached_input") / 100)


def cases() -> dict[str, Deployment]:
    """The service's load on four machines, as many conversations a GPU, as long.

    Links carry what they reach: NVL72's the share of its peak that the H800's do.
    """
    gpus, load = int(_service("decode_ep")), round(sum(users()) / 2)
    h800, rack = chip("h800"), chip("gb200-nvl72")
    cfg, context = ModelConfig.named("deepseek-v3"), int(_service("kv_length"))
    served = Deployment(cfg, h800, gpus, context=context, batch=load * gpus)
    drafted = Deployment(cfg, h800, gpus, context=context, batch=load * gpus, queries=2, mtp=True)
    inside = h800.scale_up.effective
    joined = Deployment(cfg, h800, gpus, context=context, batch=load * gpus, bandwidth=inside)
    domain = rack.scale_up.domain
    racked = Deployment(cfg, reached(rack), domain, context=context, batch=load * domain)
    return {
        f"{gpus} H800, InfiniBand, {h800.scale_out.effective / 1e9:.0f} GB/s": served,
        f"  and a draft a step, {kept():.0%} kept": drafted,
        f"{gpus} H800, all on NVLink, {inside / 1e9:.0f} GB/s": joined,
        f"{domain} GPUs of NVL72, {racked.chip.scale_up.effective / 1e9:.0f} GB/s": racked,
    }


def kept() -> float:
    """Share of drafts that V3 keeps, at least, by its report."""
    return _service("mtp_acceptance_low") / 100


def tokens_of_a_user(placed: Deployment) -> float:
    """Tokens a second of one conversation at most; a draft itself costs nothing here."""
    return placed.per_user * speculation.tokens_per_pass(kept(), placed.queries - 1)


def _paper() -> None:
    print(
        f"{'tokens/s of a user, if only messages took time':52}{'paper':>12}{'ours':>8}{'off':>7}"
    )
    rows = (
        ("InfiniBand", "", "rate_infiniband", limits.infiniband()),
        ("NVL72, a rack on NVLink", "about ", "rate_nvl72", limits.nvl72()),
    )
    for name, about, row, bound in rows:
        said, ours = paper.row(f"limits.{row}").value, bound.tokens_per_second
        off, exactly = f"{ours / said - 1:+.1%}", f"{ours:,.1f}" if ours < 100 else f"{ours:,.0f}"
        title = f"{name}, {bound.bandwidth / 1e9:.0f} GB/s a GPU"
        print(f"{title:52}{f'{about}{said:,}':>12}{exactly:>8}{off:>7}")


def _quoted() -> None:
    low, high, each = _rate("low"), _rate("high"), _of_a_gpu()
    fewest, most = users()
    print(
        f"DeepSeek's own service, 2025-02-27 (quoted): {low:g} to {high:g} tokens/s for a user, "
        f"{each:,.0f} from an H800"
    )
    print(
        f"so {each:,.0f} / {high:g} to {each:,.0f} / {low:g} = "
        f"{fewest:.0f} to {most:.0f} conversations on each GPU (derived)"
    )


def _bounds() -> None:
    made = cases()
    first = next(iter(made.values()))
    load = first.batch // first.devices
    print(
        f"Our bounds for {load} conversations a GPU of {first.context:,} tokens, FP8 weights, "
        "BF16 cache (derived):"
    )
    heads = "".join(f"{head:>11}" for head in ("ms: memory", "arithmetic", "messages"))
    print(f"{'':33}{heads}{'tokens/s: user':>15}{'GPU':>8}  limit")
    for name, one in made.items():
        times = "".join(f"{one.times[way] * 1e3:>11.1f}" for way in BINDS)
        user = tokens_of_a_user(one)
        print(f"{name:33}{times}{user:>15.1f}{user * load:>8,.0f}  {BINDS[one.limit]}")


def _of_a_gpu() -> float:
    """Tokens a second that a decoding GPU writes, as quoted."""
    return _service("output_per_node") / GPUS_OF_A_NODE


def _service(name: str) -> float:
    return paper.row(f"serving.{name}").value


def _rate(end: str) -> float:
    return paper.row(f"limits.service_rate_{end}").value
