"""Keeping the experts evenly busy: how uneven the load is, and the bias that evens it out."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _counts(*values: int):
    return lambda: (torch.tensor(values),)


def _layers() -> tuple:
    return (torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [50, 30, 60, 20]]),)


def _one_idle_layer() -> tuple:
    return (torch.tensor([[4, 6], [0, 0]]),)


def _two_sided(counts):
    away = (_wide(counts) - _mean(counts)[..., None]).abs().amax(dim=-1)
    return away / _safe(_mean(counts))


def _mean(counts: Tensor) -> Tensor:
    return _wide(counts).mean(dim=-1)


def _wide(counts: Tensor) -> Tensor:
    return counts.to(torch.promote_types(counts.dtype, torch.float32))


def _safe(mean: Tensor) -> Tensor:
    return mean.clamp(min=1e-30)


def _ratio_only(counts):
    return _wide(counts).amax(dim=-1) / _safe(_mean(counts))


def _by_minimum(counts):
    return (_mean(counts) - _wide(counts).amin(dim=-1)) / _safe(_mean(counts))


def _by_total(counts):
    return (_wide(counts).amax(dim=-1) - _mean(counts)) / _wide(counts).sum(dim=-1).clamp(min=1e-30)


def _over_everything(counts):
    wide = _wide(counts)
    return (wide.amax(dim=-1) - wide.mean()) / _safe(wide.mean())


def _absolute(counts):
    return _wide(counts).amax(dim=-1) - _mean(counts)


def _max_over_min(counts):
    return (_wide(counts).amax(dim=-1) - _wide(counts).amin(dim=-1)) / _safe(_mean(counts))


def _divides_by_zero(counts):
    return (_wide(counts).amax(dim=-1) - _mean(counts)) / _mean(counts)


MAX_VIOLATION = Exercise(
    name="moe.max_violation",
    reference="dsv3_tutorial.moe.balance:max_violation",
    cases=[
        Case("an even load", _counts(8, 8, 8, 8)),
        Case("one expert has everything", _counts(0, 0, 24, 0)),
        Case("three layers", _layers),
        Case("no token at all", _counts(0, 0, 0, 0)),
        Case("the idlest farther off", _counts(10, 10, 10, 0), hidden=True),
        Case("less than one each", _counts(1, 0, 0, 0), hidden=True),
        Case("a layer without tokens", _one_idle_layer, hidden=True),
        Case("in between", _counts(10, 3, 7, 0, 1, 9), hidden=True),
    ],
    hints=[
        "counts.float().mean(dim=-1) is the even load; .amax(dim=-1) the busiest expert's.",
        "How far the busiest lies above the mean, in units of the mean.",
        "Without tokens mean and maximum are 0: clamp the divisor to something tiny.",
    ],
    difficulty=1,
    importance=4,
    minutes=4,
    lines=3,
    mutants=[
        Mutant("no minus one", _ratio_only, "An even load is 0: subtract the mean first."),
        Mutant("the idlest", _by_minimum, "This looks at the idlest expert: take the busiest."),
        Mutant(
            "of the total", _by_total, "The excess is divided by all tokens; divide by the mean."
        ),
        Mutant("one mean", _over_everything, "Each layer has its own mean: dim=-1."),
        Mutant("tokens", _absolute, "These are tokens: divide by the mean load."),
        Mutant("max - min", _max_over_min, "This is the range; the measure is max minus mean."),
        Mutant("two-sided", _two_sided, "An idle expert counts here too: only the busiest does."),
        Mutant("0 / 0", _divides_by_zero, "Without tokens 0 / 0 is NaN: clamp the mean; it is 0."),
    ],
)


def _bias_case(seed: int, e: int, gamma: float, *zero_mean: bool, even: bool = False):
    def make() -> tuple:
        draw = torch.Generator().manual_seed(seed)
        bias = torch.randn(e, generator=draw) / 10
        counts = torch.full((e,), 12) if even else torch.randint(0, 40, (e,), generator=draw)
        return (bias, counts, gamma, *zero_mean)

    return make


def _one_at_the_mean() -> tuple:
    return torch.zeros(4), torch.tensor([10, 20, 30, 20]), 0.5


def _sign(counts: Tensor) -> Tensor:
    return (_mean(counts) - _wide(counts)).sign()


def _step(bias: Tensor, sign: Tensor, gamma: float, zero_mean: bool) -> Tensor:
    return bias + gamma * (sign - sign.mean() if zero_mean else sign)


def _wrong_way(bias, counts, gamma, zero_mean=False):
    return _step(bias, -_sign(counts), gamma, zero_mean)


def _proportional(bias, counts, gamma, zero_mean=False):
    return _step(bias, _mean(counts) - _wide(counts), gamma, zero_mean)


def _relative(bias, counts, gamma, zero_mean=False):
    return _step(bias, (_mean(counts) - _wide(counts)) / _mean(counts), gamma, zero_mean)


def _median(bias, counts, gamma, zero_mean=False):
    return _step(bias, (_wide(counts).median() - _wide(counts)).sign(), gamma, zero_mean)


def _only_down(bias, counts, gamma, zero_mean=False):
    return _step(bias, _sign(counts).clamp(max=0), gamma, zero_mean)


def _centred_bias(bias, counts, gamma, zero_mean=False):
    moved = _step(bias, _sign(counts), gamma, False)
    return moved - moved.mean() if zero_mean else moved


def _never_centred(bias, counts, gamma, zero_mean=False):
    return _step(bias, _sign(counts), gamma, False)


def _at_mean_down(bias, counts, gamma, zero_mean=False):
    sign = torch.where(_wide(counts) < _mean(counts), 1.0, -1.0)
    return _step(bias, sign, gamma, zero_mean)


def _replaced(bias, counts, gamma, zero_mean=False):
    return _step(torch.zeros_like(bias), _sign(counts), gamma, zero_mean)


UPDATE_BIAS = Exercise(
    name="moe.update_bias",
    reference="dsv3_tutorial.moe.balance:update_bias",
    cases=[
        Case("8 experts", _bias_case(0, 8, 0.001)),
        Case("an even load", _bias_case(1, 6, 0.01, even=True)),
        Case("two at the mean", _one_at_the_mean),
        Case("zero_mean", _bias_case(2, 7, 0.01, True)),
        Case("another load", _bias_case(3, 16, 0.1), hidden=True),
        Case("another, zero_mean", _bias_case(4, 5, 0.02, True), hidden=True),
        Case("an even load, zero_mean", _bias_case(5, 5, 0.02, True, even=True), hidden=True),
    ],
    hints=[
        "counts.float().mean() is the even load. Who is above it? (mean - counts).sign().",
        "+1 for an expert with too few tokens, -1 for too many, 0 at the mean; times gamma.",
        "zero_mean: subtract the mean of the signs, so that the biases' sum stays.",
    ],
    difficulty=2,
    importance=5,
    minutes=6,
    lines=3,
    mutants=[
        Mutant("wrong way", _wrong_way, "The busy experts are lifted: they must be lowered."),
        Mutant("proportional", _proportional, "The step grows with the gap: only its sign counts."),
        Mutant("relative", _relative, "The step is the relative gap: only its sign counts."),
        Mutant("median", _median, "The even load is the mean of the counts, not the median."),
        Mutant("only down", _only_down, "Idle experts stay: they must be lifted as well."),
        Mutant("at the mean", _at_mean_down, "An expert right at the mean is moved; it stays."),
        Mutant("bias centred", _centred_bias, "zero_mean centres the step, not the bias itself."),
        Mutant("never centred", _never_centred, "zero_mean is not used."),
        Mutant("replaced", _replaced, "The old bias is lost: add the step to it."),
    ],
)

EXERCISES = [MAX_VIOLATION, UPDATE_BIAS]
