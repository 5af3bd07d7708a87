"""One MoE layer of DeepSeek-V3.2 on a GPU: forward pass, saliency's share, FP8 decoding.

    python -m benchmarks.moe_forward [--tokens 16384 65536] [--experts 256]

Random bf16 weights and hidden states; routing is skewed (some experts get ten times the mean).
TFLOP/s count the 8 routed experts of each token and nothing else. "With saliency" is what `score`
does: the observer sums seven quantities by expert and domain. Decoding goes from FP8 blocks to
bf16, GB/s counts both. Medians of 5 after one to warm up, by CUDA events.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from calibration.batches import Batch
from models.experts import ExpertWeights, RoutedExperts
from models.kernels.fp8 import dequantize
from reap.score import summing
from reap.stats import LayerStats

HIDDEN, INNER, TOP_K = 7168, 2048, 8
DEVICE = torch.device("cuda")


class SiluExperts(nn.Module):
    """What RoutedExperts asks of transformers' experts module."""

    has_gate = True

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()


def milliseconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median GPU time."""
    run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def random_weights(experts: int) -> ExpertWeights:
    """bf16, expert by expert (float32 of all would not fit)."""
    up = torch.empty(experts, 2 * INNER, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    down = torch.empty(experts, HIDDEN, INNER, dtype=torch.bfloat16, device=DEVICE)
    for expert in range(experts):
        up[expert].normal_(0, HIDDEN**-0.5)
        down[expert].normal_(0, INNER**-0.5)
    return ExpertWeights(up=up, down=down, up_bias=None, down_bias=None, transposed=False)


@torch.inference_mode()
def forward(module: RoutedExperts, tokens: int) -> None:
    """Time one number of tokens and print its row."""
    experts = module.num_experts
    hidden = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    skew = 0.7 * torch.randn(experts, device=DEVICE)
    scores = torch.sigmoid(torch.randn(tokens, experts, device=DEVICE) + skew)
    weights, ids = scores.topk(TOP_K)
    weights = 2.5 * weights / weights.sum(1, keepdim=True)
    counts = torch.bincount(ids.flatten(), minlength=experts)
    domains = (torch.arange(tokens) % 3).to(torch.uint8)
    batch = Batch((0,), (tokens,), torch.zeros(1, tokens, dtype=torch.int64), None, domains)
    add = summing(LayerStats.empty(experts, ("code", "tools", "swe"), DEVICE))
    module.observe = None
    plain = milliseconds(lambda: module(hidden, ids, weights))
    module.observe = lambda record: add(record, batch)
    summed = milliseconds(lambda: module(hidden, ids, weights))
    work = 6 * tokens * TOP_K * HIDDEN * INNER / 1e9
    print(
        f"{tokens} tokens (an expert: {int(counts.min())} to {int(counts.max())}): forward "
        f"{plain:.1f} ms, {work / plain:.0f} TFLOP/s; with saliency {summed:.1f} ms, "
        f"{work / summed:.0f} TFLOP/s, {summed / plain - 1:+.1%}",
        flush=True,
    )


def decoding(experts: int) -> None:
    """Decode a layer's FP8 blocks, all of one shape in one launch."""
    total = 0.0
    for rows, columns in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        matrices = [
            (
                torch.randn(rows, columns, device=DEVICE).mul(100).to(torch.float8_e4m3fn),
                torch.rand(rows // 128, columns // 128, device=DEVICE),
                torch.empty(rows, columns, device=DEVICE, dtype=torch.bfloat16),
            )
            for _ in range(experts)
        ]
        total += milliseconds(lambda held=matrices: dequantize(held, (128, 128)))
        del matrices
    moved = 3 * experts * 3 * HIDDEN * INNER
    print(f"FP8 of {experts} experts decoded: {total:.1f} ms, {moved / total / 1e6:.0f} GB/s")


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384, 65536])
    parser.add_argument("--experts", type=int, default=256)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    module = RoutedExperts(0, SiluExperts(), options.experts)
    module.weights = random_weights(options.experts)
    for tokens in options.tokens:
        forward(module, tokens)
    module.weights = None
    torch.cuda.empty_cache()
    decoding(options.experts)


if __name__ == "__main__":
    main()
