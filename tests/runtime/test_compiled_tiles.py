"""Rows decoded by compiled code: the bits of weights that were spelled out one by one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from runtime.choice import Choice
from runtime.compiled_tiles import CompiledTiles
from runtime.decode import decode_rows
from runtime.kernel import TorchKernel
from runtime.packed import PackedWeights
from runtime.storage import Storage
from tests.runtime.oracle import DEMO, random_weights
from tests.runtime.test_kernel import STORAGES, fp8, integer, nvfp4, spelled_out

vector_code = pytest.importorskip("runtime.vector_code", exc_type=ImportError)
BF16, CPU = torch.bfloat16, torch.device("cpu")
MORE = [
    *(integer(6, 96, bits, 32, zero_points=zeros) for bits in range(2, 9) for zeros in (0, 1)),
    integer(7, 200, 3, 128),  # a last group of 72
    integer(7, 152, 4, 64, zero_points=True),  # of 24
    replace(integer(9, 128, 4, 128), scale_dtype=torch.float16),
    replace(integer(9, 128, 3, 64), scale_dtype=torch.float32),
    fp8(40, 176, (32, 128)),
    replace(fp8(40, 256, (128, 128)), scale_dtype=BF16),
]
REFUSED = [integer(5, 64, 4, 8), integer(5, 132, 3, 128), integer(5, 130, 8, 128), nvfp4(4, 24)]


def named(storage: Storage) -> str:
    return f"{storage.title}-{storage.rows}x{storage.columns}-{storage.scale_dtype}"


@pytest.fixture(scope="module")
def tiles() -> CompiledTiles:
    found = CompiledTiles(CPU, BF16)
    if not found.ready(nvfp4(1, 16)):
        pytest.skip(str(found.missing))
    return found


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def written(tiles: CompiledTiles, weights: PackedWeights, expert: int, rows: slice) -> torch.Tensor:
    """Those rows, in memory that held something else."""
    out = torch.full((rows.stop - rows.start, weights.storage.columns), torch.nan, dtype=BF16)
    tiles.write(weights, expert, rows.start, out)
    return out


def bits(values: torch.Tensor) -> torch.Tensor:
    """A zero's sign counts."""
    return values.view(torch.int16)


@pytest.mark.parametrize("storage", [*STORAGES, *MORE], ids=named)
def test_every_format_has_the_decoders_bits(tiles: CompiledTiles, storage: Storage) -> None:
    """Two parts, so that a row's scale is not at its own number."""
    weights = random_weights(storage.joined(2), 3)
    if not tiles.supports(weights.storage):
        assert storage.block[1] < 16 or storage.kind == "int"
        pytest.skip("decoded by torch")
    expected = spelled_out(weights, 2).to(BF16)
    slow = decode_rows(weights, torch.tensor([2]), 0, 2 * storage.rows, BF16)[0]
    for rows in (slice(0, 1), slice(3, storage.rows + 3), slice(0, 2 * storage.rows)):
        found = written(tiles, weights, 2, rows)
        assert torch.equal(found, expected[rows])
        assert torch.equal(bits(found), bits(slow[rows]))


def test_which_formats_are_decoded(tiles: CompiledTiles) -> None:
    """Nothing that was meant to be fast is slow unnoticed, nothing is read from half a byte."""
    assert [s for s in MORE if not tiles.supports(s)] == []
    assert len([s for s in STORAGES if not tiles.supports(s)]) == 2  # groups of 8
    assert [s for s in REFUSED if tiles.supports(s)] == []
    assert not tiles.supports(Storage(kind="plain", rows=4, columns=64))


def test_tensors_that_were_moved(tiles: CompiledTiles) -> None:
    """What is kept of a matrix is not read once its tensors are others."""
    weights = random_weights(nvfp4(8, 64), 1)
    written(tiles, weights, 0, slice(0, 8))
    other = random_weights(nvfp4(8, 64), 1, seed=1)
    kept = [weights.codes, weights.scale, weights.global_scale]  # so that none lies where one was
    for name, tensor in other.named_parameters():
        setattr(weights, name, tensor)
    assert len(kept) == 3
    assert torch.equal(written(tiles, weights, 0, slice(0, 8)), spelled_out(other, 0).to(BF16))


def test_every_code_and_every_tie(tiles: CompiledTiles) -> None:
    """All bytes of FP8 and NVFP4 and of their scales; products halfway between two numbers."""
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[(every & 0x7F) != 0x7F]
    wide = random_weights(fp8(64, 254, (1, 254)), 1)
    wide.codes.view(torch.uint8).copy_(finite.expand(64, 254))
    wide.scale.copy_(torch.logspace(-38, 30, 64).view(1, 64, 1))
    narrow = random_weights(nvfp4(254, 512), 1)
    narrow.codes.copy_(every.expand(254, 256))
    narrow.scale.view(torch.uint8).copy_(finite.view(1, 254, 1))
    ties = random_weights(integer(128, 256, 8, 256), 1)  # 9 to 15 bits of product, to be 8
    ties.codes.view(torch.uint8).copy_(every.expand(128, 256))
    ties.scale.copy_((128 + torch.arange(128.0)).view(1, 128, 1) / 512)
    for weights in (wide, narrow, ties):
        rows = slice(0, weights.storage.rows)
        expected = decode_rows(weights, torch.tensor([0]), 0, rows.stop, torch.float32)[0].to(BF16)
        found = written(tiles, weights, 0, rows)
        assert torch.equal(bits(found), bits(expected))


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("inference", [False, True])
def test_threads_share_a_matrix(
    tiles: CompiledTiles, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has tiles of its own; torch's threads are as many as before, also in new ones."""
    monkeypatch.setattr("runtime.kernel.SPLIT", 1)
    monkeypatch.setattr("runtime.kernel.TILE_BF16", 600)
    kernel, weights = TorchKernel(tiles), random_weights(nvfp4(25, 96).joined(2), 1)
    exact = spelled_out(weights, 0).to(BF16).double()
    with torch.inference_mode(inference):
        for tokens in (1, 5):
            x = torch.randn(tokens, 96).to(BF16)
            found = kernel.linear(weights, x).double()
            torch.testing.assert_close(found, x.double() @ exact.T, rtol=2**-8, atol=1e-5)
    assert kernel.workers.count == 3
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3
    torch.set_num_threads(2)
    assert kernel.linear(weights, x).shape == (5, 50)
    assert kernel.workers.count == 2


@pytest.mark.parametrize("storage", [integer(48, 128, 3, 64), fp8(72, 96, (32, 32))], ids=named)
@pytest.mark.parametrize("tile", [1, 20_000, 1 << 19])
def test_products_are_torchs_own(
    tiles: CompiledTiles, storage: Storage, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token and many, experts without any: what the decoded matrices give, exactly summed."""
    monkeypatch.setattr("runtime.kernel.TILE_CPU", tile)
    monkeypatch.setattr("runtime.kernel.TILE_BF16", tile)
    kernel, counts = TorchKernel(tiles), (1, 0, 9, 70)
    weights = random_weights(storage.joined(2), len(counts))
    x = torch.randn(sum(counts), storage.columns).to(BF16)
    found = kernel.grouped(weights, x, torch.tensor(counts).cumsum(0))
    start = 0
    for expert, count in enumerate(counts):
        own = slice(start, start + count)
        exact = x[own].double() @ spelled_out(weights, expert).to(BF16).double().T
        torch.testing.assert_close(found[own].double(), exact, rtol=2**-8, atol=1e-5)
        start += count
    only = random_weights(storage, 1)
    decoded = spelled_out(only, 0).to(BF16)
    if tile == 1 << 19:  # of one tile, so summed in the same order
        assert torch.equal(kernel.linear(only, x), F.linear(x, decoded))
    exact = x.double() @ decoded.double().T
    torch.testing.assert_close(kernel.linear(only, x).double(), exact, rtol=2**-8, atol=1e-5)


def test_without_numba_torch_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says why when a model is loaded."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    choice, storage = Choice("auto", CPU, BF16), integer(48, 128, 3, 64)
    choice.note(storage, choice.kernel_for(storage), 5)
    first, second = choice.describe()
    assert first == "5 matrices in W3A16 (groups of 64): torch"
    assert "numba is not installed" in second


def refused(*_: object) -> None:
    raise vector_code.NumbaError("no such type\nand more")


@pytest.mark.parametrize("broken", ["import", "compile"])
def test_what_numba_cannot_do_torch_does(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same weights, and it is said once."""
    if broken == "import":
        monkeypatch.setitem(sys.modules, "runtime.vector_code", None)
    else:
        monkeypatch.setattr(vector_code, "decoder", refused)
    choice, storage = Choice("auto", CPU, BF16), integer(48, 128, 3, 64)
    kernel = choice.kernel_for(storage)
    choice.note(storage, kernel, 5)
    assert next(iter(choice.describe())).endswith("torch, tiles compiled by numba")  # so far
    weights, x = random_weights(storage, 1), torch.randn(3, 128).to(BF16)
    for _ in range(2):
        expected = F.linear(x, spelled_out(weights, 0).to(BF16))
        assert torch.equal(kernel.linear(weights, x), expected)
    assert len(caplog.records) == 1
    assert f"numba cannot {'be imported' if broken == 'import' else 'compile'}" in caplog.text


def test_loading_imports_no_numba() -> None:
    """It would take more memory than a small model."""
    code = (
        "import sys; from runtime.load import load_model; load_model(sys.argv[1]);"
        "sys.exit('numba' in sys.modules)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(DEMO)], check=True, env=environment)


@pytest.mark.parametrize(
    ("device", "dtype", "why"), [("cuda", BF16, "not on cuda"), ("cpu", torch.float32, "float32")]
)
def test_where_there_are_none(device: str, dtype: torch.dtype, why: str) -> None:
    found = CompiledTiles(torch.device(device), dtype)
    assert found.missing is not None
    assert why in found.missing
    assert not found.supports(nvfp4(4, 64))


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """Compiled all the same, in a process of its own; and kept where there is a folder."""
    (tmp_path / "file").write_text("")
    code = (
        "import torch, runtime.vector_code as v\nv.FAILURES = ()\nv.decoder('int', 4, 'uint16')\n"
    )
    for root, kept in ((tmp_path / "file", False), (tmp_path / "new", True)):
        environment = {"XDG_CACHE_HOME": str(root), "PYTHONPATH": ":".join(sys.path)}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        assert any(root.rglob("*.nbi")) == kept
