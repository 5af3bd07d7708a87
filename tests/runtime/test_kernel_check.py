"""A kernel that multiplies wrongly is found out when a model is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from models.errors import InputError
from runtime import choice
from runtime.compiled_tiles import CompiledTiles
from runtime.kernel import TorchKernel
from runtime.kernel_check import KernelCheck, excerpt
from runtime.load import LoadSettings, load_model
from runtime.packed import PackedWeights
from tests.runtime.oracle import quantized_qwen, random_weights
from tests.runtime.test_kernel import BF16, STORAGES, fp8, integer, nvfp4

CPU = torch.device("cpu")


class Checked(TorchKernel):
    """torch's products as a kernel with two kinds of blocks; `lie` may change them."""

    name = "checked"

    def __init__(self, *tiles: CompiledTiles) -> None:
        super().__init__(*tiles)
        self.device = CPU
        self.asked: list[int] = []

    def way(self, weights: PackedWeights) -> object:
        return weights.linear

    def trials(self, weights: PackedWeights) -> tuple[int, ...]:
        return 8, 100

    def lie(self, out: torch.Tensor, tokens: int) -> torch.Tensor:
        self.asked.append(tokens)
        return out

    def linear(self, weights: PackedWeights, x_MK: torch.Tensor) -> torch.Tensor:
        return self.lie(super().linear(weights, x_MK), len(x_MK))

    def routed(
        self, weights: PackedWeights, x_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        each = [self.decode(weights, expert, x_TK.dtype) for expert in range(weights.experts)]
        pairs = [x @ each[e].T for x, ids in zip(x_TK, ids_TK, strict=True) for e in ids]
        return self.lie(torch.stack(pairs), len(x_TK))


class OneWrongOutput(Checked):
    """One output of many tokens, by a fifth of what such outputs are."""

    def lie(self, out: torch.Tensor, tokens: int) -> torch.Tensor:
        if tokens > 8:
            out[-1, -1] += 0.2 * out.float().square().mean().sqrt()
        return out


class OneInfinity(Checked):
    def lie(self, out: torch.Tensor, tokens: int) -> torch.Tensor:
        out[0, 3] = float("inf")
        return out


class NoCompiler(Checked):
    def lie(self, out: torch.Tensor, tokens: int) -> torch.Tensor:
        raise RuntimeError("no such instruction\nat line 7")


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.title}-{s.rows}x{s.columns}")
def test_true_products_pass_once(storage: object, experts: int) -> None:
    """Every format, rounded to bfloat16; the second weights are not multiplied again."""
    check, kernel = KernelCheck(BF16), Checked()
    for _ in range(2):
        check.prepare(kernel, random_weights(storage.joined(2), experts))  # type: ignore[attr-defined]
    assert kernel.asked == [1, 8, 100]
    other = random_weights(storage, experts)  # type: ignore[arg-type]
    other.linear = True  # another way to decode
    check.prepare(kernel, other)
    assert kernel.asked == [1, 8, 100] * 2


@pytest.mark.parametrize(
    ("lying", "words"),
    [
        (OneWrongOutput, "multiply wrongly on this CPU .100 tokens: off by"),
        (OneInfinity, "multiply wrongly on this CPU .1 tokens: not finite"),
        (NoCompiler, r"do not run on this CPU .RuntimeError: no such instruction\);"),
    ],
)
@pytest.mark.parametrize(
    "storage", [integer(96, 128, 3, 128), nvfp4(50, 96), fp8(31, 100, (1, 100))]
)
@pytest.mark.parametrize("experts", [1, 3])
def test_wrong_products_are_refused(
    lying: type[Checked], words: str, storage: object, experts: int
) -> None:
    weights = random_weights(storage, experts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=words) as refusal:
        KernelCheck(BF16).prepare(lying(), weights)
    text = str(refusal.value)
    assert weights.storage.title in text
    assert text.endswith("use --backend torch")
    assert "\n" not in text


def test_an_excerpt_is_what_its_rows_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, blocks of scales and global scales stay those of their rows."""
    monkeypatch.setattr("runtime.kernel_check.ROWS", 64)
    for storage in STORAGES:
        weights = random_weights(storage.joined(2), 3)
        some = excerpt(weights, CPU)
        rows = some.storage.rows
        assert rows == min(64, storage.rows)
        for place, expert in enumerate((0, 2)):
            whole = TorchKernel().decode(weights, expert, BF16).view(2, storage.rows, -1)
            found = TorchKernel().decode(some, place, BF16).view(2, rows, -1)
            assert torch.equal(found, whole[:, :rows])


def test_a_model_is_not_loaded_with_a_kernel_that_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quantized_qwen("W4A16", tmp_path)
    settings = LoadSettings(device="cpu")
    monkeypatch.setattr(choice, "TorchKernel", Checked)
    load_model(path, settings)
    monkeypatch.setattr(choice, "TorchKernel", OneWrongOutput)
    with pytest.raises(InputError, match=r"W4A16 .* multiply wrongly on this CPU"):
        load_model(path, settings)


def test_triton_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels pass, and do not when a product of one kind of block is off."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("wants a GPU, or TRITON_INTERPRET=1")
    from runtime.kernels.triton_kernel import TritonKernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    class Lying(TritonKernel):
        def product(self, weights, x, plan, rows, top_k, is_turned=False):  # type: ignore[no-untyped-def]
            out = super().product(weights, x, plan, rows, top_k, is_turned)
            if plan.tokens > 8:
                out[-1] = out[-2]
            return out

    for storage in (integer(33, 128, 4, 128), fp8(45, 128, (1, 128))):
        for experts in (1, 3):
            KernelCheck(BF16).prepare(TritonKernel(device), random_weights(storage, experts))
            with pytest.raises(InputError, match=r"the triton kernels for .* multiply wrongly"):
                KernelCheck(BF16).prepare(Lying(device), random_weights(storage, experts))
