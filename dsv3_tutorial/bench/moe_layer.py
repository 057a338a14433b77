"""The routed experts of one layer in every form, ready to be timed: same weights, same routing.

E experts, K experts per token, M tokens, D hidden, F expert width. Routing is drawn at random, as
even as chance makes it. A form that differs from the first, in result or gradients, is not timed.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_tutorial.bench import timing
from dsv3_tutorial.bench.attention_steps import BenchError
from dsv3_tutorial.moe import experts

ENGINES = experts.ENGINES
DENSE = "dense"  # one MLP of the activated width, K F: the same arithmetic without a choice
PEERS = ("transformers eager", "transformers grouped_mm", "transformers batched_mm")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest number
BATCHED_LIMIT = 2**26  # bytes of weights that batched_mm may copy: it takes a copy for each row
INSTALL = "pip install 'transformers>=5.17'"
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Size:
    """E experts, K of them for each of M tokens; D and F."""

    experts: int
    top_k: int
    tokens: int
    hidden: int = 512
    width: int = 256

    @property
    def flops(self) -> int:
        """Of one forward pass; a backward pass takes twice as many."""
        return 6 * self.tokens * self.top_k * self.hidden * self.width

    @property
    def rows_per_expert(self) -> float:
        return self.tokens * self.top_k / self.experts


class Layer:
    """One layer's routed experts: inputs, weights, a gradient to go back from, and every form.

    All forms read the same parameters. The global random state is left alone. `peer_problem` says
    why transformers takes no part, or is None.
    """

    def __init__(
        self, size: Size, place: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.size, self.dtype, self.place = size, dtype, torch.device(place)
        numbers = torch.Generator().manual_seed(size.tokens)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            made = torch.randn(*shape, generator=numbers) * scale
            return made.to(self.place, dtype)

        d, f, rows = size.hidden, size.width, size.tokens
        self.x = draw(rows, d).requires_grad_()
        self.grad = draw(rows, d)
        self.gate_up = nn.Parameter(draw(size.experts, 2 * f, d, scale=d**-0.5))
        self.down = nn.Parameter(draw(size.experts, d, f, scale=f**-0.5))
        chances = torch.rand(rows, size.experts, generator=numbers)
        self.indices = chances.topk(size.top_k, dim=-1).indices.to(self.place)  # (M, K)
        weights = torch.rand(rows, size.top_k, generator=numbers)
        self.weights = (weights / weights.sum(-1, keepdim=True)).to(self.place).requires_grad_()
        wide = size.top_k * f
        self.dense_up = nn.Parameter(draw(2 * wide, d, scale=d**-0.5))
        self.dense_down = nn.Parameter(draw(d, wide, scale=wide**-0.5))
        self.peer_problem = peer_problem()

    @property
    def leaves(self) -> Outputs:
        return self.x, self.weights, self.gate_up, self.down

    def forward(self, form: str) -> Callable[[], Tensor]:
        """One form's forward pass, M tokens to (M, D), as a function of nothing."""
        if form == DENSE:
            return lambda: F.linear(
                experts.swiglu(F.linear(self.x, self.dense_up)), self.dense_down
            )
        if form in PEERS:
            module = self._peer(form)
            return lambda: module(self.x, self.indices, self.weights)
        routed = self.x, self.indices, self.weights, self.gate_up, self.down
        return lambda: experts.run_experts(*routed, engine=form)

    def both(self, form: str) -> Callable[[], Outputs]:
        """Forward and backward: the output, and the gradients of input, weights and experts."""
        forward = self.forward(form)
        leaves = (self.x, self.dense_up, self.dense_down) if form == DENSE else self.leaves

        def run() -> Outputs:
            out = forward()
            return out.detach(), *torch.autograd.grad(out, leaves, self.grad)

        return run

    def forms(self, wanted: Sequence[str]) -> list[str]:
        """Those of `wanted` that can run here, at this size."""
        return [form for form in wanted if self._problem(form) is None]

    def _problem(self, form: str) -> str | None:
        if form in experts.ENGINES:
            interpreted = form == "triton" and self.place.type != "cuda"
            problem = experts.engine_problem(form, self.x, self.size.width)
            return "its kernel would be interpreted" if interpreted else problem
        if form == DENSE:
            return None
        copied = 3 * self.size.tokens * self.size.top_k * self.size.hidden * self.size.width
        if form.endswith("batched_mm") and copied * self.x.element_size() > BATCHED_LIMIT:
            return "its copies of the weights do not fit"
        return self.peer_problem

    def _peer(self, form: str) -> nn.Module:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

        size = self.size
        theirs = DeepseekV3Config(
            hidden_size=size.hidden,
            moe_intermediate_size=size.width,
            n_routed_experts=size.experts,
            num_experts_per_tok=size.top_k,
            n_group=1,
            topk_group=1,
        )
        theirs._experts_implementation = form.split()[1]
        with torch.device("meta"):
            module = deepseek.DeepseekV3Experts(theirs)
        module.gate_up_proj, module.down_proj = self.gate_up, self.down
        return module


def peer_problem() -> str | None:
    """Why transformers' experts cannot take part, in words; None where they can."""
    if importlib.util.find_spec("transformers") is None:
        return f"transformers is not installed ({INSTALL})"
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    if not hasattr(deepseek, "DeepseekV3Experts"):
        return f"this transformers keeps a module for each expert; it takes {INSTALL}"
    return None


def check_agreement(runs: Mapping[str, Callable[[], Outputs]], tolerance: float) -> float:
    """Run every form once; the largest difference from the first, over the largest number.

    Result and every gradient. Also the warm-up. Raises BenchError beyond `tolerance`.
    """
    first, worst = None, {}
    for form, run in runs.items():
        outputs = [out.float() for out in run()]
        first = outputs if first is None else first
        pairs = zip(outputs, first, strict=True)
        worst[form] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    wrong = [f"{form}: {off:.1e}" for form, off in worst.items() if not off <= tolerance]
    if wrong:
        raise BenchError(
            f"Results or gradients differ from {next(iter(runs))}'s by more than {tolerance:g} of "
            f"the largest number ({', '.join(wrong)}). Their times cannot be compared. Run "
            "tests/moe, which says where they part."
        )
    return max(worst.values())


def measure(
    layer: Layer, wanted: Sequence[str], timer: timing.Timer, repeats: int, seconds: float
) -> dict[str, dict[str, dict[str, float]]]:
    """Checked, then timed in turn: {"forward": {form: stats}, "forward and backward": {...}}.

    `seconds` of wall clock for each of the two, one round at least. The dense MLP computes
    something else: it is timed, and not compared.
    """
    forms = layer.forms(wanted)
    both = {form: layer.both(form) for form in forms}
    check_agreement({f: r for f, r in both.items() if f != DENSE}, TOLERANCE[layer.dtype])
    forward = {form: _without_graph(layer.forward(form)) for form in forms}
    options = {"timer": timer, "repeats": repeats, "seconds": seconds, "warmup": 1}
    return {
        "forward": timing.compare(forward, **options),
        "forward and backward": timing.compare(both, **(options | {"warmup": 0})),
    }


def _without_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def bare() -> Tensor:
        with torch.no_grad():
            return run()

    return bare
