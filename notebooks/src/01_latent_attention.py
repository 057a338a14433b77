# %% [markdown] id="title"
# # 1 · Multi-head Latent Attention
#
# A model that writes one token at a time spends most of that time reading memory, and a growing share of what it reads is
# its own past. DeepSeek-V3 keeps that past 57 times smaller than ordinary attention with its heads would. In this lesson
# you find out why it had to, build the attention that does it, and measure what it costs.
#
# After it you can
#
# - compute the KV cache of a published model to the byte, and say which GPUs hold it;
# - write MLA's scores in two ways, expanded and absorbed, and show that they are the same numbers;
# - explain why the rotary key stands apart from the latent;
# - say where the absorbed form wins, where it loses, and which limit of the machine decides.
#
# *75 minutes. You need PyTorch, matrix products, and an idea of what attention does.
# If a cell of this course is new to you, lesson 0 shows in ten minutes how exercises and predictions work.*
#
# **Letters.** Shapes use one set of letters through the whole course.
#
# | | | | |
# |---|---|---|---|
# | `B` batch | `S` query positions (new tokens) | `T` cached positions | `D` hidden size |
# | `H` heads | `N` head width without position | `R` head width with rotary position | `V` value width |
# | `C` width of the latent | `Q` width of the compressed query | | |
#
# DeepSeek-V3: `D` 7168, `H` 128, `N` 128, `R` 64, `V` 128, `C` 512, `Q` 1536, and 61 layers.

# %% id="setup"
from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.learn import (
    exercise,
    explore,
    fails,
    live_seconds,
    predict,
    progress,
    reveal,
    term,
)
from dsv3_tutorial.learn.figures import (
    cache_size,
    decode_speed,
    latent_flow,
    learning_curves,
    paper_tables,
)

v3 = ModelConfig.named("deepseek-v3")

# %% [markdown] id="bottleneck"
# ## 1 · The bottleneck: one token reads everything
#
# To write one token, the GPU reads each weight that takes part, once. It also reads, in every layer, the key and the value
# of every earlier token. Those keys and values are computed once and kept: that is the **KV cache**. (`term("KV cache")` in a cell explains it again;
# so it does for every word in the glossary.)

# %% [markdown] id="predict-mha"
# **Predict.** Suppose DeepSeek-V3 cached whole keys and values, as multi-head attention (MHA) does: 61 layers, 128 heads,
# a key and a value of width 128 each, 2 bytes a number. How large is the cache of *one* conversation of 131,072 tokens?
# Put your number in place of `...` and run the cell. A wrong guess teaches more than none.

# %% id="guess-mha"
predict("attention.mha_cache", ..., unit="GB")

# %% [markdown] id="exercise-cache-bytes"
# ### Exercise 1.1 · Count the cache
#
# *Difficulty 1/5 · worth it 5/5 · 5 minutes · about 5 lines*
#
# Return how many bytes one token adds to the cache of the whole model. `cfg` has `num_hidden_layers`, and
#
# - with plain attention (`cfg.is_mla` is False), each layer keeps a key and a value for each of `cfg.kv_heads` heads,
#   each of width `cfg.head_size`;
# - with MLA (`cfg.is_mla` is True), each layer keeps one latent of `cfg.kv_lora_rank` numbers and one key of
#   `cfg.qk_rope_head_dim`, whatever the number of heads. Section 2 is about why that is enough.


# %% id="cache-bytes" tags=["exercise"]
@exercise("attention.cache_bytes")
def kv_cache_bytes_per_token(cfg, bytes_per_element=2): ...


# %% [markdown] id="reveal-mha-text"
# **Measure.** The same heads, once cached whole and once as V3 caches them.

# %% id="reveal-mha"
tokens = 131072
whole = replace(v3, model_type="llama", kv_lora_rank=None, head_dim=128, rope_interleave=None)
reveal("attention.mha_cache", kv_cache_bytes_per_token(whole) * tokens / 1e9)
print(f"MLA: {kv_cache_bytes_per_token(v3) * tokens / 1e9:.2f} GB")
print(f"ratio: {kv_cache_bytes_per_token(whole) / kv_cache_bytes_per_token(v3):.1f}")

# %% [markdown] id="explain-mha"
# **Explain.** 524 GB is more than six H800s hold, for one reader, before a single weight is loaded. And every new token reads
# all of it. 9.2 GB fits beside the weights. That ratio of 57 is the reason for everything in this lesson.
#
# Not every model caches every head. Grouped-query attention (GQA) lets several query heads share one key and value.
# Six published models, on one picture:

# %% id="figure-cache"
cache_size.cache_against_context()

# %% [markdown] id="figure-cache-words"
# All lines are straight with slope one: twice the context, twice the cache. At 131,072 tokens Llama 3.1 405B fills
# 68 GB with GQA and V3 fills 9 GB with MLA. The dotted lines are what one GPU holds in all, weights included.
#
# Now move the knobs. Which context does an H800 hold for 32 conversations at once?

# %% id="explore-cache"
explore(
    cache_size.cache_on_gpus,
    model=list(cache_size.PRESETS),
    context=[4096, 16384, 65536, 131072],
    batch=[1, 8, 32, 128],
    bytes_per_number={"BF16 (2)": 2, "FP8 (1)": 1},
    say=cache_size.cache_on_gpus_in_words,
)

# %% [markdown] id="claim-quadratic"
# **Claim check.** *"Key-value caches make memory grow quadratically with sequence length."* Run it.

# %% id="run-quadratic"
llama = ModelConfig.named("llama-3.1-405b")
for context in (4096, 8192, 16384):
    cache = kv_cache_bytes_per_token(llama) * context
    scores = context**2 * llama.num_attention_heads * llama.num_hidden_layers
    print(
        f"{context:6,} tokens: cache {cache / 1e9:6.3f} GB, scores computed {scores / 1e9:8.0f} billion"
    )
# %% [markdown] id="verdict-quadratic"
# The claim is false. Memory doubles with the context; the *work* over a whole sequence quadruples, because each token looks
# at each earlier one. Attention has two costs, and they grow differently. A cache attacks the first.
#
# **Claim check.** A sketch of MLA that circulates has three projections: queries to `D`, keys to a latent, values to a
# latent. Here it is, as published. `fails` shows the error that a cell must raise.

# %% id="run-sketch"
hidden, latent, x = 512, 64, torch.randn(1, 5, 512)
q, k, v = (torch.nn.Linear(hidden, width) for width in (hidden, latent, latent))
with fails(RuntimeError):
    q(x) @ k(x).transpose(-2, -1)

# %% [markdown] id="verdict-sketch"
# The sketch does not run: a query of 512 numbers has no product with a key of 64. It also keeps *two* latents, has no way
# back to heads, and says nothing of positions. Section 2 builds what the report describes.

# %% [markdown] id="build"
# ## 2 · Build it
#
# MLA caches one vector per token and layer, and every head reads from it. This is the whole of it, with V3's widths.

# %% id="figure-flow"
latent_flow.data_flow()

# %% [markdown] id="figure-flow-words"
# Only the two boxes with a heavy outline are kept: the latent, 512 numbers, and the rotary key, 64. Left of them everything is
# computed for the new token alone. Right of them every head rebuilds a key and a value of width 128 from the same latent.
#
# ### Exercise 1.2 · Compress
#
# *Difficulty 2/5 · worth it 5/5 · 5 minutes · about 4 lines*
#
# One matrix product makes both cached parts at once. Project `x`, split the result into the latent (the first `C` numbers) and the
# key that will carry position (the last `R`), and apply RMSNorm to the *latent only*. The key is left as it is; rotation comes
# next. `F.linear(x, weight, bias)` projects (V3 has no bias; some models do), `F.rms_norm(t, (width,), gain, eps)` normalises, and `C` is the length of `norm_weight`.
#
# | | shape | |
# |---|---|---|
# | `x` | (B, S, D) | the layer's input |
# | `kv_a_weight` | (C + R, D) | $W^{DKV}$ over $W^{KR}$ |
# | `norm_weight` | (C,) | the norm's gain |
# | returns | (B, S, C), (B, S, R) | `c_kv`, `k_rope` |


# %% id="compress" tags=["exercise"]
@exercise("attention.compress")
def compress(x, kv_a_weight, norm_weight, eps=1e-6, bias=None): ...


# %% [markdown] id="rotate-text"
# Keys and values come from *one* latent, so all heads share its 512 numbers. MLA bets that a token's 32,768 keys and values were never that many free numbers.
# Section 3 tests the bet.
#
# ### Exercise 1.3 · Rotate
#
# *Difficulty 3/5 · worth it 4/5 · 8 minutes · about 4 lines*
#
# Attention has no idea of order. Rotary positions (RoPE) add one by turning pairs of coordinates: the pair
# $(a, b)$ at position $p$ becomes $(a\cos p\theta - b\sin p\theta,\; a\sin p\theta + b\cos p\theta)$, each pair with
# its own $\theta$. DeepSeek pairs neighbours: (0, 1), (2, 3), and so on.
#
# | | shape | |
# |---|---|---|
# | `x` | (B, S, H, R) | queries or keys |
# | `cos`, `sin` | (S, R / 2) | one angle per position and pair, shared by all heads |
# | returns | (B, S, H, R) | each pair turned where it stands |


# %% id="rotate" tags=["exercise"]
@exercise("attention.rotate")
def rotate_pairs(x, cos, sin): ...


# %% [markdown] id="relative"
# **Measure.** The same query and the same key, put at different positions: what does their product depend on?

# %% id="relative-run"
from dsv3_tutorial.attention.rope import rotation_table

toy = replace(ModelConfig.named("tiny"), qk_rope_head_dim=8)
cos, sin = rotation_table(toy, 64)
query, key = torch.randn(8), torch.randn(8)


def at(vector, position):
    """The vector (R,) as it stands at a position."""
    return rotate_pairs(vector.view(1, 1, 1, -1), cos[[position]], sin[[position]]).flatten()


for positions in ((3, 1), (33, 31), (62, 60), (33, 1)):
    score = at(query, positions[0]) @ at(key, positions[1])
    print(f"query at {positions[0]:2}, key at {positions[1]:2}: {score:+.2f}")

# %% [markdown] id="relative-words"
# The first three are the same: only the distance counts. That is what RoPE is for, and it is also what gets in MLA's way.
#
# Here is the trick that MLA wants to play. Without positions a score is $q^\top (W^{UK} c) = (W^{UK\top} q)^\top c$. Multiply the
# *query* by $W^{UK}$ once, and it meets the cached latent directly: no key is ever rebuilt. This is called absorption.
#
# Now rotate the rebuilt key instead, as ordinary attention would. The score becomes
# $q^\top R_{-d}\, W^{UK} c$, where $R_{-d}$ turns by the distance $d$. The turn stands *between* the two matrices that wanted to
# merge. Suppose we fold them at distance 0 and use the result everywhere: how wrong are the scores?

# %% id="blocked"
w, c, q = torch.randn(8, 16), torch.randn(200, 16), torch.randn(200, 8)  # one head; 200 pairs
folded = ((q @ w) * c).sum(-1)  # W_UK moved to the query, no rotation in between
for distance in (0, 1, 4, 16):
    turned = rotate_pairs((c @ w.T)[:, None, None], cos[[distance]], sin[[distance]]).flatten(1)
    error = (folded - (q * turned).sum(-1)).norm() / folded.norm()
    print(f"distance {distance:2}: error of the folded scores {error:.2f}")

# %% [markdown] id="blocked-words"
# Right at distance 0, and wrong by as much as the scores themselves soon after. A different folded matrix for each distance
# would be needed. So the report **decouples** position: each head's query gets a second part of width `R`, and all heads share one
# small rotated key, which is cached as it is. The content part stays free of rotation, and can be absorbed.
#
# ### Exercise 1.4 · Score with a decoupled key
#
# *Difficulty 2/5 · worth it 4/5 · 6 minutes · about 4 lines*
#
# First the plain way. Rebuild every head's content key from the latent, $k = W^{UK} c$, take its product with `q_nope`, and add the
# product of `q_rope` with the one shared `k_rope`. No scale, no mask. `torch.einsum` with the letters in lower case is the shortest way.
#
# | | shape | |
# |---|---|---|
# | `q_nope`, `q_rope` | (B, S, H, N), (B, S, H, R) | the two parts of the query |
# | `c_kv`, `k_rope` | (B, T, C), (B, T, R) | all that the cache holds |
# | `w_uk` | (H, N, C) | each head's key matrix |
# | returns | (B, H, S, T) | the scores |


# %% id="expanded-scores" tags=["exercise"]
@exercise("attention.expanded_scores")
def expanded_scores(q_nope, q_rope, c_kv, k_rope, w_uk): ...


# %% [markdown] id="absorb"
# ### Exercise 1.5 · Score without keys
#
# *Difficulty 3/5 · worth it 5/5 · 8 minutes · about 4 lines*
#
# The same scores, and no key is made. Contract the query with `w_uk` first, over `N`: the query is now `C` wide. Then take its
# product with the latent.


# %% id="absorbed-scores" tags=["exercise"]
@exercise("attention.absorbed_scores")
def absorbed_scores(q_nope, q_rope, c_kv, k_rope, w_uk): ...


# %% [markdown] id="absorb-values"
# ### Exercise 1.6 · Values without values
#
# *Difficulty 3/5 · worth it 5/5 · 6 minutes · about 3 lines*
#
# The output of a head is $\sum_t p_t\, (W^{UV} c_t)$. A sum of products can be reordered: $W^{UV} \sum_t p_t\, c_t$. Mix the latents
# first, then expand the one mixture.
#
# | | shape | |
# |---|---|---|
# | `probs` | (B, H, S, T) | attention weights |
# | `c_kv` | (B, T, C) | the cached latents |
# | `w_uv` | (H, V, C) | each head's value matrix |
# | returns | (B, S, H, V) | each head's output |


# %% id="absorbed-values" tags=["exercise"]
@exercise("attention.absorbed_values")
def absorbed_values(probs, c_kv, w_uv): ...


# %% [markdown] id="predict-cost"
# **Predict.** At V3's sizes, for each cached token and head: the expanded form multiplies a key of 192 and a value of 128; the absorbed form
# a latent key of 576 and a latent value of 512. How many times *more* arithmetic does the absorbed form do? And if the expanded heads
# were cached, how many times more *bytes* would they be?

# %% id="guess-cost"
predict("attention.more_arithmetic", ..., unit="x")
predict("attention.fewer_bytes", ..., unit="x")

# %% [markdown] id="measure-cost"
# **Measure.** The cost model counts both, per head and cached token.

# %% id="reveal-cost"
from dsv3_tutorial.cost import attention as attention_cost

width, elements = attention_cost.score_width, attention_cost.cached_elements
reveal("attention.more_arithmetic", width(v3, "absorbed") / width(v3, "expanded"))
reveal("attention.fewer_bytes", elements(v3, "expanded") / elements(v3, "absorbed"))

# %% [markdown] id="cost-words"
# That is the trade, and it sounds like a bad one until you remember section 1: in decode the machine waits for memory, and its
# arithmetic is idle. Three times more of what is free buys seventy times less of what is scarce.
#
# The package's `MLA` layer does both with one set of weights, with norms, masks and caches around the functions that you wrote. Do the two forms agree? And does one token at a time, over a cache that really holds only the latent, give the same again?

# %% id="agree"
from dsv3_tutorial.attention.cache import LatentCache
from dsv3_tutorial.attention.mla import MLA

torch.manual_seed(0)
cfg = ModelConfig.named("tiny")
layer, text = MLA(cfg).double(), torch.randn(2, 40, cfg.hidden_size, dtype=torch.float64)
with torch.no_grad():
    expanded, absorbed = layer(text, absorb=False), layer(text, absorb=True)
print("absorbed = expanded to 1e-12:", torch.allclose(expanded, absorbed, rtol=0, atol=1e-12))
cache = LatentCache.for_config(cfg, batch=2, capacity=40, dtype=torch.float64)
with torch.no_grad():
    steps = [layer(text[:, [i]], cache=cache) for i in range(40)]
print(
    "40 steps = one pass to 1e-12: ",
    torch.allclose(torch.cat(steps, 1), expanded, rtol=0, atol=1e-12),
)
print(
    f"cache: {cache.nbytes:,} bytes = 2 sequences x 40 tokens x {cfg.kv_lora_rank + cfg.qk_rope_head_dim} numbers x 8"
)

# %% [markdown] id="learns"
# ## 3 · Does it still learn?
#
# A small cache is worth nothing if the model gets worse. Here is a recorded run: five attentions in the same small frame (4 layers,
# 8 heads, 1.18 million parameters each, the feed-forward taking up what the attention saves), trained on the sources of Python's standard
# library, byte by byte. Each has several seeds; text in the same order. A twentieth of the files is held out.
#
# **Predict.** Which one needs the fewest bits per held-out byte?

# %% id="guess-learning"
variants = ["MHA", "GQA, 2 groups", "MQA", "MLA, latent 96 + 32", "MLA, latent 48 + 16"]
predict("attention.learns_best", ..., options=variants)

# %% [markdown] id="measure-learning"
# **Measure.** The receipt: a table, the curves with the band of their seeds, and where each run ended against its cache.

# %% id="figure-learning"
reveal("attention.learns_best", learning_curves.best_learner())
learning_curves.learning_table()
learning_curves.learning()

# %% [markdown] id="live"
# LEARNING WORDS
#
# **Measure.** Train the MLA variant here, for the time that you have (45 seconds unless `DSV3_LIVE_SECONDS` says otherwise), on your
# interpreter's own library, and see it drawn over the recorded band. The seed is new, so the line is new.

# %% id="live-training" tags=["live", "nbval-ignore-output"]
from dsv3_tutorial.bench.learning import SCHEDULE
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.train import corpus, loop

torch.manual_seed(100)
schedule = replace(SCHEDULE, seconds=live_seconds())
rows = list(loop.train(DeepSeekV3(cfg), corpus.load(), schedule, seed=100))
learning_curves.learning_live(rows)

# %% [markdown] id="live-words"
# Short runs mislead. LIVE WORDS

# %% [markdown] id="fast"
# ## 4 · Does it go fast?
#
# One layer, one new token, and a growing context. Three ways to the same output: the expanded heads cached; the latent cached and
# expanded again at every step; the latent cached and absorbed.
#
# **Predict.** From 1,024 to 4,096 cached tokens, which of the three grows least?

# %% id="live-decode" tags=["live", "nbval-ignore-output"]
from dsv3_tutorial.bench import attention as attention_bench

times = attention_bench.decode_step_times(contexts=[256, 1024, 4096], seconds=live_seconds() / 4)
decode_speed.decode_times(times)

# %% [markdown] id="decode-words"
# Expanding again grows steepest by far: each step rebuilds every head's key and value for every cached token. Caching the heads avoids that and reads many
# bytes instead. Absorbing does more arithmetic than cached heads and still grows least, because it reads least.
#
# Your run was short and other programs share your machine. Here is the recorded one, at two sizes (`v3-like` has V3's latent and 16 heads), with transformers beside ours:
# same weights, outputs compared before timing. The table holds slopes: the time that one more cached token adds to a step, over absorbed's.

# %% id="receipts-decode"
decode_speed.decode_ratios()
decode_speed.decode_recorded()

# %% [markdown] id="receipts-words"
# transformers 5 caches the latent, as we do, and expands it again at every step: a token costs it as much as our `reexpanded` form, dozens of times the absorbed one.
# Its cache is as small; the difference is arithmetic alone. Against cached heads, absorbing reads 8 to 9 times fewer bytes and is 4 to 5 times faster, not 8: a CPU's
# arithmetic is not as idle as a GPU's.
#
# **Predict.** On an H800, with V3's sizes: in which corner of batch and context does absorbing gain nothing? The next picture is *derived*: the roofline of one layer,
# no kernel and no measurement.

# %% id="figure-map"
decode_speed.where_absorbing_pays("h800")

# %% [markdown] id="map-words"
# On the left, one new token. Towards the lower left the layer's own weights are most of what is read, and a smaller cache gains little; past the dashed line the cache
# dominates, and absorbing approaches the 71 of the bytes. In decode it never loses on this chip. On the right, many new tokens at once, against expanding the latent
# again: every new token pays the longer product, while the expansion is paid once for all. Above about 170 new tokens absorbing loses. So a long prompt
# (*prefill*) is expanded and each written token absorbed, which is what `MLA` does when you do not ask for one form. The batch does not move that line: both sides
# grow with it.

# %% [markdown] id="paper"
# ## 5 · The paper's numbers
#
# *Insights into DeepSeek-V3* (ISCA 2025), Table 1, computed by the function that you wrote, beside what is printed.

# %% id="table-1"
paper_tables.isca_table_1(kv_cache_bytes_per_token)

# %% [markdown] id="table-1-words"
# Every size agrees to the byte. The last ratio does not: 516.096 / 70.272 is 7.34, and 7.28 is printed. It is a slip of the paper, and small.
# The table also compares three models of different depth and width, so its ratios are not the effect of attention alone.
#
# **Claim check.** MLA's savings circulate as 57x, 71x, 93.3 %, 14 % and 4 %. A ratio means nothing without its base. Here is the base of each.

# %% id="ratios"
paper_tables.mla_ratios()

# %% [markdown] id="ratios-words"
# All can be reproduced, and none says the same thing. The 93.3 % of the V2 report's abstract is not MLA alone: against DeepSeek-67B, which
# already shares its keys among heads, MLA saves 82 %; the rest is a cache stored in 6 bits a number. The 14 % and the 4 % belong to two pairs of
# models in the report's appendix, which are also its evidence that MLA is *better* than MHA. The 4 % fits an MHA of 56 heads, not of V2's 128.
#
# ## What you can do now
#
# You can count any cache, build MLA from six short functions, and say why each is there: the joint latent because bytes decide decode, the
# separate rotary key because a rotation blocks absorption, the absorbed form because arithmetic is idle. You also know its price: three times
# the arithmetic, and a form to switch away from when many tokens arrive at once.

# %% id="progress"
progress()

# %% [markdown] id="further"
# ## Further
#
# Next on the path is lesson 4, the sparse experts. What follows here goes further: three more exercises, a map to play with, and the kernel.
#
# ### Splitting heads over GPUs
#
# Tensor parallelism gives each GPU some of the heads. With GQA a GPU then caches only its own key-value heads. What happens to a latent that
# all heads read?
#
# ### Exercise 1.7 · The cache on each GPU
#
# *Difficulty 3/5 · worth it 4/5 · 8 minutes · about 6 lines*
#
# Return the bytes one token leaves on *each* GPU when the heads are dealt out over `tensor_parallel` GPUs. A GPU cannot hold less than one
# key-value head: beyond that, heads are copied.


# %% id="cache-per-gpu" tags=["exercise"]
@exercise("attention.cache_per_gpu")
def cache_bytes_per_gpu(cfg, tensor_parallel, bytes_per_element=2): ...


# %% [markdown] id="per-gpu-words"
# **Measure.** Predict first: at which split does Llama 3.1 405B cache less per GPU than V3?

# %% id="per-gpu-table"
paper_tables.cache_per_gpu(cache_bytes_per_gpu)

# %% [markdown] id="per-gpu-explain"
# At eight GPUs the 405B model with GQA caches *less* per GPU than V3 does. Splitting by heads does not shrink a latent cache at all. This is why V3 is served
# with attention replicated over data-parallel ranks, each with its own conversations. Lesson 3 returns to it.
#
# ### The softmax scale
#
# ### Exercise 1.8 · YaRN's temperature
#
# *Difficulty 2/5 · worth it 3/5 · 5 minutes · about 2 lines*
#
# Scores are divided by the square root of the *whole* query width, `N + R`. V3 was trained on 4,096 tokens and stretched to more with YaRN, which slows
# the slow rotations by `factor`. That flattens the scores, and YaRN sharpens them again: query and key are each multiplied by
# $m = 0.1 \cdot \mathrm{mscale\_all\_dim} \cdot \ln(\mathrm{factor}) + 1$.
# Return what the scores are multiplied by.


# %% id="softmax-scale" tags=["exercise"]
@exercise("attention.softmax_scale")
def yarn_softmax_scale(qk_head_dim, factor, mscale_all_dim): ...


# %% [markdown] id="scale-words"
# **Measure.** Forgetting it raises no error. How far off would V3's scores be?

# %% id="scale-run"
print(f"1 / sqrt(192)      {192**-0.5:.4f}")
print(f"1 / sqrt(128)      {128**-0.5:.4f}   the content part alone: a common slip")
print(f"V3, factor 40      {yarn_softmax_scale(192, 40, 1.0):.4f}   what the checkpoint expects")

# %% [markdown] id="bug"
# ### Find the bug
#
# ### Exercise 1.9 · Three bugs that the field has really had
#
# *Difficulty 4/5 · worth it 4/5 · 12 minutes · about 3 lines*
#
# This attention runs, gives numbers, and is wrong in three ways. The `S` queries are the last of the `T` tokens. Change three lines. The verdict
# tells which bugs are left.


# %% id="find-the-bug" tags=["exercise"]
@exercise("attention.find_the_bug")
def latent_attention(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv):
    k_nope = torch.einsum("btc,hnc->bthn", c_kv, w_uk)
    values = torch.einsum("btc,hvc->bthv", c_kv, w_uv)
    scores = torch.einsum("bshn,bthn->bhst", q_nope, k_nope)
    scores = scores + torch.einsum("bshr,btr->bhst", q_rope, k_rope)
    scores = scores * q_nope.shape[-1] ** -0.5
    s, t = scores.shape[-2:]
    seen = torch.ones(s, t, dtype=torch.bool).tril()
    probs = scores.masked_fill(~seen, 0.0).softmax(dim=-1)
    return torch.einsum("bhst,bthv->bshv", probs, values)


# %% [markdown] id="bug-words"
# All three pass a quick look at a prefill's output: the numbers are finite, and the shapes are right. Two of them only show in decode or against an
# independent implementation. The package is tested against transformers' DeepSeek-V3, forward and gradients.
#
# ### The trade as a map
#
# The explorer shows arithmetic and bytes per cached token for the three forms. Find sizes at which absorbing costs no more arithmetic than cached heads.

# %% id="explore-absorption"
explore(
    decode_speed.absorption_cost,
    rank=[64, 128, 256, 512, 896],
    head_dim=[32, 64, 128],
    heads=[8, 16, 64, 128],
    start={"rank": 512, "head_dim": 128, "heads": 128},
    say=decode_speed.absorption_cost_in_words,
)

# %% [markdown] id="joint"
# ### What a shared latent means
#
# A toy with four heads, keys of width 12 and a latent of 16. How many numbers of a token's keys are free?

# %% id="rank"
torch.manual_seed(0)
x = torch.randn(4, 6, 64)  # (B, S, D), a toy of width 64
c_kv, k_rope = compress(x, torch.randn(16 + 8, 64) / 8, torch.ones(16))
w_uk = torch.randn(4, 12, 16)  # (H, N, C): four heads' keys from one latent of 16
keys = torch.einsum("btc,hnc->bthn", c_kv, w_uk).flatten(2)  # (B, T, H * N)
print("numbers in all keys of a token:", keys.shape[-1])
print("rank of what they can be:      ", torch.linalg.matrix_rank(keys.flatten(0, 1)).item())

# %% [markdown] id="joint-words"
# Four heads of width 12 make 48 numbers, but only 16 of them are free: every head reads the same 16 in its own way.
#
# **Claim check.** *"Set the latent to an eighth of the model's width."*

# %% id="run-eighth"
for name in ("deepseek-v2-lite", "moonlight-16b-a3b", "deepseek-v2", "deepseek-v3"):
    cfg = ModelConfig.named(name)
    print(
        f"{name:18} hidden {cfg.hidden_size:5}  latent {cfg.kv_lora_rank} = hidden / {cfg.hidden_size / cfg.kv_lora_rank:g}"
    )
# %% [markdown] id="verdict-eighth"
# The same 512 serves a width of 2,048 and one of 7,168. DeepSeek ties the latent to the *head*: 512 is four times the head
# width 128, and the rotary key is half of it. The rule of an eighth would give V3 a latent of 896.
#
# ### The kernel
#
# On a GPU the package runs decode in one Triton kernel. A block of heads shares each read of the latent; the cached tokens are split over the multiprocessors,
# each keeps a running maximum and sum (online softmax), and a second kernel joins the parts. Here is the contract that both sides obey:

# %% id="kernel-contract"
from dsv3_tutorial.attention.decode import latent_decode

q = torch.randn(2, 1, 4, 16 + 8)  # (B, S, H, C + R): absorbed query beside its rotary part
latent = torch.randn(2, 50, 16 + 8)  # (B, T, C + R): the cache as it lies in memory
out = latent_decode(q, latent, torch.tensor([50, 31]), rank=16, scale=24**-0.5)
print(tuple(out.shape), "from lengths 50 and 31")

# %% [markdown] id="kernel-words"
# `backend="triton"` forces the kernel and says why if it cannot run. The tests run it in Triton's interpreter and compile it for Hopper, where they check that
# it uses the tensor cores, spills no register and fits in shared memory. Its speed on a GPU has no receipt yet; `make bench` writes one.
