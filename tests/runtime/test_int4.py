"""torch's int4 product from repacked weights against the weights spelled out, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.errors import InputError
from runtime import int4, nibbles
from runtime.choice import Choice
from runtime.int4 import Int4Kernel
from runtime.load import LoadSettings, load_model
from runtime.storage import Storage
from tests.runtime.oracle import decoded_model, quantized_qwen, random_weights
from tests.runtime.test_kernel import fp8, integer, nvfp4, spelled_out
from tests.runtime.test_load import prompt

pytestmark = pytest.mark.skipif(
    not nibbles.row_order(), reason="torch's int4 product wants AVX2 or AVX-512"
)
STORAGES = [
    integer(64, 128, 3, 128),
    integer(32, 96, 3, 32),
    integer(32, 256, 4, 256),
    nvfp4(64, 48),
]


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.title}-{s.rows}x{s.columns}")
@pytest.mark.parametrize("tile", [1, 1 << 20])
def test_repacked_weights_are_the_same_weights(
    storage: Storage, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded exactly; products as exact as bfloat16 outputs can be, for few tokens and many."""
    monkeypatch.setattr(int4, "FEW_TILE", {3: tile, 4: tile})
    monkeypatch.setattr(int4, "TILE_CPU", tile)
    storage = storage.joined(2)
    counts = (1, 0, 9, int4.FEW[storage.kind], int4.FEW[storage.kind] + 1)
    weights = random_weights(storage, len(counts))
    size = sum(tensor.nbytes for tensor in weights.parameters())
    expected = [spelled_out(weights, expert) for expert in range(len(counts))]
    kernel = Int4Kernel()
    assert kernel.supports(storage)
    kernel.prepare(weights)
    assert sum(tensor.nbytes for tensor in weights.parameters()) == size
    for expert, weight in enumerate(expected):
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(kernel.decode(weights, expert, dtype), weight.to(dtype))
    x = torch.randn(sum(counts), storage.columns, generator=torch.Generator().manual_seed(1))
    x = x.bfloat16()
    found = kernel.grouped(weights, x, torch.tensor(counts).cumsum(0)).double()
    start = 0
    for count, weight in zip(counts, expected, strict=True):
        exact = x[start : start + count].double() @ weight.double().T
        error = (found[start : start + count] - exact).norm()
        assert error <= 0.004 * exact.norm()
        if count:  # no element is off by more than a few roundings of its terms
            terms = x[start : start + count].double().abs() @ weight.double().abs().T
            assert ((found[start : start + count] - exact).abs() <= 0.004 * terms).all()
        start += count
    only = random_weights(storage, 1, seed=5)
    exact = x.double() @ spelled_out(only, 0).double().T
    kernel.prepare(only)
    assert (kernel.linear(only, x).double() - exact).norm() <= 0.004 * exact.norm()


@pytest.mark.parametrize(
    "storage",
    [
        integer(96, 128, 4, 128),  # no whole blocks of 64 rows
        integer(64, 128, 4, 128, zero_points=True),
        integer(64, 144, 4, 16),
        integer(64, 128, 5, 32),
        fp8(128, 128, (128, 128)),
    ],
    ids=lambda s: s.title,
)
def test_what_does_not_fit_is_left_to_the_other_kernel(storage: Storage) -> None:
    assert not Int4Kernel().supports(storage)
    choice = Choice("int4", torch.device("cpu"), torch.bfloat16)
    assert choice.kernel_for(storage).name == "torch"
    assert choice.kernel_for(integer(64, 128, 4, 128)).name == "int4"


def test_it_is_chosen_only_when_asked_for() -> None:
    """Its words may differ from the decoded model's where two are all but equally probable."""
    storage = integer(64, 128, 4, 128)
    assert Choice("auto", torch.device("cpu"), torch.bfloat16).kernel_for(storage).name == "torch"
    with pytest.raises(InputError, match="bfloat16"):
        Choice("int4", torch.device("cpu"), torch.float32)


def test_a_model_speaks_by_it(tmp_path: Path) -> None:
    """Logits near those of the decoded model; words are the same while none are near a tie."""
    path = quantized_qwen("W4A16", tmp_path)
    loaded = load_model(path, LoadSettings(backend="int4"))
    assert {kernel for _, kernel in loaded.choice.used} >= {"int4"}
    ids = prompt(loaded.spec.text["vocab_size"])
    with torch.inference_mode():
        ours = loaded.model(ids).logits.float()
        theirs = decoded_model(path, tmp_path / "decoded")(ids).logits.float()
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
