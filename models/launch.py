"""Which of several processes this one is, by the variables that launchers set.

torchrun, `accelerate launch` and most clusters' own launchers set RANK and WORLD_SIZE. Kept apart
from processes.py, so that the command line can ask without importing torch.
"""

from __future__ import annotations

import os


def launched() -> tuple[int, int]:
    """(number, count) of this process among those started together; (0, 1) where it is alone."""
    if "RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
