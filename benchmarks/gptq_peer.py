"""Time and output error of our GPTQ and llm-compressor's, on this machine's CPU.

    python -m benchmarks.gptq_peer [--experts B] [--layer L] [--threads T]

Two inputs: Gaussian weights under strongly correlated inputs with outlier channels, and the
experts of the bundled demo model under the inputs its router sends them. Both sides get the same
weights and the same Hessians (tokens that the printed error is taken over too); each fixes its own
scales. llm-compressor runs with its defaults (min-max scales, static order, damping .01) and with
its MSE observers. Printed: seconds, and  sum tr((W−Q) H (W−Q)ᵀ) / sum tr(W H Wᵀ).
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import ActivationOrdering
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer

from benchmarks.correlated import correlated
from quant.gptq import energy, gptq
from quant.rounding import round_to_nearest
from quant.schemes import SCHEMES, Scheme, dequantize

DEMO = Path(__file__).parents[1] / "demo" / "model"
OBSERVERS = {"int": "memoryless_mse", "nvfp4": "nvfp4_expanded_mse"}
SCHEME_NAMES = ("W3A16", "W4A16", "NVFP4")


def llmcompressor_scales(
    weight_BNK: torch.Tensor, scheme: Scheme, observer: str
) -> list[dict[str, Any]]:
    """Scale, zero point and global scale of each weight, by llm-compressor's observer."""
    found = []
    for weight in weight_BNK:
        args = scheme.weights.model_copy(update={"observer": observer, "observer_kwargs": {}})
        watch = Observer.load_from_registry(observer, base_name="weight", args=args)
        watch(weight)
        found.append(watch.get_qparams())
    return found


def llmcompressor_gptq(
    weight_BNK: torch.Tensor, hessian_BKK: torch.Tensor, scheme: Scheme, observer: str
) -> torch.Tensor:
    """What llm-compressor's GPTQ with static activation order decodes to, scales in bfloat16."""
    scales = llmcompressor_scales(weight_BNK, scheme, observer)
    return llmcompressor_rounding(weight_BNK, hessian_BKK, scheme, observer, scales)


def llmcompressor_rounding(
    weight_BNK: torch.Tensor,
    hessian_BKK: torch.Tensor,
    scheme: Scheme,
    observer: str,
    scales: list[dict[str, Any]],
) -> torch.Tensor:
    """The same, under the scales that its observer gave."""
    update = {"actorder": ActivationOrdering.STATIC, "observer": observer}
    divisors = [one["global_scale"] for one in scales]
    stored = torch.bfloat16 if scheme.kind == "int" else torch.float32
    rounded, _, _ = quantize_weight(
        weight_BNK.clone(),
        hessian_BKK.clone(),
        torch.stack([one["scale"] for one in scales]).to(stored).float(),
        torch.stack([one["zero_point"] for one in scales]),
        None if divisors[0] is None else torch.stack([one.reshape(-1)[0] for one in divisors]),
        scheme.weights.model_copy(update=update),
    )
    return rounded


def demo_experts(
    layer: int, count: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(gate and up stacked, their Hessians) and (down, its Hessians) of the first experts."""
    from calibration.hidden_states import HiddenStates
    from calibration.stream import LayerWalk
    from cli.demo import part_tokens
    from models.checkpoint import Checkpoint
    from models.experts import RoutedBatch
    from models.families import spec_of
    from models.skeleton import Skeleton
    from models.source_formats import Source

    checkpoint = Checkpoint.open(DEMO)
    skeleton = Skeleton(Source(checkpoint, spec_of(checkpoint.config)), dtype=torch.bfloat16)
    tokens = part_tokens(DEMO, "train", 24, 512)
    kept: dict[str, torch.Tensor] = {}
    sums: dict[tuple[int, str], torch.Tensor] = {}

    def observe(record: RoutedBatch, _: object) -> None:
        experts = skeleton.experts[layer]
        weights = experts.weights
        assert weights is not None
        kept["up"] = weights.up_for_mm[:count].mT.float().clone()
        kept["down"] = weights.down_for_mm[:count].mT.float().clone()
        for expert in range(count):
            inputs = record.inputs_TD[record.token_P[record.expert_P == expert]]
            middle = experts.activate(inputs @ weights.up_for_mm[expert])
            for name, rows in (("up", inputs.float()), ("down", middle.float())):
                sums[expert, name] = sums.get((expert, name), 0) + rows.T @ rows

    with tempfile.TemporaryDirectory() as folder:
        walk = LayerWalk(skeleton, tokens, HiddenStates(Path(folder), None), 4096)
        walk.embed()
        for number in range(layer + 1):
            walk.run(number, observe if number == layer else None)
    up, down = (
        (kept[name], torch.stack([sums[expert, name] for expert in range(count)]))
        for name in ("up", "down")
    )
    return up, down


def compare(name: str, weight: torch.Tensor, hessian: torch.Tensor) -> None:
    """One line for each scheme and method."""
    whole = energy(weight, hessian).sum()
    print(f"\n{name}: {weight.shape[0]} weights of {list(weight.shape[1:])}")
    for scheme_name in SCHEME_NAMES:
        scheme = SCHEMES[scheme_name]
        methods = {
            "ours": lambda s=scheme: dequantize(gptq(weight, hessian, s).quantized, s),
            "ours, RTN": lambda s=scheme: dequantize(
                round_to_nearest(weight, s, importance_BK=hessian.diagonal(dim1=1, dim2=2)), s
            ),
            "llm-compressor": lambda s=scheme: llmcompressor_gptq(
                weight, hessian, s, "memoryless_minmax"
            ),
            "llm-compressor, MSE scales": lambda s=scheme: llmcompressor_gptq(
                weight, hessian, s, OBSERVERS[s.kind]
            ),
        }
        for label, method in methods.items():
            start = time.perf_counter()
            decoded = method()
            seconds = time.perf_counter() - start
            error = (energy(weight - decoded, hessian).sum() / whole).item()
            print(f"  {scheme_name:6s} {label:28s} {seconds:7.2f} s   {error:.6f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine()}, {args.threads} thread(s), torch {torch.__version__}")
    compare("synthetic", *correlated(args.experts, 256, 512, 4096, seed=0))
    up, down = demo_experts(args.layer, args.experts)
    compare(f"demo model, layer {args.layer}, gate and up", *up)
    compare(f"demo model, layer {args.layer}, down", *down)


def machine() -> str:
    """This machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


if __name__ == "__main__":
    main()
