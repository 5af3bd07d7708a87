"""What the passes of a full-size MoE layer spend a GPU's time on, kernel by kernel.

    python -m benchmarks.layer_passes FOLDER [--tokens 65536] [--batch-tokens 16384] [--rows 12]

FOLDER/model is full_size_model.py's checkpoint (DeepSeek-V3.2's shapes). Its first MoE layer is
loaded once and run over the tokens as `compress` runs it: `scoring` with REAP's sums, `hessians`
with those of every Linear and of half of the experts, `plain` with nothing watched. For each the
seconds of a run by the host's clock (copies of hidden states beside it), then the profiler's sums
of another one; copies are in them, although they run beside the kernels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.full_size_model import token_file
from calibration.batches import BATCH_TOKENS, Batch
from calibration.hidden_states import HiddenStates
from calibration.stream import LayerWalk
from calibration.tokens import TokenSet
from models.experts import Observer
from models.opening import open_model
from models.processes import ALONE
from models.skeleton import Skeleton
from quant.expert_sums import ExpertSums
from quant.inputs import LinearInputs, watched
from reap.score import summing_batches
from reap.shared_sums import SharedSums

LAYER, SET = 1, 16
DEVICE = torch.device("cuda", 0)


class Passes:
    """The loaded layer and the ways to run it."""

    def __init__(self, walk: LayerWalk) -> None:
        self.walk, self.domains = walk, tuple(walk.tokens.domains)
        self.experts = walk.skeleton.spec.num_experts
        self.current: list[Batch] = []
        layer = walk.skeleton.load_layer(LAYER, lambda record: self.watch(record))
        self.watch: Observer = lambda record: None
        self.linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}

    def plain(self) -> None:
        """Nothing is watched."""
        self.watch = lambda record: None
        self.walk.pass_through(LAYER, self.current, keep_output=True)

    def scoring(self) -> None:
        """REAP's sums."""
        add = summing_batches(SharedSums(ALONE, self.experts, self.domains, DEVICE))
        self.watch = lambda record: add(record, self.current[0])
        self.walk.pass_through(LAYER, self.current, keep_output=True)

    def hessians(self) -> None:
        """Hessians of the first half of the experts (what is left of a pruned layer), of all
        others together, and of the Linears."""
        sums = ExpertSums(
            [list(range(first, first + SET)) for first in range(0, self.experts // 2, SET)],
            self.experts,
            with_hessian=True,
            num_tokens=self.walk.num_tokens,
            room=1 << 40,
            again=lambda: None,
        )
        self.watch = lambda record: sums.add(record, self.current[0])
        with watched(self.linears, LinearInputs(True, self.walk.num_tokens), self.current):
            self.walk.pass_through(LAYER, self.current, keep_output=False)


def report(name: str, run: Callable[[], None], tokens: int, rows: int) -> None:
    """Print one pass."""
    run()
    torch.cuda.synchronize()
    began = time.monotonic()
    run()
    torch.cuda.synchronize()
    seconds = time.monotonic() - began
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    kernels = [(e.self_device_time_total / 1e3, e.count, e.key) for e in seen.key_averages()]
    print(
        f"{name}: {seconds * 1e3:.0f} ms, {seconds / tokens * 1e6:.2f} s a million tokens; "
        f"kernels and copies {sum(one[0] for one in kernels):.0f} ms"
    )
    for milliseconds, count, key in sorted(kernels, reverse=True)[:rows]:
        print(f"  {milliseconds:8.1f} ms {count:5}  {key[:100]}")


@contextmanager
def walk_before_layer(folder: Path, tokens: int, batch_tokens: int) -> Iterator[LayerWalk]:
    """A walk of random tokens through FOLDER/model that stands before LAYER."""
    token_set = TokenSet.load(token_file(folder, tokens))
    source = open_model(str(folder / "model")).source
    skeleton = Skeleton(source, dtype=torch.bfloat16, device=DEVICE)
    with tempfile.TemporaryDirectory() as hidden:
        walk = LayerWalk(skeleton, token_set, HiddenStates(Path(hidden), None), batch_tokens)
        walk.embed()
        walk.run(0)
        yield walk


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS["cuda"])
    parser.add_argument("--rows", type=int, default=12)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.tokens:,} tokens")
    with walk_before_layer(options.folder, options.tokens, options.batch_tokens) as walk:
        passes = Passes(walk)
        for run in (passes.scoring, passes.hessians, passes.plain):
            report(run.__name__, run, options.tokens, options.rows)


if __name__ == "__main__":
    main()
