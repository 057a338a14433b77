"""What users of a service are promised, and in which formats it may keep weights and caches."""

from dataclasses import dataclass, replace

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.expert_network import FLAT, Exchange


class ServingError(ValueError):
    """A serving target that no deployment can be asked for."""


@dataclass(frozen=True)
class Target:
    """What users are promised, and in which formats.

    context: tokens in each cache; 4,989 is the mean of DeepSeek's own service. tokens_per_second:
    that one user sees. devices: of a unit; None: the best number is looked for. drafts: tokens
    guessed ahead by the MTP module, each accepted with `acceptance`; None: one where the model has
    a module and it serves more, as a draft is one more token to send. cut: each matrix is cut over
    the devices (tensor parallelism); None: where the model has no experts, or more is served so.
    Raises ServingError with all that is wrong.
    """

    context: int = 4989
    tokens_per_second: float = 20.0
    devices: int | None = None
    weights: str = "fp8"
    cache: str = "bf16"
    drafts: int | None = None
    acceptance: float = 0.85
    exchange: Exchange = FLAT
    cut: bool | None = None

    def __post_init__(self) -> None:
        checks = {
            f"context = {self.context} is not 1 or more": self.context >= 1,
            f"tokens_per_second = {self.tokens_per_second} is not above 0": (
                self.tokens_per_second > 0
            ),
            f"devices = {self.devices} is not 1 or more": self.devices is None or self.devices >= 1,
            f"drafts = {self.drafts} is not 0 or more": self.drafts is None or self.drafts >= 0,
            f"acceptance = {self.acceptance} is not from 0 to 1": 0 <= self.acceptance <= 1,
        }
        if wrong := [said for said, fine in checks.items() if not fine]:
            raise ServingError(
                f"No such service: {'; '.join(wrong)}. Nothing can be planned for it. Change each "
                "number named."
            )

    def ways(self, cfg: ModelConfig) -> list["Target"]:
        """This target with each number of drafts that may be tried.

        Raises ServingError for more drafts than the model has modules.
        """
        modules = cfg.num_nextn_predict_layers
        if self.drafts is None:
            return [replace(self, drafts=n) for n in range(min(1, modules) + 1)]
        if self.drafts > modules:
            raise ServingError(
                f"{self.drafts} drafts, and the model has {modules} MTP modules to make them: "
                f"they would come from nowhere. Give drafts of {modules} or less."
            )
        return [self]


USUAL = Target()
