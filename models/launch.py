"""Which of several processes this one is, by the variables that launchers set.

torchrun, `accelerate launch` and most clusters' own launchers set RANK and WORLD_SIZE. Kept apart
from processes.py, so that the command line can ask without importing torch.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def launched() -> tuple[int, int]:
    """(number, count) of this process among those started together; (0, 1) where it is alone."""
    if "RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))


def keep_one_gpu(environment: MutableMapping[str, str]) -> None:
    """Let this process see the GPU of its number on its machine and no other.

    Before CUDA is asked for anything: the driver reads the list once. Choosing a current device was
    refused, because every new thread begins with the first one again. Left alone where the launcher
    has given each process one GPU already.
    """
    number = environment.get("LOCAL_RANK")
    if number is None or environment.get("WORLD_SIZE", "1") == "1":
        return
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        environment["CUDA_VISIBLE_DEVICES"] = number
    elif "," in listed:
        given = listed.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = dict(enumerate(given)).get(int(number), "")
