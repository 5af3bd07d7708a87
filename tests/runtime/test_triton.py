"""The Triton kernels against decode-then-multiply in float64: on a GPU, or interpreted."""

from __future__ import annotations

import os
import types

import pytest
import torch

from runtime.kernel import TorchKernel
from runtime.packed import PackedWeights
from runtime.storage import Storage
from tests.runtime.oracle import random_weights
from tests.runtime.test_kernel import BF16, fp8, integer, nvfp4

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from runtime.kernels import tiles, triton_kernel  # noqa: E402
from runtime.kernels.order import packed_words, unpacked_codes  # noqa: E402
from runtime.kernels.tiles import Tile  # noqa: E402
from runtime.kernels.triton_kernel import TritonKernel  # noqa: E402

STORAGES = [
    integer(40, 512, 3, 128),
    integer(72, 1024, 3, 32),
    integer(33, 128, 4, 128),
    integer(50, 384, 4, 32),
    nvfp4(37, 256),
    fp8(200, 256, (128, 128)),
    fp8(200, 128, (128, 128)),  # a block as wide as the matrix
    fp8(45, 128, (1, 128)),
]
IDS = [f"{s.title}-{s.rows}x{s.columns}" for s in STORAGES]


def on_device(storage: Storage, experts: int) -> tuple[PackedWeights, torch.Tensor]:
    """Random weights, brought into the kernels' order, and the decoded model's bfloat16 ones."""
    weights = random_weights(storage, experts)
    decoded = [TorchKernel().decode(weights, e, BF16) for e in range(experts)]
    for name, parameter in weights.named_parameters():
        weights._parameters[name] = torch.nn.Parameter(parameter.to(DEVICE), requires_grad=False)
    TritonKernel(DEVICE).prepare(weights)
    return weights, torch.stack(decoded).double().to(DEVICE)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """bfloat16 outputs of float32 sums, rounded (by the interpreter: cut) to eight bits.

    Weights are those of the decoded model, so nearly every output is the exact sum rounded once.
    """
    assert torch.isfinite(found).all()
    if expected.numel():
        error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-9)
        # half of a bfloat16's last place is at most 2^-8 of its value
        assert error < (2**-8 if DEVICE.type == "cuda" else 5e-3), float(error)
        if DEVICE.type == "cuda":
            assert (found == expected.to(BF16)).double().mean() > 0.98


@pytest.mark.parametrize("storage", STORAGES, ids=IDS)
def test_the_order_is_undone(storage: Storage) -> None:
    codes = torch.randint(0, 1 << storage.bits, (9, storage.columns), dtype=torch.uint8)
    words = packed_words(storage.bits, codes)
    assert words.shape == (9, storage.columns * storage.bits // 32)
    assert torch.equal(unpacked_codes(storage.bits, words), codes)
    weights, expected = on_device(storage, 2)
    found = TritonKernel(DEVICE).decode(weights, 1, BF16)
    assert torch.equal(found.double(), expected[1])


@pytest.mark.parametrize("storage", STORAGES, ids=IDS)
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_linear(storage: Storage, rows: int) -> None:
    weights, expected = on_device(storage, 1)
    x = torch.randn(rows, storage.columns, device=DEVICE).to(BF16)
    found = TritonKernel(DEVICE).linear(weights, x)
    assert_close(found, x.double() @ expected[0].T)


@pytest.mark.parametrize("storage", STORAGES, ids=IDS)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (2, 2), (24, 2), (70, 3)])
def test_routed_pairs(storage: Storage, tokens: int, top_k: int) -> None:
    """Both parts joined, experts without a token, and one that gets them all."""
    experts = 6
    weights, expected = on_device(storage.joined(2), experts)
    kernel = TritonKernel(DEVICE)
    ids = torch.rand(tokens, experts - 1, device=DEVICE).topk(top_k).indices
    if tokens == 24:
        ids[:, 0] = 5
    x = torch.randn(tokens, storage.columns, device=DEVICE).to(BF16)
    plan = kernel.plan(ids, weights)
    found = kernel.product(weights, x, plan, tokens * top_k, top_k)
    pairs = x.double().repeat_interleave(top_k, 0)
    wanted = torch.einsum("pk,pnk->pn", pairs, expected[ids.reshape(-1)])
    assert_close(found, wanted)
    order = ids.reshape(-1).argsort()
    ends = torch.bincount(ids.reshape(-1), minlength=experts).cumsum(0)
    grouped = kernel.grouped(weights, pairs[order].to(BF16), ends)
    assert_close(grouped, wanted[order])


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (5, 2, 3), (40, 8, 40)])
@pytest.mark.parametrize("block", [8, 16, 48])  # 48: one of Humming's
def test_pairs_are_put_into_blocks(tokens: int, top_k: int, experts: int, block: int) -> None:
    """Every pair once, in a block of its expert; blocks filled up; the unused ones come last."""
    ids = torch.rand(tokens, experts, device=DEVICE).topk(min(top_k, experts)).indices
    if tokens == 5:
        ids[:, 0] = 1  # more than half of the pairs, another expert may have none
    pairs = ids.numel()
    plan = TritonKernel(DEVICE).blocks(ids, experts, Tile(block, 32))
    counts = torch.bincount(ids.flatten(), minlength=experts)
    used = int((-(-counts // block)).sum())
    assert plan.blocks >= used
    assert int(plan.padded) == used * block
    slots = plan.slots.view(-1, block)
    assert (slots[used:, 0] == pairs).all()
    real = slots[:used][slots[:used] < pairs]
    assert torch.equal(real.sort().values.cpu(), torch.arange(pairs, dtype=torch.int32))
    for row, expert in zip(slots[:used], plan.expert[:used], strict=True):
        own = row[row < pairs]
        assert len(own) > 0
        assert (row[len(own) :] == pairs).all()
        assert (ids.flatten()[own.long()] == expert).all()


def test_activation_and_weighted_sum() -> None:
    """The kernels around the products against torch in float64."""
    kernel = TritonKernel(DEVICE)
    up = torch.randn(6, 2 * 1100, device=DEVICE).to(BF16)
    gate, other = up.double().chunk(2, -1)
    found = kernel.activated(types.SimpleNamespace(swiglu=True), up)
    torch.testing.assert_close(
        found.double(), torch.nn.functional.silu(gate) * other, rtol=2e-2, atol=1e-3
    )
    weights = torch.rand(3, 2, device=DEVICE)
    out = torch.randn(6, 1500, device=DEVICE).to(BF16)
    wanted = (out.view(3, 2, -1).double() * weights.double().unsqueeze(-1)).sum(1)
    found = kernel.combined(out, weights, BF16)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=2e-2)


WAYS = {
    "wide": Tile(16, 64, warps=4, columns=128, wide=True),
    "wide ahead": Tile(16, 64, warps=4, stages=2, columns=128, wide=True),
    "two warps": Tile(8, 32, warps=2, stages=3, columns=128),
    "fenced": Tile(8, 16, fence=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("storage", STORAGES, ids=IDS)
def test_other_tiles(storage: Storage, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole layer by every way to multiply, decoding by one multiply-add."""
    for code in tiles.TILES:
        monkeypatch.setitem(tiles.TILES, code, (WAYS[way],))
    monkeypatch.setattr(triton_kernel, "LINEAR", True)
    weights, expected = on_device(storage, 3)
    assert weights.linear
    ids = torch.tensor([[0, 2], [2, 0], [2, 0]], device=DEVICE)
    x = torch.randn(3, storage.columns, device=DEVICE).to(BF16)
    kernel = TritonKernel(DEVICE)
    found = kernel.product(weights, x, kernel.plan(ids, weights), 6, 2)
    pairs = x.double().repeat_interleave(2, 0)
    assert_close(found, torch.einsum("pk,pnk->pn", pairs, expected[ids.reshape(-1)]))


def test_activation_in_the_wide_order() -> None:
    kernel, layer = TritonKernel(DEVICE), types.SimpleNamespace(swiglu=True)
    up = torch.randn(3, 2 * 256, device=DEVICE).to(BF16)
    plain = kernel.activated(layer, up)
    assert torch.equal(kernel.activated(layer, up, True), triton_kernel.turned(plain))
