"""Hessians, codes and packing of one DeepSeek-V3.2 layer on a GPU, in milliseconds.

    python -m benchmarks.hessian_kernels [--tokens 65536]

Hessians: 256 experts, top-8 of uniform random routing, so 524,288 rows at 65,536 tokens; gate and
up's from tokens gathered by expert (the gather counted), in sets of 16 experts as a job has them,
and down's; beside them one float32 product an expert, timed on 16 experts and multiplied. The
error is that of one expert against float64. Codes and packing: from weights in bfloat16 under
scales that are given (NVFP4) or made (FP8), and of codes that are there; on a quarter of the
layer, multiplied. Medians after one run to warm up, by the GPU's clock; inputs exceed its caches.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from quant.format import pack_bits
from quant.grid import Grid
from quant.hessians import add_products, made_symmetric
from quant.kernels.pack import fp8_blocks, round_codes
from quant.schemes import SCHEMES

HIDDEN, INNER, EXPERTS, TOP_K, SET = 7168, 2048, 256, 8, 16
DEVICE = torch.device("cuda")


def milliseconds(work: Callable[[], object], repeat: int = 5) -> float:
    """Median of `repeat` runs after one."""
    work()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def routed(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of all pairs by expert, and where each expert's begin and end."""
    chosen = torch.rand(num_tokens, EXPERTS, device=DEVICE).topk(TOP_K, dim=1).indices.flatten()
    expert_P, order = chosen.sort()
    end_E = torch.bincount(expert_P, minlength=EXPERTS).cumsum(0)
    return order // TOP_K, torch.cat([end_E.new_zeros(1), end_E[:-1]]), end_E


def gate_and_up(num_tokens: int) -> None:
    """Their Hessians, the error of one, and the plain way."""
    token_P, begin_E, end_E = routed(num_tokens)
    inputs_TD = torch.randn(num_tokens, HIDDEN, device=DEVICE).bfloat16()
    sums = [torch.zeros(SET, HIDDEN, HIDDEN, device=DEVICE) for _ in range(EXPERTS // SET)]

    def ups() -> None:
        inputs_PD = inputs_TD[token_P]
        for number, total in enumerate(sums):
            experts = slice(number * SET, (number + 1) * SET)
            add_products(total, inputs_PD, begin_E[experts], end_E[experts])

    print(f"  gate and up, {HIDDEN}: {milliseconds(ups, 3):.1f} ms")
    inputs_PD = inputs_TD[token_P]
    sums[0].zero_()
    add_products(sums[0], inputs_PD, begin_E[:SET], end_E[:SET])
    rows = inputs_PD[begin_E[0] : end_E[0]].double()
    exact = rows.T @ rows
    error = (made_symmetric(sums[0])[0].double() - exact).norm() / exact.norm()
    print(f"  error of one expert against float64: {float(error):.1e}")

    def by_one() -> None:
        for total, begin, end in zip(sums[0], begin_E.tolist(), end_E.tolist(), strict=False):
            own = inputs_PD[begin:end].float()
            total.addmm_(own.T, own)

    times = EXPERTS // SET
    print(f"  gate and up, one float32 product an expert: {times * milliseconds(by_one, 2):.0f} ms")


def down(num_tokens: int) -> None:
    """Of inputs that are there already, by expert."""
    _, begin_E, end_E = routed(num_tokens)
    middle_PF = torch.randn(num_tokens * TOP_K, INNER, device=DEVICE).bfloat16()
    total = torch.zeros(EXPERTS, INNER, INNER, device=DEVICE)
    spent = milliseconds(lambda: add_products(total, middle_PF, begin_E, end_E), 3)
    print(f"  down, {INNER}: {spent:.1f} ms")


def codes_and_words() -> None:
    """Of a quarter of the layer's weights."""
    count = EXPERTS // 4
    shapes = ((count, 2 * INNER, HIDDEN), (count, HIDDEN, INNER))
    weights = [0.02 * torch.randn(shape, device=DEVICE).bfloat16() for shape in shapes]
    grid = Grid(SCHEMES["NVFP4A16"], torch.bfloat16, torch.ones(count, device=DEVICE))
    steps = [
        0.005 + 0.02 * torch.rand(*w.shape[:2], w.shape[2] // 16, device=DEVICE) for w in weights
    ]

    def nvfp4() -> list[torch.Tensor]:
        pairs = zip(weights, steps, strict=True)
        return [pack_bits(round_codes(weight, step, None, grid), 4) for weight, step in pairs]

    def words(bits: int) -> Callable[[], object]:
        return lambda: [pack_bits(part, bits) for part in codes]

    print(f"  NVFP4 codes and words from bfloat16: {4 * milliseconds(nvfp4):.1f} ms")
    fp8 = 4 * milliseconds(lambda: [fp8_blocks(weight) for weight in weights])
    print(f"  FP8 codes and scales of 128 x 128 from bfloat16: {fp8:.1f} ms")
    codes = [torch.randint(-4, 4, shape, device=DEVICE, dtype=torch.int8) for shape in shapes]
    for bits in (3, 4):
        print(f"  words of {bits}-bit codes: {4 * milliseconds(words(bits)):.1f} ms")


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    torch.manual_seed(0)
    print(f"{options.tokens} tokens, {options.tokens * TOP_K} rows, {EXPERTS} experts")
    for measured in (gate_and_up, down):
        measured(options.tokens)
        torch.cuda.empty_cache()
    codes_and_words()


if __name__ == "__main__":
    main()
