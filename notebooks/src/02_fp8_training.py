# %% [markdown] id="title"
# # 2 · FP8 training
#
# DeepSeek-V3 did most of its training arithmetic on numbers of eight bits, on tensor cores that keep fewer digits of a sum than anyone was told. In this lesson you
# build what makes that enough: a scale for each few numbers, sums that are promoted in time, and three products that each quantise along the right axis. Then you train with it, and learn how much evidence it takes to say that nothing was lost.
#
# After it you can
#
# - round a number to E4M3 by hand, and say what a scale for each tile buys, and what it does not;
# - multiply scaled FP8 matrices the way the hardware has to, and say why DeepSeek promotes every 128 products;
# - write the backward pass of an FP8 linear layer, with every operand quantised along the axis that is summed;
# - tell a real difference between two training runs from noise;
# - say where FP8 is faster, and where quantising costs more than it saves.
#
# *75 minutes to `progress()`; Further holds about as much again. Run All takes about two minutes. You need to know what a linear layer and its gradient are; no other lesson is needed. In any cell, `hint(name)` helps with an exercise, `solution(name)` shows the package's source, and `term("FP8")` explains a word.*
#
# **Letters.** A product has the sizes `m`, `n`, `k`: $(m, k)$ times the transpose of $(n, k)$ gives $(m, n)$, and `k` is the axis that is summed. In a linear layer `M` tokens take the place of `m`. A *tile* is 1 x 128 numbers along a row, a *block* 128 x 128.

# %% id="setup"
from __future__ import annotations

import math

import torch

from dsv3_tutorial.hardware import chip
from dsv3_tutorial.learn import (
    exercise,
    explore,
    fails,
    hint,
    live_seconds,
    predict,
    progress,
    reveal,
    solution,
    term,
)
from dsv3_tutorial.learn.figures import fp8_roofline

# %% [markdown] id="bottleneck"
# ## 1 · The bottleneck: products, and the bytes under them
#
# Training V3 costs 250 GFLOP a token, for 14.8 trillion tokens, nearly all of it in the matrix products of linear layers. A chip does them faster in a narrower number format: half the bits, about half the circuits and half the bytes. The table has peak rates as published. The *ridge* is the arithmetic intensity (FLOP per byte moved) from which a product is bound by arithmetic and no longer by memory. The figure has a product of V3 under the roofs of two formats, and the time that arithmetic and memory need at least.

# %% id="chips"
fp8_roofline.chips_table()
fp8_roofline.by_format(chip="h800", fmt="fp8")

# %% [markdown] id="figure-roofline-words"
# With 4,096 tokens arithmetic decides, and FP8 halves it. With few tokens memory decides, and FP8 halves that too (*Further* has an explorer).
#
# That is the promise. **Predict**, on paper. V3's whole training, attention and communication included: what share of the H800's FP8 peak did it reach?
#
# **Claim check.** *"The H800 has dedicated FP8 units with twice the speed of FP16."* What is published:

# %% id="claim-units"
fp8_roofline.twice_fp16()

# %% [markdown] id="claim-units-words"
# Half true. The peak is twice BF16's, and FP16's is BF16's. But there is no separate unit: the ordinary tensor cores accept FP8. The best shapes of a published product reach 69 to 78 % of that peak. And of a whole training run, which also has attention, communication and pipeline bubbles, a fifth is left; the ISCA paper counts it against BF16's peak, of which it is 39 %.
#
# The last line of the table is the trouble of section 3. First the numbers themselves.
#
# ## 2 · Eight bits
#
# **E4M3** is a sign, four bits of exponent, three of mantissa. With the exponent bits `e` and the mantissa bits `m` as whole numbers, its value is
#
# $$(1 + m/8) \cdot 2^{e-7} \;\text{ for } e \ge 1, \qquad m/8 \cdot 2^{-6} \;\text{ for } e = 0.$$
#
# The second kind, the *subnormals*, fills the gap down to zero in even steps. There is no infinity; the code with all bits set is NaN, so the largest number is $1.75 \cdot 2^8 = 448$. PyTorch has it as `float8_e4m3fn`:

# %% id="codes"
for code in (0b0_0000_001, 0b0_0000_111, 0b0_0001_000, 0b0_0111_000, 0b0_0111_001, 0b0_1111_110):
    value = torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()
    bits = f"{code:08b}"
    print(f"{bits[0]} {bits[1:5]} {bits[5:]}  {value:.8g}")

# %% [markdown] id="codes-words"
# The smallest number, the largest subnormal, the smallest normal number $2^{-6}$, then 1, its successor, and 448.
#
# ### Exercise 2.1 · Round by hand
#
# *Difficulty 3/5 · worth it 5/5 · 8 minutes · about 4 lines*
#
# Round float32 numbers of any shape to the nearest E4M3 value, with arithmetic and without a cast to FP8. Every number lies between two powers of two; inside that stretch the values are evenly spaced, an eighth of the lower power apart. Below $2^{-6}$ the spacing stays $2^{-9}$. A tie goes to the even code (`torch.round` does that). Beyond 448 comes 448, and NaN stays NaN.
#
# Useful: `mantissa, exponent = torch.frexp(x)` gives $x = \mathrm{mantissa} \cdot 2^{\mathrm{exponent}}$ with a mantissa between 0.5 and 1, exactly; `torch.exp2`.


# %% id="round-e4m3" tags=["exercise"]
@exercise("fp8.round_e4m3")
def round_e4m3(x): ...


# %% [markdown] id="figure-line-text"
# A number and its neighbours. Above, all of E4M3 by magnitude; below, the values around 3.3 and the one it becomes.

# %% id="figure-line"
from dsv3_tutorial.learn.figures import number_line

number_line.around(3.3, "e4m3")

# %% [markdown] id="explore-line-text"
# Try 0.0003, 300 and 1,000 in each format. The names count bits of exponent and of mantissa: E5M2 is FP8's other kind, E5M6 has twelve bits, FP16 is E5M10 and BF16 E8M7. INT8 is whole numbers, evenly spaced, without an exponent.

# %% id="explore-line"
explore(
    number_line.around,
    value=[0.0003, 0.001, 0.01, 0.1, 1.06, 3.3, 40.0, 127.4, 300.0, 1000.0, 70000.0],
    fmt=["e4m3", "e5m2", "e5m6", "int8", "fp16", "bf16"],
    start={"value": 3.3, "fmt": "e4m3"},
    say=number_line.around_in_words,
)

# %% [markdown] id="scale-text"
# A rounded number is off by a sixteenth at most. But only in the middle of the range: 0.0003 becomes zero, and 1,000 is cut to 448 (both are in the explorer). A weight of 0.02 and a gradient of $10^{-7}$ both have to fit. So FP8 never stands alone: a group of numbers is divided by a common **scale** that lays its largest magnitude on 448, and the scale is kept beside them in float32.
#
# Who shares a scale? DeepSeek-V3: in activations and gradients each *tile*, 128 neighbours of one token; in weights each *block* of 128 x 128. The scale is taken from the very numbers at hand ("online"), not from earlier steps.
#
# ### Exercise 2.2 · Quantise tiles
#
# *Difficulty 2/5 · worth it 5/5 · 8 minutes · about 5 lines*
#
# | | shape | |
# |---|---|---|
# | `x` | (..., n) | real numbers; n is a multiple of `tile` |
# | returns | (..., n) `float8_e4m3fn`, (..., n / tile) float32 | what is stored, and the scales |
#
# Compute in float32. The scale is the largest magnitude over 448, so that *x is close to stored times scale*; a tile of zeros gets the scale 1. Clamp to ±448 before the cast: what becomes of larger numbers (448, or NaN) differs between versions of PyTorch.


# %% id="quantize-tiles" tags=["exercise"]
@exercise("fp8.quantize_tiles")
def cast_tiles(x, tile=128): ...


# %% [markdown] id="dequantize-text"
# ### Exercise 2.3 · And back
#
# *Difficulty 1/5 · worth it 4/5 · 3 minutes · about 2 lines*
#
# Return what the tiles stand for, in float32.


# %% id="dequantize-tiles" tags=["exercise"]
@exercise("fp8.dequantize_tiles")
def restore_tiles(x_fp8, scale, tile=128): ...


# %% [markdown] id="error-text"
# **Measure.** Your two functions on three tensors that differ by factors of a thousand. Each once with a scale for each tile, and once cast as it is.

# %% id="error"
from dsv3_tutorial.fp8.errors import relative_error

torch.manual_seed(0)
x = torch.randn(64, 4096)
for size in (1.0, 1e-3, 1e-6):
    tiles = restore_tiles(*cast_tiles(size * x))
    bare = (size * x).to(torch.float8_e4m3fn).float()
    print(
        f"size {size:7}: {relative_error(size * x, tiles):.2%} with scales, {relative_error(size * x, bare):.2%} without"
    )

# %% [markdown] id="error-words"
# With scales the error of these random numbers is 2.6 % whatever their size: it is the price of three mantissa bits, and no scale makes it smaller. What a scale buys is range. The smaller the group that shares one, the better it follows the numbers; is that why DeepSeek's tiles are so small?
#
# **Predict.** One of 262,144 numbers is an outlier a thousand times as large as the rest, and one scale serves the whole tensor. By how much are the *others* changed in E4M3, in percent?

# %% id="guess-outlier"
predict("fp8.outlier_error", ..., unit="%")

# %% [markdown] id="measure-outlier"
# **Claim check.** *"In FP8 one outlier crushes all the other values of the tensor."*

# %% id="outlier-table"
from dsv3_tutorial.learn.figures import tiles as tile_figures

reveal("fp8.outlier_error", 100 * tile_figures.others_error(1000.0, "e4m3", "tensor"))
tile_figures.outlier_table()
tile_figures.outlier(1000.0, "tensor", "int8")

# %% [markdown] id="outlier-words"
# **Explain.** The claim is INT8's story. INT8 has evenly spaced values: an outlier of 1,000 makes the step 8, and everything below 4 becomes zero. E4M3 has an exponent: a value a thousand times below the largest still has all its three digits. It takes an outlier of about 100,000 to hurt. Note the other direction too: without an outlier, or with a scale a tile, INT8 is the more accurate of the two on average; in the outlier's own tile it loses everything, and E4M3 nothing.
#
# Find the outlier at which E4M3 with one scale starts to fail.

# %% id="explore-outlier"
explore(
    tile_figures.outlier,
    outlier=[10.0, 100.0, 1000.0, 10000.0, 100000.0, 1000000.0],
    scale=["tensor", "block", "tile"],
    fmt=["e4m3", "int8"],
    start={"outlier": 1000.0, "scale": "tensor", "fmt": "int8"},
    say=tile_figures.outlier_in_words,
)

# %% [markdown] id="product-text"
# So outliers alone do not ask for tiles of 128. And tiles have a price: scales that change along `k` cannot be pulled out of a sum.
#
# ## 3 · Scaled products, and a sum of 14 bits
#
# A tensor core multiplies E4M3 values and adds the products. It knows nothing of scales. If both operands have a new scale every 128 numbers along `k`, a sum over `k` has to be interrupted as often: 128 products inside the tensor core, then the two scales, then an ordinary float32 addition outside.
#
# ### Exercise 2.4 · A scaled product
#
# *Difficulty 3/5 · worth it 5/5 · 7 minutes · about 7 lines*
#
# | | shape | |
# |---|---|---|
# | `a`, `a_scale` | (m, k) FP8, (m, k / 128) float32 | activations: a scale a tile |
# | `b`, `b_scale` | (n, k) FP8, (n / 128, k / 128) float32 | a weight: a scale a block |
# | returns | (m, n) float32 | the product of what the two stand for, $a\,b^T$ |
#
# Go through `k` in steps of 128. `a[:, part].float() @ b[:, part].float().T` is one step's partial sum; it meets two scales, and is added to the result. `k` and `n` are multiples of 128.


# %% id="scaled-matmul" tags=["exercise"]
@exercise("fp8.scaled_matmul")
def block_products(a, a_scale, b, b_scale): ...


# %% [markdown] id="product-check-text"
# **Measure.** How far off is a product of quantised matrices? Beside it the package's `fp8.gemm.matmul`, which does the same in one piece.

# %% id="product-check"
from dsv3_tutorial.fp8.gemm import matmul
from dsv3_tutorial.fp8.quant import quantize_blocks

torch.manual_seed(0)
activations, weight = torch.randn(256, 1024), torch.randn(384, 1024)
operands = (*cast_tiles(activations), *quantize_blocks(weight))
exact = activations @ weight.T
print(f"yours:         {relative_error(exact, block_products(*operands)):.2%}")
print(f"the package's: {relative_error(exact, matmul(*operands)):.2%}")

# %% [markdown] id="product-check-words"
# Each operand is 2.6 % off, so the product of two is off by $\sqrt 2$ times that. For inputs around zero independent errors do not pile up along `k`: the sum of many products is as far off, relatively, as one of them.
#
# ### What the tensor core adds
#
# The errors *of the sum* are another matter. Hopper's tensor cores do not add FP8 products in float32. DeepSeek found it by measuring: the products of a group are aligned to the largest of them, and about 14 bits are kept (the later paper: 32 products, 13 bits behind the leading one). What lies below is cut off, each time, in a running sum that gets larger and larger. The report's remedy is **promotion**: every 128 products the partial sum moves to a float32 register outside the tensor core. That is the very place where your scales are multiplied in.
#
# **Predict.** 4,096 products of positive numbers, evenly drawn from 0 to 1, with 13 bits kept behind the leading one and no promotion. Each group of 32 products is aligned *together with the running sum*, and what lies below is cut off. How far off is the sum?

# %% id="guess-accumulator"
predict("fp8.accumulator_error", ..., unit="%")

# %% [markdown] id="measure-accumulator"
# **Measure.** No GPU is needed: the package emulates the sum bit by bit. The papers leave open whether the running sum is aligned along with the products or added to their finished sum. Others have measured the first for Hopper's FP16, so it is assumed here; the column `apart` is the second.

# %% id="figure-accumulator"
from dsv3_tutorial.learn.figures import accumulators

reveal("fp8.accumulator_error", accumulators.error("positive", 4096))
accumulators.inputs_table()
rounded = {kind: accumulators.rounding_error(kind) for kind in ("positive", "zero-mean")}
print("rounding the inputs to E4M3:", ", ".join(f"{k} {e:.2g}%" for k, e in rounded.items()))
accumulators.error_against_k()

# %% [markdown] id="backward-text"
# **Explain.** It depends on the inputs. Positive numbers make a running sum that only grows, and the larger it is the more of each product lies below its last bit. What is cut off is always missing in the same direction: a *bias*, which does not average out. Numbers around zero make sums that stay small. The report has "nearly 2 %" as the maximum for random matrices, and does not say how they were drawn; here the half-zero ones come near it. So 2 % is no constant of the chip. Promotion every 128 products brings all of them down, by the norm ten times to a hundred, and their errors no longer grow with `k`.
#
# Is that much? Rounding the inputs costs 4 % if they lie around zero, and beside it the sum's 0.15 % is nothing. With positive inputs the roundings average out to 0.07 %, and beside that 6.6 % is everything. What a chip really does can be *probed* from outside: that is the last exercise of *Further*, and `python -m dsv3_tutorial probe` on any GPU. No receipt from a GPU is here yet.
#
# ## 4 · Three products, three directions
#
# A linear layer's training step has three products. Forward (**Fprop**), with tokens in rows: $Y = X W^T$. Backward, the gradient of the input (**Dgrad**), $dX = dY\, W$, and of the weight (**Wgrad**), $dW = dY^T X$. V3 does all three in FP8. Each sums over another axis: Fprop over inputs `k`, Dgrad over outputs `n`, Wgrad over the tokens `M`. A scale has to be constant within the 128 products of a partial sum, so *tiles must lie along the axis that is summed*.
#
# For `W` one set of blocks serves both directions: 128 x 128 is the same from either side. `X` and `dY` are needed both ways, and are quantised twice.
#
# ### Exercise 2.5 · The backward pass
#
# *Difficulty 4/5 · worth it 5/5 · 8 minutes · about 3 lines*
#
# Return `dx` and `dw`. `tiles(t)` gives `t` back as it is after rounding through tiles of 1 x 128 *along its last axis*; `blocks(t)` does the same with blocks. Round every operand before it is multiplied, and nothing else.
#
# | | shape |
# |---|---|
# | `dy`, `x`, `w` | (M, n), (M, k), (n, k) |
# | returns `dx`, `dw` | (M, k), (n, k) |


# %% id="linear-backward" tags=["exercise"]
@exercise("fp8.linear_backward")
def linear_gradients(dy, x, w, tiles, blocks): ...


# %% [markdown] id="layer-text"
# The package's layer does just that in real `float8_e4m3fn`. It keeps what V3 keeps: the input in FP8 for Wgrad, the weight and its gradient in float32.

# %% id="layer"
from dsv3_tutorial.fp8.linear import Fp8Linear
from dsv3_tutorial.fp8.quant import dequantize_blocks


def through_tiles(t):
    return restore_tiles(*cast_tiles(t))


def through_blocks(t):
    return dequantize_blocks(*quantize_blocks(t))


torch.manual_seed(0)
layer = Fp8Linear(256, 384, bias=False)
x, dy = torch.randn(512, 256, requires_grad=True), torch.randn(512, 384)
layer(x).backward(dy)
with torch.no_grad():
    dx, dw = linear_gradients(dy, x, layer.weight, through_tiles, through_blocks)
    exact_dx, exact_dw = dy @ layer.weight, dy.T @ x
print(
    f"dX: yours {relative_error(exact_dx, dx):.2%}, the layer's {relative_error(exact_dx, x.grad):.2%}"
)
print(
    f"dW: yours {relative_error(exact_dw, dw):.2%}, the layer's {relative_error(exact_dw, layer.weight.grad):.2%}"
)

# %% [markdown] id="layer-words"
# Three products, each about 3.7 % off: two operands of 2.6 % each. The layer differs from yours in `dW` by a trifle: it does not keep `X` itself for Wgrad but its FP8 form, with scales that are powers of two, so that tiles along the channels become tiles along the tokens without a second loss, as long as neighbouring tokens are of similar size (exercise 2.7). And note what is *not* in FP8: the weight is float32, and so is its gradient.
#
# ### Who needs small tiles
#
# The report tried one thing more: scaling `dY` by blocks of 128 x 128 in Dgrad, like a weight. A model of 16 billion parameters, trained for some 300 billion tokens, *diverged*. The report does not know why; it suspects that gradients differ strongly from token to token. Here is a way in which that would hurt.
#
# ### Exercise 2.6 · Lost tokens
#
# *Difficulty 2/5 · worth it 4/5 · 5 minutes · about 3 lines*
#
# Each row of `x` (..., D) is a token's gradient, each row of `y` what came back. Return the share of tokens, as a number between 0 and 1, whose relative error (the norm of the difference over the norm of `x`, row by row) exceeds `limit`. A row of zeros that came back as zeros is not lost; one that came back with NaN is.


# %% id="lost-tokens" tags=["exercise"]
@exercise("fp8.lost_tokens")
def lost_tokens(x, y, limit=0.5): ...


# %% [markdown] id="lost-measure"
# **Predict**, on paper: gradients whose tokens differ in size, spread over some two decades either way. Stored in E4M3 with one scale for each *block*, what share of the tokens is lost? And how much larger is the matrix's error than with tiles? (Two decades are an assumption. The second table has real gradients.)

# %% id="lost-measure-code"
from dsv3_tutorial.fp8.quant import quantize_tensor
from dsv3_tutorial.learn.figures import gradients as gradient_figures

torch.manual_seed(0)
drawn = torch.randn(1024, 512) * 10 ** (2 * torch.randn(1024, 1))
stored, one_scale = quantize_tensor(drawn)
back = {
    "tensor": stored.float() * one_scale,
    "block": through_blocks(drawn),
    "tile": through_tiles(drawn),
}
for scale, restored in back.items():
    print(
        f"a scale a {scale:6}: matrix off by {relative_error(drawn, restored):.1%}, tokens lost {lost_tokens(drawn, restored):.0%}"
    )
gradient_figures.spread_table()
tile_figures.lost_tokens(decades=2.0)

# %% [markdown] id="train-text"
# **Explain.** The matrix error is the same for all three and says nothing: the few largest tokens make up the norm, and those come back well. Under one scale, most tokens come back with more than half of them missing, nearly all as zeros. In a block 128 tokens share a scale, and about half are lost. A tile along the channels never spans two tokens, and none is lost. (Wgrad's tiles span 128 tokens; but it sums over them, and quiet ones hardly count there.)
#
# So what FP8 has to fear may be not an outlying value but an outlying *token*. Is that why the large model diverged? Nobody has shown it: a lost token is a candidate, not a proof, and two decades were our assumption. The second table has real gradients, of the small model of section 5 in its first hundred steps. Their tokens spread over a fifth to half a decade. Tiles lose none of them; blocks and a scale for the whole tensor lose half a percent at most, and those tokens are a hundred thousand times smaller than the others: next to nothing is lost. So *at this size small tiles are not needed*; whether a large model needs them only a large model can say. What does lose tokens here is one constant for all gradients (columns 2^-10 and 2^-16).
#
# ## 5 · Train
#
# The package trains whole models so: `python -m dsv3_tutorial train --precision fp8`. The linear layers of attention, MLP and experts compute in FP8. Embedding, head, gate, norms and the attention operator stay in BF16; the weights that the optimizer updates and the sum of their gradients are float32, its two moments BF16.
#
# Four ways to train a small model (2.1 million parameters, latent attention and experts), with the same first weights and the same text in the same order:
#
# - `bf16`: everything in BF16;
# - `fp8`: V3's recipe, tiles and blocks;
# - `fp8-tensor`: FP8 with one scale for each tensor;
# - `fp8, one loss scale`: as `fp8`, but no gradient is measured: all are multiplied by 1,024 and cast as they come, which is how FP16 was trained.
#
# **Predict.** You will first train all four side by side for as long as you have time (on paper: how many of the three FP8 curves will you tell from `bf16`?), and then see recorded runs of 500 steps with several seeds. In how many of the three does the recorded loss differ from BF16's by more than three times the error of the difference (more, where there are few pairs)?

# %% id="guess-told-apart"
predict("fp8.told_apart", ..., options=[0, 1, 2, 3])

# %% [markdown] id="live-text"
# *Said first: on a CPU FP8 is emulated. The eight-bit operands are those that the hardware would have; their products are summed in float32, so Hopper's 14 bits are not in these runs. It takes two to three times as long as BF16. In 45 seconds four models make some twenty steps, and the first parting of ways is at about fifty.*

# %% id="live-train" tags=["live", "nbval-ignore-output"]
from dsv3_tutorial.bench import precision as precision_bench
from dsv3_tutorial.learn.figures import precision_runs

rows = list(precision_bench.live(seconds=live_seconds()))
precision_runs.live(rows)

# %% [markdown] id="receipt-text"
# That curves lie together so early is no evidence that they are alike. The recorded runs have 500 steps. First: what would *one pair* of short runs have told, with this seed or that?

# %% id="figure-pairs"
from dsv3_tutorial.learn.figures import precision_runs

precision_runs.short_pairs()

# %% [markdown] id="pairs-words"
# Each line is one seed: the loss of `fp8` over that of `bf16`, batch by batch on the same text. Whoever runs one pair gets one of these lines, and reads its end as the price of FP8. So a difference has to be averaged over the end of a run and over pairs of several seeds, and it needs its standard error:

# %% id="figure-paired"
reveal("fp8.told_apart", precision_runs.told_apart())
precision_runs.precision_table()
print()
gradient_figures.zeroed_table()
precision_runs.curves()

# %% [markdown] id="paired-words"
# **Explain.** The one loss scale was broken on purpose. It is beyond doubt, and not at once: the second table has the cause. Gradients shrink as a model learns, and with the constant of $2^{-10}$ half of their values become zero by step 10 and seven in ten by step 100. A larger constant would have held longer; a measured scale needs no guess.
#
# V3's recipe and one scale for each tensor lie within what chance does: `float32` against `bf16`, where nothing should differ, is the null. "Undecided" is the honest word. This run cannot exclude a difference of a percent or two, because rounding alone sends runs this far apart; the report's 0.25 % was measured on models of 16 and 230 billion parameters over about a trillion tokens. (The pairs compare whole recipes: with FP8 the moments are BF16 too.) Even `bf16, no masters`, a run whose protected part is *not* protected (no float32 weights behind the BF16 ones), has to be read so.
#
# ## 6 · Other formats, on real tensors
#
# Errors on random numbers are one thing. Here are tensors of the model that this course trained (`data/checkpoints/small`): what enters its linear layers, the tokens that are sent to experts ("dispatched"), and the latents that attention keeps of each token (lesson 1). Two formats are new: MXFP8 has a scale, a power of two, for each 32 numbers, and LogFMT stores a logarithm in even steps (*Further*).

# %% id="figure-formats"
from dsv3_tutorial.learn.figures import formats_compared

formats_compared.formats_table()
formats_compared.on_real_tensors()

# %% [markdown] id="formats-words"
# At equal bits, INT8 in tiles is three times as accurate as E4M3 on these tensors, and LogFMT nearly twice. E4M3 is not in use for its accuracy: Hopper multiplies it with sums in floating point, and its range forgives a group whose numbers differ by thousands. MXFP8 shares a power of two among 32 numbers: closer groups, coarser scales. The standard rounds that scale down and lets the largest numbers saturate; rounded up, as NVIDIA does, it comes near E4M3 in tiles.
#
# **Claim check.** *"Quantise weights to symmetric INT8"*: a sound way to serve a model, and not what V3 does; it trains and ships E4M3 in blocks. INT8 in tiles would be the more accurate storage here. What it lacks is range within a group, and on Hopper it would not be faster. (Two more claims, on loss scaling and FP16, are in *Further*.)
#
# ## 7 · Does it go fast?
#
# Quantising reads a BF16 tensor and writes an FP8 one: bytes that BF16 would not have moved. It pays only if the product saves more. **Predict.** An H800, many tokens: how many outputs must a linear layer have before its faster product has paid for quantising its input?

# %% id="guess-breakeven"
predict("fp8.breakeven", ..., unit="outputs")

# %% [markdown] id="measure-map"
# **Measure**, on paper: the products of V3's layers, FP8 over BF16, by the number of tokens.

# %% id="figure-map"
from dsv3_tutorial.cost import precision
from dsv3_tutorial.learn.figures import fp8_map

reveal("fp8.breakeven", round(precision.breakeven_width(chip("h800"))))
fp8_map.speed_map()

# %% [markdown] id="map-words"
# Left, the products alone: 2x almost everywhere, because the peaks say so. (The seventh row has the shortest sums, and its BF16 result is most of its bytes.) Right, with the pass that quantises the input: a value costs the same 3 bytes of traffic however many outputs use it, so narrow layers lose what wide ones gain. The projection to V3's latent (576 outputs) is slower in FP8 from 512 tokens on, unless its quantisation is fused into what comes before, or shared with the other projection of the same input. All of this is *derived*, and forward only; published kernels reach 30 to 78 % of the FP8 peak, by shape. A Hopper receipt of ours awaits a GPU (`make bench`).
#
# ## 8 · The paper
#
# What the papers print, where they do, beside what this package counts.

# %% id="paper"
from dsv3_tutorial.learn.figures import fp8_tables

fp8_tables.bytes_table()
fp8_tables.hopper_and_blackwell()

# %% [markdown] id="paper-words"
# The scales cost next to nothing for weights and three percent for activations. With them, sending a token to an expert in FP8 saves 48.4 % of BF16's bytes, where the papers say half.
#
# The paper asks hardware for sums of more bits, and for tensor cores that take the scales themselves. Blackwell's take one for 32 numbers: exercise 2.4 becomes unnecessary.
#
# **Takeaways.**
#
# - E4M3 has three digits and a wide range. Its error, some 2.6 %, does not depend on a tensor's size; scales see to that.
# - Scales go with the axis that is summed. That is why training quantises activations and gradients twice.
# - A sum of 14 bits is harmless if it is short. Promotion and scales happen at the same place.
# - A matrix error can be blind to lost tokens, and a difference between two runs is worth nothing without its error.

# %% id="progress"
progress()

# %% [markdown] id="further"
# ## Further
#
# Next on the path is lesson 3, parallelism. What follows goes further: four more exercises, the formats' fine print, what training keeps in memory, and a detective story.
#
# ### How far a format reaches
#
# A scale lays the largest number of a group on the format's largest value. How many times smaller may another one be, and still be off by a sixteenth at most, or an eighth?

# %% id="reach"
for fmt in ("int8", "e4m3", "e5m2"):
    found = [
        f"{error:.1%}: {number_line.reach(fmt, error):>12,.0f}"
        for error in (1 / 16, 1 / 8)
        if fmt != "e5m2" or error > 0.1
    ]
    print(f"{fmt.upper()}  {'   '.join(found)}")

# %% [markdown] id="reach-words"
# INT8 is the finest near the top and errs more with every step down; E4M3 keeps its error over four decades. So for numbers of one size INT8 is better, and for numbers of many sizes E4M3. E5M2 reaches further still at half the accuracy; V3 does without it, because tiles make its range unnecessary.

# %% [markdown] id="explore-roofline-text"
# ### The roofline, to move
#
# Move `m`, the tokens, and find where memory takes over; then change the chip.

# %% id="explore-roofline"
explore(
    fp8_roofline.by_format,
    chip=["h800", "h100-sxm", "l4", "rtx-4090"],
    fmt=["bf16", "fp8", "int8"],
    m=[16, 64, 256, 1024, 4096, 16384],
    start={"chip": "h800", "fmt": "fp8", "m": 4096},
    say=fp8_roofline.by_format_in_words,
)

# %% [markdown] id="claim-scaling-text"
# **Claim checks**, from the articles that this course answers to.
#
# *"Loss scaling must be tuned carefully."* That was FP16's need. With a scale for each tile a global factor changes nothing:

# %% id="claim-loss-scaling"
torch.manual_seed(0)
dy = 1e-7 * torch.randn(4, 256)
codes, scale = cast_tiles(dy)
scaled_codes, scaled_scale = cast_tiles(65536 * dy)
print("same codes:", torch.equal(codes.view(torch.uint8), scaled_codes.view(torch.uint8)))
print("scales, times:", (scaled_scale / scale).unique().tolist())

# %% [markdown] id="claim-fp16-text"
# *"Start in FP16 and validate before you switch."* FP16 has five bits of exponent, BF16 has float32's eight:

# %% id="claim-fp16"
for value in (1e-8, 1e5):
    both = [torch.tensor(value).to(dtype).item() for dtype in (torch.float16, torch.bfloat16)]
    print(f"{value:g}: FP16 {both[0]:.3g}, BF16 {both[1]:.3g}")

# %% [markdown] id="claim-fp16-words"
# V3 was validated against BF16, which needs no loss scale at all; neither paper mentions one.
#
# ### Wider registers, other intervals
#
# Make the register wider or narrower, and find an interval at which positive inputs err by 1 %.

# %% id="explore-accumulator"
explore(
    accumulators.accumulator_lab,
    bits=[9, 11, 13, 15, 17],
    promote=[32, 64, 128, 256, 512, 1024, 2048],
    inputs=["positive", "half zero", "zero-mean"],
    start={"bits": 13, "promote": 128, "inputs": "positive"},
    say=accumulators.accumulator_lab_in_words,
)

# %% [markdown] id="explore-lost-text"
# ### How far tokens may differ
#
# Find the spread from which a scale for the whole tensor starts to lose tokens.

# %% id="explore-lost"
explore(
    tile_figures.lost_tokens,
    decades=[0.0, 0.5, 1.0, 1.5, 2.0, 3.0],
    start={"decades": 2.0},
    say=tile_figures.lost_tokens_in_words,
)

# %% [markdown] id="te-text"
# ### Transformer Engine
#
# The ready-made way on NVIDIA's GPUs is Transformer Engine. An example that is often copied is `te.Linear(in, out, dtype=torch.float8_e4m3fn)`.

# %% id="te"
from dsv3_tutorial.fp8 import engine

with fails(TypeError):
    engine.te_linear(1024, 1024, dtype=torch.float8_e4m3fn)
print("it has:", [name for name in engine.linear_signature().parameters if "dtype" in name])

# %% [markdown] id="te-words"
# `params_dtype` is the type of the weights, and those stay BF16 or float32. FP8 is chosen by a context and a *recipe*, around the forward pass. On a GPU that can, this runs; elsewhere it says why not.

# %% id="te-here" tags=["live", "nbval-ignore-output"]
if engine.problem():
    print("Transformer Engine does not run here:", engine.problem())
else:
    te_layer = engine.linear(1024, 1024)
    with engine.autocast():
        y = te_layer(torch.randn(128, 1024, device="cuda", dtype=torch.bfloat16))
    y.sum().backward()
    print("forward and backward in FP8:", te_layer.weight.grad.norm().item())

# %% [markdown] id="powers-text"
# ### Powers of two
#
# ### Exercise 2.7 · A power of two for a scale
#
# *Difficulty 3/5 · worth it 3/5 · 7 minutes · about 4 lines*
#
# Return the smallest power of two, as float32, that brings `largest` (any shape, not negative) down to 448 or below. It must be exact: `log2` in float32 is not. For 0 it is 1, and for what is not finite NaN.


# %% id="power-of-two-scale" tags=["exercise"]
@exercise("fp8.power_of_two_scale")
def power_of_two_scale(largest): ...


# %% [markdown] id="power-text"
# What it is for: an activation is kept in tiles along its channels, and Wgrad wants tiles along the tokens. How many values change when the kept FP8 form is quantised again the other way?

# %% id="power-of-two"
from dsv3_tutorial.fp8 import quant

torch.manual_seed(0)
x = torch.randn(512, 512)
for pow2 in (False, True):
    kept = quant.dequantize_tiles(*quant.quantize_tiles(x, pow2=pow2))
    again = quant.dequantize_tiles(*quant.quantize_tiles(kept.T, pow2=pow2)).T
    print(
        f"power of two: {pow2!s:5}  changed by the second rounding: {(again != kept).float().mean():.4%}"
    )

# %% [markdown] id="power-words"
# Dividing by a power of two moves the exponent and leaves the digits alone. The report uses such scales for the inputs of the layer behind attention and of the experts; this package for every activation it keeps.
#
# ### Adding up in BF16
#
# ### Exercise 2.8 · Many micro-batches
#
# *Difficulty 1/5 · worth it 4/5 · 4 minutes · about 4 lines*
#
# A batch is often computed in parts whose gradients are added. `parts` is a list of float32 tensors of one shape. Return their sum, in order, when it is *kept in `dtype` between the additions*: each addition is made in float32, and the sum is then rounded to `dtype`.


# %% id="micro-batches" tags=["exercise"]
@exercise("fp8.micro_batches")
def accumulate(parts, dtype): ...


# %% [markdown] id="micro-batches-text"
# **Predict**, on paper, then run: 1,000 equal gradients of 1, kept in BF16.

# %% id="micro-batches-run"
parts = [torch.ones(1)] * 1000
for dtype in (torch.float32, torch.bfloat16):
    print(f"{dtype}: {accumulate(parts, dtype).item():g}")

# %% [markdown] id="micro-batches-words"
# At 256 the spacing of BF16 becomes 2, adding 1 is a tie, and the tie goes back to 256, forever. That is why V3 adds gradients up in float32, and why its optimizer updates float32 weights: a thousandth of a BF16 weight is lost the same way.
#
# ### Find the bug
#
# ### Exercise 2.9 · Three bugs
#
# *Difficulty 3/5 · worth it 5/5 · 10 minutes · about 3 lines*
#
# A linear layer's forward, with both operands rounded through E4M3. It runs, gives numbers, and is wrong in three ways, each of which the field has had. Change what is wrong; the verdict tells how many are left. (A tile with NaN stays NaN.)


# %% id="find-the-bug" tags=["exercise"]
@exercise("fp8.find_the_bug")
def quantized_linear(x, w, tile=128):
    restored = []
    for operand in (x, w):
        tiles = operand.float().unflatten(-1, (-1, tile))
        largest = tiles.abs().amax(dim=-1, keepdim=True)
        factor = 448.0 / largest
        codes = (tiles * factor).clamp(-448.0, 448.0).round()
        restored.append((codes * factor).flatten(-2))
    return restored[0] @ restored[1].T


# %% [markdown] id="memory-text"
# ### What training keeps
#
# Between forward and backward a layer's input waits for Wgrad. Bytes that a linear layer keeps of 1,024 tokens by 4,096 channels, the weight left out:


# %% id="memory"
def bytes_kept(cache):
    """What a layer holds of its input between forward and backward: values and scales."""
    layer, sizes = Fp8Linear(4096, 128, bias=False, cache=cache), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.nbytes) or t, lambda t: t
    ):
        layer(torch.randn(1024, 4096, requires_grad=True))
    return sum(sizes[:2])


kept = {"E4M3": bytes_kept("e4m3"), "E5M6": bytes_kept("e5m6")}
kept["BF16"] = 2 * 1024 * 4096
for name, size in kept.items():
    print(f"{name}: {size:>9,} bytes, {8 * size / (1024 * 4096):.2f} bits a value")

# %% [markdown] id="memory-words"
# E5M6, twelve bits, is for the input of the layer behind attention, which backward needs again for attention's own gradient. The package also keeps a SwiGLU's two inputs in FP8 and computes its output again, as the report does.
#
# Of the cache of lesson 1, an FP8 form is common in serving: the latent in E4M3 with a scale for each 128, the rotated key in BF16.

# %% id="latent"
from dsv3_tutorial.fp8 import latent

c_kv, k_rope = torch.randn(3, 512), torch.randn(3, 64)
packed = latent.pack_latent(c_kv, k_rope)
back, key = latent.unpack_latent(packed, 512, 64)
print(f"{packed.shape[-1]} bytes a token and layer instead of {2 * (512 + 64)}")
print(
    f"the latent is {relative_error(c_kv, back):.1%} off, the key {relative_error(k_rope, key.float()):.1%}"
)

# %% [markdown] id="logfmt-text"
# ### LogFMT, and why it was not deployed
#
# The ISCA paper proposes a format for the tokens that experts send back: the logarithm of each magnitude, in even steps between the smallest and the largest of a tile. Its steps are *factors*: all numbers of a tile are equally accurate, and a tile of similar numbers gets finer steps.

# %% id="logfmt"
from dsv3_tutorial.fp8 import logfmt

torch.manual_seed(0)
for name, values in {
    "one size": torch.rand(64, 128) + 1,
    "normal": torch.randn(64, 128),
    "six decades": 10 ** (6 * torch.rand(64, 128)),
}.items():
    forms = {"LogFMT-8": logfmt.decode(*logfmt.encode(values, bits=8), bits=8)}
    forms["E4M3"] = through_tiles(values)
    for form, back in forms.items():
        worst = ((back - values).abs() / values.abs()).max().item()
        print(
            f"{name:12} {form:9} by the norm {relative_error(values, back):.2%}, worst number {worst:.0%}"
        )

# %% [markdown] id="logfmt-words"
# On numbers of one size LogFMT is sixteen times as accurate, on normal ones nearly twice. Over six decades E4M3 wins by the norm, and only by the norm: the last column says that it lost the small numbers, which LogFMT never does. The paper tried it on the sums that experts send back, in models of about 7 billion parameters, and found it better than E4M3 and E5M2 at eight bits. It was not deployed: encoding and decoding, a logarithm and an exponential a number, would have cost 50 to 100 % more time even when fused, and no tensor core multiplies it.
#
# ### Delayed scaling
#
# Transformer Engine's older recipe takes a tensor's scale from earlier steps, which saves a pass over it. What happens when gradients jump?

# %% id="delayed"
from dsv3_tutorial.fp8.delayed import DelayedScale

torch.manual_seed(0)
history = DelayedScale(history=16)
for step in range(6):
    gradient = torch.randn(64, 128) * (8 if step == 4 else 1)
    stored, scale = history.quantize(gradient)
    print(f"step {step}: {relative_error(gradient, stored.float() * scale):.1%} off")

# %% [markdown] id="delayed-words"
# At the jump everything beyond the remembered largest is cut off, once; after it the scale is too wide, which E4M3 hardly minds. DeepSeek measures each tile as it comes.

# %% [markdown] id="detective-text"
# ### Silicon detective
#
# NVIDIA does not say how wide Hopper's FP8 sum is. DeepSeek found it from outside: add a large number and a small one, take the large one away, and see what is left of the small one.

# %% id="figure-fading"
accumulators.fading_term()

# %% [markdown] id="detective-exercise"
# Left, the small term gets smaller until it vanishes: that is the width. Right, a term between zero and the last bit that is kept: does it round, or is it cut?
#
# ### Exercise 2.10 · Whose sum is this?
#
# *Difficulty 4/5 · worth it 4/5 · 15 minutes · about 11 lines*
#
# `Engine(seed)` hides a tensor core behind `engine.dot(products)`: it adds a list of at most 8,192 numbers, each 0 or a product of two E4M3 values, in order, and costs one probe. You have 20. Return a `TensorCore` with what you found:
#
# | | | |
# |---|---|---|
# | `bits` | 8 to 20 | kept behind the leading one |
# | `rounding` | `"truncate"`, `"nearest"` | of what lies below; a tie goes to even |
# | `group` | 4, 8, ... 128 | products that are aligned to their largest and added at once |
# | `joint` | `True`, `False` | whether the running sum is aligned along with them; if not, the group is summed first, and its sum is then aligned with the running one |
# | `promote` | `None`, 128, 256, ... 8192 | products after which the sum moves to float32 |
#
# Powers of two from $2^{-12}$ to $2^{16}$ are safe terms. A miss is answered with a sum that tells your answer from the engine. The hints go from one property to the next.


# %% id="detective" tags=["exercise"]
from dsv3_tutorial.fp8.accumulate import HOPPER, TensorCore
from dsv3_tutorial.fp8.probe import Engine, twins


@exercise("fp8.detective")
def identify(engine): ...


# %% [markdown] id="detective-hopper-text"
# Your detective on a few engines, and on Hopper as the paper describes it:

# %% id="detective-run"
from dsv3_tutorial.fp8.accumulate import matmul_emulated
from dsv3_tutorial.fp8.probe import Chip

for seed in (0, 1, 2):
    engine_under_test = Engine(seed)
    print(f"engine {seed}: {identify(engine_under_test)}, {engine_under_test.used} probes")
hopper = Chip(lambda a, b: matmul_emulated(a, b, HOPPER))
print("Hopper, emulated:", identify(hopper) == HOPPER)

# %% [markdown] id="detective-words"
# Some engines cannot be told apart by any such sum: promotion after 8,192 looks like never, and where every group is promoted nothing is left to align. `twins()` lists them, and either name counts. On a GPU, `python -m dsv3_tutorial probe` asks the real tensor cores the same questions and keeps a receipt; the H100's awaits a machine.
#
# ### Train it yourself
#
# `python -m dsv3_tutorial train --precision fp8 --config small --steps 300 --out my/fp8-run` trains the course's model in FP8, experts included; `--precision bf16` and `fp8-tensor` beside it. `python -m dsv3_tutorial bench precision --seeds 5 6 7` adds seeds to the table of section 5. On a CPU neither is fast.
