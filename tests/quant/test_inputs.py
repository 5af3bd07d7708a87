"""Sums over the inputs of Linears against brute force in float64."""

from __future__ import annotations

import pytest
import torch

from calibration.batches import PADDING, Batch
from models.needs import hessian_rows
from quant.inputs import LinearInputs

K, ROWS = 16, 5000


def batches(count: int) -> list[tuple[torch.Tensor, Batch]]:
    """Inputs [1, ROWS, K], every second batch with padding."""
    made = []
    for number in range(count):
        x = torch.randn(1, ROWS, K, generator=torch.Generator().manual_seed(number))
        domain_T = torch.zeros(ROWS, dtype=torch.uint8)
        if number % 2:
            domain_T[-number:] = PADDING
            x[0, -number:] = torch.nan  # padding may hold anything
        batch = Batch((0,), (ROWS,), torch.zeros(1, ROWS, dtype=torch.int64), None, domain_T)
        made.append((x, batch))
    return made


def test_all_rows_up_to_enough() -> None:
    given = batches(4)
    inputs = LinearInputs(True, 4 * ROWS)
    for x, batch in given:
        inputs.add("q", x, batch)
        inputs.add("k", x, batch)  # the same tensor: one Hessian
    rows = torch.cat([x[0][batch.domain_T != PADDING] for x, batch in given]).double()
    for name in ("q", "k"):
        hessian, tokens, largest = inputs.sums_of(name)
        assert hessian is not None
        assert tokens == len(rows)
        assert largest == float(rows.abs().max())
        torch.testing.assert_close(hessian.double(), rows.T @ rows, rtol=1e-5, atol=1e-2)
    assert list(inputs.hessian) == ["q"]


@pytest.mark.parametrize("times", [2, 7])
def test_of_more_rows_an_even_share_of_the_batches(times: int) -> None:
    """With as many tokens as `times` what is enough, one batch of `times` counts; ranges are of
    all. A batch's own number says whether it does, so a job that was killed goes on alike."""
    given = batches(3 * times)
    inputs = LinearInputs(True, times * hessian_rows(K))
    taken = []
    for number, (x, batch) in enumerate(given):
        before = inputs.count.get("q", 0)
        inputs.add("q", x, batch)
        if inputs.count["q"] > before:
            taken.append(number)
    assert taken[0] == 0
    assert abs(len(taken) - 3) <= 1
    assert set(torch.tensor(taken).diff().tolist()) <= {times - 1, times, times + 1}
    some = torch.cat([given[n][0][0][given[n][1].domain_T != PADDING] for n in taken]).double()
    hessian, tokens, largest = inputs.sums_of("q")
    assert hessian is not None
    assert tokens == len(some)
    torch.testing.assert_close(hessian.double(), some.T @ some, rtol=1e-5, atol=1e-2)
    real = [x[0][batch.domain_T != PADDING] for x, batch in given]
    assert largest == float(torch.cat(real).abs().max())
