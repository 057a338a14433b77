"""Who lies in the clinic: two healthy ones and sixteen sick ones; what shows, and what it was.

The key to the charts. `symptom` may be shown with the curves, `title` is one of the diagnoses to
choose from, `explanation` and `statistic` come after the learner's own.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from dsv3_tutorial.bench import clinic_bugs as bugs


@dataclass(frozen=True)
class Case:
    """One patient. `plant` puts its bug in place; `recipe` is what its run changes of the recipe.

    `statistic`, of a clinic.Run, parts it from the healthy runs; None where nothing recorded does.
    """

    name: str
    title: str
    symptom: str
    explanation: str
    statistic: Callable[..., float] | None = None
    plant: Callable[[], AbstractContextManager] = nullcontext
    recipe: Mapping[str, Any] = field(default_factory=dict)
    bytes_of_text: int | None = None  # of the training text; None: all of it
    sick: bool = True

    @property
    def told(self) -> bool:
        """Whether the recorded columns show that it is sick."""
        return self.statistic is not None


def named(name: str) -> Case:
    """The case of this name. Raises ValueError with the names there are."""
    for case in CASES:
        if case.name == name:
            return case
    raise ValueError(
        f"There is no case {name!r} in the clinic, so it has no runs. "
        f"Take one of {', '.join(case.name for case in CASES)}."
    )


CASES = [
    Case(
        name="healthy",
        title="Healthy",
        symptom="The loss falls fast, then slowly. MaxVio rises while the gate finds its first "
        "favourites and comes down as the bias catches up. The gradient norm settles below 1.",
        explanation="Nothing is wrong. MaxVio does not end at 0: a batch of 512 bytes is a sample, "
        "and eight windows of text are not alike.",
        sick=False,
    ),
    Case(
        name="healthy_half_rate",
        title="Healthy, at half the learning rate",
        symptom="Every column does what a sound run does; the first hundred steps are slower.",
        explanation="A different setting is no bug. Whatever a statistic calls sick has to lie "
        "outside what sound settings do to it.",
        recipe={"peak_lr": 3e-3},
        sick=False,
    ),
    Case(
        name="bias_in_the_weight",
        title="The balance bias also enters the weights that experts are summed with",
        symptom="All columns run as in a sound model.",
        explanation="The bias is there to steer the choice. In the weights it changes what the "
        "layer computes, without a gradient that could object. The model learns around it: no "
        "curve tells, only a test that weights do not depend on the bias does.",
        plant=bugs.bias_in_the_weight,
    ),
    Case(
        name="bias_oscillates",
        title="The bias moves with every micro-batch, and thirty times too far",
        symptom="MaxVio falls at once and then stays up, jumping from step to step; some experts "
        "have no token at all in a step, others in the next.",
        explanation="A step larger than the gap it should close overshoots, and the favourites "
        "change places. The counts of the whole batch move the bias once, by a gamma that is small "
        "against the scores' gaps. The loss does not tell.",
        statistic=lambda run: run.zero_fraction[-100:].mean(),
        plant=lambda: bugs.bias_moves_every_micro_batch(30.0),
        recipe={"micro_batches": 2},
    ),
    Case(
        name="no_balance",
        title="Nothing balances: the bias is never updated, and there is no balance loss",
        symptom="MaxVio rises and stays near its ceiling; a part of the gradient is zero for good.",
        explanation="Chosen experts learn, and are chosen more for it. A few carry nearly all "
        "tokens, the others are dead weight. The loss of a run this short does not mind: the "
        "price is capacity, and on many devices time.",
        statistic=lambda run: run.max_violation[-100:].mean(),
        recipe={"balance": "none"},
    ),
    Case(
        name="bias_sign",
        title="The bias update has the wrong sign",
        symptom="MaxVio goes to its ceiling and rests there; half of the gradient is zero.",
        explanation="Who is overloaded gets more. The bias outgrows any score, so every token goes "
        "to the same experts, whatever it is: the choice no longer depends on the token, the "
        "mixture is a dense layer of K experts. Its loss is as good as any other's here.",
        statistic=lambda run: run.zero_fraction[-50:].mean(),
        plant=bugs.bias_moves_the_wrong_way,
    ),
    Case(
        name="counts_doubled",
        title="Every token is counted twice for the balance, forward and recomputed",
        symptom="All columns run as in a sound model.",
        explanation="They are those of the healthy run, to the last digit: the update takes the "
        "sign of the gap to the mean, and MaxVio is a ratio; twice the counts changes neither. It "
        "would hurt where counts are used as numbers, as in the variant without the sign.",
        plant=bugs.counts_doubled,
    ),
    Case(
        name="zero_mask",
        title="Groups that are not chosen are masked with 0, while biased scores are negative",
        symptom="A part of the gradient is zero from the very first step, when the scores of all "
        "experts are still nearly even; a hundred steps later all columns are as in a sound model.",
        explanation="0 beats every negative score, so the experts come from the groups that were "
        "to be left out, and tie there: some are never taken. The bias soon spreads the load all "
        "the same. What stays broken is the cap on nodes, which no loss sees.",
        statistic=lambda run: run.zero_fraction[:5].mean(),
        plant=bugs.groups_masked_with_zero,
    ),
    Case(
        name="scaled_twice",
        title="The routed scaling factor is applied twice",
        symptom="The loss is worse from the beginning and stays a little worse.",
        explanation="The experts' sum is 2.5 times too large beside the shared expert and the "
        "residual stream. Weights could shrink and undo it, given time: a gap that closes slowly "
        "looks like a poor setting and is a bug.",
        statistic=lambda run: run.loss[60:120].mean(),
        plant=bugs.scaled_twice,
    ),
    Case(
        name="gate_detached",
        title="The gate gets no gradient: its weights are detached",
        symptom="A small, constant part of the gradient is zero, from the first step to the last.",
        explanation="The gate stays as it was drawn and routes by random directions; the experts "
        "still learn what they are sent. Hashing by the token works surprisingly well, so look "
        "at the zeros: exactly the gate's share of the parameters.",
        statistic=lambda run: run.zero_fraction.min(),
        plant=bugs.gate_detached,
    ),
    Case(
        name="no_softmax_scale",
        title="Attention's scores are not divided by the square root of their width",
        symptom="The loss follows the sound one a little above it, with larger gradients at first.",
        explanation="Scores are 5.7 times too large, and training from scratch makes queries and "
        "keys smaller instead: at another learning rate the gap would drown. It is gross where a "
        "checkpoint trained elsewhere is loaded. Compare with a reference, not with a curve.",
        statistic=lambda run: run.loss[-100:].mean(),
        plant=lambda: bugs.softmax_scale(lambda cfg: 1.0),
    ),
    Case(
        name="keys_not_rotated",
        title="RoPE turns the queries and not the shared key",
        symptom="The loss follows the sound one and parts from it: it stays higher.",
        explanation="A score then depends on where the query stands and not on how far the key is. "
        "Without distance the model falls back on which bytes are near in meaning, not in place.",
        statistic=lambda run: run.loss[-100:].mean(),
        plant=bugs.keys_not_rotated,
    ),
    Case(
        name="future_visible",
        title="Attention has no causal mask",
        symptom="After a common beginning the loss falls nearly to nothing, held-out loss with it.",
        explanation="The next byte stands in the input, and attention copies it. No text of this "
        "kind can be predicted so well: a loss that is too good is the one alarm that nobody "
        "wants to hear. Held-out text is no protection, it leaks the same way.",
        statistic=lambda run: run.loss[-50:].mean(),
        plant=bugs.future_visible,
    ),
    Case(
        name="target_one_too_far",
        title="Targets are shifted twice: the model learns the byte after the next",
        symptom="The loss stays far above a sound one; nothing else is out of the way.",
        explanation="Data and loss each shift by one. The task is a real one, only harder, so "
        "everything looks like slow learning. Print one input and its target.",
        statistic=lambda run: run.held_out[-4:].mean(),
        plant=bugs.target_one_too_far,
    ),
    Case(
        name="no_clipping",
        title="No gradient clipping, at ten times the learning rate",
        symptom="The loss falls fastest of all at first, then lies flat and high; the gradients "
        "become small.",
        explanation="The first large updates saturate gate and norms, and the model never comes "
        "back. Small gradients at a high loss are no peace, they are a plateau. Adam divides by "
        "the gradient's size, so most of this is the rate's doing and little the clipping's.",
        statistic=lambda run: run.held_out[-4:].mean(),
        plant=bugs.clipping_off,
        recipe={"peak_lr": 6e-2},
    ),
    Case(
        name="no_warmup",
        title="The learning rate has no warm-up",
        symptom="The loss falls faster than a sound one for twenty steps, and ends higher.",
        explanation="Adam's second moments are guesses in the first steps, and a full step on a "
        "guess ruins directions that are slow to come back. A better beginning is no proof.",
        statistic=lambda run: run.loss[:20].mean(),
        recipe={"warmup": 0},
    ),
    Case(
        name="heavy_decay",
        title="Weight decay is thirty times too strong, and on norms as well",
        symptom="The loss comes down and stops early, high, while a sound one still falls.",
        explanation="Decay pulls every weight to zero as fast as the gradient pulls it away. "
        "Train and held-out loss agree, so more text would not help: it cannot fit either.",
        statistic=lambda run: run.held_out[-4:].mean(),
        plant=bugs.decay_on_everything,
    ),
    Case(
        name="little_text",
        title="The text repeats: four kilobytes, read again and again",
        symptom="The loss falls below a sound one, and held-out loss turns and climbs.",
        explanation="The model learns the passage by heart. A loss on text that was seen before "
        "measures memory; only the gap to held-out text shows it.",
        statistic=lambda run: run.held_out[-1] - run.loss[-20:].mean(),
        bytes_of_text=4096,
    ),
]
