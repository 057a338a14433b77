"""Lesson 5's exercises: eight bits, what a step reads, an FP8 latent, drafts and their check."""

from dsv3_tutorial.learn.exercises.inference import (
    bug,
    check,
    draft,
    error,
    latent,
    pages,
    rows,
    sample,
    scales,
    serving,
)

# in the order of the lesson
EXERCISES = [
    serving.EXPERTS_TOUCHED,
    serving.TOKENS_PER_SECOND,
    scales.QUANTIZE_INT8,
    latent.FP8_ATTEND,
    draft.MTP_INPUTS,
    check.ACCEPT,
    error.PREDICTED_ERROR,
    rows.PACK_ROWS,
    pages.SLOTS,
    sample.TOP_P,
    bug.FIND_THE_BUG,
]
