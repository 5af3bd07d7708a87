"""The kernels that round and pack, against the arithmetic of a CPU: on a GPU, or interpreted."""

from __future__ import annotations

import os

import pytest
import torch

from quant.format import pack_bits
from quant.rounding import make_grid, round_to_nearest, searched_steps
from quant.schemes import SCHEMES, Scheme, scheme_with

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from quant.kernels.pack import fp8_blocks, pack_codes, round_codes  # noqa: E402

FORMATS = [
    SCHEMES["NVFP4A16"],
    scheme_with("W3A16", group_size=32),
    scheme_with("W4A16", group_size=64, symmetric=False),
    SCHEMES["W8A16"],
]


@pytest.mark.parametrize("columns", [40, 96, 640])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_words_are_the_same(bits: int, columns: int) -> None:
    """`pack_bits` on a CPU is held to compressed-tensors' packer in test_format.py."""
    codes = torch.randint(0, 1 << bits, (2, 7, columns), dtype=torch.uint8)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    expected = pack_bits(codes, bits)
    for given in (codes, signed):
        assert torch.equal(pack_codes(given.to(DEVICE), bits).cpu(), expected)


def weights(dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size, a group of zeros, a block of zeros."""
    torch.manual_seed(3)
    weight = torch.randn(2, 300, 384) * torch.exp(3 * torch.randn(2, 300, 1))
    weight[0, 0, :128] = 0
    weight[1, :128, 128:256] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", FORMATS, ids=lambda scheme: scheme.name)
def test_codes_are_the_same(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = weights(dtype)
    expected = round_to_nearest(weight, scheme)
    grid = make_grid(weight.float(), scheme, None, torch.bfloat16)
    step, zero = searched_steps(weight.float(), grid, None)
    found = round_codes(
        weight.to(DEVICE), step.to(DEVICE), None if zero is None else zero.to(DEVICE), grid
    ).cpu()
    assert found.dtype == expected.codes.dtype
    differing = int((found != expected.codes).sum())
    # the interpreter rounds a product before it is added to: exact ties then fall either way
    assert differing <= (0 if DEVICE.type == "cuda" else len(found.flatten()) // 1000)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter cannot convert to FP8")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_blocks_are_the_same(dtype: torch.dtype) -> None:
    weight = weights(dtype)
    expected = round_to_nearest(weight, SCHEMES["FP8_BLOCK"])
    codes, scale = fp8_blocks(weight.to(DEVICE))
    assert torch.equal(scale.cpu(), expected.scale)
    assert torch.equal(codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8))
