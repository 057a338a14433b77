"""Lesson 1's exercises: the cache, the latent, the rotation, and attention without keys."""

from dsv3_tutorial.learn.exercises.attention import cache, further, latent, scores

EXERCISES = [*cache.EXERCISES, *latent.EXERCISES, *scores.EXERCISES, *further.EXERCISES]
