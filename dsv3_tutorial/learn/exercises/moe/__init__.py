"""Lesson 4's exercises: the gate, the way to the experts, the load, and what lies further."""

from dsv3_tutorial.learn.exercises.moe import (
    choice,
    curves,
    further,
    gate,
    load,
    parameters,
    way,
    whole,
)

# in the order of the lesson
EXERCISES = [
    *parameters.EXERCISES,
    gate.AFFINITIES,
    *choice.EXERCISES,
    gate.COMBINE_WEIGHTS,
    *load.EXERCISES,
    *way.EXERCISES,
    *further.EXERCISES,
    *whole.EXERCISES,
    *curves.EXERCISES,
]
