# %% [markdown] id="title"
# # 0 · Start here
#
# This course builds DeepSeek-V3 in miniature. Each of its famous design decisions is met as an answer to a bottleneck that you
# measure first, on your own machine or in a recorded run.
#
# After these ten minutes you have
#
# - seen why models and hardware must be designed together;
# - measured what this machine can do, and drawn it as a roofline;
# - made a prediction, solved an exercise, and met the verdicts that an exercise can give.
#
# **How to run a cell:** click into it and press Shift+Enter. *Run, Run All Cells* works too: no lesson needs an exercise to be solved.

# %% id="setup"
from __future__ import annotations

from dsv3_tutorial import hardware
from dsv3_tutorial.bench import machine
from dsv3_tutorial.learn import (
    exercise,
    explore,
    hint,
    live_seconds,
    predict,
    progress,
    reveal,
    solution,
    term,
)
from dsv3_tutorial.learn.figures import start as figures

# %% [markdown] id="wall"
# ## 1 · The wall
#
# The paper that this course follows, *Insights into DeepSeek-V3* (ISCA 2025), opens with two rates. The memory that models ask for
# grows by more than 1000 % a year. The memory of a GPU grows by less than 50 %.
#
# **Predict.** Start both at 1. After three years, how many times larger is the demand than the supply?
# Put a number in place of `...`, then run the cell. There is no penalty for being wrong.

# %% id="guess-gap"
predict("start.gap", ..., unit="x")

# %% [markdown] id="measure-gap"
# More than 1000 % a year is a factor of at least 11. Less than 50 % is a factor of at most 1.5. So this is the least that the gap can be.

# %% id="reveal-gap"
reveal("start.gap", (11 / 1.5) ** 3)
figures.memory_wall()

# %% [markdown] id="wall-words"
# The upper line is what models ask for, the lower what one GPU offers, and the scale is logarithmic. Buying more GPUs closes it for a while, at a price that grows as fast.
# Either the model changes to fit the machine, or the machine to fit the model. Doing both on purpose is **co-design**.
#
# The paper names three areas, and the course follows them:
#
# | area | the bottleneck | V3's answer | lesson |
# |---|---|---|---|
# | memory | a conversation's past fills the GPU | Multi-head Latent Attention | 1 |
# | cost | training arithmetic | sparse experts; FP8 | 4, 2 |
# | speed | reading weights and past for each token; the network | speculation; overlapped, placed communication | 5, 3 |
# | all of it | choosing | a planner from cluster and budget to model | 6 |

# %% [markdown] id="machine"
# ## 2 · Your machine
#
# A chip has two speeds: how fast it computes and how fast it reads memory. Words with a meaning of their own are explained by `term`:

# %% id="term-intensity"
term("arithmetic intensity")

# %% [markdown] id="measure"
# **Measure.** The next cell copies memory and multiplies matrices for a few seconds, then draws the two limits that it found.
# Your numbers replace the ones that you see on the web.

# %% id="measure-machine" tags=["live", "nbval-ignore-output"]
here = machine.measure(seconds=min(live_seconds() / 4, 3)).chip()
figures.roofline(here, "fp32")

# %% [markdown] id="roofline-words"
# This drawing is called a **roofline**. On the slope, memory decides: the arithmetic units wait. On the flat part, arithmetic decides.
# The three dots are kinds of work. A model that writes one token at a time (*decode*, batch 1) uses each number that it reads about once, so it
# stands far to the left: at half a FLOP per byte here, where weights are FP32 and have 4 bytes. 32 conversations at once move it to the right. One that reads a long prompt (*prefill*) uses each number for every token of the prompt. (The dots count weights alone; lesson 1 adds the other thing that is read.)
#
# The same drawing for the GPU that V3 was trained on, from its published numbers:

# %% id="figure-h800"
figures.roofline(hardware.chip("h800"))

# %% [markdown] id="explore-words"
# Move the batch in the explorer: how many tokens at once does it take until the arithmetic of an H800 is busy? The dot climbs the slope until it reaches the ridge, near 295: a weight
# of two bytes must serve about 295 tokens.

# %% id="explore-batch"
explore(
    figures.roofline_by_batch,
    batch=[1, 8, 32, 128, 256, 512, 1024],
    chip_name=["h800", "h20", "b200", "rtx-4090"],
    say=figures.roofline_by_batch_in_words,
)

# %% [markdown] id="exercises"
# ## 3 · Your first exercise
#
# Exercises look like the next cell: a function whose body is `...`. Write yours, run the cell, and the verdict appears beneath it. If your
# function is right, the rest of the lesson uses *yours*. If not, it uses the package's, so nothing later breaks.
#
# ### Exercise 0.1 · The least time
#
# *Difficulty 1/5 · worth it 5/5 · 3 minutes · about 1 line*
#
# A job computes `flops` operations and moves `bytes` bytes. Both go on at the same time. Return the least time it can take on `chip`,
# in seconds: `chip.rate(fmt)` is its FLOP/s in a format, `chip.bandwidth()` its bytes per second.


# %% id="first-exercise" tags=["exercise"]
@exercise("start.time_s")
def time_s(flops, bytes, chip, fmt="bf16"): ...


# %% [markdown] id="verdict-not-yet"
# `[NOT ATTEMPTED]` means that the body is still `...`. Below are the two verdicts that you meet on the way. First, an answer that is wrong:
# the verdict says on which case, and it often knows the mistake.


# %% id="demo-not-yet" tags=["demonstration"]
@exercise("start.time_s")
def wrong(flops, bytes, chip, fmt="bf16"):
    return flops / chip.rate(fmt) + bytes / chip.bandwidth()


# %% [markdown] id="verdict-raised"
# Second, an answer that raises an error. You get the error and its line, not a page of traceback. A loop that never ends is stopped, too.


# %% id="demo-raised" tags=["demonstration"]
@exercise("start.time_s")
def broken(flops, bytes, chip, fmt="bf16"):
    return flops / chip.rates


# %% [markdown] id="stuck"
# Now go back to the exercise, replace `...`, and run it until it says `[PASSED]`. If you are stuck, each `hint` goes one step further, and
# `solution("start.time_s")` shows the package's own code.

# %% id="hint"
hint("start.time_s")

# %% [markdown] id="use-it"
# **Use it.** V3 activates 37 billion weights for each token. At one byte a weight, how many tokens a second can one H800 write, at best, for one reader?

# %% id="guess-tokens"
predict("start.tokens", ..., unit="tokens/s")

# %% [markdown] id="reveal-words"
# **Measure** it with the function above. Each weight is read once and used for one multiplication and one addition.

# %% id="reveal-tokens"
h800 = hardware.chip("h800")
seconds = time_s(2 * 37e9, 37e9, h800, "fp8")
reveal("start.tokens", 1 / seconds)
print(f"arithmetic used: {2 * 37e9 / seconds / h800.rate('fp8'):.2%}")

# %% [markdown] id="used"
# About 90 tokens a second at best, with the arithmetic units idle for more than 99 % of the time. (V3's 671 GB do not fit on one H800. Spread over several, each reads its share at the same time,
# and the bound rises with their number until the network decides: lesson 3.) Weights are one of the two things that a token reads. Lesson 1 is about the other.
#
# ## 4 · The map
#
# The recommended path is 0, 1 and then, as they come, 4, 2, 3, 5, 6. Each section of a lesson goes round one loop: **predict, measure, explain, build**. Everything
# that you pass is kept on this machine:

# %% id="progress"
progress()

# %% [markdown] id="next"
# Where a number comes from is always said: *measured* here or in a receipt with its device and date, *derived* by the cost model, or *quoted* from
# a source. Claims that circulate about V3 are run as code, and some of them fail.
#
# Next: open `01_latent_attention.ipynb`.
