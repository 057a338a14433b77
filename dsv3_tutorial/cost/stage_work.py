"""What each part of a model asks of a GPU for one token: FLOPs by kind, bytes, numbers to update.

Parts are the units that a pipeline can cut between: embedding, each layer, the output
head together with the multi-token prediction modules. Bytes are of what is no matrix product:
norms, rotations, SwiGLU, quantisation, the experts' permutations. Each operation reads its inputs
and writes its outputs once; fused kernels would move less.
"""

from functools import cache
from typing import NamedTuple

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params
from dsv3_tutorial.cost.precision import SCALE_BYTES, TILE

BF16, FP8 = 2, 1 + SCALE_BYTES / TILE  # bytes a number, its share of the scale included


class Work(NamedTuple):
    """Of one token: FLOP forward, bytes of memory-bound operations; and numbers with gradients."""

    linear: float = 0.0  # FLOP of products that run in the layout's precision, routed ones apart
    routed: float = 0.0
    high: float = 0.0  # FLOP of products that stay in BF16: head and gate
    attention: float = 0.0  # FLOP of scores and values, causal
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    forward_casts: float = 0.0  # bytes of quantisation, where products run in FP8
    backward_casts: float = 0.0
    again_linear: float = 0.0  # FLOP computed again under selective recomputation
    again_bytes: float = 0.0
    exchanges: int = 0  # layers whose tokens go to experts and back
    dense: float = 0.0  # numbers that each GPU of a stage holds, over tp
    experts: float = 0.0  # numbers that are dealt out over ep
    heads: int = 0  # uses of the output head
    inputs: int = 0  # layers' inputs that are kept under full recomputation
    extra_dense: float = 0.0  # of dense and experts, what multi-token prediction adds
    extra_experts: float = 0.0

    def plus(self, other: "Work") -> "Work":
        """The work of both."""
        return Work(*(a + b for a, b in zip(self, other)))


@cache
def parts(cfg: ModelConfig, seq_len: int, mtp: bool = True) -> tuple[Work, ...]:
    """The model's units in the pipeline's order."""
    vocabulary = cfg.vocab_size * cfg.hidden_size
    embedding = Work(
        forward_bytes=4 * cfg.hidden_size, backward_bytes=8 * cfg.hidden_size, dense=vocabulary
    )
    layers = [layer(cfg, cfg.is_moe_layer(i), seq_len) for i in range(cfg.num_hidden_layers)]
    last = head(cfg, tied=cfg.tie_word_embeddings)
    for _ in range(cfg.num_nextn_predict_layers if mtp else 0):
        last = last.plus(module(cfg, seq_len))  # one place, as they share the head's weights
    return (embedding, *layers, last)


def head(cfg: ModelConfig, tied: bool = False) -> Work:
    """The output head: a product in BF16, and a softmax over the vocabulary in both passes."""
    v, d = cfg.vocab_size, cfg.hidden_size
    return Work(
        high=2 * v * d,
        forward_bytes=2 * BF16 * v + 2 * BF16 * d,
        backward_bytes=2 * BF16 * v + 4 * BF16 * d,
        dense=d + (0 if tied else v * d),  # the last norm stands before it
        heads=1,
    )


def module(cfg: ModelConfig, seq_len: int) -> Work:
    """A multi-token prediction module: a block, the product that joins two states, and the head."""
    block = layer(cfg, cfg.is_moe_layer(cfg.num_hidden_layers), seq_len)
    d = cfg.hidden_size
    join = Work(
        linear=4 * d * d,
        forward_bytes=8 * BF16 * d,
        backward_bytes=16 * BF16 * d,
        dense=2 * d * d + 3 * d,
    )
    used = head(cfg)._replace(dense=0.0)  # the main model's, read once more
    whole = block.plus(join).plus(used)
    return whole._replace(extra_dense=whole.dense, extra_experts=whole.experts)


@cache
def layer(cfg: ModelConfig, moe: bool, seq_len: int) -> Work:
    """One transformer block, attention causal over sequences of seq_len."""
    numbers = params.layer_parts(cfg, moe)
    attention = _attention(cfg, seq_len, numbers["attention"])
    ffn = _experts(cfg, numbers) if moe else _dense(cfg)
    d = cfg.hidden_size
    norms = Work(  # twice: stream and branch in, stream and normalised out
        forward_bytes=2 * 4 * BF16 * d,
        backward_bytes=2 * 4 * BF16 * d,
        again_bytes=2 * 2 * BF16 * d,
        dense=numbers["norms"],
        inputs=1,
    )
    return attention.plus(ffn).plus(norms)


def _attention(cfg: ModelConfig, seq_len: int, matrices: float) -> Work:
    d, heads, width = cfg.hidden_size, cfg.num_attention_heads, cfg.qk_head_dim
    kv = heads if cfg.is_mla else cfg.kv_heads
    value = heads * cfg.value_dim
    up, ins, outs = 0.0, d + value, (heads + kv) * width + kv * cfg.value_dim + d
    if cfg.is_mla:
        q, c = cfg.q_lora_rank or 0, cfg.kv_lora_rank
        up = heads * (q * width + c * (cfg.qk_nope_head_dim + cfg.v_head_dim))
        ins += q + c
        outs += q + c
    rotated = 2 * BF16 * (heads + kv) * width  # read and written: rotation, heads put together
    return Work(
        linear=2 * matrices,
        attention=2 * (seq_len / 2) * heads * (width + cfg.value_dim),
        forward_bytes=rotated,
        backward_bytes=rotated,
        forward_casts=(BF16 + FP8) * ins,
        backward_casts=2 * FP8 * ins + (BF16 + 2 * FP8) * outs,
        again_linear=2 * up,
        dense=matrices,
    )


def _swiglu(d: float, width: float, copies: float) -> Work:
    """A gated FFN for `copies` of a token: its products, its activation, what is quantised."""
    return Work(
        forward_bytes=3 * BF16 * width * copies,
        backward_bytes=5 * BF16 * width * copies,
        forward_casts=(BF16 + FP8) * width * copies,
        backward_casts=2 * FP8 * (d + width) * copies + (BF16 + 2 * FP8) * (2 * width + d) * copies,
        again_bytes=3 * BF16 * width * copies,
    )


def _dense(cfg: ModelConfig) -> Work:
    d, width = cfg.hidden_size, cfg.intermediate_size
    numbers = 3 * d * width
    work = _swiglu(d, width, 1)
    casts = work.forward_casts + (BF16 + FP8) * d
    return work._replace(linear=2 * numbers, dense=numbers, forward_casts=casts)


def _experts(cfg: ModelConfig, numbers: dict[str, int]) -> Work:
    d, k = cfg.hidden_size, cfg.num_experts_per_tok
    copies = k + (cfg.n_shared_experts or 0)
    work = _swiglu(d, cfg.moe_intermediate_size, copies)
    moved = 2 * BF16 * (k + 1) * d  # rows gathered by expert, or partial sums brought together
    return work._replace(
        linear=2 * numbers["shared_experts"],
        routed=2 * k * params.expert(cfg),
        high=2 * numbers["gate"],
        forward_bytes=work.forward_bytes + 2 * moved,
        backward_bytes=work.backward_bytes + 2 * moved,
        forward_casts=work.forward_casts + (BF16 + FP8) * d,
        exchanges=1,
        dense=numbers["shared_experts"] + numbers["gate"],
        experts=numbers["routed_experts"],
    )
