"""The kernel that runs anywhere against decode-then-multiply in float32, spelled out."""

from __future__ import annotations

import pytest
import torch

from runtime import kernel as module
from runtime.cpu_tiles import CpuTiles
from runtime.kernel import TorchKernel
from runtime.packed import PackedWeights
from runtime.storage import Storage
from tests.runtime.oracle import random_weights

BF16 = torch.bfloat16


def integer(rows: int, columns: int, bits: int, group: int, **more: object) -> Storage:
    return Storage(
        kind="int", rows=rows, columns=columns, bits=bits, block=(1, group),
        code_dtype=torch.int32, scale_dtype=BF16, **more,
    )  # fmt: skip


def nvfp4(rows: int, columns: int) -> Storage:
    return Storage(
        kind="nvfp4", rows=rows, columns=columns, bits=4, block=(1, 16),
        code_dtype=torch.uint8, scale_dtype=torch.float8_e4m3fn,
    )  # fmt: skip


def fp8(rows: int, columns: int, block: tuple[int, int]) -> Storage:
    return Storage(
        kind="fp8", rows=rows, columns=columns, bits=8, block=block,
        code_dtype=torch.float8_e4m3fn, scale_dtype=torch.float32,
    )  # fmt: skip


STORAGES = [
    integer(96, 128, 3, 128),
    integer(37, 256, 3, 64, zero_points=True),
    integer(5, 48, 3, 16),  # 144 bits: a word is not full
    integer(33, 160, 4, 32),
    integer(40, 64, 4, 32, zero_points=True),
    integer(17, 136, 8, 8),
    integer(17, 136, 8, 8, zero_points=True),
    integer(19, 96, 5, 32),
    integer(19, 96, 2, 32),
    integer(24, 72, 7, 24, zero_points=True),
    nvfp4(50, 96),
    fp8(200, 160, (128, 128)),
    fp8(72, 64, (32, 32)),
    fp8(31, 100, (1, 100)),
]


def spelled_out(weights: PackedWeights, expert: int) -> torch.Tensor:
    """float32 [N, K], one element at a time from the table in runtime/storage.py."""
    storage = weights.storage
    n, k = storage.height, storage.columns
    out = torch.empty(n, k)
    e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes, scale = weights.codes[expert], weights.scale[expert].float()
    for row in range(n):
        part, inside = divmod(row, storage.rows)
        if storage.kind == "int":
            raw = b"".join((int(w) & 0xFFFFFFFF).to_bytes(4, "little") for w in codes[row])
            stream = int.from_bytes(raw, "little")
        scale_row = part * storage.scale_rows + inside // storage.block[0]
        for column in range(k):
            group = column // storage.block[1]
            if storage.kind == "int":
                code = (stream >> (column * storage.bits)) & ((1 << storage.bits) - 1)
                zero = 1 << (storage.bits - 1)
                if storage.zero_points:
                    zero = int(weights.zero_point[expert, row, group])
                value, factor = float(code - zero), scale[row, group]
            elif storage.kind == "nvfp4":
                nibble = int(codes[row, column // 2]) >> (4 * (column % 2)) & 15
                value = e2m1[nibble & 7] * (-1 if nibble & 8 else 1)
                factor = scale[row, group] / weights.global_scale[expert, part]
            else:
                value, factor = float(codes[row, column].float()), scale[scale_row, group]
            out[row, column] = value * factor
    return out


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.title}-{s.rows}x{s.columns}")
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_every_format_decodes_as_written(storage: Storage, dtype: torch.dtype) -> None:
    weights = random_weights(storage.joined(2), 3)
    for expert in (0, 2):
        expected = spelled_out(weights, expert).to(dtype)
        assert torch.equal(TorchKernel().decode(weights, expert, dtype), expected)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.title}-{s.rows}x{s.columns}")
def test_tiles_of_a_cpu_are_the_same_weights(storage: Storage) -> None:
    """The short way to bfloat16 gives the bits of the long one."""
    weights = random_weights(storage.joined(2), 3)
    tiles = CpuTiles()
    if not tiles.supports(weights.storage):
        pytest.skip("decoded the long way")
    expected = spelled_out(weights, 2).to(BF16)
    for rows in (slice(0, 1), slice(3, storage.rows + 5), slice(0, 2 * storage.rows)):
        found = torch.empty_like(expected[rows])
        tiles.write(weights, 2, rows.start, found)
        assert torch.equal(found, expected[rows])


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.title}-{s.rows}x{s.columns}")
@pytest.mark.parametrize("counts", [(1, 0, 0, 0), (0, 3, 0, 1), (40, 1, 7, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("tile", [1, 4096, 1 << 19])
def test_products(
    storage: Storage, counts: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token and many, experts without any, tiles smaller and larger than a matrix."""
    monkeypatch.setattr(module, "TILE_CPU", tile)
    weights = random_weights(storage.joined(2), len(counts))
    total = sum(counts)
    x = torch.randn(total, storage.columns, generator=torch.Generator().manual_seed(1))
    offsets = torch.tensor(counts).cumsum(0)
    kernel = TorchKernel()
    found = kernel.grouped(weights, x, offsets)
    assert found.shape == (total, 2 * storage.rows)
    start = 0
    for expert, count in enumerate(counts):
        weight = kernel.decode(weights, expert, torch.float32)  # held to spelled_out above
        expected = x[start : start + count].double() @ weight.double().T
        torch.testing.assert_close(
            found[start : start + count].double(), expected, rtol=1e-5, atol=1e-4
        )
        start += count
    only = random_weights(storage, 1)
    expected = x.double() @ kernel.decode(only, 0, torch.float32).double().T
    torch.testing.assert_close(kernel.linear(only, x).double(), expected, rtol=1e-5, atol=1e-4)
