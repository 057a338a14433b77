# %% [markdown] id="title"
# # 3 · Scale-up parallelism
#
# DeepSeek-V3 was trained on 2,048 GPUs. While a message travels to the next GPU, each of them could do a billion operations. So the question of this lesson is who has to send what to whom, over which wire, and when. You split a model in every way that the
# paper discusses, on real processes that share nothing but messages, and you predict what the messages cost before you send them.
#
# After it you can
#
# - write the sum that data parallel training stands on, and say how many bytes and steps it takes;
# - split a layer by columns and rows, experts by ranks and a model by stages, and show that the gradients stay those of one process;
# - send a token once to each node instead of once to each expert;
# - draw a pipeline's timeline, compute its bubble, and put each kind of traffic on a wire that can carry it.
#
# *75 minutes to `progress()`. Run All takes about two minutes. You need lesson 1's letters; the little that is needed of lesson 4 comes first.*
#
# **Words.** A **rank** is one of the processes that work together, usually one for each GPU, numbered from 0; the **world** is how many there are. Ranks that reach each other over a fast link form a **node**: on V3's cluster, eight GPUs joined by NVLink. A message goes *inside* a node or *across* nodes, over InfiniBand.
# `term("all-reduce")` explains a word, and so for each in bold.

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
# A number is used in registers. It comes from there, from the chip's own memory, from HBM, from another GPU of the node, or from another node. Here the squares' areas are the bandwidths. The small ones are this lesson's wires. V3 was trained on **H800** GPUs: H100s whose NVLink was cut from
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
# **Measure.** The paper's table, and the size of message whose bytes take as long as its latency.

# %% id="latencies"
reveal("parallel.lower_latency", network_tables.lower_latency())
network_tables.latencies()

# %% [markdown] id="latency-words"
# **Claim check.** *"Scale-out is high-latency."* Not in the paper's own table. NVLink delivers four times the bytes and not the first one sooner: the gap is bandwidth. (Both were measured from the CPU's side.) So a message of a few kilobytes costs the same on either wire, and one of a few megabytes four times as much across.
#
# **Predict.** *"Low bandwidth limits the all-reduce of gradients"*, it is said as well. Three kinds of traffic leave a GPU in a training step of V3: gradients, which all replicas add up; activations between the stages of the pipeline; and tokens on the way to experts and back. Which one keeps the links busy longest?

# %% id="guess-hungriest"
predict("parallel.hungriest", ..., options=["gradients", "stages", "experts"])

# %% [markdown] id="measure-hungriest"
# **Measure.** Counted from the model's shapes and the report's layout. *Inside* and *across* are bytes by wire. (Derived; how each is counted stands in `cost/step_traffic.py`.)

# %% id="step-traffic"
reveal("parallel.hungriest", mesh_map.hungriest())
mesh_map.traffic_table()

# %% [markdown] id="hungriest-words"
# The experts' traffic is a hundred times the gradients' across nodes, and would take a third of the step if nothing hid it. Gradients travel once a step, tokens once a layer and direction. Section 4 is about that row, section 5 about hiding what remains. And the second half says why V3 did without tensor parallelism: one and a half terabytes
# through an NVLink that had been cut.
#
# Now *this* machine, whose processes talk through its memory. Fit $\alpha$ and $\beta$ to messages of several sizes, predict one all-reduce of 4 MiB among four ranks, and run it.

# %% id="live-fit" tags=["live", "nbval-ignore-output"]
throttled.live(seconds=live_seconds() / 4)

# %% [markdown] id="ring-text"
# The prediction is off where four processes share fewer cores: the model knows wires, and no scheduler.
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
# Passing all of `x` round `world - 1` times would do; the **budget** is 2 (world - 1) / world of `x`'s bytes sent by each rank, which nobody can beat. Cut `x` into `world` chunks: in a first round of messages each chunk collects its sum on the way, in a second the finished sums go round.
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
# Now real processes. `launch` runs a function on four ranks; even the function travels as a message. Each takes its share of a batch, and your ring adds up the gradients: that is data parallelism, whole.
#
# `record` sees every message, by tier, and gives each rank a **virtual clock**: it advances by $\alpha + n / \beta$ for a message, and waits where the rank has to wait. So a laptop shows what an H800 cluster would, and shows it alike every time. Here four ranks lie on two nodes of two.

# %% id="ring-run"
from dsv3_tutorial.learn.equality import check_equal
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.parallel.gradients import flat_gradient
from dsv3_tutorial.parallel.rings import neighbour_exchange

pairs = replace(comm.network("h800"), ranks_per_node=2)


def gradients(rank, world):
    torch.manual_seed(0)
    mlp, batch = MLP(64, 256).double(), torch.randn(8, 64, dtype=torch.float64)
    mlp(batch.chunk(world)[rank]).square().mean().backward()
    return flat_gradient(mlp)


def one_rank():
    own, rank = gradients(dist.get_rank(), 4), dist.get_rank()
    with record(pairs) as seen:
        total = ring_all_reduce(own, rank, 4, neighbour_exchange())
    return total / 4, seen.bytes, seen.clock


whole = gradients(0, 1)
found = launch(one_rank, 4)
for rank, (mean, sent, _) in enumerate(found):
    check_equal(f"rank {rank}, {sum(sent.values()):,.0f} bytes sent", mean, whole)
formula = comm.all_reduce(whole.nbytes, range(4), pairs, "ring")
clock = found[0][2]
print(f"virtual clock {clock * 1e6:.2f} us, formula {formula * 1e6:.2f} us")

# %% [markdown] id="tensor-text"
# Four different shares of a batch, and on each rank the gradient of the whole, for 1.5 times its bytes. The formula is of a ring in which all ranks step together, at the pace of the slowest wire. Your messages were faster than that: a chunk crosses NVLink and InfiniBand in turn, and nobody waits for the slow hop but whoever needs it. (With all four in one node, clock and formula are equal to the last bit.) Adding up inside
# each node first (*hierarchical*) sends half as much across; exercise 3.10 builds it.
#
# ## 3 · Split a layer: tensor parallelism
#
# **Tensor parallelism** splits each matrix. If the first is cut by columns and the second by rows, nothing has to be exchanged between them.
#
# ### Exercise 3.2 · Split a feed-forward network, with one sum
#
# *Difficulty 3/5 · worth it 5/5 · 6 minutes · about 3 lines*
#
# V3's feed-forward network is down(silu(gate x) · up x). Let `world` ranks share it: all have the same `x` and (here) the whole weights, and rank `rank` computes with 1 / `world` of each weight. `all_reduce(t)` returns the sum of every rank's `t`.
# Find the cut for which one sum is enough. The **budget**: 1 / `world` of the FLOP on each rank, and *one* `all_reduce`, of a tensor as large as `x`.
#
# | | shape | |
# |---|---|---|
# | `x` | (..., D) | the same on every rank |
# | `w_gate`, `w_up` | (F, D) | applied as `x @ w.T`; F divisible by `world` |
# | `w_down` | (D, F) | |
# | returns | (..., D) | the whole network's output, on every rank |


# %% id="column-row" tags=["exercise"]
@exercise("parallel.column_row")
def column_row(x, w_gate, w_up, w_down, rank, world, all_reduce): ...


# %% [markdown] id="tensor-run-text"
# On two ranks, forward and backward. `torch.distributed.nn.functional.all_reduce` also sums gradients on the way back.

# %% id="tensor-run"
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

# %% [markdown] id="tensor-words"
# Nearly five million bytes for 256 tokens through a model of 1.2 million parameters, in every step, forward and backward, between one product and the next. So tensor parallelism needs the fastest wire there is, and V3's training went without.
#
# Attention splits by heads. What does that do to its cache?
#
#
# Attention splits by heads. What about its cache?
#
# ### Exercise 3.3 · The cache of eight GPUs
#
# *Difficulty 2/5 · worth it 5/5 · 4 minutes · about 5 lines*
#
# `tp` x `dp` GPUs serve `tokens` cached tokens together. The `dp` replicas share the tokens (rounded up: we ask for the fullest GPU); the `tp` GPUs of a replica split attention by heads. Return the bytes of cache on the fullest GPU, all layers. In lesson 1 you counted one token at one `tp`: plain attention deals its `cfg.kv_heads` out, each GPU at least
# one, and keeps a key and a value of `cfg.head_size` for each. Where `cfg.is_mla`, a token leaves `kv_lora_rank + qk_rope_head_dim` numbers a layer, and every head needs all of them. So what does `tp` save, and what does `dp`?


# %% id="cache-per-gpu" tags=["exercise"]
@exercise("parallel.cache_per_gpu")
def cache_per_gpu(cfg, tokens, tp, dp, bytes_per_element=2): ...


# %% [markdown] id="cache-table-text"
# Eight GPUs serve 65,536 cached tokens. **Predict**, on paper: which of these splits is best for LLaMA-3.1 405B (8 key-value heads), and which for V3?

# %% id="cache-table"
llama, v3 = ModelConfig.named("llama-3.1-405b"), ModelConfig.named("deepseek-v3")
for tp in (8, 4, 2, 1):
    gqa, mla = (cache_per_gpu(cfg, 65536, tp, 8 // tp) / 1e9 for cfg in (llama, v3))
    print(f"TP {tp} x DP {8 // tp}: LLaMA-3.1 405B {gqa:.2f} GB a GPU, DeepSeek-V3 {mla:.2f} GB")

# %% [markdown] id="cache-words"
# For GQA all are alike, down to one key-value head a GPU. The latent belongs to all heads, so tensor parallelism buys V3's cache nothing: at TP 8 the model with the small cache holds *more* a GPU than the one with the large cache. Data parallelism shares it out. (The report's first deployment had TP 4 in attention; the one described in February 2025 has none.)
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
# | `indices` | (M, K) int64 | the experts that each token chose; node j holds `experts_per_node` neighbours |
# | returns | (rows,) int64 and (nodes,) int64 | numbers of tokens, node by node (within a node in any order); rows for each node, 0 for `home` |


# %% id="node-copies" tags=["exercise"]
@exercise("parallel.node_copies")
def node_copies(indices, experts_per_node, nodes, home): ...


# %% [markdown] id="expert-run-text"
# **Measure.** A layer of the course's own MoE model (`small`: 16 experts, 4 a token, from 2 groups of 4) on eight ranks, two nodes of four. Three ways to send: `flat`, a row for each expert; `deduplicated`, a row for each rank; `two_stage`, a row for each node, and on from there. Forward and backward, against one process.

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
    if dispatch:
        expert_parallel(moe, None, dispatch, ranks_per_node=4)
    x = x.chunk(world, dim=1)[rank].requires_grad_()
    with record(fours if dispatch else None) as seen:
        moe(x).square().sum().backward()
    return x.grad, seen.bytes, seen.trace


whole, traces = moe_layer()[0], {}
for dispatch in ("flat", "deduplicated", "two_stage"):
    grads, sent, traces[dispatch] = zip(*launch(moe_layer, 8, dispatch))
    inside, across = (sum(b[tier] for b in sent) / 1e6 for tier in ("inside", "across"))
    title = f"{dispatch}, {inside:.1f} MB inside and {across:.1f} MB across"
    check_equal(title, torch.cat(grads, dim=1), whole)

# %% [markdown] id="expert-words"
# The gradient is that of one process, three times. *Deduplicated* saves where two experts of a token share a rank. *Two stages* move bytes from the wire that is slow to the one that is fast. Was it worth it? The traces hold every message of every rank; here they are timed again, on the network you choose, without being run again.

# %% id="network-map"
from functools import partial

from dsv3_tutorial.learn.figures import network_map, network_traces

retimed = partial(network_traces.retimed, traces)
retimed(slower_across=4)

# %% [markdown] id="network-words"
# Here the wire across is four times slower still than the H800's. Two stages win clearly. Move it to 1, the H800's own: all three take about as long, because with two nodes there is only one to cross to, and what two stages save across they spend inside. V3 has eight nodes, and *Further* computes its case: half the time of flat, with the limit of four nodes. Which way is best at 16?

# %% id="explore-network"
explore(
    retimed,
    slower_across=[1, 2, 4, 8, 16],
    say=partial(network_traces.retimed_in_words, traces),
)

# %% [markdown] id="pipeline-text"
# ## 5 · Split the depth: pipelines
#
# In **pipeline parallelism** each rank holds some of the layers, a *stage*. Only activations at the borders travel, so it suits the slow wire. But a rank must wait for the one before it, and in the backward pass for the one behind it. The batch is therefore cut into **micro-batches** that follow each other, and the order of forwards and backwards decides how long ranks wait (the **bubble**) and how much they have to keep.
#
# ### Exercise 3.6 · One forward, one backward
#
# *Difficulty 3/5 · worth it 5/5 · 8 minutes · about 5 lines*
#
# A stage of a pipeline runs every micro-batch forward (`"F0"`, `"F1"`, ...) and backward (`"B0"`, ...). Forward inputs come from the stage before, gradients from the stage after, and between its F and its B a micro-batch keeps its activations: it is *live*. Return one stage's order in the 1F1B schedule: as many forwards ahead as there are stages behind this one,
# then a forward and the oldest backward in turn, then the backwards that are left. The **budget**: never more than `stages - stage` micro-batches live at once (the last stage: one), and no idle time beyond what all forwards first would cost. There may be fewer micro-batches than stages.
#
# For `stage=1, stages=3, micro_batches=3` it is `["F0", "F1", "B0", "F2", "B1", "B2"]`.


# %% id="one-f-one-b" tags=["exercise"]
@exercise("parallel.one_f_one_b")
def one_f_one_b(stage, stages, micro_batches): ...


# %% [markdown] id="timeline-text"
# Your order, simulated: each device does the next thing as soon as its input is there. A backward takes twice a forward.

# %% id="timeline"
timelines.timeline("1f1b", stages=4, micro_batches=8)

# %% [markdown] id="timeline-words"
# The bubble is `(p - 1)` forwards and backwards, 9 here, however many micro-batches there are. Two ideas shrink it. **ZB1P** splits the backward: the gradient of a stage's *input* is what the stage before waits for; the gradient of its *weights* nobody waits for, and it fills the gaps. **DualPipe**, V3's own, feeds micro-batches from both ends, so that one's forward always meets another's
# backward; the two overlap, and the communication of one hides behind the arithmetic of the other.
#
# **Predict.** 16 stages; a forward takes 1, a full backward 2, of which the weights' part is 1. 1F1B waits 45. How long does DualPipe wait, and how long ZB1P?

# %% id="guess-bubble"
predict("parallel.bubble_zb1p", ..., unit="forwards")
predict("parallel.bubble_dualpipe", ..., unit="forwards")

# %% [markdown] id="measure-bubble"
# **Measure.** The report's formulas, beside what simulating the published orders gives, in V3's own size: 120 micro-batches.

# %% id="bubbles"
from dsv3_tutorial.cost.schedule import Times, dual_pipe, zb1p

times = Times(t_f=1, t_b=2, t_w=1, pair=3)
reveal("parallel.bubble_zb1p", zb1p(16, 120).bubble(times))
reveal("parallel.bubble_dualpipe", dual_pipe(16, 120).bubble(times))
timelines.bubble_table(16, 120, times)
print()
timelines.bubble_table(16, 120, replace(times, t_w=0.5))
timelines.three(stages=8, micro_batches=20)

# %% [markdown] id="pipe-run-text"
# 14 against 15: in bubbles alone DualPipe hardly gains on ZB1P, and it holds every layer's weights twice. It was chosen for the *overlap*: nearly all its work is done in pairs, and in a pair the tokens of one micro-batch travel while the other computes. The formula charges a pair 3, as if nothing were gained. Where weights take less (second table), formula and published order part: the device in the middle, where both streams meet,
# runs one forward and backward apart and passes the gradient on sooner.
#
# Pink is overlapped work, and DualPipe is nearly all pink.
#
# Now for real: the very orders that were drawn, on four processes. *Yours* is 1F1B made of your exercise; DualPipe is the package's. Each rank sends only activations and their gradients.

# %% id="pipe-run"
from dsv3_tutorial.cost.schedule import Op, Schedule
from dsv3_tutorial.parallel.pipeline import Pipeline


def work():
    torch.manual_seed(0)
    mlps, inputs = [MLP(32, 64).double() for _ in range(4)], torch.randn(8, 16, 32).double()
    return [torch.nn.Sequential(torch.nn.LayerNorm(32).double(), mlp) for mlp in mlps], inputs


def one_device(schedule):
    parts, inputs = work()
    mine = {i: parts[i] for i in schedule.placement[dist.get_rank()]}
    pipe = Pipeline(schedule, list(mine.values()), F.mse_loss)
    kept = pipe.step(inputs.unbind(), inputs.unbind(), inputs[0]).kept
    return {i: flat_gradient(part) for i, part in mine.items()}, kept


parts, inputs = work()
(sum(F.mse_loss(torch.nn.Sequential(*parts)(x), x) for x in inputs) / 8).backward()
orders = [[Op(o[0], int(o[1:]), i) for o in one_f_one_b(i, 4, 8)] for i in range(4)]
yours = Schedule("yours", 4, 8, tuple(map(tuple, orders)), ((0,), (1,), (2,), (3,)))
for schedule in (yours, dual_pipe(4, 8)):
    for rank, (grads, kept) in enumerate(launch(one_device, 4, schedule)):
        title = f"{schedule.name}, rank {rank}, stages {list(grads)}, kept {kept}"
        check_equal(title, grads, [flat_gradient(part) for part in parts])

# %% [markdown] id="pipe-words"
# Each rank of 1F1B keeps at most as many micro-batches as there are stages behind it, itself included; DualPipe's keep one more than it has stages, and send more: two streams pass, and both copies of each stage add up their gradients in the end.
#
# In the explorer, find a case where ZB1P waits longer than DualPipe, and one in which it waits less.

# %% id="explore-schedule"
explore(
    timelines.timeline,
    schedule=["1f1b", "zb1p", "dualpipe", "gpipe"],
    stages=[2, 4, 8],
    micro_batches=[8, 16, 24],
    t_w=[0.25, 0.5, 1.0],
    pair=[2.0, 2.5, 3.0],
    start={"schedule": "zb1p", "stages": 8, "micro_batches": 16, "t_w": 0.5, "pair": 3.0},
    say=timelines.timeline_in_words,
)

# %% [markdown] id="overlap-text"
# **How much does overlapping buy?** The report puts computation and communication of a layer at about one to one, and spends 20 of the 132 SMs (the units that compute) on moving tokens. Two micro-batches through one layer:

# %% id="overlap"
from dsv3_tutorial.learn.figures import overlap

overlap.dual_micro_batch(sms=20, communication=1.0)

# %% [markdown] id="placement-text"
# Not twice as fast: the SMs that carry messages do not multiply. And where communication is short, overlapping *loses* (exercise 3.8).
#
# ## 6 · What sits where, and the paper's numbers
#
# **Claim check.** *"Tensor parallelism inside the node, data parallelism across: scale up, not out."* A sensible rule for dense models on whole NVLink. V3's training did neither: no tensor parallelism, and its heaviest traffic, the experts', went across eight nodes, because 64 GPUs must hold a layer's experts and a node has 8. What it did is make that traffic fit: half the bytes (FP8), at most four nodes a token, one copy for each, hidden behind arithmetic. NVLink carries 160 GB/s and InfiniBand 50, so while one copy crosses, 3.2
# can be handed on inside (the report's numbers): several experts on a node cost no more than one.
#
# Try it: the same 2,048 GPUs with tensor parallelism (`tp` 8, `dp` 16, `ep` 16); the same layout on H100s; and on racks of 72 (`gb200-nvl72`), where 64 ranks of experts fit in one scale-up domain.

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
# **The paper's numbers.** Three rows of table 3: ways to wire a cluster from switches of 64 ports: V3's *multi-plane* network is eight two-layer trees side by side, one for each card of a node, at a two-layer tree's price per endpoint and eight times its size. Table 4, V3's step on it. And the bound on how fast a token can come out, if each of a layer's experts is on another GPU (section 2.3.2).

# %% id="paper-tables"
network_tables.topologies(["ft2", "mpft", "ft3"])
print()
network_tables.step()
print()
network_tables.decode_limits()

# %% [markdown] id="paper-words"
# All counts come out exactly; two of the costs were fitted, the multi-plane network's was not. Table 4's tokens per day follow from 15,360 sequences of 4,096; its parts add up to 26 ms less than the step; its FLOP/s are the count of lesson 4. The bound's "7K" has to be 7,000: with 7,168 channels and the scales that FP8 carries, 67 tokens a second become 65; at the 40 GB/s that the same paper calls effective elsewhere, 52. No latency is in it: with the 3.33 µs of table 5 for each dispatch
# and combine, NVL72's 1,200 would halve (*Further*).
#
# ## What you can do now
#
# You can say for each split of a model what is sent, when, and over which wire, and show on real processes that nothing but the place of the work has changed. You know why V3 looks as it does: its wire across is a quarter of the one inside, so tokens cross once and are hidden, and what needs the fast wire most, tensor parallelism, is left out.

# %% id="progress"
progress()

# %% [markdown] id="further"
# ## Further
#
# Next on the path is lesson 5, inference. What follows here goes deeper: a real slow wire, five more exercises, what data parallel ranks need not hold, networks larger than V3's, and what the authors ask of the next hardware.
#
# ### A wire that is really slow
#
# The virtual clock is a model. This receipt is not: two "nodes" on one machine, joined by a cable whose rate the kernel limits, with two processes on each. Flat collectives beside hierarchical ones, each beside what the model predicts from messages alone.

# %% id="throttled"
throttled.fit_table()
throttled.throttled()

# %% [markdown] id="throttled-words"
# ### Exercise 3.10 · All-reduce in two levels
#
# *Difficulty 2/5 · worth it 4/5 · 4 minutes · about 1 line*
#
# Nodes of g GPUs want the sum over all GPUs. Three collectives are at hand. `reduce_scatter(t)` works inside the node: it sums its g ranks' `t` (n,) and leaves each rank its own 1 / g of the sum. `all_gather(t)` also works inside, and puts the g parts together again. `all_reduce(t)` sums over the ranks that have the same place in their nodes: this is what crosses. The **budget**: 1 / g of `x` into `all_reduce`,
# and nothing inside that is not needed.


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
# On V3's own nodes of eight, by size of the tensor and by how slow the wire across is:

# %% id="all-reduce-map"
explore(
    network_map.all_reduce_retimed,
    slower_across=[1, 2, 4, 8],
    mb=[0.01, 0.1, 1, 10, 100],
    start={"slower_across": 1, "mb": 10},
    say=network_map.all_reduce_retimed_in_words,
)

# %% [markdown] id="dispatch-map-text"
# And V3's dispatch and combine in one layer, on 64 GPUs, computed from the number of copies that even routing would make:

# %% id="dispatch-map"
network_map.all_to_all_retimed()

# %% [markdown] id="zero-text"
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
# FSDP keeps a quarter, and pays for it: weights travel twice (gathered for the forward and for the backward pass) and gradients once, 1.5 times an all-reduce.
#
# ### Pipelines by hand
#
# ### Exercise 3.7 · How long a stage idles
#
# *Difficulty 4/5 · worth it 4/5 · 14 minutes · about 10 lines*
#
# From the orders of all stages alone, find the seconds that a stage idles in one step: the *bubble*. `orders[stage]` is a list like yours above; an F takes `t_f`, a B `t_b` seconds, messages take none. An operation starts as soon as its stage is free and the same operation has ended on the stage before (F) or after (B), where there is one. The step ends with the last operation of any stage;
# every stage works on all micro-batches, so all idle equally long. For 1F1B you must find (stages - 1)(t_f + t_b); other orders wait longer.


# %% id="bubble" tags=["exercise"]
@exercise("parallel.bubble")
def bubble(orders, t_f, t_b): ...


# %% [markdown] id="bubble-run-text"
# Your bubble of your own order, and what more micro-batches do to its share of the step:

# %% id="bubble-run"
for micro_batches in (4, 8, 32, 128):
    orders = [one_f_one_b(stage, 4, micro_batches) for stage in range(4)]
    idle = bubble(orders, t_f=1, t_b=2)
    print(
        f"{micro_batches:4} micro-batches: idle {idle:g}, {idle / (idle + 3 * micro_batches):.0%} of the step"
    )

# %% [markdown] id="dualpipev-text"
# DualPipe holds every layer twice. *DualPipeV* cuts it in half at the middle: half the devices, each with two different stages, the same bubble, and no copy.

# %% id="dualpipev"
timelines.timeline("dualpipev", stages=8, micro_batches=20)

# %% [markdown] id="overlap-exercise-text"
# ### Overlap
#
# ### Exercise 3.8 · What hiding the messages buys
#
# *Difficulty 2/5 · worth it 4/5 · 4 minutes · about 2 lines*
#
# Two micro-batches each need `compute` seconds of arithmetic (on all SMs) and `communication` seconds of messages. One after the other they alternate: nothing overlaps. Overlapped, one computes while the other communicates, and the longer of the two sets the pace; but `reserved` of the chip's `sms` now carry messages, so that arithmetic has `sms - reserved` left. Return how many times
# faster the overlapped way is. V3 set 20 of the H800's 132 SMs aside, with arithmetic and messages about equally long.


# %% id="overlap-speedup" tags=["exercise"]
@exercise("parallel.overlap_speedup")
def overlap_speedup(compute, communication, sms=132, reserved=20): ...


# %% [markdown] id="overlap-explore-text"
# From how little communication on does overlapping pay, with 20 SMs? And with 60?

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
# ### Exercise 3.9 · Who gets NVLink
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
# | returns | a tuple of all names, innermost first |

# %% id="place-groups" tags=["exercise"]
from itertools import permutations

from dsv3_tutorial.cost.sharding import bytes_across


@exercise("parallel.place_groups")
def place_groups(sizes, traffic, gpus_per_node): ...


# %% [markdown] id="place-run-text"
# V3's groups, with tensor parallelism of 8 if there were any, bytes from section 1:

# %% id="place-run"
sizes, traffic = {"tp": 8, "ep": 16, "pp": 16}, {"tp": 1504e9, "ep": 290e9, "pp": 14e9}
print("innermost first:", place_groups(sizes, traffic, 8))
print("without TP:     ", place_groups({"ep": 64, "pp": 16}, {"ep": 768e9, "pp": 14e9}, 8))

# %% [markdown] id="place-words"
# With tensor parallelism it gets the node. Without, nobody fits in one: the experts' 64 are more than eight, whoever comes first.
#
# ### Larger networks
#
# The paper's table also has two networks of another kind, with fewer switches for as many endpoints: Slim Fly and Dragonfly.

# %% id="all-topologies"
network_tables.topologies()

# %% [markdown] id="topology-words"
# The row for Slim Fly is arithmetic. Its construction is known for prime powers `q`, and the 28 that gives the table's numbers is none: with 27 one gets 30,618 endpoints. Dragonfly's cost by our fit lies 2 % above the printed one.
#
# Now DeepSeek's own library for this traffic, DeepEP. The model knows the bandwidth of 40 GB/s and a latency, and is fitted to none of these rows.

# %% id="deepep"
network_tables.deep_ep()

# %% [markdown] id="deepep-words"
# Within six percent. It fails elsewhere: for eight GPUs of one node over NVLink it is off by up to 42 %, as the kernels' own time decides there and the model knows only wires (`cost/deepep.py` lists all rows).
#
# **What the authors ask for** (section 4.4 and 6): networks inside and across that are one, larger scale-up domains, traffic compressed on its way. As knobs, from today's H800:

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
# What ranks tell each other between backward and the optimizer's step. All ranks hold a copy of the `replicated` weights, each with the gradient from *its own* tokens; the experts are split over the ranks, and the dispatch's backward has already summed an `expert` gradient over *everybody's* tokens. `counts` are this rank's tokens for each of all the experts, `bias` the gate's balance bias, the same on all ranks. The loss is the mean over ranks,
# gradients are clipped to `max_norm` by the norm of the whole model's. `all_reduce` returns the sum over ranks.
#
# The code below runs without an error, and it has three bugs. The verdict counts those that are left, and names the last one.


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
