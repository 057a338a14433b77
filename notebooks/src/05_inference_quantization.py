# %% [markdown] id="title"
# # 5 · Inference: the price of a token
#
# DeepSeek-V3 computes with 37 billion of its parameters for a token, and reading them takes a GPU far longer than multiplying by them. In this lesson you serve a model that was really trained. You find out what its tokens wait for, take that away piece by piece, and measure each time what it costs in quality.
#
# After it you can
#
# - write the bill of one token, from a `config.json`, to the byte, and name its largest line;
# - quantise weights and the latent cache, and say what each saves, where it slows a model down, and what it does to the text;
# - draft tokens with V3's MTP module and verify them, so that the output stays what it was;
# - say from a machine's bandwidth and a batch which of these pays, and which cannot.
#
# *75 minutes to `progress()` in a workshop, 90 alone. Run All takes about two minutes. You need lesson 1; lessons 4, 2 and 3 help.*
#
# **Words.** A model reads a prompt in **prefill**, all tokens at once, and then writes in **decode**, one token a step. The **batch** is how many conversations take that step together. `term("decode")` explains a word, and most of those in bold.
#
# *The report* is the DeepSeek-V3 technical report, *the paper* the authors' ISCA paper of 2025 on its hardware.

# %% id="setup"
from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.files import data_path

# %% [markdown] id="model-text"
# ## 1 · The bottleneck: one token's bill
#
# This is the model that you serve: DeepSeek-V3's architecture with 12 layers, 11 of them with 16 experts, 4 for each token, and an MTP module. It was trained for 76 minutes on the sources of Python's library. It writes Python, of a kind.
# %% id="model"
from dsv3_tutorial.inference.generate import generate
from dsv3_tutorial.inference.text import Vocabulary
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
from dsv3_tutorial.learn.figures import bill, contexts, quality, ridge, service_roofline
from dsv3_tutorial.model import DeepSeekV3

folder = data_path("checkpoints", "small")
model = DeepSeekV3.from_pretrained(folder, dtype=torch.float32).eval()
text = Vocabulary(folder, model.cfg.vocab_size)
prompt = text.encode("def read(self, size=None):\n")
print(text.decode(prompt + generate(model, [prompt], max_new_tokens=60).sequences[0]))

# %% [markdown] id="ledger-text"
# What does one step of decoding do? A **ledger** stands between PyTorch and its operators. It writes down the arithmetic of each matrix product, and each byte of weights and cache the first time that it is read. Beside it the cost model's count, from the config alone. (`tiny` is a dense model of four layers, in float32, with 128 tokens in its cache.)

# %% id="ledger"
from dsv3_tutorial.cost.bill import decode_bill
from dsv3_tutorial.inference import ledger

tiny = DeepSeekV3(ModelConfig.named("tiny"))
counted = ledger.decode(tiny, context=128).lines
formula = decode_bill(tiny.cfg, context=128, weights="float32", cache="float32")
print(f"{'':18}{'ledger: FLOP':>16}{'bytes':>12}{'formula: FLOP':>16}{'bytes':>12}")
for one, other in zip(counted, formula):
    print(f"{one.part:18}{one.flops:16,}{one.bytes:12,}{other.flops:16,}{other.bytes:12,}")

# %% [markdown] id="guess-line-text"
# The ledger needs no numbers, only shapes. So the same code can run V3 itself on PyTorch's *meta* device, where a tensor has a shape and no memory (*Further* does it: again formula and ledger agree). We ask the formula for one token of one conversation, 32,768 tokens into it, with weights in FP8 and the cache in BF16.
#
# **Predict.** Which line of the bill has the most bytes?

# %% id="guess-line"
predict(
    "inference.largest_line",
    ...,
    options=["attention weights", "routed experts", "latent cache", "output head"],
)

# %% [markdown] id="receipt-text"
# **Measure.** (FLOP/B is how many operations each byte is read for.)

# %% id="receipt"
reveal("inference.largest_line", bill.largest(batch=1))
bill.receipt(batch=1)

# %% [markdown] id="receipt-words"
# Half of the 40 GB are experts: 8 of 256 in each of 58 layers. The cache, which lesson 1 made small, is 6 % of the bytes and 88 % of the arithmetic: 242 operations a byte, where every other line has 2 at most. An H800 has time for 295 in BF16 while it reads a byte. So for one conversation everything waits for memory, and bytes are what this lesson saves.
#
# A batch shares the weights that it reads. In a dense model 32 conversations read what one reads. Experts are another matter.
#
# ### Exercise 5.1 · How many experts a batch reads
#
# *Difficulty 2/5 · worth it 5/5 · 4 minutes · about 1 line*
#
# In a layer each token chooses `top_k` different experts out of `n_experts`. An expert that several tokens chose is read from memory once. How many experts does a batch of `tokens` read on average, if all choices are equally likely and tokens choose independently?
# Ask for one expert how likely it is that *nobody* chooses it. (A trained gate has favourites, so real counts are lower.)
#
# | | | |
# |---|---|---|
# | `n_experts`, `top_k` | numbers | V3: 256 and 8 |
# | `tokens` | number | 0 or more |
# | returns | number | a mean: do not round |


# %% id="experts-touched" tags=["exercise"]
@exercise("inference.experts_touched")
def experts_touched(n_experts, top_k, tokens): ...


# %% [markdown] id="guess-touched-text"
# **Predict.** 32 conversations take a step together. By what factor do the bytes of *routed experts* that V3 reads **for each token** fall, against one conversation alone? (A dense model's weights: 32.)

# %% id="guess-touched"
predict("inference.expert_bytes_fall", ..., unit="times")

# %% [markdown] id="touched-text"
# **Measure**, with your function. The picture has the other lines too.

# %% id="touched"
alone, together = experts_touched(256, 8, 1), experts_touched(256, 8, 32) / 32
reveal("inference.expert_bytes_fall", alone / together)
print(f"32 tokens read {32 * together:.1f} of a layer's 256 experts, {together:.2f} for each token")
bill.per_token()

# %% [markdown] id="touched-words"
# 1.57 and not 32: each conversation brings experts of its own, until all are read anyway. So a mixture of experts needs *large* batches, hundreds of tokens in each layer, before its experts are shared as a dense model's weights are. The cache's line is flat: no batch shares it (unless texts begin alike), and at 256 long conversations it is nearly half of all bytes.
#
# How fast can a machine be, at best?
#
# ### Exercise 5.2 · Tokens a second, from bytes
#
# *Difficulty 1/5 · worth it 5/5 · 5 minutes · about 2 lines*
#
# If reading is all that takes time, a machine's speed is a division. A decode step makes one token for each of `batch` sequences. It reads the weights once for all of them, and each sequence's own cache. How many tokens a second come out, all sequences together?
# For a mixture of experts `weight_bytes` are those that this batch touches: exercise 5.1 counts the experts.
#
# | | | |
# |---|---|---|
# | `bandwidth` | bytes a second | |
# | `weight_bytes` | bytes | read in one step |
# | `cache_bytes` | bytes | the cache of *one* sequence |
# | `batch` | number | how many sequences |
# | returns | number | tokens a second, of all sequences |


# %% id="tokens-per-second" tags=["exercise"]
@exercise("inference.tokens_per_second")
def tokens_per_second(bandwidth, weight_bytes, cache_bytes, batch=1): ...


# %% [markdown] id="rates-text"
# Yours, for three models on four chips at 4,096 tokens of context, weights in FP8: as if the whole model lay in one chip, which V3 never does, and as if reading were all that takes time. **Predict**: which model is fastest for one conversation alone, and which when 256 share the step?

# %% id="rates"
from dsv3_tutorial.hardware import chip

devices = ("rtx-4090", "h800", "h20", "b200")
for batch in (1, 256):
    print(f"batch {batch:3}, tokens/s each", *(f"{device:>9}" for device in devices))
    for name in ("deepseek-v3", "qwen2.5-72b", "llama-3.1-405b"):
        lines = decode_bill(ModelConfig.named(name), 4096, batch, weights="fp8")
        cache = sum(line.bytes for line in lines if line.part.endswith("cache")) / batch
        weights = sum(line.bytes for line in lines) - batch * cache
        speeds = [chip(device).bandwidth() for device in devices]
        rates = [tokens_per_second(speed, weights, cache, batch) / batch for speed in speeds]
        print(f"{name:>23}", *(f"{rate:9.1f}" for rate in rates))

# %% [markdown] id="roofline-text"
# Alone V3 is ahead: it reads half of Qwen's 72 GB for a token, and a tenth of Llama's 405. Together it falls behind Qwen: nearly all of its 671 GB are read in each step. (An H20, with a seventh of an H800's arithmetic, is ahead of it in every row: only bandwidth was asked. At batch 256 the dense models would wait for its arithmetic.)
#
# Prefill is another world, since thousands of tokens share each weight. On lesson 0's roofline, for an H800:

# %% id="roofline"
service_roofline.prefill_and_decode()

# %% [markdown] id="live-text"
# On an H800 decoding stays on the slope at every batch here: more arithmetic would not make it faster. Prefill stands past BF16's ridge, eight prompts together far past FP8's. (At 4,096 tokens of context, weights and cache only; the receipt above is for 32,768.)
#
# One waits for memory, the other for arithmetic, so mixed they would fill each other's gaps, and many servers do that (*chunked prefill*). But a prompt makes everybody else's next token late, and each phase wants another parallel layout. So large services separate them: DeepSeek's in units of 32 GPUs for prefill and 144 for decode.
#
# On this machine, with our model: tokens a second in prefill and in decode. **Predict** the ratio before you run it.

# %% id="live-prefill" tags=["live", "nbval-ignore-output"]
service_roofline.live(seconds=live_seconds() / 4)

# %% [markdown] id="quantise-text"
# Prefill is many times faster here too, but for another reason. Our step reads far below a memory's rate (lesson 0): time goes into many small operators, which in prefill all tokens share. *What* a machine waits for decides what helps.
#
# ## 2 · Fewer bytes for a weight
#
# If reading weights is what takes the time, store them in fewer bits. V3's own files have FP8, in blocks of 128 x 128 (lesson 2). The older way, still in wide use, is **INT8**: whole numbers and a scale. CPUs multiply by it too.
#
# ### Exercise 5.3 · Eight bits, and a scale for each output
#
# *Difficulty 2/5 · worth it 5/5 · 7 minutes · about 4 lines*
#
# A weight (m, k) makes m outputs from k inputs: `y = x @ weight.T`. Store it in INT8, *per channel*: each row, that is each output, gets one scale, so that its largest number becomes 127 or -127. *Symmetric* means that 0 stays 0 and -128 is not used.
# A weight is then `code * scale`. Round to the nearest code, halfway to the even one, as `torch.round` does. Compute in float32, also where the weight is BF16. Rows may be very small. A row of zeros needs a scale above 0, whichever you like: 0 / 0 is NaN.
# Why a row and not a column? A row's scale is one factor behind the whole dot product; a column's would stand inside it.
#
# | | shape | |
# |---|---|---|
# | `weight` | (m, k) | float32 or BF16; leave it as it is |
# | returns | (m, k) int8 and (m,) float32 | the codes, and the scale of each row |


# %% id="quantize-int8" tags=["exercise"]
@exercise("inference.quantize_int8")
def quantize_int8(weight): ...


# %% [markdown] id="quantised-text"
# Now the trained model, its projections and experts rounded by your function, and by the package's other formats: one scale for a whole matrix (`tensor`), FP8 with one for each 128 x 128 block, **INT4** with one for each 128 weights. The cost is in bits per byte of a text that the model has not seen, a module written for this course.
#
# The second column is the same model with one *tall channel* in each feed-forward network: a row of `up` times 100, and the column of `down` that reads it divided by 100. In float32 that changes nothing. It is made by hand; in large models it is mostly *activations* that have such channels.
#
# **Predict**: which of the numbers below differ from float32's by more than 0.01 bits?

# %% id="quantised"
from dsv3_tutorial.learn.held_out import HeldOut, rounded, with_tall_channel
from dsv3_tutorial.weights.formats import dequantize, quantize


def yours(matrix):
    codes, scale = quantize_int8(matrix)
    return codes * scale[:, None]


def package(name):
    return lambda matrix: dequantize(quantize(matrix, name))


unseen, tall = HeldOut(text, windows=4), with_tall_channel(model)
formats = {"float32": lambda matrix: matrix, "INT8, yours": yours}
formats |= {name: package(name) for name in ("int8-tensor", "fp8", "int4")}
print("bits per byte  as trained  with a tall channel")
for name, by in formats.items():
    bits = [unseen.read_by(rounded(one, by)) for one in (model, tall)]
    print(f"{name:12} {bits[0]:12.3f} {bits[1]:12.3f}")

# %% [markdown] id="quality-text"
# One: a single scale for a matrix with a tall channel. That row takes the codes which its neighbours need. With a scale for each row they keep theirs; a little is lost in `down`, whose column is now too small for its rows' scales. FP8 has an exponent for each weight, and does not notice. Without tall channels eight bits lose nothing that this text can show, however scales are shared. Nor do four, but the text is short: the recorded run below is on a longer one.
#
# What is gained? Quality and time, as recorded on one core of a server:

# %% id="quality"
quality.quality_speed_size()

# %% [markdown] id="slow-text"
# INT4 costs 0.005 bits, and changes the best guess at 6 % of the positions. In time, narrow weights make the *small* model slower: reading 15 MB is not what takes the time, and each product on codes starts more operators. Only the model that has to be streamed from memory gains, and only where this CPU has a fast product: INT8 by row or with one scale, and INT4. FP8 and INT8 by 1 x 128 are widened by general code, and lose.
#
# **Weight-only** formats widen codes before the product. Do they gain in a batch? One product's time, by tokens at once:

# %% id="slow"
quality.int8_by_rows()

# %% [markdown] id="cache-text"
# Where weights are only widened, the gain melts as rows are added: bytes are read once for all rows, arithmetic is done for each. What keeps a gain is arithmetic in INT8 itself, which rounds the activations too.
#
# ## 3 · Fewer bytes for a token of the past
#
# V3's latent is 512 numbers and a rotary key of 64: 1,152 bytes in BF16, in each layer. DeepSeek's later kernels keep the 512 in E4M3, with a float32 scale for each 128, and the rotary key in BF16: 512 + 16 + 128 = **656 bytes**. Attention must then work on codes.
#
# ### Exercise 5.4 · Attention over a latent in eight bits
#
# *Difficulty 4/5 · worth it 5/5 · 10 minutes · about 8 lines*
#
# One query of `H` heads attends to `T` cached tokens, absorbed as in lesson 1: a score is `q_latent` times the token's latent, plus `q_rope` times its rotary key, all times `softmax_scale`; the values are the latents themselves. Here a latent lies in E4M3 `codes`, 128 neighbours to a scale: a *tile*. The last tile may be shorter.
# A value is `code * scale`, and you need not make one. A token's scale is the same for its whole tile, so it can be multiplied *behind* the dot product of that tile. On the way out it can be multiplied into the *probability*. `codes.float()` is exact: a code rounds nothing, `code * scale` may.
# The **budget**: no scaled copy of the cache, nor of a tile of it. You may widen codes (`codes.float()`), but products may not make as many numbers as a tile of the cache has, T x 128.
#
# | | shape | |
# |---|---|---|
# | `q_latent`, `q_rope` | (H, C), (H, R) | float32 or BF16; compute in float32 |
# | `codes` | (T, C) float8_e4m3fn | tile i is columns 128 i to 128 i + 127 |
# | `scales` | (T, tiles) float32 | one for each token and tile |
# | `k_rope` | (T, R) | stored without a scale, in q's dtype |
# | `softmax_scale` | number | |
# | returns | (H, C) | each head's mixture of latents, in q's dtype |


# %% id="fp8-attend" tags=["exercise"]
@exercise("inference.fp8_attend")
def fp8_attend(q_latent, q_rope, codes, scales, k_rope, softmax_scale): ...


# %% [markdown] id="fp8-run-text"
# Your function in the package's place: the model reads the held-out text 32 tokens at a time, so that every step attends over the cache: in float32 and in three narrower formats. In the last one the rotary keys are in E4M3 as well.

# %% id="fp8-run"
from unittest.mock import patch


@torch.inference_mode()
def over_the_cache(kind):
    caches = model.caches(*unseen.windows.shape, kind=kind)
    steps = [model(part, caches) for part in unseen.windows.split(32, dim=1)]
    bits = unseen.bits_per_byte(torch.cat(steps, dim=1))
    return bits, caches[0].nbytes // unseen.windows.numel()


with patch("dsv3_tutorial.attention.decode_fp8.fp8_attend", fp8_attend):
    for kind in (None, "bf16", "fp8", "fp8-rope"):
        bits, size = over_the_cache(kind)
        print(f"{kind or 'float32':9} {size:4} bytes a token and layer, {bits:.3f} bits per byte")

# %% [markdown] id="contexts-text"
# No format costs anything that this text can show, and FP8 leaves a third of float32's bytes. (But narrow rotary keys change more best guesses: see *Further*. DeepSeek keeps them wide.) Rows of 96 numbers pay more for their scale than V3's 512.
#
# What does it buy? First a **claim check**: *"V3's compressed cache fits into the L2 of a consumer GPU"*, and a checklist's size of the cache, *"batch x sequence x latent"*. Then the tokens of V3's cache that six devices hold if the weights lie elsewhere.

# %% id="contexts"
contexts.l2_table()
contexts.short_table()
contexts.context_that_fits()

# %% [markdown] id="ridge-text"
# A thousand tokens would fit into that L2, and every step washes them out with 38 GB of weights. 65,536 tokens of *one* layer do fit. And the checklist forgets layers, bytes and the rotary key: 137 times too little. Against all of V3's heads the latent holds 71 times as much, against GQA with 8 heads, which is what others would cache, 3.6 times. FP8 adds three quarters.
#
# Does FP8 also make attention over the cache 1.76 times faster, 1,152 / 656? That depends on how many heads share a read.

# %% id="ridge"
ridge.heads()

# %% [markdown] id="mtp-text"
# With 16 heads it does. With all 128 the BF16 latent already stands just under the ridge. 57 % of the bytes put the same arithmetic above it, and *attention by itself* gains 1.22 at most, before anything is spent on unpacking codes. (In a whole step one micro-batch's attention may run while another's weights are read; then all saved bytes count, as in section 4's explorer.) First of all FP8 makes *room*.
#
# ## 4 · More than one token in a step
#
# A decode step leaves arithmetic idle. **Speculative decoding** uses it: something cheap guesses the next tokens, and the model checks all of them in one pass, like a short prefill. V3 was trained with a module that guesses: **MTP**, one more block behind the last layer, which says the token after the next (report, section 2.2).
#
# ### Exercise 5.5 · What the MTP module reads
#
# *Difficulty 2/5 · worth it 5/5 · 6 minutes · about 2 lines*
#
# The model has read `input_ids` and left a hidden state at each position; from the last one it has `chosen` the next token. The **MTP** module guesses one token further. At each position it gets two things: the hidden state, and the embedding of the token *after* that position. Almost everyone is off by one here, and nothing fails: drafts only get worse.
# Give the pairs for all positions: the module has a cache of its own, and needs every one.
#
# | | shape | |
# |---|---|---|
# | `hidden` | (B, S, D) | at position i, after reading token i |
# | `input_ids` | (B, S) int64 | the tokens that were read; leave them as they are |
# | `chosen` | (B,) int64 | the token that follows the last position |
# | returns | (B, S, D) and (B, S) int64 | the hidden states, and the token beside each |


# %% id="mtp-inputs" tags=["exercise"]
@exercise("inference.mtp_inputs")
def mtp_inputs(hidden, input_ids, chosen): ...


# %% [markdown] id="accept-text"
# The guess is not always right, and the text must not change. If the model is greedy, keep a guess while it is what the model would have chosen. For sampling there is a rule that keeps the distribution exactly. A token that has probability p in the model and q in the draft comes with min(p, q) as a kept draft and with max(p - q, 0) after a refusal: together p.
#
# ### Exercise 5.6 · Accept or refuse
#
# *Difficulty 4/5 · worth it 5/5 · 8 minutes · about 8 lines*
#
# `K` tokens were drafted, the i-th drawn from `draft_probs[i]`. One pass of the model has given what *it* says at each of these places, `target_probs`, and one row more. Keep drafts so that the text is distributed exactly as if the model had drawn it alone.
# The rule: go through the drafts, and keep draft `i` while `uniforms[i] < p / q`, its probability in the target row over that in the draft row. The first refusal ends it. Then the next token is drawn from what the model says *more often* than the draft did, `p - q` where that is positive, divided by its sum. If all are kept, it is drawn from the last row: one token more for nothing.
# To draw, take the first token at which the running sum of the probabilities is *above* the last uniform. Greedy decoding is the same rule with one-hot rows.
#
# | | shape | |
# |---|---|---|
# | `drafted` | (K,) int64 | the drafts |
# | `draft_probs` | (K, V) | what each was drawn from |
# | `target_probs` | (K + 1, V) | what the model says at each draft, and behind the last |
# | `uniforms` | (K + 1,) | in [0, 1): one for each draft, the last one for the draw |
# | returns | two numbers | how many drafts are kept, and the next token |


# %% id="accept" tags=["exercise"]
@exercise("inference.accept")
def accept(drafted, draft_probs, target_probs, uniforms): ...


# %% [markdown] id="loop-text"
# Both together, on the trained model. `session` holds the caches. Each turn drafts one token, reads it behind the last one in *one* pass, and forgets it if it was wrong: `trim`. Greedy, so all rows are one-hot.

# %% id="loop"
from dsv3_tutorial.inference.session import Session
from dsv3_tutorial.learn.figures.guessed import Made, coloured


@torch.inference_mode()
def speculate(prompt, count):
    session = Session(model, 1, len(prompt) + count + 2, drafts=True)
    chosen, refused, made = session.prefill([prompt]).argmax(-1), (), []  # (1,)
    while len(made) < count:
        pairs = mtp_inputs(session.hidden, session.input_ids, chosen)
        guess = model.draft(*pairs, cache=session.draft_caches[0])[1][0, -1:].argmax(-1)  # (1,)
        logits, _ = session.step(torch.stack([chosen, guess], dim=1))
        rows = F.one_hot(torch.cat([guess, logits[0].argmax(-1)]), model.cfg.vocab_size).float()
        kept, token = accept(guess, rows[:1], rows[1:], torch.rand(2))
        made += [Made(int(chosen), False, refused), Made(int(guess), True)][: 1 + kept]
        chosen, refused = torch.tensor([token]), () if kept else (int(guess),)
        if not kept:
            session.trim(session.lengths - 1)
            session.hidden, session.input_ids = session.hidden[:, :1], session.input_ids[:, :1]
    return made[:count]


torch.manual_seed(0)
plain, made = generate(model, [prompt], max_new_tokens=200).sequences[0], speculate(prompt, 200)
passes = sum(not one.drafted for one in made)
print("the same 200 tokens:", [one.token for one in made] == plain)
print(f"{passes} passes, {200 / passes:.2f} tokens a pass")

# %% [markdown] id="loop-words"
# Every token is the one that the model would have chosen by itself. Here is the beginning: kept drafts are underlined, refused ones struck.

# %% id="coloured"
coloured(text, text.decode(prompt), made[:70])

# %% [markdown] id="guess-gain-text"
# Nine of ten guesses are kept. That flatters: a small greedy model soon goes round in circles, and circles are easy to guess. On unseen files it is seven of ten (*Further*); V3's report has 85 to 90 %.
#
# How much faster is that? A pass over two tokens reads more than a pass over one: the second token has experts of its own.
#
# **Predict.** Say that 85 % of the guesses are kept: 1.85 tokens a pass. V3 serves one conversation, only reading weights takes time, and both tokens choose experts independently. How many times faster is it?

# %% id="guess-gain"
predict("inference.speculation_gain", ..., unit="times")

# %% [markdown] id="gain-text"
# **Measure.** First whether two neighbouring tokens share experts in our own model, where 7.0 different ones are to be expected of strangers (by your function: 4 of 16, two tokens). Then V3 with strangers, and the H800's arithmetic as the second limit.

# %% id="gain"
from dsv3_tutorial.learn.figures import speculation_bounds
from dsv3_tutorial.learn.held_out import experts_of_two

print(f"strangers: {experts_touched(16, 4, 2):.1f} different experts of a layer")
print(f"neighbours in our model: {experts_of_two(model, unseen.windows):.1f}")
reveal("inference.speculation_gain", speculation_bounds.at_batch_one())
speculation_bounds.bounds()

# %% [markdown] id="measured-text"
# A verified token that routes like a stranger brings eight experts of its own in each layer. At batch 1 the pass reads nearly twice the experts, and the gain is 1.2. Neighbours agree a little, and each shared expert adds to it; twins would give 1.85.
#
# Why does it *fall* from 1 to 4? Experts become the larger part of what is read, and eight tokens share hardly more of them than four. At 128 nearly all experts are read anyway, and the gain is nearly whole.
#
# A dense model is the other way round: best at batch 1, until arithmetic binds; then a refused guess is waste, and drafting *slows it down*. V3 gets there at 4,096. (Without a cache, and with drafts for nothing. *Further* has the knobs: at contexts of 32,768 a dense model gains at every batch.)
#
# The report gives 1.8 times, and does not say at which batch. Where 1.8 is published for *one* conversation with a mixture of experts, either its neighbours agree, or something else than bytes took the time. Now our own model on a CPU, with what its bytes alone would allow:

# %% id="measured"
speculation_bounds.measured()

# %% [markdown] id="deploy-text"
# Time is not bytes here. A pass over two tokens starts as many small operators as a pass over one, so at batch 1 a draft may buy more than its bytes would allow; as the batch fills the operators with work, less.
#
# Everything at once: which devices, how many, which formats, how long, how many users? *Bounds, not forecasts: perfect overlap, even routing, no latency.* Routed experts and conversations are dealt out over the devices, all else lies on each of them. Three tasks, each from the start values:
#
# 1. Which is the smallest number of H800 on offer that serves 32 conversations of 32k with FP8 weights? Which format lets eight do it?
# 2. With 72 H800: from which batch on does a device hold more cache than weights?
# 3. With 72 H800 and a short context of 4,096, raise the batch until an FP8 cache speeds up no user. What binds? Now add a draft. Why does it get worse?

# %% id="deploy"
from dsv3_tutorial.learn.figures import deployment

explore(
    deployment.deployment,
    **deployment.GRID,
    start=deployment.START,
    say=deployment.deployment_in_words,
)

# %% [markdown] id="paper-text"
# ## 5 · The paper's numbers
#
# Experts lie on many devices, and each token's vector travels to its experts and back. The paper bounds decoding by that alone (section 2.3.2): 32 tokens on a device, 9 copies of each (8 routed experts and the shared one), 7,000 channels, a byte for each on the way out and two on the way back, over InfiniBand's 50 GB/s; twice, because two micro-batches take turns; 61 layers. That is 67 tokens a second. In a rack of 72 GPUs that NVLink joins (NVL72, 900 GB/s) it would be 1,200.
#
# Then DeepSeek's own service on a day in February 2025, and what our bounds say of such machines.

# %% id="limits"
from dsv3_tutorial.learn.figures import services

services.services()

# %% [markdown] id="end-text"
# With 88 conversations on a GPU, as in the service, messages and memory take longest: 21 and 16 ms. (Messages at the rate that is reached, each copy by itself; memory at its peak. Call it a tie.) A user of the real service got 42 to 46 % of the bound. Without any overlap the three would add up to 48 ms, 21 tokens a second, so perfect overlap is the bound's strongest assumption.
#
# A draft doubles what is sent: where messages bind it *lowers* the bound, where memory binds it pays. A larger **scale-up** domain (more GPUs joined by the fast links) moves the limit to memory: 64 tokens a second with the same chips, 140 on NVL72, whose memory is faster as well. That is why the authors ask for it.
#
# Each answer has its bottleneck: fewer bits for weights, where weights are read and hardly used; a narrow latent for room; drafts where bytes are shared and arithmetic is idle; batches, until memory is full or messages bind.

# %% id="progress"
progress()

# %% [markdown] id="further"
# ## Further
#
# Next on the path is lesson 6, where all of it comes together. What follows here goes further: five more exercises, requests that come and go, sampling, more drafts, and a panel to write with.
#
# ### V3 itself, without its weights
#
# The ledger of section 1 on V3, on the meta device: BF16 weights, one token of one conversation. (Nothing is chosen there: your formula says how many experts are read.)

# %% id="meta"
v3 = ModelConfig.named("deepseek-v3")
counted, formula = ledger.decode(v3, context=32768).lines, decode_bill(v3, 32768)
for one, other in zip(counted, formula):
    print(f"{one.part:18}{one.flops:18,}{one.bytes:18,}  {one == other}")

# %% [markdown] id="rounding-text"
# ### What rounding does to an output
#
# ### Exercise 5.7 · The error of a dot product, in advance
#
# *Difficulty 2/5 · worth it 4/5 · 6 minutes · about 1 line*
#
# Rounding to a grid of step `scale` moves a weight by anything between -scale / 2 and scale / 2, and all of these are about equally likely. An output adds up k such errors, each times its input. How large is the sum, as a standard deviation?
# The errors of different weights are independent, so their *variances* add up. (A number that is uniform on an interval of width w has the variance w² / 12.)
#
# | | shape | |
# |---|---|---|
# | `x` | (M, k) | M tokens' inputs |
# | `scale` | (m,) | the step of each output's weights |
# | returns | (M, m) | the standard deviation of each output's error |


# %% id="predicted-error" tags=["exercise"]
@exercise("inference.predicted_error")
def predicted_error(x, scale): ...


# %% [markdown] id="error-run-text"
# Yours beside the error that your INT8 weights really make: the first layer's query projection, on the held-out text.

# %% id="error-run"
attention = model.model.layers[0].self_attn
x = model.model.layers[0].input_layernorm(model.model.embed_tokens(unseen.windows[0])).detach()
weight = attention.q_a_proj.weight.detach()
measured = x @ (yours(weight) - weight).T
foretold = predicted_error(x, quantize_int8(weight)[1])
print(f"measured, root mean square: {measured.square().mean().sqrt():.2e}")
print(f"foretold:                   {foretold.square().mean().sqrt():.2e}")
print(f"outputs themselves:         {(x @ weight.T).square().mean().sqrt():.2e}")

# %% [markdown] id="rows-text"
# Within a few percent, from the scales and the inputs alone. So the error budget of a format can be written before anything is run.
#
# ### Bytes and pages
#
# ### Exercise 5.8 · 656 bytes
#
# *Difficulty 2/5 · worth it 3/5 · 5 minutes · about 2 lines*
#
# A cached token is one row of bytes: its E4M3 codes, then their float32 scales, then its rotary key in BF16, without gaps. With V3's sizes that is 512 + 16 + 128 = 656 bytes instead of 1,152. Nothing is converted but the key, which may come in another dtype: the bits go in as they are.
#
# | | shape | |
# |---|---|---|
# | `codes` | (..., C) float8_e4m3fn | |
# | `scales` | (..., tiles) float32 | one for each 128 codes |
# | `k_rope` | (..., R) | any floating-point dtype |
# | returns | (..., C + 4 tiles + 2 R) uint8 | a row for each token |


# %% id="pack-rows" tags=["exercise"]
@exercise("inference.pack_rows")
def pack_rows(codes, scales, k_rope): ...


# %% [markdown] id="paged-text"
# Yours, of one token of V3:

# %% id="rows-run"
from dsv3_tutorial.fp8.quant import quantize_tiles

torch.manual_seed(0)
codes, scales = quantize_tiles(torch.randn(512))
print(pack_rows(codes, scales, torch.randn(64)).shape, "instead of", 2 * (512 + 64), "bytes")

# %% [markdown] id="cache-formats-text"
# The recorded run behind section 3: cache formats on files of Python's library and on section 3's module, differences taken window by window.

# %% id="cache-formats"
quality.cache_table()

# %% [markdown] id="service-more-text"
# And the rest of the service's statistics of section 5: prefill, and whether its day adds up to its nodes.

# %% id="service-more"
services.more()

# %% [markdown] id="pages-text"
# How many tokens a conversation will have is not known when it starts. If its cache must lie in one piece, memory is set aside for the longest case, and most of it is never used. So servers cut the cache into **pages**.
#
# ### Exercise 5.9 · The page table
#
# *Difficulty 2/5 · worth it 4/5 · 5 minutes · about 2 lines*
#
# A **paged cache** is one long array of slots, cut into pages of `page_size`: page j holds the slots from `j * page_size` on. A text takes pages as it grows, wherever some are free, and `tables` lists them in order: one row for each text. In which slot does each position of each text lie?
# A pool can be large: slots need int64, also where the tables are int32.
#
# | | shape | |
# |---|---|---|
# | `tables` | (B, P) int32 or int64 | the pages of each text |
# | `positions` | (B, S) int64 | counted from the text's first token |
# | `page_size` | number | tokens in a page |
# | returns | (B, S) int64 | slots |


# %% id="slots" tags=["exercise"]
@exercise("inference.slots")
def slots(tables, positions, page_size): ...


# %% [markdown] id="server-text"
# With pages, requests can join and leave a running batch at every step: **continuous batching**. The package's server starts a request only when pages for its longest possible text are free (**admission control**), so that none fails half-way; the others queue. Twelve requests of different lengths, at most four at a time, in a pool of 40 pages of 16 tokens, a row for each and a column for each step: `.` queues, `#` writes.

# %% id="server"
from dsv3_tutorial.inference.batch import Request, Server

server = Server(model, pages=40, max_batch=4, page_size=16)
lengths = [5 + 7 * i % 31 for i in range(12)]
ids = [server.submit(Request(prompt * (1 + i % 3), lengths[i])) for i in range(12)]
rows, results = dict.fromkeys(ids, ""), {}
while not server.idle:
    events = server.step()
    for i in ids:
        here = {event.kind for event in events if event.request == i}
        rows[i] += "#" if "token" in here else "." if i not in results else ""
    results |= {event.request: event.result for event in events if event.result}
for i, length in zip(ids, lengths):
    print(f"request {i:2}, {length:2} tokens  {rows[i]}")
alone = generate(model, [prompt * 3], max_new_tokens=lengths[2]).sequences[0]
print("request 2 alone writes the same:", results[ids[2]].tokens == alone)
print("a request waits for", round(server.stats.mean_wait, 1), "steps on average")

# %% [markdown] id="sampling-text"
# A column has a fifth `#` where a request ends and the next starts in the same step. Request 2's tokens are those that it writes alone; logits differ in their last bits, because a product of another shape adds up in another order.
#
# ### Sampling
#
# So far every token was the likeliest. Small models that are greedy go round in circles; drawing helps, and some of the tail has to be cut off.
#
# ### Exercise 5.10 · Top-p
#
# *Difficulty 3/5 · worth it 3/5 · 8 minutes · about 5 lines*
#
# Sampling from all of the vocabulary now and then draws from a long tail of nonsense. **Top-p** keeps the smallest set of most likely tokens whose probabilities together reach `p`, sets all others to 0, and divides by what is left. The token with which the sum reaches `p` belongs to the set, so the most likely one is always in it. Each row has a set of its own. Of equally likely tokens, keep any.
#
# | | shape | |
# |---|---|---|
# | `probs` | (..., V) | each row sums to 1; leave it as it is |
# | `p` | number | above 0, at most 1 |
# | returns | (..., V) | tokens in their old places, in probs' dtype |


# %% id="top-p" tags=["exercise"]
@exercise("inference.top_p")
def top_p(probs, p): ...


# %% [markdown] id="distribution-text"
# Texts from one prompt: greedy, drawn, and drawn with your top-p; then the promise of exercise 5.6: drafts from a poor model `q`, 5,000 times through your `accept`, and the tokens that come first are distributed as the good model `p` says.

# %% id="distribution"
import re

from dsv3_tutorial.inference.sample import Sampling

with patch("dsv3_tutorial.inference.sample.top_p", top_p):
    for sampling in (Sampling(), Sampling(1.0, seed=0), Sampling(1.0, top_p=0.8, seed=0)):
        new = generate(model, [prompt], 40, sampling).sequences[0]
        print(
            f"{sampling.temperature:3}, top-p {sampling.top_p}:",
            re.sub(r"\s+", " ", text.decode(new)),
        )

torch.manual_seed(0)
p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.2, 0.3, 0.4])
first = torch.zeros(4)
for draft in torch.multinomial(q, 5000, replacement=True):
    kept, token = accept(draft[None], q[None], p.expand(2, -1), torch.rand(2))
    first[draft if kept else token] += 1
for name, shares in (("p", p), ("q", q), ("first tokens", first / 5000)):
    print(f"{name:12}", *(f"{share:.2f}" for share in shares.tolist()))

# %% [markdown] id="find-text"
# ### Exercise 5.11 · Find the bugs
#
# *Difficulty 4/5 · worth it 5/5 · 10 minutes · about 3 lines*
#
# This is all of speculative decoding, for one text and one draft a pass. `model.read(tokens)` reads on, keeps what it reads in the cache, and returns the hidden state (S, D) and the probabilities (S, V) behind each of these tokens. `model.trim(n)` keeps the first n tokens of the cache. `mtp(state, token)` takes a hidden state and the token *after* it, and returns probabilities (V,) of the token after that.
# `draw(probs)` draws a token; `uniform()` gives a number in [0, 1). When a pass begins, the cache holds all of the text but its last token.
#
# The code below runs, and writes text that looks right. It has three bugs: one makes it slower, two change what it writes. The verdict counts those that are left, half-fixed ones too, and names the last one. Leave the other lines, and the order of the draws, as they are.


# %% id="find-the-bug" tags=["exercise"]
@exercise("inference.find_the_bug")
def speculated(prompt, length, model, mtp, draw, uniform):
    hidden, p = model.read(prompt)
    tokens = [*prompt, draw(p[-1])]
    while len(tokens) < length:
        q = mtp(hidden[-1], tokens[-2])
        draft = draw(q)
        hidden, p = model.read([tokens[-1], draft])
        if uniform() * q[draft] < p[0, draft]:
            tokens += [draft, draw(p[1])]
        else:
            model.trim(len(tokens) + 1)
            hidden = hidden[:1]
            tokens.append(draw(p[0]))
    return tokens[:length]


# %% [markdown] id="kinds-text"
# ### More about drafts
#
# Which tokens are guessed well? From recorded runs of our model, by what the token is in Python:

# %% id="kinds"
from dsv3_tutorial.learn.figures import acceptance

acceptance.by_kind()

# %% [markdown] id="bounds-text"
# What kind of token it is matters less than whose text it is. (Thin black lines: what chance allows.)
#
# Section 4's picture for other acceptances, drafts, chips and contexts. With four drafts at 50 % and context 0, at which batches does drafting pay for V3 on an H20? Which chip makes a dense model's gain end earliest? And what do 131,072 tokens of context do to V3's gain? (32 to 128. The same H20: little arithmetic for its bandwidth. On an H20 drafts then never pay, since verifying multiplies attention's arithmetic; on an H800 small batches gain.)

# %% id="explore-bounds"
explore(
    speculation_bounds.bounds,
    acceptance=[0.5, 0.7, 0.85, 0.95],
    drafts=[1, 2, 3, 4],
    chip=["h800", "h20", "b200"],
    context=[0, 4096, 32768, 131072],
    start={"acceptance": 0.85, "drafts": 1, "chip": "h800", "context": 0},
    say=speculation_bounds.bounds_in_words,
)

# %% [markdown] id="laws-text"
# Time for a token against the tokens in the cache, for a model of hidden size 1,024 with random weights. transformers caches the same latent, but rebuilds all heads from it at every step.

# %% id="laws"
from dsv3_tutorial.learn.figures import laws

laws.decode_laws()

# %% [markdown] id="panel-text"
# ### Try it
#
# Write the beginning of a Python function, choose how many tokens are drafted, and watch which ones are kept.

# %% id="panel"
from dsv3_tutorial.learn.figures import panel

panel.generation_panel(model, text)

# %% [markdown] id="commands"
# The same from a shell, and a model of 8.9 MB instead of 15.5:
#
# ```
# python -m dsv3_tutorial generate data/checkpoints/small --prompt "def " --max-new-tokens 100 --speculate 1 --bench
# python -m dsv3_tutorial quantize data/checkpoints/small my/small-int8 --to int8
# python -m dsv3_tutorial generate my/small-int8 --prompt "class Cache:" --max-new-tokens 100 --cache fp8
# ```
#
# In float32 drafts and neighbours changed no token here. In BF16 and INT8 the last bits depend on how many tokens are multiplied at once, and where two tokens are nearly tied the text may go another way.
