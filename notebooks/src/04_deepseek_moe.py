# %% [markdown] id="title"
# # 4 · DeepSeekMoE
#
# A dense model multiplies every token with every parameter. DeepSeek-V3 holds 671 billion parameters and multiplies a token with a small part of them:
# in most layers 256 small networks stand side by side, the *experts*, and a *gate* picks eight for each token. In this lesson you build the gate, keep the experts
# evenly busy on real text, and find out what the choice costs on a machine.
#
# After it you can
#
# - count what a mixture of experts holds and what a token meets, and reproduce the paper's FLOP table;
# - write DeepSeek-V3's gate: sigmoid scores, limited groups, a bias that steers the load and never enters the result;
# - balance experts without a loss, and say what a loss does differently;
# - say when sparse layers are slower than dense ones, and where a token's copies travel.
#
# *75 minutes to `progress()`, and *Further* holds as much again. Run All takes about two minutes. You need lesson 1's letters and an idea of what a feed-forward network is.*
#
# **Letters.** New in this lesson, beside `B`, `S` and `D`:
#
# | | | | |
# |---|---|---|---|
# | `E` experts | `K` experts per token | `G` groups of experts | `M` tokens, all positions of all sequences |
# | `F` width of an expert (in code, `F` is `torch.nn.functional`) | | | |
#
# DeepSeek-V3: `E` 256, `K` 8, `G` 8, `F` 2048, `D` 7168, in 58 of its 61 layers.

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
    hint,
    live_seconds,
    predict,
    progress,
    reveal,
    solution,
    term,
)
from dsv3_tutorial.learn.figures import sparse_cost

v3 = ModelConfig.named("deepseek-v3")

# %% [markdown] id="bottleneck"
# ## 1 · The bottleneck: every parameter costs, for every token
#
# In a dense model a token is multiplied with each weight once: two operations a parameter forward, four more backward. So a model of 671 billion parameters would cost
# 4,026 GFLOP for each token of training, and DeepSeek-V3 was trained on 14.8 trillion. Parameters are what a model knows; FLOPs are what it costs. A **mixture of experts** takes the
# two apart.
#
# Each MoE layer of V3 has a gate, 256 *routed* experts of which a token meets 8, and one *shared* expert that every token meets. An expert is a small
# feed-forward network of three matrices between `hidden_size` and `moe_intermediate_size`: gate, up and down (SwiGLU).

# %% [markdown] id="predict-activated"
# **Predict.** All but three of V3's 61 layers are built so. Of its 671 billion parameters, how many billion is one token multiplied with?

# %% id="guess-activated"
predict("moe.activated", ..., unit="billion")

# %% [markdown] id="exercise-layer-parameters"
# ### Exercise 4.1 · Count a layer
#
# *Difficulty 1/5 · worth it 4/5 · 6 minutes · about 5 lines*
#
# Return two numbers for *one* MoE layer (its attention and norms left out): the parameters it holds, and those that a token is multiplied with. Of `cfg` you need `hidden_size`, `moe_intermediate_size`,
# `n_routed_experts`, `num_experts_per_tok` and `n_shared_experts`. The gate holds one vector of `hidden_size` for each routed expert, and where `cfg.topk_method` is `"noaux_tc"`
# one number more for each, the balance bias of section 3. Every token meets the whole gate.


# %% id="layer-parameters" tags=["exercise"]
@exercise("moe.layer_parameters")
def moe_layer(cfg): ...


# %% [markdown] id="reveal-activated-text"
# **Measure.** 58 layers of your count, and the other parts from the package's.

# %% id="reveal-activated"
held, met = moe_layer(v3)
rest = params.count(v3).total - 58 * held
embedding = params.count(v3).by_part["embedding"]  # looked up, not multiplied
reveal("moe.activated", (rest + 58 * met - embedding) / 1e9)
print(f"one MoE layer holds {held / 1e9:.2f} billion, a token meets {met / 1e9:.3f} billion")
sparse_cost.total_and_activated()

# %% [markdown] id="activated-words"
# The bars are on one scale. Routed experts are 97 % of the model and a little over half of what a token meets: the rest is attention, the three dense layers, the shared experts and the head.
#
# Now the paper's own count. ISCA 2025, table 2, gives the training cost of four models in GFLOP per token (it prints "GFLOPS"). Beside it: six operations for each parameter that a token meets, and attention over
# the half of 4,096 tokens that is visible on average.

# %% id="table-2"
sparse_cost.isca_table_2()

# %% [markdown] id="table-2-words"
# The two sparse rows agree with that count to half a percent. The two dense rows do not: six times Qwen's 72.7 billion parameters is 436 before any attention, and 394 is printed. Both are hit exactly by the generic estimate $72 L D^2 + 6 V D$ ($L$ layers, $V$ words of vocabulary),
# which knows nothing of a model's real shapes and leaves attention's scores out. That they were computed so is our inference. Counted alike, V3 costs 1.8 times less than Qwen2.5 72B, not 1.6; and "an order of magnitude less", which is often said, is true of
# the 405B model only.
#
# **Measure.** What does a token cost on this machine? One layer of this course's own small model, forward and backward, beside two dense layers: as wide as what a token meets, and as wide as all that is held.

# %% id="live-token" tags=["live", "nbval-ignore-output"]
from dsv3_tutorial.learn.figures.engines import token_cost_live

token_cost_live(seconds=live_seconds() / 4)

# %% [markdown] id="gate-text"
# The sparse layer does the arithmetic of the first. Where this was written it took longer than the *third*: at these small widths nothing is gained by it. Section 4 asks why.
#
# ## 2 · Build the gate
#
# A token arrives as a vector of `D` numbers. The gate scores all experts, picks `K`, and says how much each answer weighs.
#
# ### Exercise 4.2 · Score
#
# *Difficulty 1/5 · worth it 4/5 · 4 minutes · about 3 lines*
#
# Each expert has a vector; an expert's logit (raw score) for a token is their dot product. DeepSeek-V2 turns the logits into scores with a softmax over the experts, V3 with a sigmoid. Compute in float32 at least, in float64 where `x` is that,
# and never in BF16: experts whose scores differ by a thousandth would tie in BF16. (`torch.promote_types(x.dtype, torch.float32)` is the wider of the two.)
#
# | | shape | |
# |---|---|---|
# | `x` | (M, D) | tokens |
# | `weight` | (E, D) | $e_i$, one row an expert |
# | `scoring_func` | | `"sigmoid"` or `"softmax"` |
# | returns | (M, E) | scores |


# %% id="affinities" tags=["exercise"]
@exercise("moe.affinities")
def affinities(x, weight, scoring_func="sigmoid"): ...


# %% [markdown] id="choose-text"
# In a softmax the scores share a sum of 1: if one rises, the others fall, and among 256 experts most are tiny. A sigmoid scores each expert alone. Section 3 adds a fixed number to some scores; between scores of one scale that is a plausible thing to do (our reading: the report gives no reason, and the loss-free paper balances a softmax too, with another step).
#
# **Why groups.** In V3's training the 256 experts of a layer are spread over 8 nodes (machines of eight GPUs), 32 on each. A token whose eight experts stood on eight nodes would cross the slow network eight times. So the experts form `G` groups, one a node, and a
# token may use experts of its best `topk_group` groups only: 4 of 8 in V3.
#
# ### Exercise 4.3 · Choose
#
# *Difficulty 3/5 · worth it 5/5 · 10 minutes · about 6 lines*
#
# A group is worth the sum of its `best` highest scores (2 in V3, 1 in V2; fewer where a group is smaller). Keep the `topk_group` worthiest groups of each token, put every expert of the others at $-\infty$, and take the `top_k`
# highest that are left. Groups are neighbours: with 16 experts in 4 groups, group 0 is experts 0 to 3.
#
# | | shape | |
# |---|---|---|
# | `biased` | (M, E) | scores, with the balance bias added; they may be negative |
# | returns | (M, K) int64 | the experts' indices, highest first |


# %% id="choose-experts" tags=["exercise"]
@exercise("moe.choose_experts")
def choose_experts(biased, n_group, topk_group, top_k, best=2): ...


# %% [markdown] id="weights-text"
# ### Exercise 4.4 · Weigh
#
# *Difficulty 2/5 · worth it 5/5 · 5 minutes · about 4 lines*
#
# The chosen experts' answers are summed with weights: their scores, divided by the sum of the chosen scores if `norm_topk_prob`, and then times `routed_scaling_factor` (2.5 in V3). The scores here are the *unbiased* ones, whatever the choice was made with.
#
# | | shape | |
# |---|---|---|
# | `scores` | (M, E) | unbiased |
# | `indices` | (M, K) | the choice |
# | returns | (M, K) | weights |


# %% id="combine-weights" tags=["exercise"]
@exercise("moe.combine_weights")
def combine_weights(scores, indices, norm_topk_prob=True, routed_scaling_factor=1.0): ...


# %% [markdown] id="agree-text"
# Your three functions are a gate. Does it agree with the package's, on random tokens and with a random bias? `small` is this course's own MoE model: 16 experts in 4 groups, 4 a token out of 2 groups.

# %% id="agree"
from dsv3_tutorial.moe.gate import route

torch.manual_seed(0)
small = ModelConfig.named("small")
tokens, gate_weight = torch.randn(1000, small.hidden_size), torch.randn(16, small.hidden_size) / 16
bias = torch.randn(16) / 10
scores = affinities(tokens, gate_weight)
indices = choose_experts(scores + bias, small.n_group, small.topk_group, 4)
weights = combine_weights(scores, indices, True, small.routed_scaling_factor)
theirs = route(tokens, gate_weight, bias, small)
print("same experts:", torch.equal(indices, theirs.indices))
print("same weights:", torch.allclose(weights, theirs.weights))

# %% [markdown] id="figure-route-text"
# Here is one token's way through a toy gate: 16 experts in 4 groups, two groups kept, four experts chosen. Expert 6 scores high for every token.

# %% id="figure-route"
from dsv3_tutorial.learn.figures import routing

routing.token_route(token=1, bias_on_favourite=0.0, topk_group=2)

# %% [markdown] id="figure-route-words"
# Bars are scores, shaded groups are kept, coloured bars are chosen, and the number above a bar is its weight. A good score outside the kept groups is lost: that is the price of the limit.
#
# Now lower the favourite with a negative bias. At which bias does token 1 drop it, and what do the weights do until then?

# %% id="explore-route"
explore(
    routing.token_route,
    token=list(range(8)),
    bias_on_favourite=(-0.8, 0.4, 0.05),
    topk_group=[1, 2, 3, 4],
    start={"token": 1, "bias_on_favourite": 0.0, "topk_group": 2},
    say=routing.token_route_in_words,
)

# %% [markdown] id="shared-text"
# At -0.1 token 1 still uses it, at -0.2 no longer, and group 1 goes with it. Until the choice changes, no weight moves: the bias enters the choice and nothing else. Then the weights are those of the new four.
#
# The **shared expert** is the part without a choice: what every token needs does not have to be learnt 256 times.

# %% [markdown] id="balance"
# ## 3 · Keep the experts busy
#
# A freshly drawn gate is uneven, and learning from the loss alone does not mend it: a few experts get most of the tokens, and the GPUs that hold the others wait. How uneven a load is, is measured by **MaxVio**, the maximal violation.
#
# ### Exercise 4.5 · MaxVio
#
# *Difficulty 1/5 · worth it 4/5 · 4 minutes · about 3 lines*
#
# How far does the busiest expert lie above an even load, in units of the even load? For tokens per expert `counts` (..., E), return $(\max - \mathrm{mean}) / \mathrm{mean}$ over the last axis, in float32: 0 for an even load. Without any tokens it is 0.


# %% id="max-violation" tags=["exercise"]
@exercise("moe.max_violation")
def max_violation(counts): ...


# %% [markdown] id="bias-text"
# DeepSeek's earlier models added a second loss (an *auxiliary loss*) that pushes the scores of busy experts down. It balances, and its gradient also reaches what the model is meant to learn. V3's answer is a number `b_i` for each expert that is added to the score *in the choice only* and moved by a rule, not by a gradient, after each
# step of the optimizer.
#
# ### Exercise 4.6 · Move the bias
#
# *Difficulty 2/5 · worth it 5/5 · 6 minutes · about 3 lines*
#
# Return the new bias, as a new tensor: up by `gamma` for each expert that got fewer tokens than the mean, down by `gamma` for each that got more, unmoved right at the mean. Only the sign of the gap counts. With `zero_mean` (a variant of the Moonlight model) subtract the mean of the signs first, so that the biases keep
# their sum.
#
# | | shape | |
# |---|---|---|
# | `bias` | (E,) | float |
# | `counts` | (E,) int64 | tokens each expert got in the *whole* batch of an optimizer step, on all GPUs |
# | returns | (E,) | the bias of the next step |


# %% id="update-bias" tags=["exercise"]
@exercise("moe.update_bias")
def update_bias(bias, counts, gamma, zero_mean=False): ...


# %% [markdown] id="simulate-text"
# **Measure.** Your two functions on a gate with a favourite: logits are noise, plus 2 for expert 0. How many steps until the load is about even, at three gammas, and does it stay so?


# %% id="simulate"
def violations(gamma, steps=300):
    """MaxVio of every step: 512 tokens, 4 of 16 experts each, expert 0 a favourite."""
    draw, bias, found = torch.Generator().manual_seed(0), torch.zeros(16), []
    for _ in range(steps):
        scores = torch.randn(512, 16, generator=draw)
        scores[:, 0] += 2.0
        chosen = (scores.sigmoid() + bias).topk(4).indices
        counts = torch.bincount(chosen.flatten(), minlength=16)
        found.append(max_violation(counts).item())
        bias = update_bias(bias, counts, gamma)
    return found


for gamma in (0.001, 0.01, 0.1):
    run = violations(gamma)
    first = next((step for step, value in enumerate(run) if value < 0.2), "never")
    print(f"gamma {gamma:5}: below 0.2 at step {first}; last 50 steps {sum(run[-50:]) / 50:.1f}")

# %% [markdown] id="simulate-words"
# Ten times the gamma, about a tenth of the steps. A hundred times is hardly sooner, and it does not stay: over the last 50 steps its load is the least even. A step of fixed size does not settle; it keeps crossing the point of balance, and the larger it is the farther. (*Further* has an explorer of both ends.)
#
# ### Trained, side by side
#
# V3's gamma is 0.001, in a run of some 230,000 steps. In 300 steps the bias moves by 0.3 at most. So this recorded run has three gammas, an auxiliary loss over each *sequence* and one over the whole *batch* (both with a weight of 0.01, a hundred times V3's), and
# nothing at all. Same small model (4 layers, 16 experts, 4 a token), same text, three seeds. *Said first: 300 steps of a toy show how balance behaves. They cannot show which method makes the better large model.*
#
# **Predict.** Which of the three gammas leaves the most uneven load at the end?

# %% id="guess-balance"
predict("moe.least_even_gamma", ..., options=[0.001, 0.01, 0.1])

# %% [markdown] id="measure-balance"
# **Measure.** The receipt. MaxVio is given twice: over the training batches of the last 50 steps, and over held-out text as a whole. *Paired*: the loss minus that of `none` with the same seed.

# %% id="figure-balance"
from dsv3_tutorial.learn.figures import balance_runs

reveal("moe.least_even_gamma", float(balance_runs.least_even_gamma().split()[-1]))
balance_runs.balance_table()
balance_runs.balance_curves()

# %% [markdown] id="balance-words"
# **Explain.** Left alone, the busiest expert of a layer gets three times its share, and after 300 steps that has hardly changed. Both losses and the middle gamma bring it down to a fraction. 0.001, V3's value, is slow: it is below half of what `none` ends with from step 230 on, 0.01 from step 70. And 0.1 never comes to rest: each step throws
# the bias past its aim, as the simulation above did. None reaches what chance alone would leave: neighbouring tokens are alike.
#
# And the loss? All five end below *none*, by half to three and a half times their errors. With three seeds a gap would have to be 4.3 errors wide to count, so *this run ranks nothing*. It shows no sign that balance costs anything, with a loss or without.
#
# **Measure.** Train the middle gamma here, for the time that you have, and see its MaxVio over the recorded band.

# %% id="live-balance" tags=["live", "nbval-ignore-output"]
from dsv3_tutorial.bench import balance as balance_bench

rows = list(balance_bench.live("bias, gamma 0.01", live_seconds()))
balance_runs.balance_live(rows, "bias, gamma 0.01")

# %% [markdown] id="live-balance-words"
# Your run should come down into the recorded band; how far it gets depends on your machine.
#
# **What do experts specialise in?** The same models, shown four kinds of text from the library: prose, asynchronous code, character tables, and e-mail.

# %% id="figure-domains"
from dsv3_tutorial.learn.figures import balance_domains

balance_domains.specialisation_table()
balance_domains.domain_heat_map("bias, gamma 0.01")

# %% [markdown] id="domains-words"
# The upper table says how far each kind of text's use of experts lies from the average of the kinds; the picture shows one layer of one run. Character tables have experts of their own: one gets 2.9 times its even share of them. The model balanced by its bias lets kinds of text differ most, and the loss over each *sequence* lets
# them differ least, about half as much: it asks every single text to use all experts evenly. The loss over the *batch* is in between, where the unbalanced model is. Three seeds of a toy, and the picture is one layer of one of them; the direction is what the V3 report finds in a large model (its figure 9).
#
# **Claim check.** *"DeepSeek-V3 uses auxiliary losses to encourage uniform expert use."* Here is what the papers print.

# %% id="papers-balance"
from dsv3_tutorial.learn.figures import moe_tables

moe_tables.loss_free()
moe_tables.scope()

# %% [markdown] id="papers-balance-words"
# The claim describes V2, and the opposite of V3's main mechanism. V3 balances with the bias; a sequence-wise loss with a weight of 0.0001 (report, section 4.2) remains as a guard against extremes within one sequence. And "uniform" is not the goal either: only the load of the whole batch has to be even, so that
# experts may differ from text to text.
#
# Read the second table closely. An auxiliary loss over the *batch* reaches the same validation loss as the bias does, in both models. In the two sizes reported, what costs a little is balancing inside every *sequence*: the scope matters, more than whether it is a loss. The freer scope has its own price: a single sequence, or the small batches of serving, may be uneven (*Further*: redundant experts).
#
# Why only the sign of the gap? The loss-free paper tried a step proportional to the gap: better balance (MaxVio 0.028 to 0.040 instead of 0.044) at a slightly worse perplexity (9.51 to 9.53 instead of 9.50).

# %% [markdown] id="predict-engine"
# ## 4 · Engines: what the choice costs on a machine
#
# A MoE layer does the arithmetic of a small dense one. Does it take its time? The plain way is a loop: each expert in turn collects the tokens that chose it. The package has that loop (`loop`), and three engines that sort all requests by expert first, so that each expert's rows lie together: `sorted`, PyTorch's `grouped_mm`, and on a GPU a Triton kernel. All give the same numbers (*Further* shows it).
#
# **Predict.** 64 experts, 8 a token, 256 tokens: forward and backward through one layer. How many times longer does transformers' plain loop (its default is another engine) take than the engine that the package takes by itself, on a CPU?

# %% id="guess-engine"
predict("moe.eager_over_ours", ..., unit="x")

# %% [markdown] id="measure-engine"
# **Measure.** The recorded run, in one process with equal weights and outputs compared; transformers' own grouped engine beside it.

# %% id="figure-engines"
from dsv3_tutorial.learn.figures import engines

reveal("moe.eager_over_ours", engines.eager_over_ours())
engines.engine_table()
engines.growth_table()

# %% [markdown] id="engines-words"
# Their loop takes more than thirty times as long with 256 tokens, and twelve times with 1,024, although the arithmetic is the same. It is not that a loop is slow: the package's own `loop` stays close to the sorted engine. The two differ in one line. `gate_up[e]` *inside* the loop makes autograd build, for every expert, a gradient as large as all
# experts, and add them up; the package takes the stacked weights apart once, with `unbind` (*Further* times both). So four times the experts cost their loop eleven times as much, and the others a fifth more. (transformers uses its grouped engine unless told otherwise, and ours is level with that one.)
#
# Does a sparse layer then take the time of a dense one with the same arithmetic? The recorded run again, forward only, by how many rows (tokens) each expert gets, over one dense network `K F` wide:

# %% id="figure-crossover"
engines.rows_per_expert()

# %% [markdown] id="crossover-words"
# No. At the sizes of `small` (left) the best engine takes 2.3 to 5 times as long as a dense layer, and the loop up to 12: sorting, gathering and many small products cost time, and with few rows both wait for weights, of which the sparse layer reads up to four times as many (16 experts against the width of 4). With experts of width 256 (right) the best engine comes down from 3.4 times to 1.1. A sparse layer comes close to its
# arithmetic once each expert has hundreds of rows, and that takes large batches; middle batches, which read every expert for a few rows each, are the inefficient ones. On a GPU these numbers differ; there is no receipt from one yet, and `make bench` writes it.
#
# ## 5 · Where the tokens go
#
# On many GPUs the experts are elsewhere. Each token is sent to the nodes that hold its experts (**dispatch**), and the answers come back (**combine**). With eight experts a token is copied eight times, unless a node that holds two of them gets one copy and passes it on.
#
# **Predict.** Eight experts out of 256, drawn evenly, on eight nodes of 32. How many different nodes do they touch on average? And when only the four best nodes are allowed, how many of a token's eight best experts does it still get (random scores)?

# %% id="guess-nodes"
predict("moe.nodes", ..., unit="nodes")
predict("moe.best_kept", ..., unit="experts")

# %% [markdown] id="measure-nodes"
# **Measure.** From the closed form (exercise 4.9 derives it), then with V3's cap of four nodes, and for every cap from one node to eight. (The counts of 5.28 and 5.27 are samples of 20,000 and 4,000 tokens.)

# %% id="reveal-nodes"
from dsv3_tutorial.cost.routing import expected_nodes
from dsv3_tutorial.learn.figures import node_copies

reveal("moe.nodes", expected_nodes(256, 8, 8))
node_copies.copies_table(expected_nodes)
reveal("moe.best_kept", node_copies.best_kept(4))
node_copies.affinity_kept()

# %% [markdown] id="affinity-words"
# Sending one copy to a node instead of one to an expert saves a third of the traffic between nodes; the cap takes another quarter off that, and above all makes four the worst case. Its price: of its eight best experts a token keeps 6.6, and the replacements score nearly as high, so that the summed score (*affinity*) falls by 0.6 % only. Whether that costs
# quality no number here can say; V3 trained with the cap, and we know of no run of it without.

# %% [markdown] id="paper"
# ## 6 · The paper's numbers
#
# DeepSeek-V3 by part, to the last parameter, and what a token meets of each. The V3 repository says "36.7B activated, including 0.9B embedding and 0.9B head".

# %% id="parts-table"
sparse_cost.parts_table()

# %% [markdown] id="paper-words"
# 671,026,419,200 in all. The activated count is 36.6 billion with the output head and 37.6 with the embedding as well, so 36.7 "with both" does not add up: a third party's copy of the same document says 36.6 with the head alone, and that does. The published files hold 685 billion: the same, and
# the multi-token prediction module with its own copies of embedding and head.
#
# ## What you can do now
#
# You can count any mixture of experts, write V3's gate and say why each part is there: scores that stand each alone, groups so that a token stays on four nodes, weights without the bias so that steering changes nothing else. You can balance experts by numbers that a rule moves, and you know what decides: the scope of
# the balance, and a gamma that fits the length of the run.

# %% id="progress"
progress()

# %% [markdown] id="further"
# ## Further
#
# Next on the path is lesson 2, FP8 training. What follows here goes further: seven more exercises, redundant experts, a model to train yourself, and a clinic of sick loss curves.
#
# ### Fine-grained experts
#
# DeepSeekMoE cuts each expert into several smaller ones and picks as many times more. Parameters and FLOPs stay the same. What grows is the number of sets a token can choose from.
#
# ### Exercise 4.7 · Combinations
#
# *Difficulty 1/5 · worth it 3/5 · 4 minutes · about 1 line*
#
# How many sets of experts can a token have, when `top_k` of `n_experts` are chosen? With `split`, each expert is first cut into so many smaller ones, and `split` times as many are chosen.


# %% id="expert-combinations" tags=["exercise"]
@exercise("moe.expert_combinations")
def expert_combinations(n_experts, top_k, split=1): ...


# %% [markdown] id="combinations-text"
# **Predict**, on paper, then run: 2 of 16 experts; the same cut in four; and V3.

# %% id="combinations"
for title, sizes in {"2 of 16": (16, 2), "8 of 64": (16, 2, 4), "V3, 8 of 256": (256, 8)}.items():
    print(f"{title:13} {expert_combinations(*sizes):,}")

# %% [markdown] id="combinations-words"
# From 120 to four billion, at equal cost: that is the paper's own example. It is an argument, not a measurement: how many of these sets a trained gate uses is another question.

# %% [markdown] id="shared-md"
# ### Shared experts
#
# DeepSeekMoE has several shared experts. They are kept as one network of their joint width, which is the same sum. Check it:

# %% id="shared"
from dsv3_tutorial.mlp import MLP

torch.manual_seed(0)
joint, x = MLP(8, 12).double(), torch.randn(5, 8, dtype=torch.float64)
halves = 0
for part in (slice(0, 6), slice(6, 12)):  # two experts of width 6, cut out of one of width 12
    gated = F.silu(x @ joint.gate_proj.weight[part].T) * (x @ joint.up_proj.weight[part].T)
    halves = halves + gated @ joint.down_proj.weight[:, part].T
print("two shared experts = one of their joint width:", torch.allclose(halves, joint(x)))

# %% [markdown] id="size-text"
# ### What is held and what is met
#
# Training cost against size, for the six published models that this course knows.

# %% id="figure-flops"
sparse_cost.flops_against_size()

# %% [markdown] id="figure-flops-words"
# Dense models lie on a line: more parameters, more FLOPs. The sparse ones lie far below it. What this figure leaves out is memory: every one of the 671 billion has to be held somewhere, and read whenever some token of the batch asks for it.
# FLOPs are the price of training; lesson 5 returns to the bytes.


# %% [markdown] id="dispatch-text"
# ### How the tokens get there
#
# ### Exercise 4.8 · Dispatch
#
# *Difficulty 3/5 · worth it 5/5 · 6 minutes · about 3 lines*
#
# The engines' first step. `indices` (M, K) flattened is one list of M K requests. Return the order that puts the requests of each expert together, tokens in order within an expert, and how many requests each of the `n_experts` has, those without any included.
#
# | | shape | |
# |---|---|---|
# | `indices` | (M, K) int64 | each token's experts |
# | returns | (M K,) int64, (E,) int64 | `order`, places in the flattened list; `counts` |


# %% id="dispatch" tags=["exercise"]
@exercise("moe.dispatch")
def dispatch(indices, n_experts): ...


# %% [markdown] id="way-back-text"
# There and back: sorted by expert, and put back, nothing is lost.

# %% id="way-back"
torch.manual_seed(0)
chosen = torch.rand(5, 6).topk(2).indices
order, counts = dispatch(chosen, 6)
print("rows per expert:", counts.tolist())
requests = chosen.flatten()[order]
print("sorted by expert:", requests.tolist())
print("back in place:   ", torch.equal(requests[order.argsort()], chosen.flatten()))

# %% [markdown] id="engines-equal-text"
# Four engines, one result: the readable loop, rows sorted by expert and multiplied group by group, PyTorch's grouped product, and on a GPU a Triton kernel.

# %% id="engines-equal"
from dsv3_tutorial.moe.experts import run_experts

torch.manual_seed(0)
x, gate_up, down = torch.randn(64, 32), torch.randn(16, 48, 32) / 6, torch.randn(16, 32, 24) / 5
chosen = torch.rand(64, 16).topk(4).indices
share = torch.rand(64, 4)
loop = run_experts(x, chosen, share, gate_up, down, engine="loop")
for engine in ("sorted", "grouped_mm"):
    other = run_experts(x, chosen, share, gate_up, down, engine=engine)
    print(f"{engine}: equal to the loop:", torch.allclose(other, loop, atol=1e-5))

# %% [markdown] id="index-text"
# The line that makes a loop slow: the same loop, with the stacked weights indexed inside it, or taken apart before it. Time of the backward pass:

# %% id="live-index" tags=["live", "nbval-ignore-output"]
import time

gate_up, down = torch.randn(64, 256, 256) / 16, torch.randn(64, 256, 128) / 11
x, experts_of = torch.randn(256, 256), torch.rand(256, 64).topk(8).indices
for how in ("indexed", "unbind"):
    gate_up.requires_grad_(), down.requires_grad_()
    into, back = (gate_up, down) if how == "indexed" else (gate_up.unbind(), down.unbind())
    out = torch.zeros(256, 256)
    for expert in range(64):
        token = (experts_of == expert).nonzero()[:, 0]
        gate, up = (x[token] @ into[expert].T).chunk(2, dim=-1)
        out = out.index_add(0, token, (F.silu(gate) * up) @ back[expert].T)
    start = time.perf_counter()
    out.sum().backward()
    print(f"{how:8} {1e3 * (time.perf_counter() - start):6.0f} ms backward")

# %% [markdown] id="live-engines-text"
# Time one layer of `small` here, forward only, with few and with many rows for each expert.

# %% id="live-engines" tags=["live", "nbval-ignore-output"]
engines.engines_live(seconds=live_seconds())

# %% [markdown] id="nodes-text"
# ### Exercise 4.9 · Nodes
#
# *Difficulty 3/5 · worth it 3/5 · 8 minutes · about 3 lines*
#
# The number of section 5. `top_k` different experts are drawn evenly from `n_experts`, which lie on `nodes` nodes, equally many on each. Return the expected number of nodes that hold at least one of them.


# %% id="expected-nodes" tags=["exercise"]
@exercise("moe.expected_nodes")
def nodes_touched(n_experts, top_k, nodes): ...


# %% [markdown] id="affinity-explore-text"
# Experts of one node may be alike: a token that suits one then suits its neighbours. Move the correlation and watch what the cap costs.

# %% id="explore-affinity"
explore(
    node_copies.affinity_kept,
    correlation=[0.0, 0.25, 0.5, 0.75],
    say=node_copies.affinity_kept_in_words,
)

# %% [markdown] id="steps-text"
# ### How long does a gamma take?
#
# ### Exercise 4.10 · Steps to close a gap
#
# *Difficulty 2/5 · worth it 4/5 · 4 minutes · about 1 line*
#
# An idle expert's score lies `gap` below that of an overloaded one. After how many steps has the bias lifted it level? Both of them move. Return a whole number, and 0 where there is no gap.


# %% id="steps-to-close" tags=["exercise"]
@exercise("moe.steps_to_close")
def steps_to_close(gap, gamma): ...


# %% [markdown] id="steps-run-text"
# **Predict**, on paper, then run: the largest gap there can be between two sigmoid scores is 1. How many steps does V3's gamma need for it?

# %% id="steps-run"
for gamma in (0.001, 0.01, 0.1):
    print(f"gamma {gamma:5}: {steps_to_close(1.0, gamma):3} steps to close a gap of 1")

# %% [markdown] id="steps-words"
# 500 steps are nothing in V3's training, and more than the whole recorded run here. So a gamma has to be chosen for the length of a run, like a learning rate. V3 also sets it to 0 for the last 500 billion tokens: the bias then rests.

# %% [markdown] id="figure-load-text"
# A harder gate than exercise 4.6's: every expert has its own fixed preference. Left, MaxVio over 200 steps of 512 tokens (chance alone gives an even gate 0.15); right, the tokens of each expert at the first step and at the last.

# %% id="figure-load"
routing.load_over_steps(gamma=0.01, skew=1.0)

# %% [markdown] id="explore-load-text"
# Find a gamma that is too slow for 200 steps, and one that never comes to rest.

# %% id="explore-load"
explore(
    routing.load_over_steps,
    gamma=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
    skew=[0.5, 1.0, 2.0],
    start={"gamma": 0.01, "skew": 1.0},
    say=routing.load_over_steps_in_words,
)

# %% [markdown] id="whole-layer"
# ### The whole layer
#
# ### Exercise 4.11 · Experts in a loop
#
# *Difficulty 3/5 · worth it 4/5 · 10 minutes · about 7 lines*
#
# The definition that every engine is tested against. Each expert takes the tokens that chose it, computes $\mathrm{down}\,(\mathrm{silu}(\mathrm{gate}\,x) \cdot \mathrm{up}\,x)$, and adds its answer, times its weight, to those tokens. `gate_up` holds each expert's gate rows above its up rows.
# `swiglu(both)` gives silu of its first half times its second, if you want it.
#
# | | shape | |
# |---|---|---|
# | `x` | (M, D) | tokens |
# | `indices`, `weights` | (M, K) | who, and how much |
# | `gate_up`, `down` | (E, 2F, D), (E, D, F) | the experts |
# | returns | (M, D) | the weighted sum of each token's experts |


# %% id="experts-loop" tags=["exercise"]
from dsv3_tutorial.moe.experts import swiglu


@exercise("moe.experts_loop")
def experts_loop(x, indices, weights, gate_up, down): ...


# %% [markdown] id="bug"
# ### Find the bug
#
# ### Exercise 4.12 · Three bugs of kinds that the field has had
#
# *Difficulty 4/5 · worth it 5/5 · 12 minutes · about 3 lines*
#
# One optimizer step's routing in one layer, over several micro-batches. It runs, gives numbers, and is wrong in three ways. Change what is wrong; the verdict tells how many bugs are left.


# %% id="find-the-bug" tags=["exercise"]
@exercise("moe.find_the_bug")
def balanced_step(micro_batches, bias, gamma, n_group, topk_group, top_k):
    weights = []
    for scores in micro_batches:
        biased = scores + bias
        grouped = biased.unflatten(-1, (n_group, -1))
        worth = grouped.topk(2, dim=-1).values.sum(dim=-1)
        chosen = worth.topk(topk_group, dim=-1).indices
        kept = (chosen[..., None] == torch.arange(n_group)).any(dim=1)
        limited = grouped.masked_fill(~kept[..., None], 0.0).flatten(-2)
        indices = limited.topk(top_k, dim=-1).indices
        picked = biased.gather(1, indices)
        weights.append(picked / picked.sum(dim=-1, keepdim=True))
        counts = torch.bincount(indices.flatten(), minlength=len(bias)).to(bias)
        bias = bias + gamma * (counts.mean() - counts).sign()
    return weights, bias


# %% [markdown] id="bug-words"
# None of the three raises an error or stops a loss from falling. The mask of 0 has been in released code: as long as biased scores are positive it changes nothing. The package's test suite holds a case where it does.
#
# ### Redundant experts
#
# When serving, V3 copies its busiest experts. EPLB decides how many copies each expert gets and which GPU holds them. Skewed loads, 256 experts on 32 GPUs:

# %% id="eplb"
node_copies.eplb_gain()

# %% [markdown] id="eplb-words"
# With the experts in order, the busiest GPU does 2.7 times the mean, and everybody waits for it. Placing them better without copies hardly helps: one expert alone is too much for a GPU. 32 redundant experts bring it to 1.15 times if the copies of a group stay on one node, and to an even load if they may go anywhere. The report serves prefill so: 32 GPUs with eight experts each and one redundant one. (The loads are made up: Zipf's law, seeded.)
#
# ### A model to train
#
# The package trains the whole model: MLA, experts, balance, multi-token prediction. In a terminal, `python -m dsv3_tutorial train --config small --steps 300 --out my/run` takes some minutes. A longer run's result lies in `data/checkpoints/small`. Here is what it needs for text that it has never seen, beside counting
# and compressing:

# %% id="checkpoint-table"
moe_tables.checkpoint()

# %% [markdown] id="checkpoint-words"
# 12 layers, 16 experts each, 7.5 million parameters, 76 minutes of one CPU core: 1.40 bits per byte, well below any n-gram and below `lzma`. The last row is fairer to compression: `lzma` may then look back at all of the training text, word for word, and wins. A model this small cannot keep eleven megabytes in its head.
#
# ### The loss-curve clinic
#
# Eighteen patients, three short training runs each: two are healthy, and sixteen have one bug each, of kinds that the field has had. Each patient has a letter, two runs to look at, and four curves over the grey band of the healthy ones. What they can have:

# %% id="clinic-diagnoses"
from dsv3_tutorial.learn.figures import clinic_charts

clinic_charts.diagnoses()

# %% [markdown] id="clinic-chart-text"
# One patient to begin with. What is wrong with K?

# %% id="clinic-chart"
clinic_charts.chart("K")

# %% [markdown] id="clinic-explore-text"
# Its loss falls below every healthy run's, and its held-out loss (diamonds, of seed 0) rises. Look at the others. Some cannot be told from the healthy by these curves: "nothing to see" is then the right diagnosis.

# %% id="clinic-explore"
from dsv3_tutorial.bench import clinic

explore(clinic_charts.chart, patient=sorted(clinic.charts()), say=clinic_charts.chart_in_words)

# %% [markdown] id="clinic-exercise-text"
# ### Exercise 4.13 · By heart
#
# *Difficulty 2/5 · worth it 4/5 · 6 minutes · about 1 line*
#
# A curve that a human looks at helps once; a number that is computed in every run helps always. Return whether a run has learnt its text by heart, from two columns of it. Healthy runs end with 0 to 0.2 bits between the two. It is tried on runs that you have not seen, healthy and sick with other things.
#
# | | shape | |
# |---|---|---|
# | `loss` | (steps,) | bits per byte of each step's batch |
# | `held_out` | (measurements,) | bits per byte on other text, the last at the end |
# | returns | | `True` or `False` |


# %% id="memorises" tags=["exercise"]
@exercise("moe.memorises")
def memorises(loss, held_out): ...


# %% [markdown] id="clinic-separate-text"
# For any other patient, write a statistic of a run and see whether it parts sick from healthy, on a seed that was held back as well. A run has `loss`, `grad_norm`, `max_violation` and `zero_fraction`, one value a step, and `held_out`. Here is a statistic for patient E; change both. `separates(None, ...)` says "these curves do not tell".

# %% id="clinic-separate"
patient = clinic.charts()["E"]
print(clinic.separates(lambda run: run.grad_norm[-100:].mean(), patient).message)
print(clinic.separates(lambda run: run.max_violation[-100:].mean(), patient).message)

# %% [markdown] id="clinic-words"
# `clinic_charts.key(letter)` tells what a patient has. Two of the sixteen leave nothing in these curves. One is harmless: counts that are all doubled have the same signs. The other is the bias in the experts' weights. Such bugs are found by comparing with an independent implementation, as this package's tests do, and not by watching a loss.
