"""Packed weights on a CPU beside bfloat16: one Linear, and routed experts.

    python -m benchmarks.cpu_kernels [--threads 1] [--repeats 5] [--rows 2048] [--columns 7168]
        [--experts 0] [--formats W3 ...] [--kernels compiled passes int4] [--tokens 1 8 64 512]

The largest of DeepSeek-V3.2's expert matrices for 1, 8, 64 and 512 tokens: oneDNN's own bfloat16
product beside the default (tiles decoded by runtime/compiled_tiles.py), the same where numba is
missing (runtime/cpu_tiles.py) and `--backend int4`. With --experts E there are E such matrices and
every token goes to two of them; bfloat16 is then torch's grouped product.

Each goes through several matrices in turn, so that no cache holds them; the kernels take turns
too. Printed is the fastest of all runs, for other load on the machine only adds, and its ratio to
bfloat16's; "error" is one token's, relative to float64 with the weights in float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.expert_kernels import storage
from runtime.compiled_tiles import CompiledTiles
from runtime.int4 import Int4Kernel
from runtime.kernel import Kernel, TorchKernel
from runtime.packed import PackedWeights

COPIES = {1: 6, 8: 6, 64: 2}  # matrices that take turns, by tokens; one of more tokens
TOP_K = 2
FORMATS = ("W3", "W4", "W8", "NVFP4", "FP8")
Product = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]  # copy, inputs, expert ends


def kernel_named(name: str) -> Kernel:
    """What a word of --kernels means."""
    if name == "int4":
        return Int4Kernel()
    if name == "passes":
        return TorchKernel()
    tiles = CompiledTiles(torch.device("cpu"), torch.bfloat16)
    if not tiles.ready(storage("W4", 1, 64, 128)):
        raise SystemExit(f"compiled tiles: {tiles.missing}")
    return TorchKernel(tiles)


def random_weights(name: str, experts: int, rows: int, columns: int) -> PackedWeights:
    """Matrices of random codes and scales."""
    weights = PackedWeights(storage(name, 1, rows, columns), experts)
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


def plain_product(experts: int, copies: int, rows: int, columns: int) -> Product:
    """bfloat16's."""
    held = [torch.randn(max(1, experts), rows, columns).bfloat16() for _ in range(copies)]
    if experts:
        return lambda copy, x, ends: F.grouped_mm(
            x, held[copy].transpose(1, 2), offs=ends.to(torch.int32)
        )
    return lambda copy, x, _: F.linear(x, held[copy][0])


def packed_product(
    name: str, kernel: Kernel, experts: int, copies: int, rows: int, columns: int
) -> tuple[Product, float]:
    """A kernel's, and its error with one token."""
    held = [random_weights(name, max(1, experts), rows, columns) for _ in range(copies)]
    one = torch.randn(1, columns).bfloat16()
    exact = one.double() @ TorchKernel().decode(held[0], 0, torch.float32).double().T
    for weights in held:
        kernel.prepare(weights)
    if experts:
        ends = torch.ones(experts, dtype=torch.long)
        found = kernel.grouped(held[0], one, ends)
    else:
        found = kernel.linear(held[0], one)
    error = float((found - exact).norm() / exact.norm())
    if experts:
        return lambda copy, x, ends: kernel.grouped(held[copy], x, ends), error
    return lambda copy, x, _: kernel.linear(held[copy], x), error


def inputs(tokens: int, experts: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs, each token to TOP_K experts where there are any, and where experts end."""
    if not experts:
        return torch.randn(tokens, columns).bfloat16(), torch.tensor([tokens])
    chosen = torch.stack([torch.randperm(experts)[:TOP_K] for _ in range(tokens)])
    ends = torch.bincount(chosen.flatten(), minlength=experts).cumsum(0)
    return torch.randn(tokens * TOP_K, columns).bfloat16(), ends


def fastest(
    products: dict[tuple[str, str], Product],
    tokens: list[int],
    repeats: int,
    options: tuple[int, int],
) -> dict[tuple[str, str, int], float]:
    """Seconds by format, kernel and tokens. `options`: experts and columns."""
    experts, columns = options
    best: dict[tuple[str, str, int], float] = {}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for count in tokens:
                x, ends = inputs(count, experts, columns)
                for copy in range(1 if experts else COPIES.get(count, 1)):
                    for key, product in products.items():
                        began = time.perf_counter()
                        product(copy, x, ends)
                        took = time.perf_counter() - began
                        if repeat:  # the first is for warming up
                            best[*key, count] = min(took, best.get((*key, count), took))
    return best


def main() -> None:
    """Print one row a format and kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    kernels = ("compiled", "passes", "int4")
    parser.add_argument("--kernels", nargs="+", default=kernels, choices=kernels)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, columns, experts = options.rows, options.columns, options.experts
    copies = 1 if experts else max(COPIES.get(count, 1) for count in options.tokens)
    products = {("bf16", ""): plain_product(experts, copies, rows, columns)}
    errors = {("bf16", ""): ""}
    for kernel_name in options.kernels:
        kernel = kernel_named(kernel_name)
        for name in options.formats:
            if kernel.supports(storage(name, 1, rows, columns)):
                product, error = packed_product(name, kernel, experts, copies, rows, columns)
                products[name, kernel_name] = product
                errors[name, kernel_name] = f"{error:.4f}"
    best = fastest(products, options.tokens, options.repeats, (experts, columns))
    where = f"{experts} experts of " if experts else ""
    print(f"{where}{rows}x{columns}, {options.threads} threads, ms (times bf16)")
    print(" " * 16 + "".join(f"{f'{count} tokens':>18}" for count in options.tokens) + "    error")
    for name, kernel_name in products:
        cells = ""
        for count in options.tokens:
            own, base = best[name, kernel_name, count], best["bf16", "", count]
            cells += f"{f'{own * 1e3:.2f} ({own / base:.2f})':>18}"
        print(f"{name:7}{kernel_name:9}{cells}{errors[name, kernel_name]:>9}", flush=True)


if __name__ == "__main__":
    main()
