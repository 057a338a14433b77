"""One layer's decode step in every form, ready to be timed: same weights, same tokens, same output.

B batch, T cached positions, H heads, N, R and V head dims, C kv latent. Caches are filled with
random latents, not by a prefill; the expanded heads, and transformers' cache, are made of these.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv3_tutorial.attention.cache import Cache, FullCache, LatentCache
from dsv3_tutorial.attention.mla import MLA
from dsv3_tutorial.bench import timing
from dsv3_tutorial.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=16, hidden_size=512, intermediate_size=512, num_hidden_layers=1,
    num_attention_heads=8, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32,
    v_head_dim=64, max_position_embeddings=2**17,
)  # fmt: skip
V3_LIKE = replace(
    SMALL, hidden_size=1024, num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
)  # fmt: skip
CONFIGS = {"small": SMALL, "v3-like": V3_LIKE}
OURS = ("absorbed", "reexpanded", "expanded")
REBUILT = "rebuilt"  # as in a prefill: heads rebuilt once, then one fused attention over them
PEERS = ("transformers sdpa", "transformers eager")  # the first is its default
FORMS = (OURS[0], *PEERS, *OURS[1:])  # the order in which memory is given out
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest number in the output
_CHUNK = 1024  # tokens expanded at once


class BenchError(RuntimeError):
    """What was to be compared does not compute the same."""


@dataclass(frozen=True)
class Step:
    """A decode step that can be repeated: `run` it, then `reset` puts its cache back."""

    run: Callable[[], Tensor]
    reset: Callable[[], None]
    cache_bytes: int

    def __call__(self) -> Tensor:
        return self.run()


class Layer:
    """One attention layer of `cfg` in our code and, where it is installed, in transformers'.

    Every implementation has the same random weights. The global random state is left alone.
    `peer_problem` says why transformers takes no part, or is None.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        place: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        peers: bool = True,
    ):
        self.cfg, self.dtype = cfg, dtype
        self.place = torch.device(place)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.ours = MLA(cfg).to(self.place, dtype).eval()
        self.ours.expands_from = 1  # absorb=None then rebuilds always: that is REBUILT
        self.peers, self.peer_problem = {}, "it was not asked for"
        if peers:
            self.peer_problem = peer_problem()
        if self.peer_problem is None:
            self.peers = {form: self._peer(form) for form in PEERS}

    def _peer(self, form: str) -> tuple[Callable, Callable]:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

        heads = {"num_key_value_heads": self.cfg.num_attention_heads}  # MLA expands to all heads
        theirs = DeepseekV3Config(**{**self.cfg.to_dict(), **heads})
        theirs._attn_implementation = form.split()[1]
        module = deepseek.DeepseekV3Attention(theirs, 0).to(self.place, self.dtype).eval()
        module.load_state_dict(self.ours.state_dict(), strict=True)
        return module, deepseek.DeepseekV3RotaryEmbedding(theirs).to(self.place)

    def steps(
        self, context: int, batch: int, forms: Sequence[str], queries: int = 1
    ) -> dict[str, Step]:
        """A step behind `context` cached tokens for each form: x (B, S, D) -> (B, S, D).

        Forms that are not here are left out; transformers' take one query.
        """
        numbers = torch.Generator(self.place).manual_seed(context)
        where = {"device": self.place, "dtype": self.dtype}
        x = torch.randn(batch, queries, self.cfg.hidden_size, generator=numbers, **where)
        latent = LatentCache.for_config(self.cfg, batch, context + queries, **where)
        c, r = self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim
        for count in _chunks(context):
            rows = torch.randn(batch, count, c + r, generator=numbers, **where)  # (B, T, C + R)
            latent.append(rows[..., :c], rows[..., c:])
        made = {form: self._our_step(form, x, latent) for form in forms if form in (*OURS, REBUILT)}
        named = {form: self.peers[form] for form in forms if form in self.peers}
        stored = _as_transformers_stores(latent, self.cfg) if named else ()
        made |= {form: _peer_step(*peer, x, stored) for form, peer in named.items()}
        return {form: made[form] for form in forms if form in made}

    def _our_step(self, form: str, x: Tensor, latent: LatentCache) -> Step:
        cache: Cache = self._expand(latent) if form == "expanded" else latent
        lengths = torch.full((len(x),), latent.longest)
        absorb = None if form == REBUILT else form == "absorbed"
        return Step(
            lambda: self.ours(x, cache, absorb=absorb), lambda: cache.trim(lengths), cache.nbytes
        )

    def _expand(self, latent: LatentCache) -> FullCache:
        """Every head's own keys and values, made from the latents that the other forms read."""
        where = {"device": self.place, "dtype": self.dtype}
        full = FullCache.for_config(self.cfg, latent.batch, latent.capacity, **where)
        heads, n = self.cfg.num_attention_heads, self.cfg.qk_nope_head_dim
        for count in _chunks(latent.longest):
            at = slice(full.longest, full.longest + count)
            up = self.ours.kv_b_proj(latent.c_kv[:, at]).unflatten(-1, (heads, -1))
            k_rope = latent.k_rope[:, at, None].expand(-1, -1, heads, -1)  # (B, T, H, R)
            full.append(torch.cat([up[..., :n], k_rope], dim=-1), up[..., n:])
        return full


def peer_problem() -> str | None:
    """Why transformers' layer cannot take part, in words; None where it can."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    if not hasattr(deepseek.DeepseekV3Attention, "expand_kv"):
        return "this transformers caches whole heads; 5.17 and later cache the latent"
    return None


def compare(
    steps: Mapping[str, Step], timer: timing.Timer, repeats: int, seconds: float
) -> dict[str, dict[str, float]]:
    """`timing.compare`, each cache put back after its step, outside the timed part."""

    def one(step: Step) -> float:
        taken = timer(step)
        step.reset()
        return taken

    return timing.compare(steps, timer=one, repeats=repeats, warmup=0, seconds=seconds)


def check_agreement(steps: Mapping[str, Step], tolerance: float) -> float:
    """Run every step once; the largest difference from the first, over the largest number.

    Also the warm-up. Raises BenchError beyond `tolerance`: a faster wrong answer is no result.
    """
    outputs = {}
    for form, step in steps.items():
        outputs[form] = step().float()
        step.reset()
    first, *_ = outputs.values()
    worst = {form: _difference(out, first) for form, out in outputs.items()}
    wrong = [f"{form}: {off:.1e}" for form, off in worst.items() if not off <= tolerance]
    if wrong:
        raise BenchError(
            f"Outputs differ from {next(iter(outputs))}'s by more than {tolerance:g} of the "
            f"largest number ({', '.join(wrong)}). Their times cannot be compared. Run "
            "tests/attention/test_oracle.py, which says where they part."
        )
    return max(worst.values())


def fitting(
    cfg: ModelConfig, context: int, batch: int, forms: Sequence[str], limit: float, element: int = 4
) -> list[str]:
    """Those of `forms` whose caches fit in `limit` bytes beside the largest step's own memory.

    Taken in the order given. Interleaved runs hold all their caches at once.
    """
    chosen: list[str] = []
    for form in forms:
        held = {_cache_of(form): _cache_elements(cfg, form) for form in [*chosen, form]}
        working = max(_working_elements(cfg, form) for form in [*chosen, form])
        if (sum(held.values()) + working) * context * batch * element <= limit:
            chosen.append(form)
    return chosen


def _cache_of(form: str) -> str:
    return "latent" if form in ("absorbed", "reexpanded") else form.split()[0]  # shared or not


def _cache_elements(cfg: ModelConfig, form: str) -> int:
    """Elements held for a cached token between steps."""
    if form == "expanded":
        return cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim)
    return cfg.kv_lora_rank + cfg.qk_rope_head_dim


def _working_elements(cfg: ModelConfig, form: str) -> int:
    """Elements a step makes for a cached token and drops: rebuilt heads, keys and values apart."""
    if form in ("absorbed", "expanded"):
        return cfg.num_attention_heads
    rebuilt = 2 * cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + 2 * cfg.v_head_dim
    return cfg.num_attention_heads * rebuilt + _cache_elements(cfg, form)


def _difference(out: Tensor, wanted: Tensor) -> float:
    return float((out - wanted).abs().max() / wanted.abs().max())


def _chunks(count: int) -> list[int]:
    whole, rest = divmod(count, _CHUNK)
    return [_CHUNK] * whole + [rest] * (rest > 0)


def _as_transformers_stores(latent: LatentCache, cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """(B, 1, T, C) and (B, 1, T, R), even coordinates of a rotated key first."""
    k_rope = latent.k_rope
    if cfg.rope_interleave:
        k_rope = torch.cat([k_rope[..., 0::2], k_rope[..., 1::2]], dim=-1)
    return latent.c_kv[:, None].contiguous(), k_rope[:, None].contiguous()


def _peer_step(
    module: Callable, rotary: Callable, x: Tensor, stored: tuple[Tensor, Tensor]
) -> Step:
    """transformers' layer over a DynamicCache. Its angles are given: a model makes them once."""
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(*(part[:, :, :1] for part in stored), 0)
    held = cache.layers[0]
    angles = rotary(x, torch.full((1, 1), stored[0].shape[2], device=x.device))

    def reset() -> None:
        held.keys, held.values = stored  # a step makes new tensors: these are as they were

    reset()
    size = sum(part.untyped_storage().nbytes() for part in stored)
    return Step(lambda: module(x, angles, None, cache)[0], reset, size)
