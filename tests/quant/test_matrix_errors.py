"""One broken row of a large matrix is found under every scheme, and no right row is accused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.gptq import gptq
from quant.judgement import bound, error_findings
from quant.matrix_errors import MatrixErrors, matrix_errors
from quant.recipes import Recipe, Rule
from quant.rounding import round_to_nearest
from quant.schemes import SCHEMES, Quantized, Scheme, dequantize, int_scheme
from quant.verify import verify_checkpoint
from tests.quant.checkpoints import quantized_checkpoint
from tests.tiny import tiny_model

ROWS, COLUMNS, ROW = 1000, 384, 777  # rows end in a ragged FP8 block
ALL = [
    *(int_scheme(bits, 128, symmetric) for bits in range(2, 9) for symmetric in (True, False)),
    *(scheme for scheme in SCHEMES.values() if scheme.kind != "int"),
]
IDS = [f"{one.name}-{'symmetric' if one.symmetric else 'asymmetric'}" for one in ALL]
Break = Callable[[Quantized, Scheme], Quantized]


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05


def found(weight: torch.Tensor, q: Quantized, scheme: Scheme) -> tuple[MatrixErrors, list[str]]:
    errors = matrix_errors(weight.numpy(), dequantize(q, scheme).numpy())
    assert errors is not None
    scale = None if q.global_scale is None else float(q.global_scale)
    return errors, list(error_findings("m", errors, scheme, scale))


def with_rows(q: Quantized, change: Callable[[torch.Tensor], torch.Tensor]) -> Quantized:
    """All that is stored a row, changed."""
    scale = change(q.scale) if len(q.scale) == ROWS else q.scale
    zero = None if q.zero_point is None else change(q.zero_point)
    return replace(q, codes=change(q.codes), scale=scale, zero_point=zero)


def swapped(q: Quantized, scheme: Scheme) -> Quantized:
    order = torch.arange(ROWS)
    order[[ROW, 3]] = torch.tensor([3, ROW])
    return with_rows(q, lambda part: part.view(torch.uint8)[order].view(part.dtype)
                     if part.element_size() == 1 else part[order])  # fmt: skip


def another(q: Quantized, scheme: Scheme) -> Quantized:
    """Row 3 twice."""
    order = torch.arange(ROWS)
    order[ROW] = 3
    return replace(q, codes=q.codes.view(torch.uint8)[order].view(q.codes.dtype))


def nothing(q: Quantized, scheme: Scheme) -> Quantized:
    """A row that is worth zero."""
    codes = q.codes.clone()
    codes[ROW] = 0
    if q.zero_point is not None:
        codes[ROW] = q.zero_point[ROW].repeat_interleave(COLUMNS // q.zero_point.shape[1])
    return replace(q, codes=codes)


def words_of_zero(q: Quantized, scheme: Scheme) -> Quantized:
    """A row of packed words that is zero: the lowest codes of integers."""
    codes = q.codes.clone()
    codes[ROW] = -(1 << scheme.bits - 1) if scheme.kind == "int" and scheme.symmetric else 0
    return replace(q, codes=codes)


def scaled(q: Quantized, scheme: Scheme) -> Quantized:
    """A row eight times as large (of an FP8 block: through its codes, as far as they go)."""
    if len(q.scale) != ROWS:
        codes = q.codes.float()
        codes[ROW] = (codes[ROW] * 8).clamp(-448, 448)
        return replace(q, codes=codes.to(q.codes.dtype))
    scale = q.scale.float()
    scale[ROW] *= 8
    if scheme.kind == "nvfp4":
        scale = scale.clamp(max=448)
    return replace(q, scale=scale.to(q.scale.dtype))


@pytest.mark.parametrize("scheme", ALL, ids=IDS)
def test_one_broken_row_of_many_is_named(scheme: Scheme) -> None:
    weight = weights()
    q = round_to_nearest(weight, scheme)
    assert found(weight, q, scheme)[1] == []
    breaks: list[Break] = [swapped, another, nothing, words_of_zero]
    if scheme.kind != "nvfp4":  # its blocks' scales are near their largest
        breaks.append(scaled)
    for broken in breaks:
        errors, findings = found(weight, broken(q, scheme), scheme)
        assert len(findings) == 1, broken.__name__
        if broken is swapped:
            assert " and 1 more rows are not the source's" in findings[0]
            assert "row 777" in findings[0] or "row 3 " in findings[0]
        else:
            assert f"row {ROW} is not the source's" in findings[0], broken.__name__
        if scheme.bits <= 4 and broken is not scaled:
            assert errors.relative < bound(scheme)  # the whole matrix tells nothing


@pytest.mark.parametrize("scheme", ALL, ids=IDS)
def test_right_rows_are_not_accused(scheme: Scheme) -> None:
    """Zeros, rows of any smallness, outliers in one row, in every group, heavy tails."""
    weight = weights(1)
    weight[::9] = 0
    for power, row in enumerate(range(1, 150, 10)):
        weight[row] *= 2.0**-power
    for power, row in enumerate(range(2, 300, 10)):
        weight[row] *= 2.0**-power
    weight[5, 7] = 12.0
    weight[200:300, ::128] *= 40
    tails = torch.distributions.StudentT(2.0).sample((100, COLUMNS)) * 0.05
    weight[300:400] = tails.clamp(-3, 3)
    weight[400:500] *= (torch.rand(100, COLUMNS) < 0.05).float()
    weight[500:600] = weight[500:600].abs()
    torch.manual_seed(2)
    q = round_to_nearest(weight, scheme)
    errors = matrix_errors(weight.numpy(), dequantize(q, scheme).numpy())
    assert errors is not None
    scale = None if q.global_scale is None else float(q.global_scale)
    assert errors.broken_rows(scheme, scale) == []
    if scheme.kind == "nvfp4":  # a partner's global scale, a thousand times as coarse
        assert scale is not None
        coarse = torch.tensor([scale / 1000])
        q = round_to_nearest(weight, scheme, global_scale_B=coarse)
        errors = matrix_errors(weight.numpy(), dequantize(q, scheme).numpy())
        assert errors is not None
        assert errors.broken_rows(scheme, float(coarse)) == []


SOLVED = [int_scheme(2, 64, True), int_scheme(2, 64, False), SCHEMES["NVFP4A16"]]
SOLVED += [int_scheme(bits, 64, True) for bits in (3, 4, 5, 6, 8)]


@pytest.mark.parametrize("scheme", SOLVED, ids=lambda scheme: scheme.name)
def test_rows_by_gptq_are_not_accused(scheme: Scheme) -> None:
    """Inputs of few directions and of very unlike sizes, weights with outliers."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    columns = 192
    sizes = torch.logspace(0, -3, columns)[torch.randperm(columns, generator=generator)]
    few = normal(1024, 6) @ normal(6, columns)
    inputs = [few, few + 0.02 * normal(1024, columns), normal(1024, columns) * sizes]
    inputs.append((few + 0.05 * normal(1024, columns)) * sizes)
    spiked = normal(96, columns)
    spiked[:, ::64] *= 40
    steps = normal(96, columns).sign()
    steps[:, ::64] = 15.0
    for weight in (normal(96, columns), spiked, steps):
        for x in inputs:
            solved = gptq(weight[None], (x.T @ x / len(x))[None], scheme)
            q = solved.quantized[0]
            errors = matrix_errors(weight.numpy(), dequantize(q, scheme).numpy())
            assert errors is not None
            scale = None if q.global_scale is None else float(q.global_scale)
            assert errors.broken_rows(scheme, scale) == []


def test_sums_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, other = weights().numpy(), weights().numpy() * 1.25
    monkeypatch.setattr("quant.matrix_errors.CHUNK", 7 * COLUMNS)
    errors = matrix_errors(weight.T, np.ascontiguousarray(other.T))
    assert errors is not None
    assert errors.relative == pytest.approx(0.25, rel=1e-5)
    assert errors.largest == np.abs(weight).max()
    assert errors.of_row(17) == pytest.approx(0.25, rel=1e-5)
    shifted = matrix_errors(weight, weight + np.float32(0.5))
    assert shifted is not None
    assert shifted.lean == pytest.approx(1, rel=1e-5)
    assert matrix_errors(weight, weight[:-1]) is None
    nothing_at_all = matrix_errors(weight * 0, weight * 0)
    assert nothing_at_all is not None
    assert (nothing_at_all.relative, nothing_at_all.lean) == (0.0, 0.0)
    invented = matrix_errors(weight * 0, weight)
    assert invented is not None
    assert invented.relative == float("inf")


WIDE = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128}
FILES = [
    (int_scheme(2, 32, True), "weight_packed", "zeroed"),
    (SCHEMES["W3A16"], "weight_packed", "zeroed"),
    (int_scheme(4, 64, False), "weight_packed", "zeroed"),
    (SCHEMES["W4A16"], "weight_packed", "swapped"),
    (SCHEMES["W8A16"], "weight_scale", "larger"),
    (SCHEMES["NVFP4A16"], "weight_packed", "zeroed"),
    (SCHEMES["FP8_BLOCK"], "weight", "swapped"),
    (SCHEMES["FP8_DYNAMIC"], "weight", "zeroed"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3_moe", tmp_path_factory.mktemp("rows") / "source", **WIDE)


@pytest.mark.parametrize(("scheme", "suffix", "how"), FILES)
def test_a_broken_row_of_a_file_is_found(
    scheme: Scheme, suffix: str, how: str, source: Path, tmp_path: Path
) -> None:
    recipe = Recipe((Rule(scheme=scheme, ignore=("re:.*self_attn.*",)),))
    out = quantized_checkpoint(source, tmp_path / "out", recipe)
    assert verify_checkpoint(out, source).findings == []
    tensors = load_file(out / "model.safetensors")
    module = "model.layers.2.mlp.experts.3.up_proj"
    part = tensors[f"{module}.{suffix}"]
    raw = part if how == "larger" else part.view(torch.uint8)
    if how == "zeroed":
        raw[9] = 0
    elif how == "swapped":
        raw[[9, 40]] = raw[[40, 9]]
    else:
        raw[9] *= 4
    save_file(tensors, out / "model.safetensors")
    (finding,) = verify_checkpoint(out, source).findings
    assert finding.startswith(module)
    assert "row 9 " in finding or "row 40 " in finding
    assert "not the source's" in finding
