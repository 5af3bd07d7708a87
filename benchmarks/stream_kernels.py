"""What streaming a DeepSeek-V3.2 layer through a GPU is made of, piece by piece.

    python -m benchmarks.stream_kernels [--tokens 65536] [--parts experts decoding carries]

experts   256 experts, top-8 of uneven random routing: the grouped GEMMs alone, the experts'
          forward as a job runs it, and with REAP's sums. TFLOP/s count 8 experts a token.
decoding  the layer's 768 matrices from FP8 blocks of 128 x 128 to bfloat16, all on the GPU.
carries   hidden states of eight batches of 16,384 tokens to the GPU and back to pageable memory:
          one after the other as torch copies them, and by calibration/carries.py beside products
          that keep the GPU busy; those products alone for comparison.

Medians after one run to warm up, by the GPU's clock; `carries` by the host's. Random values.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32MoE

from benchmarks.full_size_model import CONFIG, HIDDEN, INNER
from benchmarks.hessian_kernels import milliseconds
from calibration.batches import Batch
from calibration.carries import GpuCarries
from calibration.hidden_states import HiddenStates
from models.experts import ExpertWeights, RoutedExperts
from models.kernels.fp8 import dequantize
from reap.score import summing
from reap.stats import LayerStats

EXPERTS, TOP_K, BLOCK = 256, 8, (128, 128)
BATCHES, BATCH_TOKENS = 8, 16384
DOMAINS = ("code", "tools", "swe")
DEVICE = torch.device("cuda")


def experts_of_a_layer() -> RoutedExperts:
    """With the activation of transformers' own module and random weights."""
    settings = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    config = AutoConfig.for_model(**settings, num_hidden_layers=2, n_routed_experts=EXPERTS)
    with torch.device("meta"):
        original = DeepseekV32MoE(config).experts
    experts = RoutedExperts(1, original, EXPERTS)
    up = torch.empty(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    down = torch.empty(EXPERTS, HIDDEN, INNER, dtype=torch.bfloat16, device=DEVICE)
    for expert in range(EXPERTS):
        up[expert].normal_(0, HIDDEN**-0.5)
        down[expert].normal_(0, INNER**-0.5)
    experts.weights = ExpertWeights(up, down, None, None, transposed=False)
    return experts


def measure_experts(tokens: int) -> None:
    """GEMMs, forward, forward with sums."""
    experts = experts_of_a_layer()
    hidden_TD = torch.randn(tokens, HIDDEN, device=DEVICE).bfloat16()
    logits_TE = torch.randn(tokens, EXPERTS, device=DEVICE)
    logits_TE += 0.7 * torch.randn(EXPERTS, device=DEVICE)
    weights_TK, ids_TK = logits_TE.sigmoid().topk(TOP_K)
    weights_TK = (2.5 * weights_TK / weights_TK.sum(1, keepdim=True)).bfloat16()
    batch = Batch(
        samples=(0,),
        lengths=(tokens,),
        input_ids=torch.zeros(1, tokens, dtype=torch.long),
        attention_mask=None,
        domain_T=(torch.arange(tokens) % len(DOMAINS)).to(torch.uint8),
    )
    add = summing(LayerStats.empty(EXPERTS, DOMAINS, DEVICE))
    weights = experts.weights
    assert weights is not None
    counts_E = torch.bincount(ids_TK.flatten(), minlength=EXPERTS)
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    inputs_PD = hidden_TD.repeat(TOP_K, 1)
    middle_PF = torch.randn(tokens * TOP_K, INNER, device=DEVICE).bfloat16()

    def products() -> None:
        F.grouped_mm(inputs_PD, weights.up_for_mm, offs=offsets_E)
        F.grouped_mm(middle_PF, weights.down_for_mm, offs=offsets_E)

    def forward() -> None:
        experts(hidden_TD, ids_TK, weights_TK)

    times = {}
    with torch.inference_mode():
        times["grouped GEMMs alone"] = milliseconds(products, 5)
        times["experts"] = milliseconds(forward, 5)
        experts.observe = lambda record: add(record, batch)
        times["experts with saliency"] = milliseconds(forward, 5)
    work = 6 * HIDDEN * INNER * TOP_K * tokens
    print(f"{tokens} tokens, {int(counts_E.min())} to {int(counts_E.max())} an expert")
    for name, spent in times.items():
        print(f"  {name}: {spent:.1f} ms, {work / spent / 1e9:.0f} TFLOP/s")
    share = 1 - times["experts"] / times["experts with saliency"]
    print(f"  saliency's share: {share:.1%}", flush=True)


def measure_decoding() -> None:
    """Gate and up of all experts in one launch, down in another."""
    loads = []
    for count, rows, columns in ((2 * EXPERTS, INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)):
        codes = torch.randint(0, 127, (count, rows, columns), dtype=torch.uint8, device=DEVICE)
        scales = torch.rand(count, rows // BLOCK[0], columns // BLOCK[1], device=DEVICE)
        out = torch.empty(count, rows, columns, dtype=torch.bfloat16, device=DEVICE)
        loads.append(list(zip(codes.view(torch.float8_e4m3fn), scales, out, strict=True)))

    def decode() -> None:
        for matrices in loads:
            dequantize(matrices, BLOCK)

    spent = milliseconds(decode)
    moved = 3 * sum(codes.numel() for matrices in loads for codes, _, _ in matrices)
    print(
        f"decoding of {EXPERTS} experts: {spent:.2f} ms, {moved / spent / 1e6:.0f} GB/s", flush=True
    )


def seconds(work: Callable[[], object]) -> float:
    """Of the second of two runs, by the host's clock."""
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.monotonic()
        work()
        torch.cuda.synchronize()
    return time.monotonic() - began


def measure_carries(folder: Path) -> None:
    """Both ways of eight batches."""
    busy = torch.randn(8192, 8192, device=DEVICE).bfloat16()
    shape = (BATCH_TOKENS, HIDDEN)

    def run() -> None:
        for _ in range(36):  # about what a layer takes
            busy @ busy

    states = HiddenStates(folder, None)
    for batch in range(BATCHES):
        states.put(0, batch, {"hidden_states": torch.ones(shape, dtype=torch.bfloat16)})
    ways = GpuCarries(states, DEVICE)

    def alone() -> None:
        for _ in range(BATCHES):
            run()

    def beside() -> None:
        entering = ways.entering(0, range(BATCHES), keep=True)
        for batch, carry in enumerate(entering):
            run()
            ways.put(1, batch, carry)
        ways.settle()
        states.forget_from_ram(1)

    def in_turn() -> None:
        for batch in range(BATCHES):
            carry = states.take(0, batch, keep=True)["hidden_states"].to(DEVICE)
            run()
            states.put(1, batch, {"hidden_states": carry})
        states.forget_from_ram(1)

    print(
        f"{BATCHES} batches of {BATCH_TOKENS} tokens: {seconds(alone):.3f} s of products, "
        f"{seconds(beside):.3f} s with carries beside them, {seconds(in_turn):.3f} s in turn",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--parts", nargs="+", default=["experts", "decoding", "carries"])
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if "experts" in options.parts:
        measure_experts(options.tokens)
    if "decoding" in options.parts:
        measure_decoding()
        torch.cuda.empty_cache()
    if "carries" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            measure_carries(Path(folder))


if __name__ == "__main__":
    main()
