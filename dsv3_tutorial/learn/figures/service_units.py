"""V3's service in a supposed world: how many GPUs share the experts, and what holds it back."""

from functools import cache

from dsv3_tutorial.cost import future, future_world, serving_plan
from dsv3_tutorial.cost.future_world import World
from dsv3_tutorial.cost.serving_plan import Serving
from dsv3_tutorial.cost.serving_target import Target
from dsv3_tutorial.hardware import Cluster

RATE = 20  # tokens a second that each user sees
# What the planner names, in words that tell memory's two numbers apart.
NAMES = {"memory": "memory size", "bandwidth": "memory bandwidth", "compute": "arithmetic"}


@cache
def served(world: World) -> Serving:
    """The service that gives most tokens a GPU, each user seeing 20 a second."""
    cluster = Cluster(world.chip, future_world.GPUS)
    return serving_plan.best(future_world.model(), cluster, Target(tokens_per_second=RATE))


@cache
def served_by(world: World, devices: int) -> Serving:
    """The same service with the experts shared by so many GPUs."""
    target = Target(tokens_per_second=RATE, devices=devices)
    return serving_plan.serve(future_world.model(), world.chip, target, devices)


def ends(serving: Serving) -> str:
    """What stops a larger batch: `memory size`, or what a pass waits for."""
    return NAMES.get(serving.limit, serving.limit)


def waits(serving: Serving) -> str:
    """What takes most of a pass over the model, whatever stops a larger batch."""
    most = serving.deployment.limit
    return NAMES.get(most, f"the {most}")


def in_words(world: World) -> str:
    """The best unit, what ends its batch, and why it is not as large as today's, if it is not."""
    now, today = served(world), served(future.today())
    told = f"The best service holds {now.batch:,} conversations on {now.devices:,} GPUs; "
    told += f"{ends(now)} ends the batch, and a pass waits most for {waits(now)}."
    if not now.fits or now.devices == today.devices:
        return told
    same = served_by(world, today.devices)
    rates = [each.tokens_per_second_per_gpu for each in (same, now)]
    held = "fewer" if now.devices > today.devices else "more"
    return (
        f"{told} With today's {today.devices} GPUs a pass would wait most for {waits(same)}, and "
        f"{rates[0]:,.0f} tokens/s a GPU come out, not {rates[1]:,.0f}. So {now.devices} share the "
        f"experts: each holds {held} of them, and {now.batch / now.devices:.0f} caches, where it "
        f"is {today.batch / today.devices:.0f} today."
    )
