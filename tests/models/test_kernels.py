"""The forward pass's Triton kernels against plain torch in float32 or float64.

On a GPU, or by Triton's interpreter: TRITON_INTERPRET=1 on a machine with triton.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.kernel_device import DEVICE, INTERPRETED, MARKS

pytest.importorskip("triton")
pytestmark = MARKS


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 100), (3, 1024), (2, 2048 + 3)])
def test_gated_silu_rounds_where_torch_does(rows: int, width: int) -> None:
    from models.kernels.experts import gated_silu

    up = (3 * torch.randn(rows, 2 * width, device=DEVICE)).bfloat16()
    gate, value = up.chunk(2, dim=-1)
    expected = F.silu(gate) * value
    found = gated_silu(up)
    assert found.is_contiguous()
    if INTERPRETED:  # it cuts bits off where a GPU rounds
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 8), (7, 3, 1030), (4, 8, 2048)])
def test_combine_sums_and_norms(
    tokens: int, top_k: int, width: int, weight_dtype: torch.dtype
) -> None:
    from models.kernels.experts import combine

    pairs = tokens * top_k
    outputs = torch.randn(pairs, width, device=DEVICE).bfloat16()
    weights = torch.rand(tokens, top_k, device=DEVICE).to(weight_dtype)
    place = torch.randperm(pairs).to(DEVICE)
    total, norms = combine(outputs, weights, place, norms=True)
    rows = outputs.double()[place].view(tokens, top_k, width)
    expected = (rows * weights.double()[..., None]).sum(1)
    assert total.dtype == torch.bfloat16
    assert norms is not None
    error = (total.double() - expected).norm() / expected.norm()
    assert error < 0.01
    torch.testing.assert_close(norms.double(), outputs.double().norm(dim=1), rtol=1e-6, atol=0)
    again, none = combine(outputs, weights, place, norms=False)
    assert none is None
    assert torch.equal(again, total)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot convert FP8")
@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
@pytest.mark.parametrize("shape", [(128, 256), (100, 200), (33, 300), (1, 16)])
def test_fp8_blocks(shape: tuple[int, int], block: tuple[int, int]) -> None:
    from models.kernels.fp8 import dequantize

    rows, columns = shape
    joined = torch.full((3, 2, rows, columns), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    matrices, expected = [], []
    for number in range(3):
        codes = torch.randn(shape, device=DEVICE).mul(40).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // block[0]), -(-columns // block[1]), device=DEVICE)
        matrices.append((codes, scales, joined[number, 1]))
        spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        expected.append((codes.float() * spread[:rows, :columns]).bfloat16())
    flags = dequantize(matrices, block)
    assert flags.tolist() == [0, 0, 0]
    assert torch.equal(joined[:, 1], torch.stack(expected))
    assert joined[:, 0].isnan().all()  # beside them nothing was written


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot convert FP8")
def test_fp8_names_the_matrix_that_is_broken() -> None:
    from models.kernels.fp8 import dequantize

    def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = torch.zeros(40, 40, device=DEVICE).to(torch.float8_e4m3fn)
        return codes, torch.ones(1, 1, device=DEVICE), torch.empty(40, 40, device=DEVICE)

    sound, nan_code, no_scale = case(), case(), case()
    nan_code[0].view(torch.uint8)[39, 39] = 0xFF
    no_scale[1].fill_(torch.inf)
    no_scale[0].view(torch.uint8)[3, 3] = 0x38
    assert dequantize([sound, nan_code, no_scale], (128, 128)).tolist() == [0, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")
def test_layer_with_kernels_is_the_layer_without() -> None:
    """The same experts module with kernels and, in a family with another activation, without."""
    from models.experts import ExpertWeights, RoutedBatch, RoutedExperts

    class Original(nn.Module):
        has_gate = True

        def __init__(self, act_fn: nn.Module) -> None:
            super().__init__()
            self.act_fn = act_fn

    class Silu(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.silu(x)

    seen: list[RoutedBatch] = []
    results = []
    generator = torch.Generator("cuda").manual_seed(0)
    weights = ExpertWeights(
        up=torch.randn(8, 512, 256, device="cuda", generator=generator).bfloat16() / 16,
        down=torch.randn(8, 256, 256, device="cuda", generator=generator).bfloat16() / 16,
        up_bias=None,
        down_bias=None,
        transposed=False,
    )
    x = torch.randn(100, 256, device="cuda", generator=generator).bfloat16()
    scores = torch.rand(100, 8, device="cuda", generator=generator)
    scores[:, 5] = 0  # an expert without tokens
    router_weights, ids = scores.topk(3)
    for act_fn in (nn.SiLU(), Silu()):
        experts = RoutedExperts(0, Original(act_fn), 8)
        experts.weights, experts.observe = weights, seen.append
        results.append(experts(x, ids, router_weights))
    with_kernels, without = seen
    assert with_kernels.norms_P is not None
    norms = with_kernels.outputs_PD.double().norm(dim=1)
    torch.testing.assert_close(with_kernels.norms_P.double(), norms, rtol=1e-6, atol=0)
    assert torch.equal(with_kernels.offsets_E, without.offsets_E)
    error = (results[0].float() - results[1].float()).norm() / results[1].float().norm()
    assert error < 2e-3
