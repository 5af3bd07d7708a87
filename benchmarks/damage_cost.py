"""What `score --damage` adds to the scoring pass of a full-size MoE layer on a GPU.

    python -m benchmarks.damage_cost FOLDER [--tokens 131072] [--repeats 3]

FOLDER/model is full_size_model.py's checkpoint (DeepSeek-V3.2's shapes). Its first MoE layer is
loaded, scored, and its sums are made, with and without the damage statistics, in turn; seconds of
the whole pass, reading the layer from the page cache included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.layer_passes import DEVICE, LAYER, walk_before_layer
from calibration.batches import BATCH_TOKENS, Batch
from calibration.stream import LayerWalk
from models.journal import Journal
from models.processes import ALONE
from reap.damage import SAMPLED_TOKENS
from reap.damage_watch import DamageWatch
from reap.score import summing_batches
from reap.shared_sums import SharedSums


def scored(walk: LayerWalk, journal: Journal, size: int) -> float:
    """Seconds of one scoring pass of LAYER; what enters it stays."""
    domains = tuple(walk.tokens.domains)
    sums = SharedSums(ALONE, walk.skeleton.spec.num_experts, domains, DEVICE)
    watch = DamageWatch(walk, journal, size)
    torch.cuda.synchronize()
    began = time.monotonic()
    observe = watch.beside(LAYER, summing_batches(sums))
    current: list[Batch] = []
    walk.skeleton.load_layer(LAYER, lambda record: observe(record, current[0]))
    left, finish = watch.finisher(LAYER)
    walk.pass_through(LAYER, current, keep_output=True, left=left)
    if finish is not None:
        finish()
    walk.skeleton.unload_layer(LAYER)
    sums.total()
    torch.cuda.synchronize()
    return time.monotonic() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        walk_before_layer(options.folder, options.tokens, BATCH_TOKENS["cuda"]) as walk,
    ):
        journal = Journal.open(Path(folder) / "job", {"command": "damage_cost"})
        seconds: dict[int, list[float]] = {0: [], SAMPLED_TOKENS: []}
        for repeat in range(1 + options.repeats):  # the first one warms up
            for size, own in seconds.items():
                found = scored(walk, journal, size)
                if repeat:
                    own.append(found)
    plain, damage = (statistics.median(own) for own in seconds.values())
    print(
        f"{torch.cuda.get_device_name()}: {options.tokens:,} tokens, {plain:.2f} s a layer, with "
        f"--damage {damage:.2f} s: {damage - plain:.2f} s more ({damage / plain - 1:+.1%})"
    )


if __name__ == "__main__":
    main()
