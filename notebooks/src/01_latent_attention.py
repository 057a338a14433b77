# %% [markdown] id="title"
# # 1 · Multi-head Latent Attention
#
# A model that writes one token at a time spends most of that time reading memory, and a growing share of what it reads is
# its own past. DeepSeek-V3 keeps that past 57 times smaller than multi-head attention with 128 heads of 128 would. In this lesson
# you find out why it had to, build the attention that does it, and measure what it costs.
#
# After it you can
#
# - compute the KV cache of a published model to the byte, and say which GPUs hold it;
# - write MLA's scores in two ways, expanded and absorbed, and show that they are the same numbers;
# - explain why the rotary key stands apart from the latent;
# - say where the absorbed form wins, where it loses, and which limit of the machine decides.
#
# *75 minutes; Run All takes about one. You need PyTorch, matrix products, and an idea of what attention does.
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
from dsv3_tutorial.cost import params
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
from dsv3_tutorial.learn.figures import cache_size, latent_flow

v3 = ModelConfig.named("deepseek-v3")

# %% [markdown] id="bottleneck"
# ## 1 · The bottleneck: one token reads everything
#
# To write one token, the GPU reads each weight that takes part, once. It also reads, in every layer, the key and the value
# of every earlier token. Those keys and values are computed once and kept: that is the **KV cache**. (`term("KV cache")` in a cell explains it again,
# as it does for every word in the glossary.)

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
# Return how many bytes one token adds to the cache of the whole model, each number taking `bytes_per_element` bytes. `cfg` has `num_hidden_layers`, and
#
# - with plain attention (`cfg.is_mla` is False), each layer keeps a key and a value for each of `cfg.kv_heads` heads,
#   each of width `cfg.head_size`;
# - with MLA (`cfg.is_mla` is True), each layer keeps one latent of `cfg.kv_lora_rank` numbers and one key of
#   `cfg.qk_rope_head_dim`, whatever the number of heads. Section 2 is about why that is enough.


# %% id="cache-bytes" tags=["exercise"]
@exercise("attention.cache_bytes")
def kv_cache_bytes_per_token(cfg, bytes_per_element=2): ...


# %% [markdown] id="reveal-mha-text"
# **Measure.** The same heads, once cached whole and once as V3 caches them; and beside it the other thing that each token reads, the weights.

# %% id="reveal-mha"
tokens = 131072
whole = replace(v3, model_type="llama", kv_lora_rank=None, head_dim=128, rope_interleave=None)
reveal("attention.mha_cache", kv_cache_bytes_per_token(whole) * tokens / 1e9)
print(f"MLA caches {kv_cache_bytes_per_token(v3) * tokens / 1e9:.2f} GB")
print(f"ratio: {kv_cache_bytes_per_token(whole) / kv_cache_bytes_per_token(v3):.1f}")
print(f"weights that take part in a token: {params.count(v3).activated / 1e9:.1f} GB in FP8")

# %% [markdown] id="explain-mha"
# **Explain.** 524 GB is more than six H800s hold, for one reader, before a single weight is loaded; and every new token reads all of it, fourteen times
# what it reads in weights. 9.2 GB is a ninth of one H800. That ratio of 57 is the reason for everything in this lesson.
#
# Not every model caches every head. Grouped-query attention (GQA) lets several query heads share one key and value.
# Six published models, on one picture:

# %% id="figure-cache"
cache_size.cache_against_context()

# %% [markdown] id="figure-cache-words"
# All lines are straight with slope one: twice the context, twice the cache. (V3 lies on V2, and Moonlight on V2-Lite: the same 576 numbers, in nearly as many layers.) At 131,072 tokens Llama 3.1 405B fills
# 68 GB with GQA and V3 fills 9 GB with MLA. The dotted lines are what one GPU holds in all, weights included.
#
# Now move the knobs. Which of these contexts does an H800 hold for 32 conversations at once, with V3 and with Llama? (V3 16,384, in 37 GB; Llama 4,096, in 68 GB.)

# %% id="explore-cache"
explore(
    cache_size.cache_on_gpus,
    model=list(cache_size.PRESETS),
    context=[4096, 16384, 65536, 131072],
    batch=[1, 8, 32, 128],
    bytes_per_number={"BF16 (2)": 2, "FP8 (1)": 1},
    start={"model": "DeepSeek-V3 (MLA)", "batch": 32},
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
# at each earlier one (the full square is counted here; a causal mask halves it). Attention has two costs, and they grow differently.
# This lesson shrinks the first.
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
# back to heads, and says nothing of positions. Section 2 builds what the technical reports of DeepSeek-V2 and V3 describe (*the reports* from here on).
#
# ## 2 · Build it
#
# MLA caches one vector per token and layer, and every head reads from it. This is the whole of it, with V3's widths.

# %% id="figure-flow"
latent_flow.data_flow()

# %% [markdown] id="figure-flow-words"
# Only the two boxes with a heavy outline are kept: the latent, 512 numbers, and one rotary key, 64. From the latent every head has its own key and value of width
# 128, and with the rotary part a key is 192 wide: 128 x (192 + 128) = 40,960 numbers. (Plain MHA with heads of 128 would keep 32,768. Hence two ratios, 71 and 57.)
# Queries are compressed too, to 1,536, in training and in decode: that saves weights and activations, not cache.
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
# Section 3 tests the bet at toy size.
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

torch.manual_seed(0)
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
torch.manual_seed(0)
w, c, q = torch.randn(8, 16), torch.randn(200, 16), torch.randn(200, 8)  # one head; 200 pairs
folded = ((q @ w) * c).sum(-1)  # W_UK moved to the query, no rotation in between
for distance in (0, 1, 4, 16):
    turned = rotate_pairs((c @ w.T)[:, None, None], cos[[distance]], -sin[[distance]]).flatten(1)
    error = (folded - (q * turned).sum(-1)).norm() / folded.norm()
    print(f"distance {distance:2}: error of the folded scores {error:.2f}")

# %% [markdown] id="blocked-words"
# Right at distance 0, and wrong by as much as the scores themselves soon after. A different folded matrix for each distance would be needed, or every key rebuilt
# at every step. So the reports **decouple** position: each head's query gets a second part of width `R`, and all heads share one
# small rotated key, which is cached as it is. The content part stays free of rotation, and can be absorbed.
#
# ### Exercise 1.4 · Score with a decoupled key
#
# *Difficulty 2/5 · worth it 4/5 · 6 minutes · about 4 lines*
#
# First the plain way. Rebuild every head's content key from the latent, $k = W^{UK} c$, take its product with `q_nope`, and add the
# product of `q_rope` with the one shared `k_rope`; both rotary parts come rotated. No scale, no mask. `torch.einsum` with the letters in lower case is the shortest way.
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
# product with the latent. The verdict also counts the arithmetic per cached token: rebuilding keys is over its budget.


# %% id="absorbed-scores" tags=["exercise"]
@exercise("attention.absorbed_scores")
def absorbed_scores(q_nope, q_rope, c_kv, k_rope, w_uk): ...


# %% [markdown] id="absorb-values"
# ### Exercise 1.6 · Values without values
#
# *Difficulty 3/5 · worth it 5/5 · 6 minutes · about 3 lines*
#
# The output of a head is $\sum_t p_t\, (W^{UV} c_t)$. A sum of products can be reordered: $W^{UV} \sum_t p_t\, c_t$. Mix the latents
# first, then expand the one mixture. Here too the arithmetic is counted.
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
# **Measure.** The cost model counts both, per head and cached token; and from them the FLOP per byte that lesson 0 drew the roofline against.

# %% id="reveal-cost"
from dsv3_tutorial import hardware
from dsv3_tutorial.cost import attention as attention_cost
from dsv3_tutorial.cost import roofline

width, elements = attention_cost.score_width, attention_cost.cached_elements
reveal("attention.more_arithmetic", width(v3, "absorbed") / width(v3, "expanded"))
reveal("attention.fewer_bytes", elements(v3, "expanded") / elements(v3, "absorbed"))
for form in ("expanded", "absorbed"):
    step = attention_cost.decode_step(v3, 1, form=form)
    print(f"{form:9} {step.cache_flops / step.cache_bytes:4.0f} FLOP per byte of cache")
for name in ("h800", "h20"):
    print(f"{name:9} {roofline.ridge(hardware.chip(name)):4.0f} at the ridge")

# %% [markdown] id="cost-words"
# Cached heads do one FLOP per byte: the arithmetic of an H800 waits for 99.7 % of the time. Absorbed, each byte serves 128 heads and does 242, just short of the
# ridge. So MLA does not leave the arithmetic idle, it uses it up: three times more of what was idle buys seventy times less of what was scarce. The price shows where
# the ridge is lower: on an H20 arithmetic decides already.
#
# Now put your functions together into a layer. Scores are divided by the root of the *whole* query width, `N + R`; the future is masked; the package's `MLA` lends its
# weights and then says whether it agrees.

# %% id="agree"
from dsv3_tutorial.attention.mla import MLA

torch.manual_seed(0)
tiny = ModelConfig.named("tiny")
layer, text = MLA(tiny).double(), torch.randn(2, 40, tiny.hidden_size, dtype=torch.float64)


def attend(x, scores):
    """MLA from your functions: x (B, S, D) -> (B, S, D)."""
    cos, sin = (table.double() for table in rotation_table(tiny, x.shape[1]))
    q_nope, q_rope = layer.queries(x)
    c_kv, k_rope = compress(x, layer.kv_a_proj_with_mqa.weight, layer.kv_a_layernorm.weight)
    q_rope = rotate_pairs(q_rope, cos, sin)
    k_rope = rotate_pairs(k_rope[:, :, None], cos, sin)[:, :, 0]  # (B, T, R)
    w_uk, w_uv = layer.up_weights()
    logits = scores(q_nope, q_rope, c_kv, k_rope, w_uk) * (32 + 32) ** -0.5  # N + R of tiny
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    probs = logits.masked_fill(future, -math.inf).softmax(-1)
    return layer.o_proj(absorbed_values(probs, c_kv, w_uv).flatten(2))


# %% [markdown] id="agree-text"
# Do both of your forms equal the package's layer? And does one token at a time, over a cache that really holds only the latent, give the same again?

# %% id="agree-run"
from dsv3_tutorial.attention.cache import LatentCache

cache = LatentCache.for_config(tiny, batch=2, capacity=40, dtype=torch.float64)
with torch.no_grad():
    whole = layer(text)
    mine = [attend(text, scores) for scores in (expanded_scores, absorbed_scores)]
    steps = torch.cat([layer(text[:, [i]], cache=cache) for i in range(40)], dim=1)
equal = [torch.allclose(other, whole, rtol=0, atol=1e-12) for other in (*mine, steps)]
print("expanded, absorbed, 40 steps: equal to 1e-12:", equal)
print(f"cache: {cache.nbytes:,} bytes = 2 sequences x 40 tokens x (96 + 32) numbers x 8")

# %% [markdown] id="learns"
# ## 3 · Does it still learn?
#
# A small cache is worth nothing if the model gets worse. Here is a recorded run: five attentions in the same small model (4 layers, 8 heads, 1.21 million parameters each, the
# feed-forward taking up what the attention saves), trained on the sources of Python's standard library, byte by byte, 1.2 million bytes each. Every attention has three
# seeds, and with the same seed all read the same text in the same order. A twentieth of the files is held out. The loss is in bits per byte; lower is better. *Said first: this is
# a toy, and a toy can mislead.*
#
# **Predict.** Which one needs the fewest bits per held-out byte? (MQA is GQA with a single group.)

# %% id="guess-learning"
variants = ["MHA", "GQA, 2 groups", "MQA", "MLA, latent 96 + 32", "MLA, latent 48 + 16"]
predict("attention.learns_best", ..., options=variants)

# %% [markdown] id="measure-learning"
# **Measure.** The receipt: a table, the curves with the band of their seeds, and where each run ended against its cache.

# %% id="figure-learning"
from dsv3_tutorial.learn.figures import decode_speed, learning_curves, paper_tables

reveal("attention.learns_best", learning_curves.best_learner())
learning_curves.learning_table()
learning_curves.gap_over_steps()
learning_curves.learning()

# %% [markdown] id="live"
# **Explain.** Here MHA, GQA and MQA lie within about two standard errors of each other, and MLA is *behind* all of them, by more than its error. The gap was more than twice as
# large after 100 steps and has been shrinking. (A likely reason, not shown here: MLA passes keys and values through one more matrix, which has to be learnt first.) So the toy does not show that MLA is as
# good as MHA. It shows how a ranking depends on the length of the run. The evidence for MLA is elsewhere: two pairs of models in the V2 report (appendix D.2), 16B parameters on 1.33T tokens
# and 250B on 420B tokens, where MLA beat MHA on hard benchmarks.
#
# **Measure.** Train the MLA variant here, for the time that you have (45 seconds unless `DSV3_LIVE_SECONDS` says otherwise), on your
# interpreter's own library, and see it drawn over the recorded band. The seed is new, so the line is new.

# %% id="live-training" tags=["live", "nbval-ignore-output"]
from dsv3_tutorial.bench.learning import SCHEDULE
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.train import corpus, loop

torch.manual_seed(100)
schedule = replace(SCHEDULE, seconds=live_seconds())
rows = list(loop.train(DeepSeekV3(tiny), corpus.load(), schedule, seed=100))
learning_curves.learning_live(rows)

# %% [markdown] id="live-words"
# Your line should run into the band where the recorded seeds were at the same step; how far it gets depends on your machine.
#
# ## 4 · Does it go fast?
#
# One layer, one new token, and a growing context. Three ways to the same output: the expanded heads cached; the latent cached and
# expanded again at every step; the latent cached and absorbed.
#
# **Predict**, on paper: which of the three grows least with the context, and which most?

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
# transformers (5.17 and later; 5.23 here) caches the latent, as we do, and expands it again at every step: a cached token costs it about as much as our `reexpanded` form or more, 26 to
# 109 times the absorbed one. It is a reference implementation; serving engines absorb as we do. Against cached heads absorbing reads 8 to 9 times fewer bytes and is 4 to 6 times
# faster: on this CPU the extra arithmetic is not free.
#
# Where does absorbing lose? In decode it did not, down to 16 cached tokens, within the noise. With *many* new tokens at once it does: each new token pays the longer product, and expanding is
# paid once for all of them. First what was measured, behind 2,048 cached tokens, then a map for V3 on an H800, *derived* from the roofline.

# %% id="figure-map"
decode_speed.measured_crossovers()
decode_speed.where_absorbing_pays("h800")

# %% [markdown] id="map-words"
# Left, one new token. Towards the lower left the layer's weights are most of what is read, and absorbing gains nothing. Up to the solid line cached heads fit in 80 GB, and it gains up to 4x. Beyond it
# the gain is larger, but there the other form does not fit at all: most of what MLA buys is *room*. Right, many new tokens at batch 1: expanding a latent costs 33.6 MFLOP once, and each new token
# then saves 0.2 MFLOP per cached token; they meet at 171. With a short cache the weights blur the line. So a prompt is expanded and each written token absorbed: `MLA` does that by itself.
#
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
# models in the report's appendix. The 4 % fits an MHA of 56 heads, not of V2's 128. That the 93.3 % includes the 6 bits is our reading: it fits to the digit, and the report does not spell it out.
#
# ## What you can do now
#
# You can count any cache, build MLA from five short functions, and say why each is there: the joint latent because bytes decide decode, the
# separate rotary key because a rotation blocks absorption, the absorbed form because it trades idle arithmetic for bytes, up to the ridge. You also know its price: three times
# the arithmetic, a form to switch away from when many tokens arrive at once, and a toy that learnt more slowly.

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
# Return the bytes one token leaves on the *fullest* GPU when the heads are dealt out over `tensor_parallel` GPUs: 8 heads on 3 GPUs make 3 on the fullest. A GPU cannot hold less
# than one key-value head: beyond that, heads are copied.


# %% id="cache-per-gpu" tags=["exercise"]
@exercise("attention.cache_per_gpu")
def cache_bytes_per_gpu(cfg, tensor_parallel, bytes_per_element=2): ...


# %% [markdown] id="per-gpu-words"
# **Predict**, on paper, then run: from which split on does Llama 3.1 405B cache less per GPU than V3?

# %% id="per-gpu-table"
paper_tables.cache_per_gpu(cache_bytes_per_gpu)

# %% [markdown] id="per-gpu-explain"
# At eight GPUs the 405B model with GQA caches *less* per GPU than V3 does: splitting by heads does not shrink a latent cache at all. The V3 report still splits attention over 4 GPUs when serving; the
# production notes of 2025 do not, and give each rank conversations of its own (data parallelism). Lesson 3 returns to it.
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
v3_scale = yarn_softmax_scale(192, 40, 1.0)
print(
    f"V3, factor 40      {v3_scale:.4f}   what the checkpoint expects, {v3_scale * 192**0.5:.2f}x the first"
)

# %% [markdown] id="bug"
# ### Find the bug
#
# ### Exercise 1.9 · Three bugs of kinds that the field has had
#
# *Difficulty 4/5 · worth it 4/5 · 12 minutes · about 3 lines*
#
# This attention runs, gives numbers, and is wrong in three ways. The `S` queries are the last of the `T` tokens. Change three lines. The verdict
# tells how many are left.


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
# All three pass a quick look at a prefill's output: the numbers are finite, and the shapes are right. The mask only shows in decode, scale and fill only against an
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
# Four heads of width 12 make 48 numbers, but only 16 of them are free: every head reads the same 16 in its own way. (From `x` to the latent there is a norm, so the map as a whole is not low-rank; from the latent
# to the heads it is.)
#
# **Claim check.** *"Set the latent to an eighth of the model's width."*

# %% id="run-eighth"
for name in ("deepseek-v2-lite", "moonlight-16b-a3b", "deepseek-v2", "deepseek-v3"):
    published = ModelConfig.named(name)
    print(
        f"{name:18} hidden {published.hidden_size:5}  latent {published.kv_lora_rank} = hidden / {published.hidden_size / published.kv_lora_rank:g}"
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
