"""Routed experts of DeepSeek-V3.2's shapes on a GPU: our Triton kernels, Humming and bf16.

128 experts, top-8; gate and up joined (4096 x 7168) and down (7168 x 2048); 1, 8, 64 and 512
tokens. Every kernel is checked against decode-then-multiply in float32, then timed in CUDA graphs
of several launches, each for other tokens and, of one token, other experts: no launch of the host
is counted, and what a launch reads was not read by the one before. GB/s counts the codes and scales
of the experts that were hit, as a share of the copy bandwidth measured in the same run. `with plan`
adds what puts routed pairs into blocks.

    python benchmarks/expert_kernels.py [--formats W3 W4 NVFP4 FP8] [--tokens 1 8 64 512]
        [--kernels triton humming] [--tune] [--layer] [--out FILE.json]

--layer times a whole expert layer through the runtime in a CUDA graph beside the sum of its
kernels, as the profiler has them: PackedExperts behind the routers of Qwen3-MoE and DeepSeek-V3.2,
transformers' own and the runtime's. With --formats and no name behind it, that alone. --tune tries
blocks of other sizes. Needs about 25 GB of GPU memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DeepseekV32Config, Qwen3MoeConfig
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from models.families import spec_of
from runtime.decode import decode_rows
from runtime.experts import PackedExperts
from runtime.packed import PackedWeights
from runtime.router import FusedRouter, law_of, wrong_answers
from runtime.storage import Storage

if TYPE_CHECKING:
    from runtime.kernels.triton_kernel import TritonKernel

EXPERTS, TOP_K = 128, 8
SHAPES = {"gate_up": (2, 2048, 7168), "down": (1, 7168, 2048)}
BF16 = torch.bfloat16
DEVICE = torch.device("cuda")


def storage(name: str, parts: int, rows: int, columns: int) -> Storage:
    """The layouts that are timed."""
    common: dict[str, Any] = {"rows": rows, "columns": columns, "parts": parts}
    if name in ("W3", "W4", "W8"):
        return Storage(
            kind="int", bits=int(name[1]), block=(1, 128), code_dtype=torch.int32,
            scale_dtype=BF16, **common,
        )  # fmt: skip
    if name == "NVFP4":
        return Storage(
            kind="nvfp4", bits=4, block=(1, 16), code_dtype=torch.uint8,
            scale_dtype=torch.float8_e4m3fn, **common,
        )  # fmt: skip
    return Storage(
        kind="fp8", bits=8, block=(128, 128), code_dtype=torch.float8_e4m3fn,
        scale_dtype=torch.float32, **common,
    )  # fmt: skip


def random_weights(held: Storage) -> PackedWeights:
    """Random codes and scales on the GPU; every code occurs."""
    weights = PackedWeights(held, EXPERTS)
    weights.allocate(DEVICE)
    codes = weights.codes.data
    if held.kind == "fp8":
        for expert in codes:
            expert.copy_(torch.randn(expert.shape, device=DEVICE))
    else:
        flat = codes.view(torch.uint8)
        flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, device=DEVICE))
    scale = 0.5 + torch.rand(weights.scale.shape, device=DEVICE)
    weights.scale.data.copy_(scale * (100 if held.kind == "nvfp4" else 0.01))
    if held.kind == "nvfp4":
        weights.global_scale.data.fill_(10000.0)
    return weights


def timed(runs: Sequence[Callable[[], Any]], repeats: int = 20) -> float:
    """Seconds of one run: the median of replays of a CUDA graph of all of them, by their number."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(runs))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written a second by an elementwise copy (memcpy's own kernel is slower)."""
    source = torch.randn(1 << 29, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed([partial(torch.mul, source, 2.0, out=target)] * 4)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def expected_rows(
    weights: PackedWeights, x: torch.Tensor, ids: torch.Tensor, top_k: int, pairs: list[int]
) -> torch.Tensor:
    """float32 products of some pairs with decoded weights (before any reordering)."""
    flat = ids.reshape(-1)
    rows = []
    for pair in pairs:
        which = flat[pair].reshape(1).long()
        weight = decode_rows(weights, which, 0, weights.storage.height, torch.float32)[0]
        rows.append(weight @ x[pair // top_k].float())
    return torch.stack(rows)


class Report:
    """Rows of the table, printed as they come."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        self.rows: list[dict[str, Any]] = []

    def add(
        self, kernel: str, name: str, case: Case, seconds: float, error: float,
        with_plan: float | None = None,
    ) -> None:  # fmt: skip
        parts, rows, columns = SHAPES[case.shape]
        weights = parts * rows * columns
        one = weights * 2 if name == "bf16" else storage(name, *SHAPES[case.shape]).nbytes(1)
        nbytes = case.hit * one
        row = {
            "kernel": kernel, "format": name, "shape": case.shape, "tokens": case.tokens,
            "experts_hit": case.hit, "us": seconds * 1e6, "GB/s": nbytes / seconds / 1e9,
            "share_of_copy": nbytes / seconds / self.bandwidth,
            "TFLOP/s": 2 * case.tokens * TOP_K * weights / seconds / 1e12, "error": error,
            "us_with_plan": None if with_plan is None else with_plan * 1e6,
        }  # fmt: skip
        self.rows.append(row)
        plan = "" if with_plan is None else f"  with plan {with_plan * 1e6:.1f} us"
        print(
            f"{kernel:9}{name:7}{case.shape:9}{case.tokens:>5} tokens {row['us']:9.1f} us "
            f"{row['GB/s']:6.0f} GB/s {row['share_of_copy']:6.1%} of copy "
            f"{row['TFLOP/s']:7.1f} TFLOP/s  error {error:.4f}{plan}",
            flush=True,
        )


class Case:
    """Several routings of so many tokens and their inputs, for one of the shapes."""

    def __init__(self, shape: str, tokens: int, generator: torch.Generator) -> None:
        self.shape, self.tokens = shape, tokens
        self.top_k = TOP_K if shape == "gate_up" else 1
        count = max(2, 16 // tokens)
        order = torch.rand(tokens, EXPERTS, device=DEVICE, generator=generator).argsort(1)
        # of one token, each routing has experts that no other has
        self.ids = [order[:, TOP_K * i : TOP_K * (i + 1)].contiguous() for i in range(count)]
        self.hit = round(statistics.mean(int(ids.unique().numel()) for ids in self.ids))
        self.some = [0, tokens * TOP_K // 2, tokens * TOP_K - 1]
        rows = tokens * TOP_K // self.top_k
        self.inputs = [
            torch.randn(rows, SHAPES[shape][2], device=DEVICE, generator=generator).to(BF16)
            for _ in self.ids
        ]


def kernels_of(names: list[str]) -> dict[str, TritonKernel]:
    from runtime.kernels.triton_kernel import TritonKernel

    made: dict[str, TritonKernel] = {}
    for name in names:
        if name == "triton":
            made[name] = TritonKernel(DEVICE)
        else:
            from runtime.humming import HummingKernel

            made[name] = HummingKernel(DEVICE)
    return made


def compare(report: Report, options: argparse.Namespace) -> None:
    """Every format, shape and number of tokens by every kernel."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for shape, (parts, rows, columns) in SHAPES.items():
        cases = [Case(shape, tokens, generator) for tokens in options.tokens]
        for name in options.formats:
            for kernel_name, kernel in kernels_of(options.kernels).items():
                weights = random_weights(storage(name, parts, rows, columns))
                if not kernel.supports(weights.storage):
                    continue
                try:
                    measure(report, kernel_name, kernel, weights, name, cases, options.tune)
                except Exception:
                    traceback.print_exc(limit=-4)
                del weights
                torch.cuda.empty_cache()
        plain = torch.randn(EXPERTS, parts * rows, columns, device=DEVICE, dtype=BF16) * 0.02
        for case in cases:
            runs = []
            for ids, x in zip(case.ids, case.inputs, strict=True):
                flat = ids.reshape(-1)
                x_PK = x[flat.argsort() // case.top_k].contiguous()
                offs = flat.bincount(minlength=EXPERTS).cumsum(0).int()
                runs.append(partial(F.grouped_mm, x_PK, plain.transpose(1, 2), offs=offs))
            report.add("torch", "bf16", case, timed(runs), 0.0)
        del plain, runs
        torch.cuda.empty_cache()


def measure(
    report: Report, kernel_name: str, kernel: TritonKernel, weights: PackedWeights, name: str,
    cases: list[Case], tune: bool,
) -> None:  # fmt: skip
    """One kernel and one set of weights: errors, products alone, products with their plans."""
    wanted = [
        expected_rows(weights, case.inputs[0], case.ids[0], case.top_k, case.some) for case in cases
    ]
    began = time.monotonic()
    kernel.prepare(weights)
    torch.cuda.synchronize()
    print(f"{kernel_name} reorders {name} {cases[0].shape}: {time.monotonic() - began:.1f} s")
    for case, want in zip(cases, wanted, strict=True):
        pairs = case.tokens * TOP_K
        alone, both = [], []
        for ids, x in zip(case.ids, case.inputs, strict=True):
            plan = kernel.plan(ids, weights)
            alone.append(partial(kernel.product, weights, x, plan, pairs, case.top_k))
            both.append(partial(planned, kernel, weights, x, ids, case.top_k))
        error = relative_error(alone[0]()[case.some], want)
        report.add(kernel_name, name, case, timed(alone), error, timed(both))
        if tune and kernel_name == "triton":
            tune_rows(kernel, weights, case, name)


def planned(
    kernel: TritonKernel, weights: PackedWeights, x: torch.Tensor, ids: torch.Tensor, top_k: int
) -> torch.Tensor:
    """The product with everything it takes."""
    return kernel.product(weights, x, kernel.plan(ids, weights), ids.numel(), top_k)


def tune_rows(kernel: TritonKernel, weights: PackedWeights, case: Case, name: str) -> None:
    """Other tokens and rows than the kernel's own."""
    from runtime.kernels.plans import by_expert
    from runtime.kernels.tiles import Tile

    alone = case.tokens == 1
    tried = [Tile(t, r) for t, r in itertools.product((8, 16, 32, 64), (16, 32))]
    tried += [Tile(t, 16, fence=True, registers=128) for t in (8, 16)]
    tried += [
        Tile(t, r, warps=4, stages=s, columns=128)
        for t, r, s in itertools.product((16, 32, 64), (64, 128), (2, 3))
    ]
    for tile in tried:
        if alone and tile.tokens != min(t.tokens for t in tried):
            continue
        try:
            runs = []
            for ids, x in zip(case.ids, case.inputs, strict=True):
                plan = kernel.plan(ids, weights) if alone else by_expert(ids, EXPERTS, tile)
                plan = dataclasses.replace(plan, tile=tile)
                runs.append(
                    partial(kernel.product, weights, x, plan, case.tokens * TOP_K, case.top_k)
                )
            took = f"{timed(runs) * 1e6:.1f} us"
        except Exception as error:
            took = str(error)[:80]
        print(f"  tune {name} {case.shape} {case.tokens} tokens: {tile}: {took}", flush=True)


class Activation(nn.Module):
    """What PackedExperts asks of transformers' experts module."""

    is_transposed, has_gate = False, True

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()


def router_of(family: str) -> tuple[nn.Module, FusedRouter]:
    """transformers' router of a family at these sizes with random weights, and ours for it."""
    common = {"hidden_size": 7168, "num_experts_per_tok": TOP_K, "norm_topk_prob": True}
    common |= {"num_hidden_layers": 4, "first_k_dense_replace": 1}
    if family == "qwen3_moe":
        made: dict[str, Any] = {**common, "num_experts": EXPERTS}
        router: nn.Module = Qwen3MoeTopKRouter(Qwen3MoeConfig(**made))
    else:
        made = {**common, "n_routed_experts": EXPERTS, "n_group": 8, "topk_group": 4}
        made |= {"routed_scaling_factor": 2.5, "scoring_func": "sigmoid"}
        router = DeepseekV32TopkRouter(DeepseekV32Config(**made))
    router.to(DEVICE, BF16)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for tensor in router.state_dict().values():
        tensor.normal_(0.0, 0.01, generator=generator)
    found = law_of(router, {}, spec_of({**made, "model_type": family}), BF16)
    assert found is not None, f"no law found for {family}"
    fused = FusedRouter(router, found, ())
    assert not wrong_answers(fused, {}, BF16)
    return router, fused


def whole_layer(options: argparse.Namespace) -> None:
    """A layer through the runtime, its router included, beside the sum of its kernels."""
    routers = {family: router_of(family) for family in ("qwen3_moe", "deepseek_v32")}
    for kernel_name, kernel in kernels_of(options.kernels).items():
        made = [random_weights(storage("W3", *SHAPES[s])) for s in ("gate_up", "down")]
        for weights in made:
            kernel.prepare(weights)
        layer = PackedExperts(0, Activation(), EXPERTS, *made)
        layer.kernel = kernel
        for family, pair in routers.items():
            for title, router in zip(("transformers' router", "fused router"), pair, strict=True):
                name = f"{kernel_name} W3, {family}'s {title}"
                for tokens in options.tokens:
                    time_layer(name, layer, router, tokens)
        del layer, made
        torch.cuda.empty_cache()


def time_layer(name: str, layer: nn.Module, router: nn.Module, tokens: int) -> None:
    """One line; at one token, the kernels too."""
    inputs = [torch.randn(tokens, 7168, device=DEVICE).to(BF16) for _ in range(8)]

    def run(x: torch.Tensor) -> Any:
        _, weights, ids = router(x)
        return layer(x, ids, weights)

    kernels = kernel_seconds(run, inputs)
    seconds = timed([partial(run, x) for x in inputs])
    total = sum(kernels.values())
    print(
        f"layer {name}: {tokens:>4} tokens: {seconds * 1e6:8.1f} us in a graph, kernels "
        f"{total * 1e6:8.1f} us ({seconds / total:.3f})",
        flush=True,
    )
    if tokens == 1:
        for kernel, own in sorted(kernels.items(), key=lambda pair: -pair[1]):
            print(f"    {own * 1e6:6.1f} us  {kernel[:70]}")


def kernel_seconds(
    run: Callable[[torch.Tensor], Any], inputs: list[torch.Tensor]
) -> dict[str, float]:
    """Seconds in each kernel, of one run, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    for x in inputs:
        run(x)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for x in inputs:
            run(x)
        torch.cuda.synchronize()
    return {
        e.key: e.self_device_time_total / len(inputs) / 1e6
        for e in seen.key_averages()
        if e.self_device_time_total
    }


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="*", default=["W3", "W4", "NVFP4", "FP8"])
    parser.add_argument("--kernels", nargs="+", default=["triton", "humming"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--layer", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"copy {bandwidth / 1e9:.0f} GB/s"
    )
    report = Report(bandwidth)
    with torch.inference_mode():
        if options.formats:
            compare(report, options)
        if options.layer:
            whole_layer(options)
    if options.out:
        options.out.write_text(json.dumps({"copy": bandwidth, "rows": report.rows}, indent=1))


if __name__ == "__main__":
    main()
