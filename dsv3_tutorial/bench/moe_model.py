"""The whole model in our code and in transformers', ready to be timed: decoding and training.

B batch, T cached tokens. Caches are filled with random latents, not by a prefill. transformers runs
with each pair of its attention and expert implementations; the fastest of them is the one to beat.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_tutorial.bench.attention_steps import Step, peer_problem
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3

OURS = "ours"
ATTENTION, EXPERTS = ("sdpa", "eager"), ("grouped_mm", "eager", "batched_mm")
PEERS = tuple(f"transformers {a} {e}" for a in ATTENTION for e in EXPERTS)  # first: its default
TRAINED = tuple(form for form in PEERS if not form.endswith("batched_mm"))
_LONGEST = 2**15  # positions: more than any cell's context

PRESET = replace(
    ModelConfig.named("small"), num_nextn_predict_layers=0, max_position_embeddings=_LONGEST
)
# Attention as in `bench attention`'s small, with experts; and V3's own head dims, narrower.
SMALL = replace(
    PRESET, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
    q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    intermediate_size=1024, moe_intermediate_size=256,
)  # fmt: skip
V3_LIKE = replace(
    SMALL, hidden_size=1024, num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=16,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    intermediate_size=2048,
)  # fmt: skip
CONFIGS = {"small": SMALL, "v3-like": V3_LIKE, "small preset": PRESET}


class Pair:
    """One model of `cfg` in our code and, where it is installed, in transformers': equal weights.

    Float32. The global random state is left alone. `peer_problem` says why transformers takes no
    part, or is None.
    """

    def __init__(self, cfg: ModelConfig, place: torch.device | str = "cpu"):
        self.cfg, self.place = cfg, torch.device(place)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.ours = DeepSeekV3(cfg).to(self.place).eval()
        self.peer_problem, self.theirs = peer_problem(), None
        if self.peer_problem is None:
            self.theirs = _peer(cfg, self.ours).to(self.place).eval()

    def decode_steps(self, context: int, batch: int = 1) -> dict[str, Step]:
        """A decode step of every form behind `context` cached tokens: logits (B, 1, V)."""
        numbers = torch.Generator().manual_seed(context)
        tokens = torch.randint(self.cfg.vocab_size, (batch, 1), generator=numbers).to(self.place)
        caches = self.ours.caches(batch, context + 1)
        rank, rope = self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim
        for cache in caches:
            rows = torch.randn(batch, context, rank + rope, generator=numbers).to(self.place)
            cache.append(rows[..., :rank], rows[..., rank:])
        lengths = torch.full((batch,), context)

        def reset() -> None:
            for cache in caches:
                cache.trim(lengths)

        held = sum(cache.nbytes for cache in caches)
        steps = {OURS: Step(lambda: self.ours(tokens, caches), reset, held)}
        if self.theirs is not None:
            stored = [_as_transformers_stores(cache) for cache in caches]
            steps |= {form: self._peer_decode(form, tokens, stored) for form in PEERS}
        return steps

    def _peer_decode(
        self, form: str, tokens: Tensor, stored: Sequence[tuple[Tensor, Tensor]]
    ) -> Step:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, parts in enumerate(stored):
            cache.update(*(part[:, :, :1] for part in parts), layer)

        def reset() -> None:
            for held, parts in zip(cache.layers, stored, strict=True):
                held.keys, held.values = parts  # a step makes new tensors: these are as they were

        def run() -> Tensor:
            return self._use(form)(tokens, past_key_values=cache, use_cache=True).logits

        reset()
        size = sum(part.untyped_storage().nbytes() for parts in stored for part in parts)
        return Step(run, reset, size)

    def training_steps(self, batch: int, length: int) -> dict[str, Callable[[], Tensor]]:
        """Loss, backward, AdamW's step, gradients dropped: each form gives its loss.

        The learning rate is 0, so every repeat is the same step and the weights stay equal.
        """
        numbers = torch.Generator().manual_seed(length)
        tokens = torch.randint(self.cfg.vocab_size, (batch, length + 1), generator=numbers)
        tokens = tokens.to(self.place)
        steps = {OURS: _training_step(self.ours, _still(self.ours), tokens)}
        if self.theirs is not None:
            optimizer = _still(self.theirs)
            for form in TRAINED:
                steps[form] = _training_step(self._logits(form), optimizer, tokens)
        return steps

    def _logits(self, form: str) -> Callable[[Tensor], Tensor]:
        def run(tokens: Tensor) -> Tensor:
            return self._use(form)(tokens, use_cache=False).logits

        return run

    def _use(self, form: str) -> nn.Module:
        """transformers' model with the two implementations that a form names."""
        _, attention, experts = form.split()
        self.theirs.config._attn_implementation = attention
        self.theirs.config._experts_implementation = experts
        return self.theirs


def _still(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.0)


def _training_step(
    logits: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, tokens: Tensor
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        guesses = logits(tokens[:, :-1])  # (B, S, V)
        loss = F.cross_entropy(guesses.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def _peer(cfg: ModelConfig, ours: DeepSeekV3) -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    with torch.random.fork_rng():
        theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**cfg.to_dict()))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs


def _as_transformers_stores(cache) -> tuple[Tensor, Tensor]:
    """(B, 1, T, C) and (B, 1, T, R), even coordinates of a rotated key first."""
    k_rope = torch.cat([cache.k_rope[..., 0::2], cache.k_rope[..., 1::2]], dim=-1)
    return cache.c_kv[:, None].contiguous(), k_rope[:, None].contiguous()
