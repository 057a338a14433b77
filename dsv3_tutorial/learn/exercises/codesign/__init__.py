"""Lesson 6's exercises: stalls, what a GPU holds, what a run costs, decisions, and two designs."""

from dsv3_tutorial.learn.exercises.codesign import (
    bug,
    designs,
    gain,
    orders,
    price,
    stages,
    stalls,
    state,
)

# in the order of the lesson
EXERCISES = [
    stalls.EXPOSED,
    state.STATE_BYTES,
    price.RUN_COST,
    orders.BOTH_ORDERS,
    designs.LAB_DESIGN,
    designs.CLUSTER_DESIGN,
    stages.SLOWEST_STAGE,
    price.MFU,
    gain.GAIN,
    gain.FIT_EFFICIENCY,
    bug.FIND_THE_BUG,
]
