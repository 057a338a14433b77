"""How long a cell that trains or times may take."""

import math
import os


def live_seconds(default: float = 45.0) -> float:
    """Seconds for a live cell: DSV3_LIVE_SECONDS where it is a positive number, else 45."""
    try:
        seconds = float(os.environ["DSV3_LIVE_SECONDS"])
    except (KeyError, ValueError):
        return default
    return seconds if math.isfinite(seconds) and seconds > 0 else default
