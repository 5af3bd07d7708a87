"""Memory of carries that are used up serves the next ones."""

from __future__ import annotations

import torch

from calibration.carries import SpareMemory


def carry(rows: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.full((1, rows, 8), 7, dtype=dtype)}


def test_memory_is_used_again_where_it_fits() -> None:
    spare = SpareMemory(2)
    first = carry(100)
    place = first["hidden_states"].data_ptr()
    spare.give(first)
    made = spare.like(carry(90))["hidden_states"]  # shorter, of the same memory
    assert made.data_ptr() == place
    assert made.shape == (1, 90, 8)
    made.fill_(3)
    spare.give({"hidden_states": made})
    whole = spare.like(carry(50, torch.float32))["hidden_states"]  # its full length again
    assert whole.data_ptr() == place
    assert whole.shape == (1, 50, 8)
    assert whole.dtype == torch.float32
    assert spare.like(carry(100))["hidden_states"].data_ptr() != place  # it is in use


def test_no_more_is_kept_than_asked_for_and_nothing_much_too_large() -> None:
    spare = SpareMemory(2)
    for _ in range(5):
        spare.give(carry(100))
    assert len(spare.free) == 2
    small = spare.like(carry(10))["hidden_states"]
    assert small.untyped_storage().nbytes() == small.nbytes
    assert len(spare.free) == 2
