"""Time, memory and output error of GPTQ on a GPU, by stage, and llm-compressor's beside it.

    python -m benchmarks.gptq_gpu [--experts B] [--scheme W3A16] [--hidden D] [--width F]
                                  [--sweeps S ...] [--orders] [--peer] [--peer-experts B]

Experts of DeepSeek-V3.2's size unless told otherwise: gate and up stacked, [2F, D] over one
Hessian, and down, [D, F]. Weights are Gaussian, inputs mixed from D / 4 sources with noise, uneven
channel sizes and a few outlier channels; each expert has its own 16,384 tokens. Printed:
milliseconds per expert of each stage and of the whole call (median of --repeat, after one to warm
up), memory beyond weights and Hessians, and  sum tr((W−Q) H (W−Q)ᵀ) / sum tr(W H Wᵀ)  in float64.
With --orders two experts are also rounded in the order of smallest pivots, as on a CPU.
With --peer llm-compressor's `quantize_weight` (static order, damping .01) rounds gate, up and down
of the same experts under the same Hessians, with min-max and with its MSE-searched scales.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from quant.columns import rounded_in_order
from quant.factor import damped_factor, factorise, factorise_by_pivots
from quant.gptq import GptqSettings, Solved, gptq
from quant.refine import refine
from quant.rounding import make_grid, round_to_nearest, searched_steps
from quant.schemes import SCHEMES, Scheme, dequantize

TOKENS = 16384
DEVICE = torch.device("cuda")


@dataclass(frozen=True, slots=True)
class Case:
    """Weights [B, N, K] and Hessians [B, K, K] of some experts."""

    name: str
    weight: torch.Tensor
    hessian: torch.Tensor

    @classmethod
    def made(cls, name: str, experts: int, rows: int, columns: int, seed: int) -> Case:
        """Fresh ones on the GPU."""
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        sources = columns // 4
        weight = 0.02 * normal(experts, rows, columns) * torch.exp(0.3 * normal(experts, rows, 1))
        hessian = torch.empty(experts, columns, columns, device=DEVICE)
        for expert in range(experts):
            strength = torch.rand(sources, 1, generator=generator, device=DEVICE).square()
            inputs = normal(TOKENS, sources) @ (normal(sources, columns) * strength)
            inputs = inputs / math.sqrt(sources) + 0.2 * normal(TOKENS, columns)
            inputs *= torch.exp(0.5 * normal(columns))
            inputs[
                :, torch.randperm(columns, generator=generator, device=DEVICE)[: columns // 80 + 1]
            ] *= 10
            inputs = inputs.bfloat16().float()
            torch.mm(inputs.T, inputs / TOKENS, out=hessian[expert])
        return cls(name, weight, hessian)

    def error(self, decoded: torch.Tensor) -> float:
        """Relative output error, float64."""
        lost = whole = 0.0
        for weight, found, hessian in zip(self.weight, decoded, self.hessian, strict=False):
            exact, missed = weight.double(), (weight - found).double()
            matrix = hessian.double()
            lost += float(((missed @ matrix) * missed).sum())
            whole += float(((exact @ matrix) * exact).sum())
        return lost / whole


def milliseconds(work: Callable[[], object], repeat: int) -> float:
    """Median of `repeat` runs after one, by the GPU's clock."""
    work()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def stages(case: Case, scheme: Scheme, repeat: int) -> dict[str, float]:
    """Milliseconds per expert of the parts of one call."""
    weight, hessian = case.weight, case.hessian
    grid = make_grid(weight, scheme, None, torch.bfloat16)
    damped, factor, _ = damped_factor(hessian, 0.01)
    step, zero = searched_steps(weight, grid, factor.importance_BK)
    columns_first = weight.mT.contiguous()
    step_BGN = step.mT.contiguous()
    zero_BGN = None if zero is None else zero.mT.contiguous()
    values, _ = rounded_in_order(columns_first, step_BGN, zero_BGN, factor, grid)

    def sweep() -> None:
        kept = values.clone(), step_BGN.clone()
        refine(columns_first, *kept, zero_BGN, damped, grid, 1)

    parts: dict[str, Callable[[], object]] = {
        "factor": lambda: damped_factor(hessian, 0.01),
        "search": lambda: searched_steps(weight, grid, factor.importance_BK),
        "loop": lambda: rounded_in_order(columns_first, step_BGN, zero_BGN, factor, grid),
        "sweep": sweep,
    }
    return {name: milliseconds(work, repeat) / len(weight) for name, work in parts.items()}


def ours(case: Case, scheme: Scheme, sweeps: int, repeat: int) -> float:
    """One line, and the milliseconds per expert."""
    settings = GptqSettings(sweeps=sweeps)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    solved = gptq(case.weight, case.hessian, scheme, settings=settings)
    memory = (torch.cuda.max_memory_allocated() - before) / len(case.weight) / 2**20
    spent = milliseconds(
        lambda: gptq(case.weight, case.hessian, scheme, settings=settings), repeat
    ) / len(case.weight)
    error = case.error(dequantize(solved.quantized, scheme))
    fell = int(solved.fell_back_B.sum())
    print(
        f"  {case.name:8s} {sweeps} sweeps: {spent:7.2f} ms per expert, {memory:6.0f} MiB per "
        f"expert, error {error:.6f} (reported {reported(solved):.6f}), {fell} fell back",
        flush=True,
    )
    return spent


def reported(solved: Solved) -> float:
    """The relative error a solution states of itself."""
    return float(solved.error_BN.double().sum() / solved.energy_BN.double().sum())


def orders(case: Case, scheme: Scheme, experts: int) -> None:
    """The error of the first experts under both orders of columns, before and after two sweeps."""
    part = Case(case.name, case.weight[:experts], case.hessian[:experts])
    grid = make_grid(part.weight, scheme, None, torch.bfloat16)
    weight = part.weight.mT.contiguous()
    damped, _, _ = damped_factor(part.hessian, 0.01)
    for name, factorised in (
        ("descending diagonal", factorise),
        ("smallest pivots", factorise_by_pivots),
    ):
        factor, _ = factorised(damped)
        found, zeros = searched_steps(part.weight, grid, factor.importance_BK)
        step = found.mT.contiguous()
        zero = None if zeros is None else zeros.mT.contiguous()
        values, _ = rounded_in_order(weight, step, zero, factor, grid)
        errors = []
        for sweeps in (0, 2):
            refine(weight, values, step, zero, damped, grid, sweeps)
            spread = step.repeat_interleave(weight.shape[1] // step.shape[1], dim=1)
            errors.append(part.error((values * spread).mT))
        print(
            f"  {case.name:8s} {experts} experts, {name}: error {errors[0]:.6f}, "
            f"after two sweeps {errors[1]:.6f}",
            flush=True,
        )


def peer(case: Case, scheme: Scheme, split: int, experts: int, repeat: int) -> None:
    """llm-compressor on the first experts: `split` matrices of them, one after the other."""
    from benchmarks.gptq_peer import OBSERVERS, llmcompressor_rounding, llmcompressor_scales

    part = Case(case.name, case.weight[:experts], case.hessian[:experts])
    mine = dequantize(gptq(part.weight, part.hessian, scheme).quantized, scheme)
    print(f"  {case.name:8s} ours, the same {experts}: error {part.error(mine):.6f}", flush=True)
    for observer in ("memoryless_minmax", OBSERVERS[scheme.kind]):
        decoded, spent = [], 0.0
        for weight in part.weight.chunk(split, dim=1):
            scales = llmcompressor_scales(weight, scheme, observer)

            call = partial(llmcompressor_rounding, weight, part.hessian, scheme, observer, scales)
            decoded.append(call())
            spent += milliseconds(call, repeat) / experts
        error = part.error(torch.cat(decoded, dim=1))
        print(
            f"  {case.name:8s} llm-compressor, {observer}: {spent:7.2f} ms per expert without its "
            f"scales, error {error:.6f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--scheme", choices=sorted(SCHEMES), default="W3A16")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--sweeps", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--orders", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--peer-experts", type=int, default=8)
    args = parser.parse_args()
    scheme = SCHEMES[args.scheme]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.experts} experts")
    total = dict.fromkeys(args.sweeps, 0.0)
    shapes = (("gate_up", 2 * args.width, args.hidden, 2), ("down", args.hidden, args.width, 1))
    for seed, (name, rows, columns, split) in enumerate(shapes):
        case = Case.made(name, args.experts, rows, columns, seed)
        plain = round_to_nearest(
            case.weight, scheme, importance_BK=case.hessian.diagonal(dim1=1, dim2=2)
        )
        print(f"{name}: {args.experts} x {[rows, columns]}, rounded to nearest: error "
              f"{case.error(dequantize(plain, scheme)):.6f}")  # fmt: skip
        del plain
        parts = stages(case, scheme, args.repeat)
        print("  ms per expert: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()), flush=True)
        for sweeps in args.sweeps:
            total[sweeps] += ours(case, scheme, sweeps, args.repeat)
        if args.orders:
            orders(case, scheme, min(args.experts, 2))
        if args.peer:
            peer(case, scheme, split, min(args.experts, args.peer_experts), args.repeat)
        del case
        gc.collect()
        torch.cuda.empty_cache()
    for sweeps, spent in total.items():
        print(f"three matrices, {sweeps} sweeps: {spent:.2f} ms per expert")


if __name__ == "__main__":
    main()
