"""One token's way through a toy gate, and what the balance bias does to the load over steps."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from dsv3_tutorial.learn.figures.style import (
    COMPUTE,
    IDLE,
    INK,
    MEMORY,
    figure,
    finish,
)
from dsv3_tutorial.moe import balance
from dsv3_tutorial.moe.gate import Routing, choose_experts, combine_weights

EXPERTS, NODES, TOP_K, TOKENS = 16, 4, 4, 8
FAVOURITE = 6  # the expert that the toy gate likes for every token
BATCH, STEPS, EVEN, TAIL = 512, 200, 0.2, 50
UPDATES = ("sign", "proportional")


def toy_scores() -> Tensor:
    """Sigmoid scores of 8 fixed tokens (8, 16): expert 6 is a favourite of all."""
    logits = np.random.default_rng(4).normal(-0.4, 0.9, (TOKENS, EXPERTS))
    logits[:, FAVOURITE] = 1.6 + 0.25 * np.sort(logits[:, FAVOURITE])
    return torch.from_numpy(1 / (1 + np.exp(-logits)))


def toy_route(bias_on_favourite: float, topk_group: int) -> tuple[Routing, Tensor]:
    """The routing of all 8 tokens, and the biased scores (8, 16) that chose."""
    scores = toy_scores()
    biased = scores.clone()
    biased[:, FAVOURITE] += bias_on_favourite
    indices = choose_experts(biased, NODES, topk_group, TOP_K)
    return Routing(indices, combine_weights(scores, indices), scores), biased


def token_route(
    token: int, bias_on_favourite: float, topk_group: int, show: str = "biased"
) -> Figure:
    """One token's scores, the bias outlined on them, the groups kept, the choice and its weights.

    show "biased" draws what the choice looks at beside the scores, "unbiased" the scores alone.
    """
    routing, biased = toy_route(bias_on_favourite, topk_group)
    scores, seen = routing.scores[token].tolist(), biased[token].tolist()
    chosen = routing.indices[token].tolist()
    weights = dict(zip(chosen, routing.weights[token].tolist(), strict=True))
    fig, ax = figure(8, 4.0)
    _shade_groups(ax, _kept(biased[token], topk_group))
    looks = [COMPUTE if expert in weights else IDLE for expert in range(EXPERTS)]
    ax.bar(range(EXPERTS), scores, width=0.7, color=looks)
    if show == "biased":
        outline = {"fill": False, "edgecolor": INK, "linewidth": 1.4, "linestyle": "--"}
        ax.bar(range(EXPERTS), seen, width=0.7, **outline)
    for expert, weight in weights.items():
        top = max(scores[expert], seen[expert]) + 0.02
        ax.text(expert, top, f"{weight:.2f}", ha="center", fontsize=11, fontweight="bold")
    ax.set_xticks(range(EXPERTS))
    ax.set_ylim(min(0.0, min(seen) - 0.05), 1.4)
    ax.grid(False, axis="x")
    likers = _choosing_favourite(routing)
    title = (
        f"Token {token}: experts {_listed(sorted(chosen))}; "
        f"expert {FAVOURITE} gets {likers} of {TOKENS} tokens"
    )
    finish(fig, ax, title, "expert", "score of the expert (0 to 1)", legend=False)
    _explain(fig, show)
    return fig


def _explain(fig: Figure, show: str) -> None:
    """What the bars mean, under the axes."""
    outline = Patch(fill=False, edgecolor=INK, linestyle="--", label="score + bias: chooses")
    bars = [
        Patch(color=COMPUTE, label="score of a chosen expert, its weight above"),
        Patch(color=IDLE, label="score, not chosen"),
        *([outline] if show == "biased" else []),
    ]
    fig.legend(handles=bars, loc="outside lower center", ncols=3, fontsize=10, frameon=False)


def token_route_in_words(
    token: int, bias_on_favourite: float, topk_group: int, show: str = "biased"
) -> str:
    """The choice, its weights, and what became of the favourite, in words."""
    routing, biased = toy_route(bias_on_favourite, topk_group)
    order = routing.indices[token].argsort()
    chosen = routing.indices[token][order].tolist()
    weights = [f"{weight:.2f}" for weight in routing.weights[token][order].tolist()]
    kept = _kept(biased[token], topk_group)
    score, seen = routing.scores[token, FAVOURITE], biased[token, FAVOURITE]
    fate = "is chosen" if FAVOURITE in chosen else "is not chosen"
    groups = f"group {kept[0]} is" if len(kept) == 1 else f"groups {_listed(kept)} are"
    return (
        f"Token {token}: {groups} kept; experts {_listed(chosen)} are chosen, with weights "
        f"{_listed(weights)} from the unbiased scores. Expert {FAVOURITE}, the favourite, scores "
        f"{score:.2f}, counts as {seen:.2f} in the choice and {fate}; "
        f"it gets {_choosing_favourite(routing)} of the {TOKENS} tokens."
    )


def _kept(biased: Tensor, topk_group: int) -> list[int]:
    """The groups a token may use, by the sum of their two best, as `choose_experts` ranks them."""
    worth = biased.view(NODES, -1).topk(2).values.sum(dim=1)  # (G,)
    return sorted(worth.topk(topk_group).indices.tolist())


def _choosing_favourite(routing: Routing) -> int:
    return int((routing.indices == FAVOURITE).any(dim=1).sum())


def _listed(values: list) -> str:
    *first, last = [str(value) for value in values]
    return f"{', '.join(first)} and {last}" if first else last


def _shade_groups(ax: Axes, kept: list[int]) -> None:
    """Groups apart, the kept ones shaded and all named."""
    size = EXPERTS // NODES
    for group in range(NODES):
        left = group * size - 0.5
        if group in kept:
            ax.axvspan(left, left + size, color="#DCEBF5", zorder=0)
        if group:
            ax.axvline(left, color=INK, linewidth=0.8)
        text = f"group {group}" + (", kept" if group in kept else "")
        ax.text(left + size / 2, 1.3, text, ha="center", fontsize=11, color=INK)
    ax.set_xlim(-0.5, EXPERTS - 0.5)


class Run(NamedTuple):
    """A balancing run, before each update: MaxVio (STEPS,), tokens of each expert (STEPS, E)."""

    violation: np.ndarray
    loads: np.ndarray


def _moved(bias: Tensor, counts: Tensor, gamma: float, update: str) -> Tensor:
    if update == "proportional":  # the loss-free paper's other variant: as far as the gap is large
        mean = counts.double().mean()
        return bias + gamma * (mean - counts) / mean
    return balance.update_bias(bias, counts, gamma)


@cache
def simulate(gamma: float, skew: float, update: str = "sign") -> Run:
    """200 steps of 512 tokens on 16 experts, top-4, no network: only the bias learns.

    logits = noise, new in each step, + skew x a fixed liking of each expert. float64 throughout,
    so that no rounding decides a choice. Raises ValueError for an update there is not.
    """
    if update not in UPDATES:
        raise ValueError(
            f"update is {update!r}, so it is not known how the bias moves. Give one of "
            f"{', '.join(UPDATES)}."
        )
    random = np.random.default_rng(11)
    liking = random.permutation(np.linspace(-1.5, 1.5, EXPERTS))
    bias, violation, loads = torch.zeros(EXPERTS, dtype=torch.float64), [], []
    for _ in range(STEPS):
        logits = random.normal(size=(BATCH, EXPERTS)) + skew * liking
        scores = torch.from_numpy(1 / (1 + np.exp(-logits)))
        counts = balance.expert_counts((scores + bias).topk(TOP_K).indices, EXPERTS)
        violation.append(balance.max_violation(counts.double()).item())
        loads.append(counts.numpy())
        bias = _moved(bias, counts, gamma, update)
    return Run(np.array(violation), np.array(loads))


def steps_until_even(run: Run) -> int | None:
    """Updates until MaxVio is first below 0.2; None where it never is."""
    below = np.flatnonzero(run.violation < EVEN)
    return int(below[0]) if len(below) else None


def undone(run: Run) -> float:
    """The share of the last 50 steps' moves that undo the one before.

    Near 0 the biases still travel, near a half they follow chance, near 1 they swing.
    """
    gaps = np.sign(BATCH * TOP_K / EXPERTS - run.loads[-TAIL:])  # (TAIL, E)
    return float((gaps[1:] * gaps[:-1] < 0).mean())


def load_over_steps(gamma: float, skew: float, update: str = "sign") -> Figure:
    """MaxVio over the steps, and the tokens of each expert at both ends."""
    run = simulate(gamma, skew, update)
    chance = simulate(0.0, 0.0).violation.mean()
    fig, (left, right) = figure(10, 4.2, columns=2)
    left.plot(range(STEPS), run.violation, color=COMPUTE, linewidth=1.8)
    left.axhline(EVEN, color=INK, linestyle="--", linewidth=1.2, label=f"even enough: {EVEN}")
    left.axhline(chance, color=MEMORY, linestyle=":", label=f"chance alone: {chance:.2f}")
    left.set_ylim(0, max(1.0, run.violation.max()) * 1.3)
    finish(fig, left, "", "optimizer steps", "MaxVio: (busiest - mean) / mean")
    experts, first, last = np.arange(EXPERTS), run.loads[0], run.loads[-1]
    right.bar(experts - 0.2, first, width=0.4, color=IDLE, label="first step")
    right.bar(experts + 0.2, last, width=0.4, color=COMPUTE, label="last step")
    mean = BATCH * TOP_K / EXPERTS
    right.axhline(mean, color=INK, linestyle="--", linewidth=1.2)
    right.set_xticks(experts[::3])
    right.set_ylim(0, max(first.max(), last.max(), 2 * mean) * 1.25)
    right.grid(False, axis="x")
    finish(fig, right, "", "expert", f"tokens a step (even: {mean:.0f})")
    right.legend(fontsize=11, frameon=False, ncols=2, loc="upper center")
    fig.suptitle(_finding(run, gamma), x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    return fig


def _finding(run: Run, gamma: float) -> str:
    steps, end = steps_until_even(run), run.violation[-TAIL:].mean()
    reached = f"even after {steps} steps" if steps is not None else f"never even in {STEPS} steps"
    return f"gamma {gamma:g}: {reached}, MaxVio {end:.2f} at the end"


def load_over_steps_in_words(gamma: float, skew: float, update: str = "sign") -> str:
    """How many steps until the load is even, and how far it still swings, in words."""
    run = simulate(gamma, skew, update)
    steps, tail = steps_until_even(run), run.violation[-TAIL:]
    reached = f"MaxVio falls below {EVEN} after {steps} steps"
    if steps is None:
        reached = f"MaxVio never falls below {EVEN} in {STEPS} steps"
    return (
        f"With gamma {gamma:g} ({update}) and skew {skew:g}, MaxVio starts at "
        f"{run.violation[0]:.2f}. {reached}; over the last {TAIL} it lies between "
        f"{tail.min():.2f} and {tail.max():.2f} (an even gate: "
        f"{simulate(0.0, 0.0).violation.mean():.2f} by chance alone), and {undone(run):.0%} of "
        f"the moves undo the one before."
    )
