"""Lesson 4's exercises: the gate, the way to the experts, the load, and what lies further."""

from dsv3_tutorial.learn.exercises.moe import further, gate, load, whole

EXERCISES = [*gate.EXERCISES, *load.EXERCISES, *further.EXERCISES, *whole.EXERCISES]
