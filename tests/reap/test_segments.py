"""Sums over cells against a loop."""

from __future__ import annotations

import pytest
import torch

from reap.segments import Segments

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("values", "cells"), [(0, 3), (1, 1), (500, 7), (300, 1000)])
def test_sums_counts_and_maxima(values: int, cells: int, device: str) -> None:
    generator = torch.Generator().manual_seed(values)
    cell_N = torch.randint(0, cells + 2, (values,), generator=generator)  # the last are left out
    value_N = torch.rand(values, generator=generator, dtype=torch.float64)
    segments = Segments.of(cell_N.to(device), cells)
    sorted_N = segments.sorted(value_N.to(device))
    sums, most = (segments.reduced(sorted_N, how).cpu() for how in ("sum", "max"))
    for cell in range(cells):
        own = value_N[cell_N == cell]
        assert int(segments.count()[cell]) == len(own)
        torch.testing.assert_close(sums[cell], own.sum(), rtol=1e-14, atol=0)
        assert most[cell] == (own.max() if len(own) else 0)
    other = Segments.of(cell_N.to(device), cells)
    assert torch.equal(sums, other.reduced(other.sorted(value_N.to(device)), "sum").cpu())
