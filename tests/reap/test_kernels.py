"""Scoring's Triton kernels, and what is collected with them, against plain torch on a CPU.

On a GPU, or by Triton's interpreter: TRITON_INTERPRET=1 on a machine with triton.
"""

from __future__ import annotations

import pytest
import torch

from calibration.batches import PADDING, Batch
from models.experts import RoutedBatch
from reap.damage import DamageCollector
from tests.kernel_device import DEVICE, INTERPRETED, MARKS

pytest.importorskip("triton")
pytestmark = MARKS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 8), (7, 3, 300), (4, 8, 1024)])
def test_weighted_products(tokens: int, top_k: int, width: int, dtype: torch.dtype) -> None:
    from reap.kernels.gram import weighted_products

    outputs = torch.randn(tokens * top_k, width).to(dtype)
    order = torch.randperm(tokens * top_k).view(tokens, top_k)
    weights = torch.rand(tokens, top_k)
    rows = outputs.double()[order] * weights.double()[..., None]
    found = weighted_products(outputs.to(DEVICE), order.to(DEVICE), weights.to(DEVICE))
    torch.testing.assert_close(found.double().cpu(), rows @ rows.mT, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="wants a CUDA device")
def test_damage_is_collected_on_a_gpu_as_on_a_cpu() -> None:
    tokens, top_k, experts, width = 50, 3, 9, 64
    torch.manual_seed(0)
    ids = torch.rand(tokens, experts).topk(top_k).indices
    expert_P, order_P = torch.sort(ids.flatten(), stable=True)
    domain_T = torch.zeros(tokens, dtype=torch.uint8)
    domain_T[-6:] = PADDING
    batch = Batch((0,), (tokens - 6,), torch.zeros(1, tokens, dtype=torch.int64), None, domain_T)
    hidden, outputs = torch.randn(tokens, width), torch.randn(tokens * top_k, width).bfloat16()
    hidden[-6:] = torch.nan  # padding may hold anything
    rows = {(0,): torch.tensor([0, 7, 8, 30])}
    found = []
    for device in ("cpu", "cuda", "cuda"):
        collector = DamageCollector(0, experts, top_k, rows)
        record = RoutedBatch(
            layer=0,
            offsets_E=torch.bincount(expert_P, minlength=experts).cumsum(0).to(device),
            expert_P=expert_P.to(device),
            token_P=(order_P // top_k).to(device),
            router_weights_P=(order_P % 7 / 7).to(device),
            inputs_TD=hidden.to(device),
            outputs_PD=outputs.to(device),
        )
        for _ in range(2):
            collector.routed(record, batch)
            collector.left(batch, {"hidden_states": hidden.to(device)})
        found.append(collector)
    on_cpu, on_gpu, again = found
    torch.testing.assert_close(on_gpu.grams[0].cpu(), on_cpu.grams[0], rtol=1e-5, atol=1e-7)
    assert torch.equal(on_gpu.grams[0], again.grams[0])
    for name in ("inputs", "weights", "token_weights"):
        pairs = zip(getattr(on_gpu, name), getattr(on_cpu, name), strict=True)
        assert all(torch.allclose(gpu.cpu(), cpu, rtol=1e-6) for gpu, cpu in pairs)
