"""Lesson 0: the one formula that the whole course is measured against."""

from dsv3_tutorial.hardware import chip
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _decode() -> tuple:  # 37e9 weights in FP8, read once, each used for one multiply and add
    return 74e9, 37e9, chip("h100-sxm"), "bf16"


def _prefill() -> tuple:  # the same weights, shared by 4,096 tokens
    return 4096 * 74e9, 37e9, chip("h100-sxm"), "bf16"


def _other_format() -> tuple:
    return 3e15, 2e10, chip("h800"), "fp8"


def _other_chip() -> tuple:
    return 5e12, 8e10, chip("h20"), "bf16"


def _newer_chip() -> tuple:
    return 3e13, 9e11, chip("b200"), "fp8"


def _near_the_ridge() -> tuple:  # 300 FLOP per byte: both terms matter
    return 3e14, 1e12, chip("h100-sxm"), "bf16"


def _adds(flops, bytes, chip, fmt="bf16"):
    return flops / chip.rate(fmt) + bytes / chip.bandwidth()


def _takes_the_faster(flops, bytes, chip, fmt="bf16"):
    return min(flops / chip.rate(fmt), bytes / chip.bandwidth())


def _only_arithmetic(flops, bytes, chip, fmt="bf16"):
    return flops / chip.rate(fmt)


def _only_memory(flops, bytes, chip, fmt="bf16"):
    return bytes / chip.bandwidth()


def _upside_down(flops, bytes, chip, fmt="bf16"):
    return max(chip.rate(fmt) / flops, chip.bandwidth() / bytes)


def _one_format(flops, bytes, chip, fmt="bf16"):
    return max(flops / chip.rate("bf16"), bytes / chip.bandwidth())


EXERCISES = [
    Exercise(
        name="start.time_s",
        reference="dsv3_tutorial.cost.roofline:time_s",
        cases=[
            Case("one token of decode", _decode),
            Case("a prefill of 4,096 tokens", _prefill),
            Case("near the ridge", _near_the_ridge),
            Case("FP8 on an H800", _other_format, hidden=True),
            Case("an H20", _other_chip, hidden=True),
            Case("a B200", _newer_chip, hidden=True),
        ],
        hints=[
            "Find two times: how long the arithmetic takes alone, and the memory traffic alone.",
            "A time is an amount divided by a rate: flops / chip.rate(fmt) and "
            "bytes / chip.bandwidth().",
            "Both go on at once, so the slower of the two decides: max(...).",
        ],
        difficulty=1,
        importance=5,
        minutes=3,
        lines=1,
        mutants=[
            Mutant("sum", _adds, "you added the two times, but they pass at the same time."),
            Mutant("min", _takes_the_faster, "you took the faster of the two; the slower decides."),
            Mutant("no memory", _only_arithmetic, "this is the arithmetic alone; where is memory?"),
            Mutant("no flops", _only_memory, "this is the memory alone; where is the arithmetic?"),
            Mutant("inverted", _upside_down, "the fraction is upside down: amount / rate is time."),
            Mutant(
                "one format", _one_format, "the rate depends on the format: use chip.rate(fmt)."
            ),
        ],
    )
]
