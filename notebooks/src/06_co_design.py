# %% [markdown] id="title"
# # 6 · Co-design: from a machine to a model, and back
#
# Each lesson so far met one bottleneck and one answer to it. Here you put the answers together. You find out what a training step waits for, plan DeepSeek-V3 on its real machine, take its decisions away one by one, and then design models for machines other than V3's.
#
# After it you can
#
# - take a training step apart, tell work from waiting, and say what a repair can gain before you build it;
# - plan a run from a `config.json` and a number of GPUs: memory, time, MFU, dollars, kWh;
# - say what each of V3's decisions saves, and why that question has two answers;
# - choose a model for a given machine and a given service, and defend it with numbers;
# - tell which of the paper's numbers follow from arithmetic, and which have to be believed.
#
# *75 minutes to `progress()` in a workshop, 100 alone. Run All takes about two minutes. You need lessons 1 and 4; lessons 2, 3 and 5 help.*
#
# **Words.** A **layout** says how a run lies over its GPUs: PP stages of a pipeline, DP replicas, EP GPUs that share a layer's experts. A **GPU-hour** is one GPU for one hour, working or waiting. **MFU** is the share of the GPUs' peak arithmetic that went into the model. `term("layout")` explains a word.
#
# *The report* is the DeepSeek-V3 technical report, *the paper* the authors' ISCA paper of 2025 on its hardware.

# %% id="setup"
from __future__ import annotations

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.designs import BRIEFS
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

v3 = ModelConfig.named("deepseek-v3")

# %% [markdown] id="profile-text"
# ## 1 · Profile first
#
# A faster product makes a step faster only if products are what it spends its time on. So look before you design. Here are three runs of `tiny`, a dense model of four layers, on the same text: A, B and C. Two of them stall, each by a common mistake. Find both in the tables. (The seconds change with whatever else your machine does; look at what is *waited* for.)

# %% id="jobs" tags=["live", "nbval-ignore-output"]
from dsv3_tutorial.bench import stalls_runs

steps = max(2, int(live_seconds() / 6))
healthy = stalls_runs.run(steps=steps)
settings = stalls_runs.jobs(wait=0.7 * healthy.step_ms / 1e3)
jobs = {name: stalls_runs.run(steps=steps, **how) for name, how in settings.items()}
for name, job in jobs.items():
    print(f"job {name}\n{job}\n")

# %% [markdown] id="guess-job-text"
# **Predict.** Which repair gives job B its time back?

# %% id="guess-job"
predict(
    "codesign.job_b",
    ...,
    options=["prefetch", "background checkpoint", "faster products", "none is needed"],
)

# %% [markdown] id="repair-text"
# **Measure.** Job B reads from a store that takes 0.7 of a step to answer, and asks for each batch when it needs it; job A writes a **checkpoint** every second step while training stops. (Both stores are slow by sleeping, B's before its answer, A's for 0.25 s of each save: no network and no busy disk is measured.) The repairs: a thread asks for the next batches while this one is computed, a **prefetch**; and the checkpoint is written behind the next steps, from a copy in memory.

# %% id="repair" tags=["live", "nbval-ignore-output"]
repaired = {
    "A": stalls_runs.run(steps=steps, save_every=2),
    "B": stalls_runs.run(steps=steps, prefetch=2, **settings["B"]),
}
for name, job in repaired.items():
    print(f"job {name}: {jobs[name].stalls}\nnow:   {job.stalls}")
    print("  the same losses:", jobs[name].losses == job.losses)

# %% [markdown] id="stalls-text"
# Not one loss has changed. The same as recorded, with a third stall: text that has to be *unpacked*. That is work, and not waiting.

# %% id="stalls"
from dsv3_tutorial.learn.figures import stalls

reveal("codesign.job_b", "prefetch")
stalls.table()
stalls.timeline("checkpoint")

# %% [markdown] id="stalls-words"
# Waiting for a store or a disk can be hidden behind any work. What *works*, like unpacking, needs a core that is free, as one was here; and where it takes longer than a step, the rest is still waited for. (Job A above still waits: its write takes longer than two steps, so the next save waits for the last one. The recorded run saves every sixth step.)
#
# What goes on behind other work is **hidden**: nobody waits for it, though it may slow the work beside it a little (128 ms in all, where 102 would do). What sticks out is **exposed**. Every plan in this lesson hangs on that difference.
#
# ### Exercise 6.1 · What nothing hides
#
# *Difficulty 3/5 · worth it 5/5 · 8 minutes · about 6 lines*
#
# A trace is a list of **spans**, (start, end) in seconds. Nobody waits for messages that travel while the GPU computes; what a step waits for is the rest. How many seconds of `other` does no span of `work` cover?
# Spans come in any order, and spans of one list may overlap each other: two messages in one second take one second, not two. Either list may be empty. One way: put all starts and ends into one sorted list; between two neighbours in it nothing begins and nothing ends.
#
# | | | |
# |---|---|---|
# | `work` | list of (start, end) | when the GPU computes |
# | `other` | list of (start, end) | when messages, files or anything else are on their way |
# | returns | number | seconds in which some `other` runs and no `work` |


# %% id="exposed" tags=["exercise"]
@exercise("codesign.exposed")
def exposed(work, other): ...


# %% [markdown] id="links-text"
# Use yours on the largest thing that V3 has to hide. In DualPipe a GPU computes one micro-batch's forward and another's backward together, while tokens of both travel to their experts and back. The planner, which you meet in section 3, says how long one layer of such a pair computes. The messages go as a copy for each expert (*flat*), for each GPU (*deduplicated*), or once to each node and then on over NVLink (*two-stage*); with InfiniBand at 40 GB/s, and at half of that.

# %% id="links"
from dsv3_tutorial.cost import comm_moe, stage_step
from dsv3_tutorial.cost.tiers import network
from dsv3_tutorial.learn.figures import step_anatomy

of = step_anatomy.reported()
compute = stage_step.layer_of_a_pair(of.cfg, of.cluster, of.job, of.layout, of.assume)
h800, layer = network("h800"), comm_moe.Layer(node_limit=4, n_group=8)
print(f"a layer of a pair computes for {1e3 * compute:.1f} ms")
for scheme in comm_moe.SCHEMES:
    for slower in (1, 2):
        how = (4096, layer, 64, h800.slower(across=slower), scheme)
        t = 2 * (comm_moe.dispatch_time(*how) + comm_moe.combine_time(*how))
        left = exposed([(0, compute)], [(0, t)])
        print(f"{scheme:13} {40 // slower} GB/s: {1e3 * t:4.1f} ms, {1e3 * left:4.1f} exposed")

# %% [markdown] id="links-words"
# At 40 GB/s a copy for each expert sticks out, a copy for each GPU just fits, and two-stage dispatch leaves nearly half of the time free. At half the bandwidth even two-stage sticks out, as much as flat does at full. A stall need not be a mistake in a script: it may be a message on the wrong link.
#
# Two more mistakes that a profile of one GPU does not show stand in *Further*: the busiest expert's rank, for which all others wait, and a precision that nobody validated.
#
# ## 2 · Put it together
#
# What do V3's decisions buy at a size that you can train? A small model with MLA, experts, FP8 and MTP, against a dense one with full multi-head attention in BF16. Both cost **the same training FLOP a token**, the MTP module included, and both read the same text in the same order: 500 steps of 1,024 tokens, three seeds for each, from receipts. Expect no triumph: lesson 1's toy learnt worse with MLA, and sparse models want more text than this.
#
# **Predict.** Which has the lower loss on held-out text, beyond what three pairs may do by chance?

# %% id="guess-pair"
from dsv3_tutorial.learn.figures import pair

predict("codesign.pair", ..., options=pair.CHOICES)

# %% [markdown] id="pair-text"
# **Measure**, and what each of them holds and takes. (FP8 is emulated here: it rounds as a GPU would, and is slower, not faster.)

# %% id="pair"
reveal("codesign.pair", pair.better())
pair.costs_table()
pair.curves()

# %% [markdown] id="pair-words"
# All three pairs have the whole design *behind*, and three pairs are too few to be sure of it. What is sure is what is counted: a quarter of the cache, 2.6 times the parameters, 0.7 times the activated ones.
#
# Be honest about the toy. Its MTP module takes 22.5 % of its FLOPs, V3's 4 %, and one of the two things that it is for, drafts, is not in this loss. Its experts see half a million tokens, and V3's 15 trillion. FP8 saves no time where it is emulated. The evidence that these decisions work is at other sizes: the V2 report's pairs with 16 and 250 billion parameters, the V3 report's FP8 pairs of 16 and 230 billion. A toy shows *mechanisms and costs*. For the rest you need a plan at the real size.
#
# ## 3 · From a cluster to a plan
#
# V3 has 671 billion parameters, and there were 2,048 H800 with 80 GB each. Does training fit? For each number there are its BF16 weight, a float32 gradient, and what the optimizer keeps: 14 bytes, 9.4 TB in all. The layout decides what one GPU holds.
#
# ### Exercise 6.2 · What a GPU holds from step to step
#
# *Difficulty 3/5 · worth it 5/5 · 7 minutes · about 4 lines*
#
# A model has `dense` parameters that every token meets and `routed` parameters in its experts. The layers are cut into `pp` equal stages. `dp` GPUs hold the same stage: all of them hold its dense numbers, and each group of `ep` shares its experts out, so that the same experts lie on `dp // ep` GPUs.
# A GPU holds weights (BF16, 2 bytes a number) and gradients (float32, 4 bytes) of its stage. With `copies = 2`, as in DualPipe, it holds those of two stages, and each stage lies on twice as many GPUs. **ZeRO-1** deals the optimizer out (a float32 copy and two BF16 moments, 8 bytes a number) over all GPUs that hold the same numbers. How many bytes are on one GPU?
#
# | | | |
# |---|---|---|
# | `dense`, `routed` | numbers | of the whole model |
# | `pp`, `ep`, `dp` | numbers | `ep` divides `dp` |
# | `copies` | 1 or 2 | stages that a GPU holds |
# | returns | bytes | weights, gradients and its share of the optimizer |


# %% id="state-bytes" tags=["exercise"]
@exercise("codesign.state_bytes")
def state_bytes(dense, routed, pp, ep, dp, copies=1): ...


# %% [markdown] id="state-text"
# Yours, for V3 in its own layout (first line) and in four others. Of an H800's 80 GB the planner takes 72 as usable, and activations come on top. Which of the lines fit?

# %% id="state"
from dsv3_tutorial.cost import params

counted = params.count(v3)
routed = counted.by_part["routed_experts"]
dense = counted.total - routed
print(f"{routed / counted.total:.1%} of the parameters are routed experts")
layouts = ((16, 64, 128, 2), (16, 64, 128, 1), (16, 8, 128, 2), (32, 1, 64, 1), (1, 256, 2048, 1))
for pp, ep, dp, copies in layouts:
    size = state_bytes(dense, routed, pp, ep, dp, copies) / 1e9
    print(f"pp {pp:2}, ep {ep:3}, dp {dp:4}, stages a GPU {copies}: {size:6.1f} GB")

# %% [markdown] id="state-words"
# Nearly all of V3 are routed experts, and 64 GPUs share those. With eight, all that a GPU holds is 77 GB, more than the 72, before any activation. DualPipe's second stage costs 10 GB. Neither 32 stages alone nor 256 GPUs to the experts alone would do.
#
# What is missing is time. The **planner** counts a step's work in a layout (products, attention, the *memory traffic* of norms and quantisation, messages, the pipeline's waits) and divides by rates. None of them is fitted to V3's run. They are published rates of single kernels: DeepGEMM's products, attention on an H100, and DeepSeek's own 160 and 40 GB/s for the links.
#
# **Predict.** V3's step took 19.926 s (the paper's table 4). By how many percent does such a plan miss it? Negative is too fast.

# %% id="guess-step"
predict("codesign.step_off", ..., unit="%")

# %% [markdown] id="step-text"
# **Measure**, beside the paper's own parts.

# %% id="step"
from dsv3_tutorial.cost import step_time
from dsv3_tutorial.cost.layout import Job, Layout
from dsv3_tutorial.cost.plan import plan
from dsv3_tutorial.learn.figures import step_anatomy

cluster = hardware.cluster("h800:2048")
as_trained = plan(v3, cluster, Job(), Layout.read("deepseek-v3"))
measured = step_time.printed("step")
reveal("codesign.step_off", 100 * (as_trained.step_time_s / measured - 1))
step_anatomy.validation_table()
step_anatomy.predicted_step(as_trained)

# %% [markdown] id="step-words"
# Too fast by 15 %, and three quarters of that lie in the overlapped pairs. A third of the miss is DeepGEMM, which came after V3 was trained. And one thing comes out that lesson 3 could not explain: of a bubble of 2.06 s the formula gives 0.9; with 0.9 of *uneven stages* it is 1.8. 61 layers, the MTP module and two heads do not divide among 16 stages.
#
# The table has the other published runs. A real step has more than its kernels: launches, clocks that fall, two micro-batches that fight for one memory (guesses; *Further* lists what the planner does not know). Do at least *differences* hold? The one published pair warns: V2 against DeepSeek 67B saved 42 % and is planned to save 58 %. So trust the large bars of section 4, and neither the size nor the order of the small ones.
#
# ### Exercise 6.3 · What a run costs
#
# *Difficulty 1/5 · worth it 5/5 · 4 minutes · about 3 lines*
#
# From the time of one step to a bill. V3's number is "2,664K H800 GPU hours" for 14.8 T tokens; yours is next. Leave the number of steps as the fraction that it is.
#
# | | | |
# |---|---|---|
# | `tokens`, `tokens_per_step` | numbers | of the run, and of one step of all GPUs together |
# | `step_s` | seconds | of one step |
# | `gpus` | number | |
# | `rent`, `watts` | dollars an hour, watts | of one GPU |
# | returns | three numbers | GPU hours, dollars, kWh |


# %% id="run-cost" tags=["exercise"]
@exercise("codesign.run_cost")
def run_cost(tokens, tokens_per_step, step_s, gpus, rent, watts): ...


# %% [markdown] id="cost-text"
# Yours, for 14.8 trillion tokens: with the planned step, and with the step that the paper measured.

# %% id="cost"
power = cluster.chip.power_w
for name, seconds in {"planned": as_trained.step_time_s, "measured": measured}.items():
    hours, dollars, kwh = run_cost(14.8e12, 15360 * 4096, seconds, 2048, 2.0, power)
    print(
        f"{name:8} {hours / 1e3:6,.0f} thousand GPU-hours, ${dollars / 1e6:.3f} M, {kwh / 1e6:.2f} GWh"
    )

# %% [markdown] id="cost-words"
# The report prints 2,664 thousand GPU-hours and 5.328 million dollars for pre-training, 5.576 million in all. **Claim check.** *"V3 cost 5.6 million dollars."* It is the final run's hours times an assumed rent of two dollars. Research, failed runs, data, staff and the machines themselves are not in it, and the report says so. (The energy is the GPUs' rated power alone.)
#
# ## 4 · Unbuild V3
#
# Seven decisions made V3 what it is: MLA, FP8, routing limited to four nodes, dispatch that crosses once to each node (*dedup*; section 1's two-stage), DualPipe, MTP, and balance by a bias. What is each worth? Give it up, let the planner find the best layout for what is left, and compare.
#
# ### Exercise 6.4 · Worth what, and in which order?
#
# *Difficulty 2/5 · worth it 5/5 · 6 minutes · about 5 lines*
#
# `price(kept)` plans a model that has kept only some of its decisions, and returns what it costs; `kept` is a `frozenset` of their names. What is one decision worth? There are two honest answers:
# - **removal**: how much dearer the model becomes if it alone is given up;
# - **addition**: how much cheaper a model *without any* becomes if it alone is made.
#
# A decision that saves money has positive numbers. `price` remembers what it was asked, so ask as often as you like.
#
# | | | |
# |---|---|---|
# | `price` | function | of a frozenset of names, to a number |
# | `decisions` | names | all there are |
# | returns | dict | name to (removal, addition) |


# %% id="both-orders" tags=["exercise"]
@exercise("codesign.both_orders")
def both_orders(price, decisions): ...


# %% [markdown] id="guess-unbuild-text"
# What stands in a decision's place matters. Here: plain multi-head attention over 128 heads; BF16; experts on any node; a copy for each expert; 1F1B or ZB1P without overlap (`term("ZB1P")`); no MTP module; and the unevenness that a balance loss left in published models of 1 B parameters.
#
# **Predict.** Which one, given up alone, costs V3's training most GPU-hours?

# %% id="guess-unbuild"
predict(
    "codesign.largest",
    ...,
    options=["mla", "fp8", "node-limit", "dedup", "dualpipe", "mtp", "bias"],
)

# %% [markdown] id="worth-text"
# **Measure**, with your function. `price` asks the planner for the training of V3 with only the decisions that are kept, in thousand GPU-hours (a thousand are 2,000 dollars and 700 kWh), in layouts without tensor parallelism, as V3 was trained. The picture shows the same, and what each decision adds in *serving*: tokens a second for each GPU, decoding at 4,989 tokens of context, 20 a second or more for each user.

# %% id="worth"
from dsv3_tutorial.cost.decisions import DECISIONS
from dsv3_tutorial.learn.figures import unbuild, unbuild_tables

worth = both_orders(unbuild_tables.price, DECISIONS)
reveal("codesign.largest", max(worth, key=lambda name: worth[name][0]))
real = run_cost(14.8e12, 15360 * 4096, measured, 2048, 2.0, power)[0] / 1e3
print(
    f"thousand GPU-hours: measured {real:,.0f}, planned {as_trained.gpu_hours / 1e3:,.0f}", end=", "
)
print(f"in the fastest layout without TP {unbuild_tables.price(DECISIONS):,.0f}")
for name, (removal, addition) in worth.items():
    print(f"{name:11} given up alone {removal:+6.0f}, made alone {addition:+6.0f}")
unbuild.tornado()

# %% [markdown] id="tornado-words"
# Read it from the top. FP8 saves most, and not by its products alone: in BF16 the activations leave so little room that everything has to be computed again (*Further*: with TP it would save less than half as much). MLA is second, since 128 full heads have 17 billion parameters more. MTP *costs* hours. The node limit needs dedup to save anything. Made alone in the bare model, most save more hours: there is more to save.
#
# In serving the bars are bounds (4,770 tokens/s here; DeepSeek's service had 14,800 on eight GPUs), and memory ends every batch. That is why MTP adds little: its gift is a single user's speed.
#
# **Claim check.** An article that this course answers to says: *start with memory compression, then compute, then parallelism.* Three groups of decisions, in all orders; then once more with GQA of 8 groups where MLA is not, as others would build it.

# %% id="orders"
unbuild_tables.groups()
unbuild_tables.orders()
unbuild_tables.orders(kv_heads=8)

# %% [markdown] id="orders-words"
# For training compute comes first, by far. MLA as a first step saves about as much as parallelism against full heads, and next to nothing against GQA. For serving memory comes first: with 128 full heads hardly a token is served without MLA; against GQA, MLA first serves a third more than FP8 first. An order without a goal is no advice.
#
# Now plan one yourself. The layout is searched anew at each move, TP included. Three tasks, each from the start values:
#
# 1. Which is the smallest number of H800 here on which V3 can be trained at all? And without FP8?
# 2. More GPUs make training shorter. Do they make it cheaper? Go up to 8,192.
# 3. On which of these chips does giving up FP8 cost nothing, and why?

# %% id="planner"
from dsv3_tutorial.learn.figures import planner

explore(planner.planner, **planner.GRID, start=planner.START, say=planner.planner_in_words)

# %% [markdown] id="design-text"
# ## 5 · The design game
#
# Now the machine is given, and you choose the model.
#
# ### Exercise 6.5 · A model for a lab
#
# *Difficulty 3/5 · worth it 5/5 · 8 minutes · about 8 lines*
#
# Your lab has eight H100s for two weeks, and afterwards one of them for its users. Choose the model (`print(BRIEFS["lab"])` repeats the demands):
#
# | | |
# |---|---|
# | model | 10 B parameters or more, 1.2 B or more of them activated by a token |
# | training | 300 B tokens or more, within 14 days on eight H100s |
# | service | 48 users at once on **one** H100, each with 32,768 tokens of context and 40 tokens/s |
#
# Return a dict of fields with Hugging Face's names, and `"tokens"`. The planner trains it on the fastest layout it finds and serves it; the verdict lists all that is missed. Many designs pass. What a model would *learn* is not priced: floors stand in for it, and the shape must keep near published ones:
# - `hidden_size` at most 160 times the number of layers; all heads' queries together (128 a head, 192 with MLA) at least `hidden_size` / 2 wide; `q_lora_rank`, if given, at least `hidden_size` / 8; the feed-forward that a token meets at most 8 x `hidden_size`;
# - without a latent, 8 `num_key_value_heads` or more; in each layer a token caches at least `hidden_size` / 16 numbers;
# - experts at least `hidden_size` / 8 wide; 2 routed ones a token or more, and no more shared than routed ones; at most layers / 10 + 3 dense layers before them.
#
# Served, a weight takes 1 byte (FP8) and a cached number 2, in 72 of 80 GB. A layer caches `kv_lora_rank` + 64 numbers a token, or 256 for each of `num_key_value_heads`.
#
# | field | |
# |---|---|
# | `hidden_size`, `num_hidden_layers`, `num_attention_heads` | always; a head is 128 wide |
# | `kv_lora_rank` | MLA; leave it out for plain attention with `num_key_value_heads` |
# | `n_routed_experts`, `num_experts_per_tok`, `moe_intermediate_size` | leave them out for a dense model with `intermediate_size` |
# | `intermediate_size` | beside experts that of the dense layers; left out, as wide as all experts that a token meets |
# | `n_shared_experts`, `first_k_dense_replace`, `num_nextn_predict_layers`, `q_lora_rank` | 1, 1, 0 and none unless you say so |
# | `tokens` | to train on |


# %% id="lab-design" tags=["exercise"]
@exercise("codesign.lab_design")
def lab_design(): ...


# %% [markdown] id="cluster-text"
# Two limits, two numbers: training time goes with tokens times activated parameters, users with the bytes of a cache. Parameters that rest are nearly free, until memory is full.
#
# ### Exercise 6.6 · A model for bandwidth-rich chips
#
# *Difficulty 4/5 · worth it 5/5 · 7 minutes · about 8 lines*
#
# The same game on 512 H20. Such a chip reads *faster* than an H100 (4.0 against 3.35 TB/s), has more memory (96 against 80 GB), and a seventh of its arithmetic: 148 TFLOP/s in BF16, 296 in FP8. `print(BRIEFS["h20"])` repeats the demands:
#
# | | |
# |---|---|
# | model | 120 B parameters or more, 10 B or more of them activated |
# | training | 1.8 T tokens or more, within 40 days and 560,000 dollars, at an assumed 1.20 a GPU hour |
# | service | 240 users at once on **eight** H20, each with 32,768 tokens of context and 30 tokens/s |
#
# Fields, shapes and bytes are those of 6.5, with 86.4 of 96 GB to use. Users and experts are shared out over the eight, so the experts must divide by 8; all else lies on each of them. A cache is computed on in BF16.
#
# V3's own attention fails here, and not for lack of memory. Why? (Lesson 1 found that its decode stands at 242 FLOP for each byte of cache.) A step may last 1/30 s: reading *and* arithmetic must each be done in it.


# %% id="cluster-design" tags=["exercise"]
@exercise("codesign.cluster_design")
def cluster_design(): ...


# %% [markdown] id="cluster-run-text"
# Your two designs, demand by demand. Then the worked answer of the second game with more and fewer heads on its latent: the users that eight H20 and eight H800 serve. (*Further* has both worked answers.)

# %% id="cluster-run"
from dsv3_tutorial.learn.figures import design

design.judged(lab_design(), BRIEFS["lab"])
design.judged(cluster_design(), BRIEFS["h20"])
design.heads_table()

# %% [markdown] id="design-words"
# On an H20 arithmetic ends the batch of V3's 128 heads, and on an H800 memory does. A latent is read once for all heads, so more heads mean more arithmetic for each byte, and an H800 does 295 FLOP while it reads a byte, an H20 37. (*memory* is its size: a full one, 86 GB, is read in 22 of a user's 33 ms, which leaves some room for arithmetic.) That is co-design in one number.
#
# ## 6 · The paper, whole
#
# The 487 printed numbers that the course uses lie in `data/paper`. Each is computed again from our code, or marked as one that has to be believed, with the reason.
#
# **Predict.** In which of these groups do most of ours come out *differently*, by more than a tenth, or at all where a count has to be exact?

# %% id="guess-paper"
predict(
    "codesign.differ",
    ...,
    options=["DeepEP's kernels", "networks (ISCA table 3)", "sizes of models", "FP8"],
)

# %% [markdown] id="paper-text"
# **Measure.**

# %% id="paper"
from dsv3_tutorial.learn.figures import paper_whole

reveal("codesign.differ", paper_whole.most_different())
paper_whole.counts()
paper_whole.believed()
paper_whole.differences()

# %% [markdown] id="surprises-text"
# Nine in ten of those that can be computed stand, and most of what differs is *our* models' miss: of messages between few GPUs, which counts links and not what a kernel costs. What teaches more are the places where printed numbers disagree with each other, or with a count:

# %% id="surprises"
paper_whole.surprises()

# %% [markdown] id="future-text"
# None overturns a design decision. One changes a headline: the paper says *an order of magnitude* less arithmetic for a token, and it is a factor of 1.8 against 72 billion dense parameters, 9.9 only against 405 billion. [docs/paper.md](../docs/paper.md) has every number.
#
# ## 7 · What hardware should come next
#
# The authors end with wishes. Each that we could give a size is a knob of the planner, such as
#
# - *more accurate sums in FP8*: a wider accumulator, so that no sums move to other registers;
# - *fused quantisation*: the tensor core casts and scales, and nothing is read or written for it;
# - *communication off the SMs*: a part of the chip that only sends, instead of 20 of the 132 SMs;
# - *one network*: 160 GB/s to every GPU, not only to those in the node;
# - *in-network multicast and reduce*: switches that copy on the way out and add on the way back;
# - *stacked memory*: twice the bandwidth.
#
# **Predict.** Which one shortens V3's *training* step most?

# %% id="guess-future"
predict(
    "codesign.knob",
    ...,
    options=[
        "more accurate sums in FP8",
        "fused quantisation",
        "communication off the SMs",
        "one network",
        "in-network multicast and reduce",
        "stacked memory",
    ],
)

# %% [markdown] id="knobs-text"
# **Measure**: training, serving, and the time that a token's messages take.

# %% id="knobs"
from dsv3_tutorial.learn.figures import next_hardware

reveal("codesign.knob", next_hardware.best())
next_hardware.knobs()

# %% [markdown] id="what-if-text"
# Training gains most if messages leave the SMs. (The planner takes all that runs beside them to be slower by the 20 SMs' share.) All that the network could do better gives training 9 % at most, since DualPipe hides most messages; it gives serving half as much again, and a token's messages up to three times the speed. In serving memory ends the batch before more network helps, so four knobs buy exactly the same. (Switches that only copied would shorten dispatch alone, and the combine that travels at the same time would still set the pace.)
#
# Build your own machine: V3's training step in the report's layout, and its service. Three tasks, from today's H800:
#
# 1. Which single change speeds up training and leaves serving as it was? Which the other way round?
# 2. Halve the training step with two changes.
# 3. Eight times the arithmetic and half the scale-out: a faster machine for V3, or a slower one?

# %% id="what-if"
explore(
    next_hardware.what_if,
    **next_hardware.GRID,
    start=next_hardware.START,
    say=next_hardware.what_if_in_words,
)

# %% [markdown] id="end-text"
# What a machine lacks, its model is built around. V3 has a latent, because caches fill memory; FP8, because products are the largest part of a step; a copy for each node and two streams through the pipeline, because its links are a quarter as fast as those inside a node. On other chips other answers win, as your second design showed.
#
# Most printed numbers that can be computed stand, with some footnotes. You know how to compute them, and which you have to believe.

# %% id="progress"
progress()

# %% [markdown] id="further"
# ## Further
#
# This is the end of the path. What follows goes further: five more exercises, the stalls that one GPU does not show, the planner's assumptions and errors, and the models after V3.
#
# ### Inside the step
#
# The operators of one healthy step, by time. (`train.trace.write_trace` writes all spans of a run for Perfetto, and `train --profile` does it for your own runs.)

# %% id="anatomy" tags=["live", "nbval-ignore-output"]
from dsv3_tutorial.train.trace import operators

state = stalls_runs.begin()
stalls_runs.step(state)
for op in operators(lambda: stalls_runs.step(state), top=6):
    print(f"{op.name:56} {op.calls:5} calls {1e3 * op.seconds:7.1f} ms")

# %% [markdown] id="two-stalls-text"
# Products (`mm`) are the largest part. A model this small spends much of a step on many small operators.
#
# ### Two stalls that a profile of one GPU does not show
#
# Routed tokens do not spread evenly. Eight ranks with four experts each, a toy gate with three degrees of preference: what the busiest rank does over the mean, counted in tokens and measured in seconds.

# %% id="experts"
stalls.experts_table()

# %% [markdown] id="validate-text"
# All others wait for the busiest rank. Copies of busy experts on idle ranks repair that (lesson 4), and a bias keeps it from arising.
#
# The other is slower to show: a precision that nobody validated. Recorded losses of three runs (lesson 2): BF16, FP8 with its tiles, and FP8 with one scale for all gradients.

# %% id="validate"
from dsv3_tutorial import receipts

for row in receipts.latest("precision", seed=0, length=500):
    if row.shapes["variant"] in ("bf16", "fp8", "fp8, one loss scale"):
        curve = dict(zip(row.shapes["steps"], row.shapes["loss"]))
        print(
            f"{row.shapes['variant']:20} {curve[50]:.2f} after 50 steps, {curve[500]:.2f} after 500"
        )

# %% [markdown] id="ladder-text"
# At step 50 the third looks as good as the others. Whoever validates for 50 steps ships it.
#
# ### The small pair, rung by rung
#
# Between the two ends of section 2, each decision added to those before it (one seed for those between, so differences below three percent say nothing), and the baseline at other learning rates: neither is better.

# %% id="ladder"
pair.ladder_table()
pair.learning_rates()

# %% [markdown] id="pair-live-text"
# Both ends side by side on this machine, with a seed that is in no receipt. A minute buys some forty of the 500 steps: enough to see that both learn, and not who learns better. (`+ MTP` is the whole design.)

# %% id="pair-live" tags=["live", "nbval-ignore-output"]
from dsv3_tutorial.bench import codesign

for step, losses in codesign.live(seconds=live_seconds()):
    if step % 5 == 1:
        print(f"step {step:3}:", ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))

# %% [markdown] id="further-stages-text"
# ### Stages that are not equal
#
# ### Exercise 6.7 · The slowest stage
#
# *Difficulty 4/5 · worth it 3/5 · 10 minutes · about 8 lines*
#
# A pipeline runs at the pace of its slowest stage, and its parts do not take the same time: behind V3's layers stand two heads of 129,280 rows. Cut the layers, in their order, into `stages` stages of neighbours, so that the slowest one is as fast as can be. How long does it take?
# Closing a stage whenever it reaches the mean is *not* best: an early cut can spoil a later one. 62 layers and 16 stages must take well under a second: do not try all cuts.
#
# | | | |
# |---|---|---|
# | `costs` | list of numbers | seconds of each layer |
# | `stages` | number | not more than layers |
# | returns | number | the smallest possible largest sum |


# %% id="slowest-stage" tags=["exercise"]
@exercise("codesign.slowest_stage")
def slowest_stage(costs, stages): ...


# %% [markdown] id="stages-text"
# Yours, on V3: 61 layers and the MTP module at 1 each (V3's dense layers are as much arithmetic as its experts), and two output heads at 1.6 each, on 16 stages.

# %% id="stages"
costs = [1.0] * 62 + [1.6] * 2
pace = slowest_stage(costs, 16)
print(
    f"the slowest stage {pace:.1f}, an even share {sum(costs) / 16:.2f}: {pace / (sum(costs) / 16) - 1:.0%} slower"
)

# %% [markdown] id="mfu-text"
# That is one more reason for DualPipe, where a GPU holds a stage from each end: what one lacks the other has. The planner's step has these waits as *uneven stages*.
#
# ### MFU, and which
#
# ### Exercise 6.8 · MFU
#
# *Difficulty 1/5 · worth it 4/5 · 3 minutes · about 1 line*
#
# **Model FLOP utilisation** is the share of what the GPUs could do at their peak that went into the model: only FLOP that the model needs count, none that were done twice to save memory.
#
# | | | |
# |---|---|---|
# | `tokens_per_second` | number | of the whole run |
# | `flops_per_token` | FLOP | forward and backward |
# | `gpus`, `peak` | number, FLOP/s | `peak` is one GPU's |
# | returns | number | a share, not percent |


# %% id="mfu" tags=["exercise"]
@exercise("codesign.mfu")
def mfu(tokens_per_second, flops_per_token, gpus, peak): ...


# %% [markdown] id="mfu-run-text"
# Yours on table 4: attention counted by half its square or by all of it, and the peak of BF16 or of FP8, in which most products ran.

# %% id="mfu-run"
from dsv3_tutorial.cost import flops

rate = 272.8e9 / 86400
for fmt in ("bf16", "fp8"):
    for causal in (True, False):
        each = flops.training_flops_per_token(v3, causal=causal)
        share = mfu(rate, each, 2048, cluster.chip.rate(fmt))
        print(f"{fmt} peak, {'causal' if causal else 'whole square':12} {share:6.1%}")

# %% [markdown] id="gain-text"
# Four answers from 19.5 to 43.8 %, all of the same run. Say which.
#
# ### A faster network
#
# ### Exercise 6.9 · What a faster network buys
#
# *Difficulty 2/5 · worth it 4/5 · 6 minutes · about 4 lines*
#
# A step needs `compute` seconds of arithmetic and `network` seconds of messages. The share `overlapped` of the messages may travel while something is computed, and does, as long as there is arithmetic to hide it behind; the rest travels alone, and the step waits for it. How many times as fast does the step become when the network is `factor` times as fast?
#
# | | | |
# |---|---|---|
# | `compute`, `network` | seconds | of a step |
# | `overlapped` | 0 to 1 | share of the network's time |
# | `factor` | number | 2: twice as fast |
# | returns | number | old time over new time |


# %% id="gain" tags=["exercise"]
@exercise("codesign.gain")
def gain(compute, network, overlapped, factor): ...


# %% [markdown] id="gain-run-text"
# Yours on a step of 12 s of arithmetic and 9 s of messages: what a network twice and ten times as fast buys, for three kinds of overlap.

# %% id="gain-run"
for overlapped in (0.0, 0.5, 1.0):
    twice, ten = (gain(12, 9, overlapped, factor) for factor in (2, 10))
    print(f"{overlapped:4.0%} overlapped: twice as fast {twice:.2f}x, ten times {ten:.2f}x")

# %% [markdown] id="fit-text"
# Once messages are hidden a faster network buys nothing. This is how V3's co-design makes the H800's slow links hurt so little.
#
# ### Where a rate comes from
#
# ### Exercise 6.10 · An efficiency from measured times
#
# *Difficulty 2/5 · worth it 3/5 · 6 minutes · about 2 lines*
#
# Somebody timed matrix products of several sizes. One efficiency is to explain them all: `seconds = flops / (efficiency * peak)`. Find it by least squares *in the seconds*, on a line through zero. (The mean of the single efficiencies would let the shortest product speak as loudly as the longest.)
#
# | | | |
# |---|---|---|
# | `flops`, `seconds` | lists of numbers | of each measurement |
# | `peak` | FLOP/s | |
# | returns | number | the share of `peak` |


# %% id="fit-efficiency" tags=["exercise"]
@exercise("codesign.fit_efficiency")
def fit_efficiency(flops, seconds, peak): ...


# %% [markdown] id="fit-run-text"
# Yours on the eight products of one MoE layer of V3, as DeepGEMM's repository published them for an H800 (forward shapes).

# %% id="fit-run"
from dsv3_tutorial import paper
from dsv3_tutorial.cost import calibration

work = calibration.layer_flops(v3)
times = [flop / paper.row(f"kernels.fp8.{name}").value / 1e12 for name, flop in work.items()]
print(f"one efficiency for all: {fit_efficiency([*work.values()], times, 1978.9e12):.3f}")
print(f"forward and backward together, as the planner has it: {calibration.fp8_products():.3f}")

# %% [markdown] id="validation-text"
# ### What the planner does not know
#
# Section 3 showed by how much it is off. All its predictions are too fast: most of what a model of peaks and bytes leaves out slows a step.

# %% id="unknown"
import textwrap

from dsv3_tutorial.cost import validation

with_it, without = (each().step_time_s for each in (validation.deepseek_v3, validation.without_mtp))
print(f"the MTP module takes {1 - without / with_it:.1%} of V3's planned step\n")
for sentence in validation.UNKNOWN:
    print(textwrap.fill(sentence, 96, initial_indent="- ", subsequent_indent="  "))

# %% [markdown] id="factors-text"
# ### Unbuilt, as factors
#
# Section 4's bars as hours and as factors: how many times as many hours without the decision. As factors the two orders lie closer together: much of what looks like interaction is that the bare model takes 2.4 times the hours.

# %% id="factors"
unbuild.table()

# %% [markdown] id="rests-text"
# What the bars rest on: the same removals with the FP8 kernels of V3's time, and with tensor parallelism allowed.

# %% id="rests"
unbuild_tables.rests_on()
unbuild_tables.against_gqa()

# %% [markdown] id="rests-words"
# With both, FP8 and MLA are level. FP8's large bar is memory: tensor parallelism halves a GPU's activations, and then BF16 need not compute everything again (last column). And MLA's bar is MHA's price: against GQA with 8 groups it buys serving, not training.
#
# ### The worked designs

# %% id="worked"
design.compare()

# %% [markdown] id="furthest-text"
# ### Where ours miss by most
#
# Of the 26 numbers that differ, those furthest off, with the reason for each.

# %% id="furthest"
paper_whole.furthest()

# %% [markdown] id="wishes-text"
# ### The wishes, one by one
#
# Each knob of section 7 with its assumption, and the wishes that no number here can price.

# %% id="wishes"
next_hardware.knobs_table()

# %% [markdown] id="after-text"
# ### After V3
#
# What later models changed, and what that changes in our numbers.

# %% id="after"
next_hardware.models_after()

# %% [markdown] id="bug-text"
# Each is the next move in the same game: scales that hardware multiplies by itself, attention that reads only what it needs, more experts and fewer heads.
#
# ### Find the bugs
#
# ### Exercise 6.11 · Find the bugs
#
# *Difficulty 3/5 · worth it 4/5 · 8 minutes · about 3 lines*
#
# An estimate of a training step, as it is found in many a spreadsheet. It runs, and it is wrong in **three** places, each of them a mistake that people make. Messages do travel beside the arithmetic, so the longer of the two is right, and 6 FLOP for each parameter and token are right.
#
# | | | |
# |---|---|---|
# | `total`, `activated` | numbers | the model's parameters, and those that one token meets |
# | `tokens` | number | of a step |
# | `gpus`, `peak` | number, FLOP/s | `peak`: what one GPU reaches |
# | `sent` | bytes | that one GPU sends in a step |
# | `link` | gigabits a second | of one GPU's network card |
# | `stages`, `micro_batches` | numbers | of a 1F1B pipeline |
# | returns | seconds | of a step, bubble included |


# %% id="find-the-bug" tags=["exercise"]
@exercise("codesign.find_the_bug")
def step_seconds(total, activated, tokens, gpus, peak, sent, link, stages, micro_batches):
    compute = 6 * total * tokens / (gpus * peak)
    network = sent / (link * 1e9)
    busy = max(compute, network)
    bubble = busy * (stages - 1) / (micro_batches + stages - 1)
    return busy + bubble


# %% [markdown] id="last-text"
# The same planner runs from a terminal, for any `config.json`, any cluster and any layout:
#
# `python -m dsv3_tutorial plan deepseek-v3 --cluster h800:2048 --tokens 14.8T --without fp8`
