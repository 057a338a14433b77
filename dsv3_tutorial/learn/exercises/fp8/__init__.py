"""Lesson 2's exercises: rounding, tiles, products, what is lost, and the silicon detective."""

from dsv3_tutorial.learn.exercises.fp8 import (
    back,
    backward,
    bug,
    detective,
    lost,
    products,
    rounding,
    scales,
    sums,
    tiles,
)

# in the order of the lesson
EXERCISES = [
    rounding.ROUND_E4M3,
    tiles.QUANTIZE_TILES,
    back.DEQUANTIZE_TILES,
    products.SCALED_MATMUL,
    backward.LINEAR_BACKWARD,
    lost.LOST_TOKENS,
    scales.POWER_OF_TWO_SCALE,
    sums.MICRO_BATCHES,
    bug.FIND_THE_BUG,
    *detective.EXERCISES,
]
