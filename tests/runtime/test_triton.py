"""The Triton kernels against decode-then-multiply in float64: on a GPU, or interpreted."""

from __future__ import annotations

import os
import types
from dataclasses import replace
from functools import partial

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

from runtime.kernels import decoding, tiles, triton_kernel  # noqa: E402
from runtime.kernels.order import packed_words, unpacked_codes  # noqa: E402
from runtime.kernels.plans import by_expert  # noqa: E402
from runtime.kernels.tiles import Tile  # noqa: E402
from runtime.kernels.triton_kernel import TritonKernel  # noqa: E402

STORAGES = [
    integer(40, 512, 3, 128),
    integer(24, 1024, 3, 64),
    integer(33, 512, 3, 32),
    integer(33, 128, 4, 128),
    integer(41, 256, 4, 64),
    integer(24, 1024, 4, 128),  # two steps of 512 columns, four of 256
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
    moved(weights)
    TritonKernel(DEVICE).prepare(weights)
    return weights, torch.stack(decoded).double().to(DEVICE)


def moved(weights: PackedWeights) -> None:
    """To the device that is tested."""
    for name, parameter in weights.named_parameters():
        weights._parameters[name] = torch.nn.Parameter(parameter.to(DEVICE), requires_grad=False)


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
            # a sum near the middle between two numbers may go the other way: 1 of 50, or one or two
            assert (found != expected.to(BF16)).sum() <= max(2, found.numel() // 50)


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
    plan = by_expert(ids, experts, Tile(block, 32))
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


def tables() -> list[tuple[Storage, Tile]]:
    """Every tile that a format may be multiplied in, on whatever card, with its storages."""
    rows = []
    for storage in STORAGES:
        code = triton_kernel.FORMATS[storage.kind, storage.bits]
        wide = tiles.WIDE[code]
        waves = tiles.FEW_IN_WAVES.values() if code == 4 else ()
        rows += [(storage, t) for t in (tiles.FEW, *waves, tiles.SOME, tiles.MANY, wide)]
    return rows


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "plain"])
@pytest.mark.parametrize(
    ("storage", "tile"),
    tables(),
    ids=lambda v: (
        f"{v.tokens}x{v.rows}"
        if isinstance(v, Tile)
        else f"{v.title}-{v.rows}x{v.columns}-{v.block[1]}"
    ),
)
def test_every_tile(
    storage: Storage, tile: Tile, linear: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert without a token, blocks that are full and one that is not, one token, a Linear."""
    monkeypatch.setattr(triton_kernel, "tile_for", lambda *_, **__: tile)
    weights, expected = on_device(storage, 3)
    assert weights.linear
    weights.linear = linear
    kernel = TritonKernel(DEVICE)
    tokens = tile.tokens + 3
    ids = torch.tensor([[0]], device=DEVICE).repeat(tokens, 1)
    ids[::4] = 2
    x = torch.randn(tokens, storage.columns, device=DEVICE).to(BF16)
    plan = kernel.plan(ids, weights)
    assert plan.tile == tile
    found = kernel.product(weights, x, plan, tokens, 1)
    assert_close(found, torch.einsum("pk,pnk->pn", x.double(), expected[ids.flatten()]))
    alone = kernel.product(weights, x[:1], kernel.plan(ids[:1], weights), 1, 1)
    assert_close(alone, x[:1].double() @ expected[2].T)
    weights, expected = on_device(storage, 1)
    weights.linear = linear
    few = x[: tile.tokens - 3]
    assert_close(kernel.linear(weights, few), few.double() @ expected[0].T)


@pytest.mark.parametrize("edge", [decoding.SMALLEST * 1.02, decoding.LARGEST * 0.98])
@pytest.mark.parametrize("storage", STORAGES, ids=IDS)
def test_scales_at_the_edge(storage: Storage, edge: float) -> None:
    """The last scales that are decoded the linear way, and the first that are not."""
    name = "global_scale" if storage.kind == "nvfp4" else "scale"
    for factor, linear in ((1.0, True), (2.0 if edge > 1 else 0.5, False)):
        weights = random_weights(storage, 1)
        held = getattr(weights, name)
        held.fill_(1 / (edge * factor) if storage.kind == "nvfp4" else edge * factor)
        weights.scale[0, 0, 0] = 0
        decoded = TorchKernel().decode(weights, 0, BF16).double().to(DEVICE)
        moved(weights)
        kernel = TritonKernel(DEVICE)
        kernel.prepare(weights)
        assert weights.linear is linear
        x = torch.randn(3, storage.columns, device=DEVICE).to(BF16)
        assert_close(kernel.linear(weights, x), x.double() @ decoded.T)


def test_scales_of_other_types_are_decoded_the_plain_way() -> None:
    """Float16 scales (GPTQ) are not multiplied in bfloat16."""
    storage = replace(integer(33, 128, 4, 128), scale_dtype=torch.float16)
    weights, expected = on_device(storage, 1)
    assert not weights.linear
    x = torch.randn(9, 128, device=DEVICE).to(BF16)
    assert_close(TritonKernel(DEVICE).linear(weights, x), x.double() @ expected[0].T)


def test_blocks_grow_with_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that holds the average; wide ones on Hopper alone."""
    tile_of = partial(tiles.tile_for, 8, torch.device("cuda"))
    monkeypatch.setattr(tiles, "is_hopper", lambda _: True)
    found = [tile_of(average) for average in (1, 8, 9, 16, 17, 300)]
    wide = tiles.WIDE[8]
    assert found == [tiles.FEW, tiles.FEW, tiles.SOME, tiles.SOME, wide, wide]
    of_int4 = partial(tiles.tile_for, 4, torch.device("cuda"))
    assert [of_int4(1), of_int4(8)] == [tiles.FEW, tiles.FEW]
    found = [of_int4(average, waves=True) for average in (1, 8, 9)]
    assert found == [tiles.FEW_IN_WAVES[4], tiles.FEW_IN_WAVES[4], tiles.SOME]
    assert tile_of(8, waves=True) == tiles.FEW
    monkeypatch.setattr(tiles, "is_hopper", lambda _: False)
    assert [tile_of(average) for average in (4, 17)] == [tiles.FEW, tiles.MANY]


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (5, 2), (40, 1)])
def test_a_whole_layer(tokens: int, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up and down of different formats, whose blocks differ once they are a warpgroup's.

    The ids of one expert a token are every second of a tensor.
    """
    monkeypatch.setattr(tiles, "is_hopper", lambda _: True)
    if DEVICE.type == "cpu":  # the interpreter launches nothing ahead
        monkeypatch.setattr(triton_kernel, "ahead", lambda _: {})
    up, up_ENK = on_device(integer(128, 128, 4, 128).joined(2), 2)
    down, down_ENK = on_device(fp8(40, 128, (1, 128)), 2)
    layer = types.SimpleNamespace(up=up, down=down, num_experts=2, swiglu=True)
    x = torch.randn(tokens, 128, device=DEVICE).to(BF16)
    ids = torch.rand(tokens, 2, device=DEVICE).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, device=DEVICE)
    kernel = TritonKernel(DEVICE)
    found = kernel.experts(layer, x, ids, weights)
    gate, other = torch.einsum("tk,tcnk->tcn", x.double(), up_ENK[ids]).chunk(2, -1)
    active = torch.nn.functional.silu(gate) * other
    wanted = torch.einsum("tcf,tcnf,tc->tn", active, down_ENK[ids], weights.double())
    assert (found.double() - wanted).norm() < 0.02 * wanted.norm()


def test_activation_in_the_wide_order() -> None:
    kernel, layer = TritonKernel(DEVICE), types.SimpleNamespace(swiglu=True)
    up = torch.randn(3, 2 * 256, device=DEVICE).to(BF16)
    plain = kernel.activated(layer, up)
    assert torch.equal(kernel.activated(layer, up, True), triton_kernel.turned(plain))
