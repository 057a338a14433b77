# %% [markdown] id="title"
# # 3 · Scale-up parallelism
#
# DeepSeek-V3 was trained on 2,048 GPUs. While a message travels to the next GPU, about three microseconds, each of them could do two billion operations. So the question of this lesson is who has to send what to whom, over which wire, and when. You split a model in every way that the
# paper discusses, on real processes, and predict what their messages cost.
#
# After it you can
#
# - write the sum that data parallel training stands on, and count its bytes and steps;
# - split a layer by columns and rows, experts by ranks and a model by stages, and show that the gradients stay those of one process;
# - send a token once to each node instead of once to each expert;
# - draw a pipeline's timeline, compute its bubble, and put each kind of traffic on a wire that can carry it.
#
# *75 minutes to `progress()` in a workshop, more alone. Run All takes about two minutes. You need lesson 1; the little that is needed of lesson 4 comes first.*
#
# **Words.** A **rank** is one of the processes that work together, usually one for each GPU, numbered from 0; the **world** is how many there are. Ranks that reach each other over a fast link form a **node**: on V3's cluster, eight GPUs joined by NVLink. A message goes *inside* a node or *across* nodes, over InfiniBand.
# `term("all-reduce")` explains a word, and so for each in bold.
#
# *The report* is the DeepSeek-V3 technical report, *the paper* the authors' ISCA paper of 2025 on its hardware. NVLink is the **scale-up** network, InfiniBand the **scale-out** network.

# %% id="setup"
from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm
from dsv3_tutorial.learn import (
    check_equal,
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
from dsv3_tutorial.learn.figures import mesh_map, network_tables, throttled, tiers, timelines
from dsv3_tutorial.parallel.launch import launch
from dsv3_tutorial.parallel.traffic import record

# %% [markdown] id="moe-text"
# ## 0 · A mixture of experts in ten lines
#
# In most layers of V3 stand 256 small networks, the **experts**. A **gate** scores them for each token and picks eight. All that this lesson needs of lesson 4 is that *each token has to be at eight of 256 places*. Here six tokens choose 2 of 8 experts, which
# lie on four ranks, two on each.

# %% id="moe"
torch.manual_seed(0)
tokens, gate = torch.randn(6, 16), torch.randn(8, 16)
scores = (tokens @ gate.T).sigmoid()  # (M, E)
chosen = scores.topk(2).indices  # (M, K)
for token, experts in enumerate(chosen.tolist()):
    places = " and ".join(f"expert {e} on rank {e // 2}" for e in sorted(experts))
    print(f"token {token} goes to {places}")

# %% [markdown] id="bottleneck"
# ## 1 · The bottleneck: each wire is slower than the one before
#
# The squares' areas are bandwidths: where a number that is used in a register may come from. The small ones are this lesson's wires. V3 was trained on **H800** GPUs: H100s whose NVLink was cut from
# 450 to 200 GB/s in each direction, of which 160 are reached.

# %% id="bandwidths"
tiers.bandwidths()

# %% [markdown] id="alpha-beta"
# Bandwidth is half of it: a message also waits for software and switches. The usual model is $t = \alpha + n / \beta$, a latency and $n$ bytes over a bandwidth.
#
# **Predict.** The paper's table 5 has the time of 64 bytes between two GPUs over NVLink, and between two machines on one switch over InfiniBand. Which is shorter?

# %% id="guess-latency"
predict("parallel.lower_latency", ..., options=["NVLink", "InfiniBand"])

# %% [markdown] id="measure-latency"
# **Measure.** The paper's table, and the size of message whose bytes take as long as its latency. (RoCE is InfiniBand's protocol over Ethernet.)

# %% id="latencies"
reveal("parallel.lower_latency", network_tables.lower_latency())
network_tables.latencies()

# %% [markdown] id="latency-words"
# **Claim check.** *"Scale-out is high-latency."* Not by the paper's table: under one switch InfiniBand is the faster one, over three a little the slower. (Both as a program on the CPU sees them.) NVLink carries four times the bytes: the gap is bandwidth. Kilobytes cost about the same on either wire, megabytes three to four times as much across.
#
# **Predict.** *"Low bandwidth limits the all-reduce of gradients"*, it is said as well. Three kinds of traffic leave a GPU in a training step of V3: gradients, which all replicas add up; activations between the stages of the pipeline; and tokens on the way to experts and back. Which one keeps the links busy longest?

# %% id="guess-hungriest"
predict("parallel.hungriest", ..., options=["gradients", "stages", "experts"])

# %% [markdown] id="measure-hungriest"
# **Measure.** Counted from the model's shapes and the report's layout: *data parallel* replicas add up gradients, *pipeline stages* hand activations on, *experts* get tokens and return them, and *tensor parallel* ranks, which V3 did not have, would share every layer. Derived; how each is counted stands in `cost/step_traffic.py`.

# %% id="step-traffic"
reveal("parallel.hungriest", mesh_map.hungriest())
mesh_map.traffic_table()

# %% [markdown] id="hungriest-words"
# The experts' traffic is 37 times the gradients' across nodes, and would keep the links busy for a third of the step's time. Gradients travel once a step, tokens in every layer, there and back, forward and backward. The lower half says what tensor parallelism would have added: half a terabyte through an NVLink that had been cut, between a layer's own products, where nothing hides it.
#
# Now *this* machine, whose processes talk through its memory. Fit $\alpha$ and $\beta$ to messages, predict one all-reduce of 4 MiB among four ranks, and run it. Is the prediction too short?

# %% id="live-fit" tags=["live", "nbval-ignore-output"]
throttled.live(seconds=live_seconds() / 4)

# %% [markdown] id="ring-text"
# It is, wherever four processes share fewer cores: the model knows wires, no scheduler, and not the time to add.
#
# ## 2 · Add up: all-reduce and data parallelism
#
# In **data parallelism** each rank holds the whole model and takes a share of the batch. Before the step, every rank needs the sum of all gradients: an **all-reduce**. If each sent its vector of `n` bytes to all others, a rank would send `(p - 1) n`. A **ring** needs less than `2 n`, however many ranks there are: each cuts its vector into `p` chunks and talks to its neighbours only.
# The numbers below say how many ranks' values a chunk already sums.

# %% id="ring-figure"
from dsv3_tutorial.learn.figures import ring_steps

ring_steps.ring(world=4)

# %% [markdown] id="ring-exercise"
# ### Exercise 3.1 · All-reduce with nothing but a neighbour
#
# *Difficulty 4/5 · worth it 5/5 · 8 minutes · about 8 lines*
#
# `world` ranks hold `n` numbers each, and every rank wants the sum of them all. The only thing a rank can do is `exchange(chunk)`: it sends `chunk` to rank + 1 (the last to rank 0) and returns what rank - 1 sent, of the same shape. Every rank runs the same function and must call `exchange` as often as the others, or all wait for ever.
# Passing all of `x` round would do; the **budget** is 2 (world - 1) / world of `x`'s bytes sent by each rank, which no ranks can beat unless a switch adds for them. Cut `x` into `world` chunks. In the first round each chunk collects its sum on the way: in step `s`, from 0 to `world - 2`, rank `r` sends its chunk `r - s` and adds what arrives to chunk `r - s - 1` (both modulo `world`). In the second round the finished sums go round.
#
# | | shape | |
# |---|---|---|
# | `x` | (n,) | this rank's numbers, n divisible by `world`; leave them as they are |
# | returns | (n,) | the sum over all ranks, in x's dtype, on every rank |
#
# The verdict runs your function as two to eight ranks, message by message.


# %% id="ring-all-reduce" tags=["exercise"]
@exercise("parallel.ring_all_reduce")
def ring_all_reduce(x, rank, world, exchange): ...


# %% [markdown] id="ring-run-text"
# Now real processes. `launch` runs a function on four ranks; even the function travels as a message. Each takes its share of a batch, and your ring adds up the gradients: that is data parallelism, whole. Beside it, all of `x` passed round.
#
# `record` sees every message, by tier, and gives each rank a **virtual clock**: a message takes $\alpha + n / \beta$, its card is busy for $n / \beta$, and a rank waits where it has to. So a laptop shows what an H800 cluster would, without congestion and alike every time. Here four ranks lie on two nodes of two.

# %% id="ring-run"
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.parallel.gradients import flat_gradient
from dsv3_tutorial.parallel.rings import neighbour_exchange, pass_round

pairs = replace(comm.network("h800"), ranks_per_node=2)


def gradients(rank, world):
    torch.manual_seed(0)
    mlp, batch = MLP(256, 512).double(), torch.randn(8, 256, dtype=torch.float64)
    mlp(batch.chunk(world)[rank]).square().mean().backward()
    return flat_gradient(mlp)


def one_rank(all_reduce):
    own, rank = gradients(dist.get_rank(), 4), dist.get_rank()
    with record(pairs) as seen:
        total = all_reduce(own, rank, 4, neighbour_exchange())
    return total / 4, seen.bytes["across"], seen.clock


whole = gradients(0, 1)
for name, way in (("your ring", ring_all_reduce), ("all of x", pass_round)):
    means, sent, clocks = zip(*launch(one_rank, 4, way))
    title = f"{name}, rank 1 sends {sent[1] / 1e6:.2f} MB across, {max(clocks) * 1e6:.0f} us"
    check_equal(title, torch.stack(means), whole.expand(4, -1))
formula = comm.all_reduce(whole.nbytes, range(4), pairs, "ring")
print(f"a ring of {whole.nbytes / 1e6:.2f} MB by formula: {formula * 1e6:.0f} us")

# %% [markdown] id="tensor-text"
# Four different shares of a batch, and on each rank the gradient of the whole. Half the bytes take half the time. The formula is of ranks that all step together, at the pace of the slow wire; yours wait only for what they need, and are a little faster. (Try `MLP(8, 8)` and a batch as narrow: so small a vector pays for steps, and the ring has twice as many.) Adding up inside each node first sends less across still: exercise 3.7.
#
# ## 3 · Split a layer: tensor parallelism
#
# **Tensor parallelism** splits each matrix. If the first is cut by its outputs and the second by the same features, its inputs, nothing has to be exchanged between them. (Textbooks say *columns, then rows*; PyTorch stores a weight as (out, in), so that it is the other way round in code.)
#
# ### Exercise 3.2 · Split a feed-forward network, with one sum
#
# *Difficulty 3/5 · worth it 5/5 · 6 minutes · about 3 lines*
#
# V3's feed-forward network is down(silu(gate x) · up x). Let `world` ranks share it: all have the same `x` and (here) the whole weights, and rank `rank` computes with 1 / `world` of each weight. `all_reduce(t)` returns the sum of every rank's `t`.
# Find the cut for which one sum is enough. The **budget**: 1 / `world` of the FLOP on each rank, and *one* `all_reduce`, of a tensor as large as `x`. The next cell trains with it, so gradients must pass through.
#
# | | shape | |
# |---|---|---|
# | `x` | (..., D) | the same on every rank |
# | `w_gate`, `w_up` | (F, D) | applied as `x @ w.T`; F divisible by `world` |
# | `w_down` | (D, F) | applied as `h @ w.T` |
# | returns | (..., D) | the whole network's output, on every rank |


# %% id="column-row" tags=["exercise"]
@exercise("parallel.column_row")
def column_row(x, w_gate, w_up, w_down, rank, world, all_reduce): ...


# %% [markdown] id="tensor-run-text"
# Yours on two ranks, forward and backward. In the backward pass the sum needs nothing: each rank has the whole gradient of the output. It is the gradient of `x` of which each has a part. So `copied` marks `x`: nothing forward, a sum backward; and `summed` is the reverse. (What would an all-reduce that also sums backward do to the weights' gradients?)

# %% id="tensor-run"
from dsv3_tutorial.parallel.tensor_exchange import copied, summed


def mlp_on(world):
    torch.manual_seed(0)
    mlp, x = MLP(64, 256).double(), torch.randn(256, 64, dtype=torch.float64, requires_grad=True)
    weights = [part.weight for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    if world == 1:
        mlp(x).square().sum().backward()
        return x.grad, flat_gradient(mlp)
    group, rank = dist.group.WORLD, dist.get_rank()
    with record() as seen:
        y = column_row(copied(x, group), *weights, rank, world, lambda t: summed(t, group))
        y.square().sum().backward()
    return x.grad, flat_gradient(mlp), seen.bytes["inside"]


x_grad, whole = mlp_on(1)
x_grads, parts, sent = zip(*launch(mlp_on, 2, 2))
check_equal(
    f"gradient of x on both ranks, {sent[0]:,} bytes sent",
    torch.stack(x_grads),
    x_grad.expand(2, -1, -1),
)
check_equal("the weights' gradients, a half from each", sum(parts), whole)

# %% [markdown] id="tensor-words"
# One sum forward and one backward, each of the size of `x`: bytes that grow with the tokens, in every layer, between one product and the next. So tensor parallelism needs the fastest wire there is. (*Further* splits a whole model.)
#
# Attention splits by heads. What does that do to its cache?
#
# ### Exercise 3.3 · The cache of eight GPUs
#
# *Difficulty 2/5 · worth it 5/5 · 4 minutes · about 5 lines*
#
# `tp` x `dp` GPUs serve `tokens` cached tokens together. The `dp` replicas share the tokens (rounded up: we ask for the fullest GPU); the `tp` GPUs of a replica split attention by heads. Return the bytes of cache on the fullest GPU, for all `cfg.num_hidden_layers` layers, at `bytes_per_element` a number. In lesson 1 you counted one token at one `tp`: plain attention deals its `cfg.kv_heads` out, each GPU at least
# one (rounded up), and keeps a key and a value of `cfg.head_size` for each. Where `cfg.is_mla`, a token leaves `kv_lora_rank + qk_rope_head_dim` numbers a layer, and every head needs all of them. So what does `tp` save, and what does `dp`?


# %% id="cache-per-gpu" tags=["exercise"]
@exercise("parallel.cache_per_gpu")
def cache_per_gpu(cfg, tokens, tp, dp, bytes_per_element=2): ...


# %% [markdown] id="cache-table-text"
# Eight GPUs serve 65,536 cached tokens, with TP 8, 4, 2 or 1 (and so DP 1, 2, 4 or 8). **Predict**, on paper: for LLaMA-3.1 405B (**GQA**, 8 key-value heads) and for V3, does the split matter, and which is best?

# %% id="cache-table"
llama, v3 = ModelConfig.named("llama-3.1-405b"), ModelConfig.named("deepseek-v3")
for tp in (8, 4, 2, 1):
    gqa, mla = (cache_per_gpu(cfg, 65536, tp, 8 // tp) / 1e9 for cfg in (llama, v3))
    print(f"TP {tp} x DP {8 // tp}: LLaMA-3.1 405B {gqa:.2f} GB a GPU, DeepSeek-V3 {mla:.2f} GB")

# %% [markdown] id="cache-words"
# For GQA all are alike, down to one key-value head a GPU. The latent belongs to all heads, so splitting heads buys V3's cache nothing: at TP 8 the model with the small cache holds *more* a GPU than the one with the large cache. Data parallelism shares it out; splitting the sequence would too. (The report's deployment, section 3.4, had TP 4 in attention; the one that DeepSeek described in February 2025 has none.)
#
# ## 4 · Split the experts
#
# In **expert parallelism** each rank holds some of the experts. A layer then takes two **all-to-all** exchanges: *dispatch*, each token to its experts' ranks, and *combine*, the answers back. V3 spreads the 256 experts of a layer over 64 ranks on eight nodes. Before anything is sent, each rank has to know how much it sends to whom.
#
# ### Exercise 3.4 · How many rows for whom
#
# *Difficulty 2/5 · worth it 4/5 · 5 minutes · about 1 line*
#
# Before an all-to-all each rank must say how many rows it sends to every rank. In the plainest dispatch a row is one (token, expert) pair: a token with three experts on a rank goes there three times. Rank r holds the experts `r * experts_per_rank` to `(r + 1) * experts_per_rank - 1`. The rank's own share is counted too, and so are ranks that get nothing.
#
# | | shape | |
# |---|---|---|
# | `indices` | (M, K) int64 | the experts that each of this rank's M tokens chose; M may be 0 |
# | returns | (world,) int64 | rows for each rank, in all M K |


# %% id="destination-counts" tags=["exercise"]
@exercise("parallel.destination_counts")
def destination_counts(indices, experts_per_rank, world): ...


# %% [markdown] id="node-copies-text"
# ### Exercise 3.5 · One copy for a node
#
# *Difficulty 3/5 · worth it 5/5 · 8 minutes · about 5 lines*
#
# Between nodes every byte is four times as dear as inside (40 against 160 GB/s on V3's machines), and a node can hand a token on to its own GPUs. So a token should cross to a node **once**, however many of its experts are there, and not at all to the node it is on (`home`). Return what the dispatcher sends: the tokens, those for node 0 first, then
# node 1's and so on, and how many there are for each node. The **budget**: not a row more between nodes than needed.
#
# | | shape | |
# |---|---|---|
# | `indices` | (M, K) int64 | the experts that each token chose; node j holds `experts_per_node` of them, beginning with expert `j * experts_per_node` |
# | returns | (rows,) int64 and (nodes,) int64 | which tokens (rows of `indices`), node by node, within a node in any order; how many for each node, 0 for `home` |


# %% id="node-copies" tags=["exercise"]
@exercise("parallel.node_copies")
def node_copies(indices, experts_per_node, nodes, home): ...


# %% [markdown] id="expert-run-text"
# **Measure.** A layer of the course's own MoE model (`small`: 16 experts, 4 a token, from 2 of its 4 groups) on eight ranks, two nodes of four. Three ways to send: `flat`, a row for each expert; `deduplicated`, a row for each rank; `two_stage`, a row for each node, handed on inside. On the way back each rank adds up what its experts say of a token, each node what its ranks say, and the token's own rank the rest.
# Forward and backward, against one process. The last lines are your two functions' count of the rows across: a node is one "rank" of eight experts, and each row, `hidden_size` numbers of 8 bytes, travels four times.

# %% id="expert-run"
from dsv3_tutorial.block import initialize
from dsv3_tutorial.moe.layer import MoE
from dsv3_tutorial.parallel.expert import expert_parallel

small, fours = ModelConfig.named("small"), replace(pairs, ranks_per_node=4)


def moe_layer(dispatch=None):
    rank, world = (dist.get_rank(), 8) if dispatch else (0, 1)
    torch.manual_seed(0)
    moe, x = MoE(small).double(), torch.randn(1, 2048, small.hidden_size, dtype=torch.float64)
    initialize(moe, 0.06)
    x = x.chunk(world, dim=1)[rank].requires_grad_()
    if dispatch:
        expert_parallel(moe, None, dispatch, ranks_per_node=4)
    with record(fours if dispatch else None) as seen:
        moe(x).square().sum().backward()
    return x.grad, seen.bytes["across"], seen.trace, moe.gate(x).indices


whole, traces = moe_layer()[0], {}
for dispatch in ("flat", "deduplicated", "two_stage"):
    grads, sent, traces[dispatch], chosen = zip(*launch(moe_layer, 8, dispatch))
    check_equal(f"{dispatch}, {sum(sent) / 1e6:.1f} MB across", torch.cat(grads, dim=1), whole)
flat = sum(destination_counts(c, 8, 2)[1 - rank // 4] for rank, c in enumerate(chosen))
once = sum(node_copies(c, 8, 2, rank // 4)[1].sum() for rank, c in enumerate(chosen))
for name, rows in (("flat", flat), ("once a node", once)):
    print(f"by your count, {name}: {4 * 8 * small.hidden_size * rows / 1e6:.1f} MB")

# %% [markdown] id="expert-words"
# The gradient is that of one process, three times, and your count is the bytes that went across (the small rest is weights and expert numbers). *Deduplicated* saves where two experts of a token share a rank. *Two stages* move bytes from the slow wire to the fast one.
#
# Is it worth it? For V3, 64 ranks on eight nodes, the bytes of one layer computed from the copies that even routing makes, without and with V3's limit (a token's experts lie on at most four nodes):

# %% id="dispatch-map"
from functools import partial

from dsv3_tutorial.learn.figures import network_map, network_traces

network_map.all_to_all_retimed()

# %% [markdown] id="network-words"
# Two stages with V3's limit take half the time of flat. Now your own eight ranks. The traces hold every message of every rank, and are timed again on the wires you choose, without being run again; `larger` plays each message as if it had so many times the bytes. Start at 1 and 1: on the H800's own wires two stages win nothing, because our toy's messages are small, and two stages send more of them (the caption says how much of the time is latency).
# From which size on do they win? And from which slower wire on? (This clock runs one stage after the other; V3's kernels, and the figure above, overlap them.)

# %% id="explore-network"
explore(
    partial(network_traces.retimed, traces),
    slower_across=[1, 2, 4, 8, 16],
    larger=[1, 10, 100],
    say=partial(network_traces.retimed_in_words, traces),
)

# %% [markdown] id="pipeline-text"
# ## 5 · Split the depth: pipelines
#
# In **pipeline parallelism** each rank holds some of the layers, a *stage*. Only activations at the borders travel, so it suits the slow wire. But a rank must wait for the one before it, and in the backward pass for the one behind it. The batch is therefore cut into **micro-batches** that follow each other, and the order of forwards and backwards (a *schedule*; **1F1B** is one, *GPipe*, all forwards first, another) decides how long ranks wait (the **bubble**) and how much they have to keep.
#
# ### Exercise 3.6 · One forward, one backward
#
# *Difficulty 3/5 · worth it 5/5 · 8 minutes · about 5 lines*
#
# A stage of a pipeline runs every micro-batch forward (`"F0"`, `"F1"`, ...) and backward (`"B0"`, ...). Forward inputs come from the stage before, gradients from the stage after, and between its F and its B a micro-batch keeps its activations: it is *live*. Return one stage's order in the 1F1B schedule: as many forwards ahead as there are stages after this one,
# then a forward and the oldest backward in turn, then the backwards that are left. The **budget**: never more than `stages - stage` micro-batches live at once (the last stage: one), and no idle time beyond what all forwards first would cost. There may be fewer micro-batches than stages.
#
# For `stage=0, stages=3, micro_batches=3` it is `["F0", "F1", "F2", "B0", "B1", "B2"]`, for `stage=1` `["F0", "F1", "B0", "F2", "B1", "B2"]`.


# %% id="one-f-one-b" tags=["exercise"]
@exercise("parallel.one_f_one_b")
def one_f_one_b(stage, stages, micro_batches): ...


# %% [markdown] id="timeline-text"
# Your order, simulated: each device does the next thing as soon as its input is there. A backward takes twice a forward.

# %% id="timeline"
from dsv3_tutorial.cost.schedule import Op, Schedule, Times, dual_pipe, zb1p

orders = [[Op(o[0], int(o[1:]), stage) for o in one_f_one_b(stage, 4, 8)] for stage in range(4)]
yours = Schedule("yours", 4, 8, tuple(map(tuple, orders)), ((0,), (1,), (2,), (3,)))
timelines.drawn(yours, Times(t_f=1, t_b=2))

# %% [markdown] id="timeline-words"
# The bubble is `(p - 1)` forwards and backwards, 9 here, however many micro-batches there are. Two ideas shrink it. **ZB1P** splits the backward: the stage before waits for the gradient of a stage's *input*; for that of its *weights* nobody waits, and it fills the gaps. **DualPipe**, V3's own, feeds micro-batches from both ends, so that one's forward can meet another's
# backward; the two overlap, and the communication of one hides behind the arithmetic of the other.
#
# **Predict.** 16 stages; a forward takes 1, a full backward 2, of which the weights' part is 1. 1F1B waits 45. How long does ZB1P wait, and (a guess) how long DualPipe?

# %% id="guess-bubble"
predict("parallel.bubble_zb1p", ..., unit="forwards")
predict("parallel.bubble_dualpipe", ..., unit="forwards")

# %% [markdown] id="measure-bubble"
# **Measure.** The report's formulas, beside what simulating the published orders gives, in V3's own size: 120 micro-batches.

# %% id="bubbles"
times = Times(t_f=1, t_b=2, t_w=1, pair=3)
reveal("parallel.bubble_zb1p", zb1p(16, 120).bubble(times))
reveal("parallel.bubble_dualpipe", dual_pipe(16, 120).bubble(times))
timelines.bubble_table(16, 120, times)
print()
timelines.bubble_table(16, 120, replace(times, t_w=0.5))
timelines.three(stages=8, micro_batches=20)

# %% [markdown] id="pipe-run-text"
# 14 against 15: in bubbles alone DualPipe hardly gains on ZB1P, and it holds every layer's weights twice. It was chosen for the *overlap*. Pink is two micro-batches at once, half of DualPipe's work in the figure and more than four fifths at V3's size (last column): the tokens of one travel while the other computes. The formulas charge a pair 3, as if nothing were gained.
# In the second table formula and published order part by 1: there the devices in the middle run one forward and backward apart, which hands the gradient on sooner.
#
# V3's own step had a *measured* bubble of 10.3 % (section 6 has the table), 1.7 to 2.8 times DualPipe's rows here. Stages of unequal length and messages that nothing hides could explain it; no published number says.
#
# Now for real: such orders on four processes, *yours* from your exercise. Each rank sends only activations and their gradients.

# %% id="pipe-run"
from dsv3_tutorial.parallel.pipeline import Pipeline


def work():
    torch.manual_seed(0)
    mlps, inputs = [MLP(32, 64).double() for _ in range(4)], torch.randn(8, 16, 32).double()
    return [torch.nn.Sequential(torch.nn.LayerNorm(32).double(), mlp) for mlp in mlps], inputs


def one_device(schedule):
    parts, inputs = work()
    mine = {i: parts[i] for i in schedule.placement[dist.get_rank()]}
    with record(pairs) as seen:
        pipe = Pipeline(schedule, list(mine.values()), F.mse_loss)
        kept = pipe.step(inputs.unbind(), inputs.unbind(), inputs[0]).kept
    return {i: flat_gradient(part) for i, part in mine.items()}, kept, seen.bytes


parts, inputs = work()
(sum(F.mse_loss(torch.nn.Sequential(*parts)(x), x) for x in inputs) / 8).backward()
for schedule in (yours, dual_pipe(4, 8)):
    for rank, (grads, kept, sent) in enumerate(launch(one_device, 4, schedule)):
        kb = f"{sent['inside'] / 1e3:.0f} + {sent['across'] / 1e3:.0f} KB inside + across"
        title = f"{schedule.name}, rank {rank}, stages {list(grads)}, kept {kept}, {kb}"
        check_equal(title, grads, [flat_gradient(part) for part in parts])

# %% [markdown] id="pipe-words"
# Each rank of 1F1B keeps at most as many micro-batches as there are stages from it on; DualPipe's keep one more than it has stages, and send more: two streams pass, and both copies of a stage add up their gradients.
#
# In the explorer a pair takes 3 where nothing is gained by overlapping, and less where something is. With pair 3, at which `t_w` is DualPipe furthest ahead of ZB1P? And from which pair on (two streams that fight for the same chip) is DualPipe's *step* the longer one? Its bubble does not tell: a slow pair counts as work. (DualPipe needs twice as many micro-batches as stages.)

# %% id="explore-schedule"
explore(
    timelines.timeline,
    schedule=["1f1b", "zb1p", "dualpipe", "gpipe"],
    stages=[2, 4, 8],
    micro_batches=[8, 16, 24],
    t_w=[0.25, 0.5, 1.0],
    pair=[2.0, 2.5, 3.0, 3.5, 4.0],
    start={"schedule": "zb1p", "stages": 8, "micro_batches": 16, "t_w": 1.0, "pair": 3.0},
    say=timelines.timeline_in_words,
)

# %% [markdown] id="overlap-text"
# **How much does overlapping buy?** The report puts computation and communication at about one to one, and spends 20 of the 132 SMs (the units that compute) on moving tokens. Our count of section 1 gives less communication, and table 4's own times a range (its 1B, a backward, may or may not include the weights' part). Two micro-batches through one layer:

# %% id="overlap"
from dsv3_tutorial.learn.figures import overlap

overlap.ratios_table()
overlap.dual_micro_batch(sms=20, communication=1.0)

# %% [markdown] id="placement-text"
# Not twice as fast: the SMs that carry messages do not multiply. At the ratio that we count the gain is 1.17, by table 4 between 1.14 and 1.44; and as long as the SMs stay reserved there is a point below which overlapping loses (exercise 3.9).
#
# ## 6 · What sits where, and the paper's numbers
#
# **Claim check.** *"Tensor parallelism inside the node, data parallelism across: scale up, not out."* A sensible rule for dense models on uncut NVLink. V3's training kept half of it: data parallelism across, no tensor parallelism inside, and its heaviest traffic across eight nodes. What it did was to make that traffic fit: half the bytes on the way out (FP8; answers return in BF16), at most four nodes a token, one copy for each, hidden behind arithmetic.
# And while one copy crosses at InfiniBand's 50 GB/s, NVLink's 160 can hand on 3.2 (the report's numbers, 4 with the 40 GB/s reached): several experts on a node cost no more than one.
#
# Try it. *A warning first: nothing is hidden in this count, and memory is an estimate. It rules layouts out; it does not show that V3's was the only one.* Keep the experts on one node (`ep` 8): what is saved, and what does not fit? Which is the smallest `ep` that fits with room? Back at `ep` 64, add tensor parallelism (`tp` 8 and `dp` 16; the caption must still say 2,048 GPUs). Then V3's layout on H100s (why so little change?) and on racks of 72 (`gb200-nvl72`).

# %% id="explore-placement"
explore(
    mesh_map.placement,
    pp=[1, 4, 8, 16],
    dp=[16, 32, 64, 128],
    ep=[8, 16, 32, 64],
    tp=[1, 2, 4, 8],
    chip=["h800", "h100-sxm", "gb200-nvl72"],
    start={"pp": 16, "dp": 128, "ep": 64, "tp": 1, "chip": "h800"},
    say=mesh_map.placement_in_words,
)

# %% [markdown] id="paper"
# **The paper's numbers.** Three rows of table 3 are ways to wire a cluster from switches of 64 ports. V3's *multi-plane* network is eight two-layer trees side by side, one for each card of a node, at a two-layer tree's price per endpoint and eight times its size. Table 4, V3's step on it. And the bound on how fast a token can come out, if each of a layer's experts has a GPU of its own (section 2.3.2).

# %% id="paper-tables"
network_tables.topologies(["ft2", "mpft", "ft3"])
print()
network_tables.step()
network_tables.bubble_measured()
print()
network_tables.decode_limits()

# %% [markdown] id="paper-words"
# All counts of table 3 come out exactly; two of the three costs were fitted. Table 4's tokens per day follow from 15,360 sequences of 4,096; its parts add up to 26 ms less than the step. The bound's "7K" has to be 7,000: with 7,168 channels and FP8's scales, 67 tokens a second become 65, and at the 40 GB/s that the same paper calls effective elsewhere, 52. NVL72's 1,200 leave out that each layer waits for four latencies, and that 72 GPUs have to hold 257 experts; the last two rows put them in, one at a time.
#
# ## What you can do now
#
# You can say for each split of a model what is sent, when, and over which wire, and show that nothing but the place of the work has changed. And you know why V3 looks as it does: its wire across is a quarter of the one inside, so tokens cross once, hidden, and tensor parallelism is left out.

# %% id="progress"
progress()

# %% [markdown] id="further"
# ## Further
#
# Next on the path is lesson 5, inference. What follows here goes deeper: a real slow wire, five more exercises, a whole model split by heads, what data parallel ranks need not hold, networks larger than V3's, and what the authors ask of the next hardware.
#
# ### A wire that is really slow
#
# The virtual clock is a model. This receipt is not: two "nodes" on one machine, joined by a cable whose rate the operating system limits, with two processes on each. Flat collectives beside hierarchical ones, each beside what the model predicts from messages alone.

# %% id="throttled"
throttled.fit_table()
throttled.throttled()

# %% [markdown] id="throttled-words"
# On slow cables, adding up inside a node first pays, and so does sending one copy for two receivers (*dispatch*: the same rows for both ranks of a node). A plain all-to-all has no bytes to save, and on the faster of the two cables going by node loses. The model is of wires: where the cable has no limit, processes and their scheduling decide, and the model is far off.
#
# ### Exercise 3.7 · All-reduce in two levels
#
# *Difficulty 2/5 · worth it 4/5 · 4 minutes · about 1 line*
#
# Nodes of g GPUs want the sum over all GPUs. Three collectives are at hand. `reduce_scatter(t)` works inside the node: it sums its g ranks' `t` (n,) and leaves each rank its own 1 / g of the sum. `all_gather(t)` also works inside, and puts the g parts together again. `all_reduce(t)` sums over the ranks that have the same place in their nodes: this is what crosses. The **budget**: 1 / g of `x` into `all_reduce`,
# and nothing inside that is not needed. `x` is (n,), n divisible by g; return (n,), the sum, on every rank.


# %% id="hierarchical-all-reduce" tags=["exercise"]
@exercise("parallel.hierarchical_all_reduce")
def hierarchical_all_reduce(x, reduce_scatter, all_reduce, all_gather): ...


# %% [markdown] id="hierarchical-real-text"
# Yours on four real ranks, two nodes of two, with the bytes of a ring beside it.

# %% id="hierarchical-real"
from dsv3_tutorial.parallel.rings import node_collectives


def two_ways():
    rank, (scatter, reduce, gather) = dist.get_rank(), node_collectives(2)
    x = torch.arange(65536, dtype=torch.float64) + rank
    with record(pairs) as flat:
        total = ring_all_reduce(x, rank, 4, neighbour_exchange())
    with record(pairs) as by_node:
        same = torch.equal(hierarchical_all_reduce(x, scatter, reduce, gather), total)
    return same, flat.bytes, flat.clocks, by_node.bytes, by_node.clocks


same, *rest = launch(two_ways, 4)[1]
print("equal:", same)
for name, sent, clocks in (("ring", *rest[:2]), ("hierarchical", *rest[2:])):
    print(f"{name:13} rank 1 sent {sent}, done after {max(clocks) * 1e6:.2f} us")

# %% [markdown] id="all-reduce-map-text"
# On two of V3's nodes, 16 GPUs, by size of the tensor and by how slow the wire across is. For which sizes is a tree the fastest?

# %% id="all-reduce-map"
explore(
    network_map.all_reduce_retimed,
    slower_across=[1, 2, 4, 8],
    mb=[0.01, 0.1, 1, 10, 100],
    start={"slower_across": 1, "mb": 10},
    say=network_map.all_reduce_retimed_in_words,
)

# %% [markdown] id="whole-model-text"
# ### A whole model, split by heads
#
# `tensor_parallel` does to each layer of a model what you did to an MLP: feed-forward networks by features, attention by heads, MLA's latent projections whole on each rank. `tiny` is the course's small dense MLA model.

# %% id="whole-model"
from torch.distributed.device_mesh import init_device_mesh

from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel.tensor import tensor_parallel

tiny = ModelConfig.named("tiny")


def train_on(ranks):
    torch.manual_seed(0)
    model, ids = DeepSeekV3(tiny).double(), torch.randint(tiny.vocab_size, (4, 65))
    if ranks > 1:
        tensor_parallel(model, init_device_mesh("cpu", (ranks,)))
    with record() as seen:
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    return flat_gradient(model), seen.bytes["inside"]


whole, _ = train_on(1)
for rank, (grads, sent) in enumerate(launch(train_on, 2, 2)):
    check_equal(f"rank {rank}, {sent / 1e6:.1f} MB sent", grads, whole)

# %% [markdown] id="zero-text"
# Millions of bytes for 256 tokens, every step, in the middle of the arithmetic.
#
# ### What a replica need not hold
#
# Data parallel ranks hold everything, each the same. **ZeRO-1** gives each parameter one owner, who alone keeps its optimizer state and sends the new weights round; V3 trains so. PyTorch's **FSDP** (ZeRO-3) shares weights and gradients out as well, and gathers each layer just before it is used. On four real ranks, bytes a rank for weights, gradients and AdamW's two moments, in float32:

# %% id="zero"
from torch.distributed.fsdp import fully_shard

from dsv3_tutorial.parallel.replicas import owners


def fsdp():
    torch.manual_seed(0)
    model, ids = DeepSeekV3(tiny), torch.randint(tiny.vocab_size, (4, 65))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (4,)))
    row = ids[dist.get_rank()][None]
    with record() as seen:
        F.cross_entropy(model(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten()).backward()
    return 4 * sum(p.to_local().numel() for p in model.parameters()), seen.bytes["inside"]


parameters = list(DeepSeekV3(tiny).parameters())
all_bytes = 4 * sum(p.numel() for p in parameters)
owner = owners(parameters, 4)
owned = [4 * sum(p.numel() for p, of in zip(parameters, owner) if of == rank) for rank in range(4)]
print(f"everything on each rank: {4 * all_bytes / 1e6:.1f} MB")
print(f"ZeRO-1: {(2 * all_bytes + 2 * max(owned)) / 1e6:.1f} MB on the fullest")
for rank, (held, sent) in enumerate(launch(fsdp, 4)):
    print(f"FSDP, rank {rank}: {4 * held / 1e6:.1f} MB; sent in one step {sent / 1e6:.1f} MB")

# %% [markdown] id="bubble-exercise-text"
# FSDP keeps a quarter, and pays for it: weights travel twice (gathered for the forward and for the backward pass; the outermost ones stay) and gradients once, nearly 1.5 times the 7.3 MB of an all-reduce.
#
# ### Pipelines by hand
#
# ### Exercise 3.8 · How long a stage idles
#
# *Difficulty 4/5 · worth it 4/5 · 14 minutes · about 10 lines*
#
# From the orders of all stages alone, find the seconds that a stage idles in one step: the *bubble*. `orders[stage]` is a list like yours above; an F takes `t_f`, a B `t_b` seconds, messages take none. An operation starts as soon as its stage is free and the same operation has ended on the stage before (F) or after (B), where there is one. The step ends with the last operation of any stage (stage 0's last backward). Return one number:
# every stage works on all micro-batches, so all idle equally long. For 1F1B, and for all forwards first, you must find (stages - 1)(t_f + t_b); an order that runs no forwards ahead waits longer.


# %% id="bubble" tags=["exercise"]
@exercise("parallel.bubble")
def bubble(orders, t_f, t_b): ...


# %% [markdown] id="bubble-run-text"
# Your bubble of your own order, and its share of the step with more and more micro-batches:

# %% id="bubble-run"
for micro_batches in (4, 8, 32, 128):
    order = [one_f_one_b(stage, 4, micro_batches) for stage in range(4)]
    idle = bubble(order, t_f=1, t_b=2)
    share = idle / (idle + 3 * micro_batches)
    print(f"{micro_batches:4} micro-batches: idle {idle:g}, {share:.0%} of the step")

# %% [markdown] id="real-timeline-text"
# And a real run's clock, DualPipe on four processes of this machine. Four processes on fewer cores wait for each other in ways no schedule knows.

# %% id="live-timeline" tags=["live", "nbval-ignore-output"]
from dsv3_tutorial.parallel.pipeline import measured_timeline


def timed(schedule):
    parts, inputs = work()
    mine = [parts[i] for i in schedule.placement[dist.get_rank()]]
    step = Pipeline(schedule, mine, F.mse_loss).step(inputs.unbind(), inputs.unbind(), inputs[0])
    return measured_timeline(step)


slots = launch(timed, 4, dual_pipe(4, 8))[0]
timelines.real([[slot for slot in slots if slot.device == rank] for rank in range(4)], "dualpipe")

# %% [markdown] id="dualpipev-text"
# DualPipe holds every layer twice. *DualPipeV* cuts it in half at the middle: half the devices, each with two different stages, the same bubble, and no copy.

# %% id="dualpipev"
timelines.timeline("dualpipev", stages=8, micro_batches=20)

# %% [markdown] id="overlap-exercise-text"
# ### Overlap
#
# ### Exercise 3.9 · What hiding the messages buys
#
# *Difficulty 2/5 · worth it 4/5 · 4 minutes · about 2 lines*
#
# Two micro-batches each need `compute` seconds of arithmetic (on all SMs) and `communication` seconds of messages. One after the other they alternate: nothing overlaps. Overlapped, one computes while the other communicates, and the longer of the two sets the pace (two micro-batches, in the steady state: no filling and draining); but `reserved` of the chip's `sms` now carry messages, so that arithmetic has `sms - reserved` left. Return how many times
# faster the overlapped way is. V3 set 20 of the H800's 132 SMs aside, with arithmetic and messages about equally long.


# %% id="overlap-speedup" tags=["exercise"]
@exercise("parallel.overlap_speedup")
def overlap_speedup(compute, communication, sms=132, reserved=20): ...


# %% [markdown] id="overlap-explore-text"
# How much communication is needed before overlapping pays, with 20 SMs? And with 60? (0 is an ideal: messages that cost no SM.)

# %% id="overlap-explore"
explore(
    overlap.dual_micro_batch,
    sms=[0, 10, 20, 40, 60],
    communication=[0.1, 0.2, 0.5, 1.0, 1.5],
    start={"sms": 20, "communication": 1.0},
    say=overlap.dual_micro_batch_in_words,
)

# %% [markdown] id="place-exercise-text"
# ### Places
#
# ### Exercise 3.10 · Who gets NVLink
#
# *Difficulty 2/5 · worth it 4/5 · 6 minutes · about 2 lines*
#
# Ranks are numbered so that the *innermost* group's members are neighbours, the next group's stand that group's size apart, and so on. A group stays inside a node only if its size times that of all groups inside it is at most `gpus_per_node`; else all its bytes count as crossing. `bytes_across(order, sizes, traffic, gpus_per_node)` counts them for a given order, innermost first. Return the order
# with the fewest bytes between nodes. "TP inside, DP across" is one such order. Is it always the best?
#
# | | |
# |---|---|
# | `sizes` | dict: name of a group -> its GPUs, like {"dp": 16, "tp": 8, "pp": 4} |
# | `traffic` | dict: name -> bytes that a GPU sends in it per step |
# | returns | a tuple or list of all names, innermost first |

# %% id="place-groups" tags=["exercise"]
from itertools import permutations

from dsv3_tutorial.cost.sharding import bytes_across


@exercise("parallel.place_groups")
def place_groups(sizes, traffic, gpus_per_node): ...


# %% [markdown] id="place-run-text"
# V3's groups with tensor parallelism of 8 and experts over 16 ranks, counted as in section 1 (gradients left out); and two light groups that fit into a node together, beside a heavy one that does not:

# %% id="place-run"
with_tp = mesh_map.groups(tp=8, dp=16, ep=16)
light = {"a": 4, "b": 2, "heavy": 16}, {"a": 3e9, "b": 3e9, "heavy": 5e9}
for sizes, traffic in (with_tp, light):
    order = place_groups(sizes, traffic, 8)
    crossing = bytes_across(order, sizes, traffic, 8)
    print(
        f"{order[0]} innermost: {crossing / 1e9:,.0f} GB of {sum(traffic.values()) / 1e9:,.0f} cross"
    )

# %% [markdown] id="place-words"
# Tensor parallelism gets the node: all it sends stays inside. In the second case the heaviest group does *not* get it: 16 ranks never fit, so two light ones save more. (Counted here: a group that spans nodes sends all its bytes across. The experts' 64 ranks with two stages do better.)
#
# ### Larger networks
#
# The paper's table also has two networks of another kind, with fewer switches for as many endpoints than a three-layer fat tree: **Slim Fly** and **Dragonfly**.

# %% id="all-topologies"
network_tables.topologies()

# %% [markdown] id="topology-words"
# The row for Slim Fly is arithmetic. Its construction is known for prime powers `q`, and the 28 that gives the table's numbers is none: with 27 one gets 30,618 endpoints. Dragonfly's cost by our fit lies 2 % above the printed one.
#
# Now DeepSeek's own library for this traffic, DeepEP. The model knows a latency and 40 GB/s, which the same authors call effective on the same cluster; it is fitted to none of these rows.

# %% id="deepep"
network_tables.deep_ep()

# %% [markdown] id="deepep-words"
# Within six percent where tokens are few and all goes over InfiniBand. It fails, probably where kernels decide and not wires, inside one node, and in training on 16 and 32 GPUs.
#
# **What the authors ask for** (paper, sections 4.4 and 6): networks inside and across that are one, larger scale-up domains, traffic compressed on its way. As knobs, from today's H800 (`bits`: of a number on its way back from an expert; 10 is the paper's LogFMT-10). Which single knob helps decoding most, which training?

# %% id="explore-future"
from dsv3_tutorial.learn.figures import recommend

explore(
    recommend.future,
    bandwidth_ratio=[4, 2, 1],
    domain=[8, 32, 64, 256],
    bits=[16, 10, 8],
    latency_us=[0, 1, 2.8, 5],
    start={"bandwidth_ratio": 4, "domain": 8, "bits": 16, "latency_us": 2.8},
    say=recommend.future_in_words,
)

# %% [markdown] id="bug-text"
# ### Exercise 3.11 · Find the bugs
#
# *Difficulty 4/5 · worth it 5/5 · 10 minutes · about 3 lines*
#
# The function is what ranks tell each other between backward and the optimizer's step. All ranks hold a copy of the `replicated` weights, each with the gradient from *its own* tokens; the experts are split over the ranks, and the dispatch's backward has already summed an `expert` gradient over *everybody's* tokens. `counts` are this rank's tokens for each of all the experts, `bias` the gate's balance bias, the same on all ranks: it moves by `gamma` up for an expert that got fewer tokens than the mean, counted over all ranks, else down. The loss is the mean over ranks,
# gradients are clipped to `max_norm` by the norm of the whole model's. `all_reduce` returns the sum over ranks.
#
# The code below runs without an error, and it has three bugs. The verdict counts those that are left, half-fixed ones too, and names the last one.


# %% id="find-the-bug" tags=["exercise"]
@exercise("parallel.find_the_bug")
def synchronised(replicated, expert, counts, bias, gamma, max_norm, world, all_reduce):
    replicated = all_reduce(replicated) / world
    expert = all_reduce(expert) / world
    norm = (replicated.square().sum() + expert.square().sum()).sqrt()
    shrink = (max_norm / norm).clamp(max=1.0)
    counts = counts.to(bias.dtype)
    bias = bias + gamma * torch.sign(counts.mean() - counts)
    return replicated * shrink, expert * shrink, bias


# %% [markdown] id="train-text"
# ### Train across ranks
#
# The package's `train` splits the same way, with the same losses as one process:
#
# ```
# torchrun --standalone --nproc-per-node 4 -m dsv3_tutorial train --config small --dp 4 --ep 2 --out my/experts
# torchrun --standalone --nproc-per-node 4 -m dsv3_tutorial train --config small --dp 2 --tp 2 --out my/tensor
# torchrun --standalone --nproc-per-node 4 -m dsv3_tutorial train --config small --pp 2 --dp 2 --out my/stages
# ```
#
# `--dp` counts replicas of attention, and `--ep` divides them: V3 is `--pp 16 --dp 128 --ep 64`. Kill a rank, and torchrun's `--max-restarts` goes on from the last checkpoint. Two machines, with Slurm and without: `docs/multi_node.md`.
