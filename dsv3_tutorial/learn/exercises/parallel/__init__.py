"""Lesson 3's exercises: rings, splits, caches, copies, pipelines, and what lies further."""

from dsv3_tutorial.learn.exercises.parallel import (
    bubble,
    cache,
    copies,
    counts,
    gradients,
    order,
    overlap,
    place,
    ring,
    split,
)

# in the order of the lesson
EXERCISES = [
    ring.RING_ALL_REDUCE,
    split.COLUMN_ROW,
    cache.CACHE_PER_GPU,
    counts.DESTINATION_COUNTS,
    copies.NODE_COPIES,
    order.ONE_F_ONE_B,
    place.HIERARCHICAL,
    bubble.BUBBLE,
    overlap.OVERLAP_SPEEDUP,
    place.PLACE_GROUPS,
    gradients.FIND_THE_BUG,
]
