"""Packed weights on a CPU beside bfloat16: time of one Linear.

    python -m benchmarks.cpu_kernels [--threads 1] [--repeats 5] [--rows 2048] [--columns 7168]

The largest of DeepSeek-V3.2's expert matrices for 1, 8, 64 and 512 tokens: oneDNN's own bfloat16
product, the kernel that decodes tiles (runtime/kernel.py) and runtime/int4.py. Each goes
through several matrices in turn, so that no cache holds them; the kernels take turns too, so that
other load on the machine falls on all; printed are medians and their ratio to bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.expert_kernels import storage
from runtime.int4 import Int4Kernel
from runtime.kernel import TorchKernel
from runtime.packed import PackedWeights

COPIES = 6
TOKENS = (1, 8, 64, 512)
FORMATS = ("W3", "W4", "NVFP4", "FP8")


def random_weights(name: str, rows: int, columns: int) -> PackedWeights:
    """One matrix of random codes and scales."""
    weights = PackedWeights(storage(name, 1, rows, columns), 1)
    weights.allocate(torch.device("cpu"))
    if name == "FP8":
        weights.codes.copy_(torch.randn(weights.codes.shape))
    else:
        flat = weights.codes.view(torch.uint8)
        flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8))
    weights.scale.copy_(torch.rand(weights.scale.shape))
    if name == "NVFP4":
        weights.global_scale.fill_(1000.0)
    return weights


def main() -> None:
    """Print one row a format and kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=7168)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, columns = options.rows, options.columns
    plain = [torch.randn(rows, columns).bfloat16() for _ in range(COPIES)]
    kernels = {"torch": TorchKernel(), "int4": Int4Kernel()}
    held: dict[tuple[str, str], list[PackedWeights]] = {}
    errors = {("bf16", ""): ""}
    one = torch.randn(1, columns).bfloat16()
    for kernel_name, kernel in kernels.items():
        for name in FORMATS:
            if not kernel.supports(storage(name, 1, rows, columns)):
                continue
            all_of_it = [random_weights(name, rows, columns) for _ in range(COPIES)]
            exact = one.double() @ TorchKernel().decode(all_of_it[0], 0, torch.float32).double().T
            for weights in all_of_it:
                kernel.prepare(weights)
            error = (kernel.linear(all_of_it[0], one) - exact).norm() / exact.norm()
            errors[name, kernel_name] = f"{error:.4f}"
            held[name, kernel_name] = all_of_it
    times: dict[tuple[str, str, int], list[float]] = {}
    with torch.inference_mode():
        for repeat in range(options.repeats + 1):
            for tokens in TOKENS:
                x = torch.randn(tokens, columns).bfloat16()
                for copy in range(COPIES):
                    began = time.perf_counter()
                    F.linear(x, plain[copy])
                    took = [(("bf16", "", tokens), time.perf_counter() - began)]
                    for (name, kernel_name), all_of_it in held.items():
                        began = time.perf_counter()
                        kernels[kernel_name].linear(all_of_it[copy], x)
                        took.append(((name, kernel_name, tokens), time.perf_counter() - began))
                    if repeat:  # the first is for warming up
                        for key, seconds in took:
                            times.setdefault(key, []).append(seconds)
    print(f"{rows}x{columns}, {options.threads} threads, ms (times bf16)")
    print(f"{'':14}" + "".join(f"{f'{tokens} tokens':>18}" for tokens in TOKENS) + f"{'error':>9}")
    for name, kernel_name in (("bf16", ""), *held):
        cells = ""
        for tokens in TOKENS:
            own = statistics.median(times[name, kernel_name, tokens])
            base = statistics.median(times["bf16", "", tokens])
            cells += f"{f'{own * 1e3:.2f} ({own / base:.2f})':>18}"
        print(f"{name:7}{kernel_name:7}{cells}{errors[name, kernel_name]:>9}")


if __name__ == "__main__":
    main()
