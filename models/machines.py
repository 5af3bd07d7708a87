"""Rates of machines, measured there: what `inspect` divides amounts of work by.

One entry, one machine. Each rate is of a job's own work on a full-size layer of DeepSeek-V3.2
(benchmarks/deepseek_v32_layer.py, stream_kernels.py, hessian_kernels.py, gptq_gpu.py), so launches,
copies and whatever else does not overlap are in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Per second unless said otherwise; bytes are bytes, flops two a multiply-add."""

    title: str
    read_bytes: float  # of the disk, cold
    write_bytes: float  # with fsync
    upload_bytes: float  # a layer as stored, from the page cache to the GPU and decoded
    forward_flops: float  # a whole layer: experts, attention, saliency
    hessian_flops: float  # full squares, of which the lower half is computed
    factor_cubed: float  # K^3 of a Hessian [K, K]
    round_seconds: float  # seconds a weight: scales, column loop
    sweep_seconds: float  # seconds a weight and sweep of refinement
    layer_seconds: float  # seconds a layer and job: Linears one by one, the rest
    process_bytes: float  # host: Python, torch, the CUDA context
    ring_bytes: float  # host, pinned: for each stream through the model
    batch_tokens: int  # of a forward
    experts_at_once: int  # in the solver
    kept_bytes: float  # at most, of expert inputs for down's Hessians


MACHINES: Mapping[str, Machine] = {
    "h200": Machine(
        title="one H200, a disk of 1.5 GB/s",
        read_bytes=1.5e9,
        write_bytes=1.8e9,
        upload_bytes=14e9,
        forward_flops=370e12,
        hessian_flops=830e12,
        factor_cubed=1.2e14,
        round_seconds=0.13e-9,
        sweep_seconds=0.15e-9,
        layer_seconds=1.2,
        process_bytes=3.5e9,
        ring_bytes=0.8e9,
        batch_tokens=16384,
        experts_at_once=16,
        kept_bytes=8 * 2**30,
    ),
}
