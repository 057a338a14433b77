"""Delayed scaling: a tensor's scale from what it was in earlier steps, known before it is computed.

Transformer Engine's older recipe. It saves a pass over the tensor (measure, then cast) and pays
when a tensor grows: what lies beyond the remembered largest is cut off. DeepSeek-V3 measures every
tensor at hand instead, "online" (report, section 3.3.2).
"""

from collections import deque

import torch
from torch import Tensor

from dsv3_tutorial.fp8.quant import quantize_tensor, scale_for


class DelayedScale:
    """One tensor's history of largest magnitudes, and the scale that it gives the next step.

    history: how many steps are remembered; the largest of them counts. margin: powers of two left
    free above it. The first step, without a history, measures the tensor at hand.
    """

    def __init__(self, history: int = 16, margin: int = 0):
        if history < 1:
            raise ValueError(
                f"history={history}: with nothing remembered there is no scale. Give 1 or more."
            )
        self.margin = margin
        self.largest: deque[float] = deque(maxlen=history)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (...) -> float8_e4m3fn (...), scale float32 (): by the past. Then remembers x.

        What lies beyond 448 scales is clamped. NaN and infinity raise QuantizationError.
        """
        now = x.detach().abs().amax().item()
        past = max(self.largest, default=now)
        scale = scale_for(torch.tensor(past * 2.0**self.margin, device=x.device))
        stored = quantize_tensor(x, scale=scale)
        self.largest.append(now)
        return stored
