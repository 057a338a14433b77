"""What a run costs, and how well it uses what is paid for."""

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

V3 = (14.8e12, 62_914_560, 19.926, 2048, 2.0, 700.0)


def _numbers(*numbers: float):
    return lambda: numbers


def _open(
    steps=lambda tokens, per_step: tokens / per_step,
    gpus=lambda n: n,
    hour=3600,
    rent=lambda hours, n, rent: hours * rent,
    power=lambda hours, n, watts: hours * watts / 1000,
):
    """`run_cost` with each factor open to be got wrong."""

    def cost(tokens, tokens_per_step, step_s, n, price, watts):
        hours = steps(tokens, tokens_per_step) * step_s / hour * gpus(n)
        return hours, rent(hours, n, price), power(hours, n, watts)

    return cost


RUN_COST = Exercise(
    name="codesign.run_cost",
    reference="dsv3_tutorial.cost.plan:run_cost",
    cases=[
        Case("a small run", _numbers(3.6e9, 1e6, 2.0, 8, 2.0, 500.0)),
        Case("DeepSeek-V3", _numbers(*V3)),
        Case("one GPU", _numbers(2.5e8, 65_536, 0.75, 1, 0.4, 72.0)),
        Case("another rent", _numbers(1e12, 4e6, 7.0, 512, 3.5, 1000.0), hidden=True),
        Case(
            "steps that are no whole number", _numbers(1e7, 3e6, 60.0, 4, 1.0, 400.0), hidden=True
        ),
    ],
    hints=[
        "How many steps are there? tokens / tokens_per_step, not rounded; each takes step_s.",
        "All GPUs work through all of it: gpu_hours = seconds / 3600 * gpus.",
        "A GPU hour costs rent dollars and takes watts / 1000 kWh.",
    ],
    difficulty=1,
    importance=5,
    minutes=4,
    lines=3,
    tolerance=1e-9,
    mutants=[
        Mutant(
            "hours of the run",
            _open(gpus=lambda n: 1),
            "These are hours of the run: each of the gpus works and is paid through all of them.",
        ),
        Mutant(
            "hours, paid by GPU",
            lambda t, s, step, n, rent, watts: (
                (h := t / s * step / 3600),
                h * n * rent,
                h * n * watts / 1000,
            ),
            "The first number are hours of the run: return GPU hours, times gpus.",
        ),
        Mutant(
            "gpus twice",
            _open(rent=lambda h, n, r: h * n * r, power=lambda h, n, w: h * n * w / 1000),
            "gpus is counted twice: GPU hours hold it already.",
        ),
        Mutant(
            "seconds",
            _open(hour=1),
            "These are GPU seconds: an hour has 3600.",
        ),
        Mutant("minutes", _open(hour=60), "These are GPU minutes: an hour has 3600 seconds."),
        Mutant(
            "a token a step",
            _open(steps=lambda tokens, per_step: tokens),
            "tokens_per_step is not used: a step takes many tokens at once.",
        ),
        Mutant(
            "watt hours",
            _open(power=lambda h, n, w: h * w),
            "These are watt hours: a kWh has a thousand.",
        ),
        Mutant(
            "joules",
            _open(power=lambda h, n, w: h * 3600 * w),
            "These are joules, watt seconds: a kWh is an hour of a thousand watts.",
        ),
        Mutant(
            "no power",
            _open(power=lambda h, n, w: h / 1000),
            "watts is not used: a GPU hour takes watts / 1000 kWh.",
        ),
        Mutant(
            "one GPU's power",
            _open(power=lambda h, n, w: h / n * w / 1000),
            "This is one GPU's energy: all gpus take power.",
        ),
        Mutant(
            "whole steps",
            _open(steps=lambda tokens, per_step: -(-tokens // per_step)),
            "The steps are rounded: leave the last one as the fraction that it is.",
        ),
        Mutant(
            "whole steps, rounded down",
            _open(steps=lambda tokens, per_step: tokens // per_step),
            "The last step is dropped: leave it as the fraction that it is.",
        ),
    ],
)

MFU = Exercise(
    name="codesign.mfu",
    reference="dsv3_tutorial.cost.estimate:mfu",
    cases=[
        Case("one GPU at half its peak", _numbers(1e4, 5e10, 1, 1e15)),
        Case("DeepSeek-V3", _numbers(3.157e6, 2.5046e11, 2048, 989.4e12)),
        Case("a small model", _numbers(2.5e4, 3.1e8, 2, 4e13)),
        Case("another cluster", _numbers(7.7e5, 4.4e11, 512, 9.9e14), hidden=True),
        Case("a rack", _numbers(9e6, 6e10, 72, 2.5e15), hidden=True),
    ],
    hints=[
        "How many FLOP a second does the run do that are of use? And how many could it do?",
        "Of use: tokens_per_second * flops_per_token. It could: gpus * peak.",
    ],
    difficulty=1,
    importance=4,
    minutes=3,
    lines=1,
    tolerance=1e-9,
    mutants=[
        Mutant(
            "one GPU",
            lambda rate, flops, gpus, peak: rate * flops / peak,
            "gpus is not used: the tokens are those of the whole run, and so is the peak.",
        ),
        Mutant(
            "gpus the other way",
            lambda rate, flops, gpus, peak: rate * flops * gpus / peak,
            "gpus multiplies what could be done, not what is.",
        ),
        Mutant(
            "forward and backward again",
            lambda rate, flops, gpus, peak: 3 * rate * flops / (gpus * peak),
            "A factor of 3 too much: flops_per_token holds forward and backward already.",
        ),
        Mutant(
            "six",
            lambda rate, flops, gpus, peak: 6 * rate * flops / (gpus * peak),
            "A factor of 6 too much: flops_per_token are FLOP, not parameters.",
        ),
        Mutant(
            "upside down",
            lambda rate, flops, gpus, peak: gpus * peak / (rate * flops),
            "The fraction is upside down: what is done over what could be.",
        ),
        Mutant(
            "percent",
            lambda rate, flops, gpus, peak: 100 * rate * flops / (gpus * peak),
            "This is in percent: return a share.",
        ),
        Mutant(
            "a GPU's FLOP/s",
            lambda rate, flops, gpus, peak: rate * flops / gpus,
            "These are FLOP/s of a GPU: divide by its peak.",
        ),
    ],
)
