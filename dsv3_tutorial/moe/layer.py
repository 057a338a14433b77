"""The mixture of experts as a layer: a gate, routed experts, and one that every token visits.

B batch, S positions, D hidden. DeepSeekMoE, section 3; DeepSeek-V3 report, equation 12.
"""

from torch import Tensor, nn

from dsv3_tutorial.config import ConfigError, ModelConfig
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.moe.experts import Experts
from dsv3_tutorial.moe.gate import Gate


class MoE(nn.Module):
    """forward: x (B, S, D) -> (B, S, D), the shared expert plus the weighted routed ones.

    No token is dropped, however uneven the load. `engine` forces how the routed experts are
    computed (`moe.experts.ENGINES`); None takes the fastest for the tensor and the load.
    """

    def __init__(self, cfg: ModelConfig, engine: str | None = None):
        super().__init__()
        if cfg.n_routed_experts is None:
            raise ConfigError(["n_routed_experts is not set: this config has no experts; use MLP"])
        self.gate = Gate(cfg)
        self.experts = Experts(
            cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size, engine
        )
        self.shared_experts = None
        if cfg.n_shared_experts:  # one network of their joint width is the same sum
            self.shared_experts = MLP(
                cfg.hidden_size, cfg.moe_intermediate_size * cfg.n_shared_experts
            )

    def forward(self, x: Tensor) -> Tensor:
        routing = self.gate(x)
        out = self.experts(x.flatten(0, -2), routing.indices, routing.weights).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)
