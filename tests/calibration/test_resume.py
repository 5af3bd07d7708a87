"""Where a walk can be taken up again, and what of it lies on the disk."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from calibration.hidden_states import HiddenStates
from calibration.resume import HIDDEN, begin_at, keep_place
from calibration.stream import LayerWalk, SnapshotClock
from models.journal import Journal
from models.opening import open_model
from models.skeleton import Skeleton
from tests.tiny import tiny_model
from tests.token_sets import random_token_set

BEYOND_ANY_DISK = 1 << 60


def walk_through(folder: Path, journal: Journal, budget: int | None) -> LayerWalk:
    if not (folder / "model").exists():
        tiny_model("qwen3_moe", folder / "model", num_hidden_layers=5)
    source = open_model(str(folder / "model")).source
    tokens = random_token_set(source.spec.text["vocab_size"])
    states = HiddenStates(journal.folder / "hidden", budget, journal.discard)
    return LayerWalk(Skeleton(source, dtype=torch.float32), tokens, states, 32)


def generations(journal: Journal) -> list[int]:
    """Whose files lie on the disk, once what was discarded is gone."""
    for thread in journal._removing:
        thread.join()
    return sorted(int(path.name[6:]) for path in (journal.folder / "hidden").glob("layer_*"))


@pytest.mark.parametrize("budget", [None, 3000])
def test_without_room_a_job_goes_on_and_begins_earlier_after_a_kill(
    budget: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saved behind layers 0 and 1, then the disk is full: files of layer 2 stay, those of later
    layers that were spilled go when they are used up."""
    journal = Journal.open(tmp_path / "out", {"command": "test"})
    walk = walk_through(tmp_path, journal, budget)
    clock = SnapshotClock(share=1e9)  # always due
    assert begin_at(walk, journal, "walk") == 0
    with caplog.at_level(logging.WARNING):
        for layer in range(4):
            walk.run(layer)
            walk.hidden_states.forget_from_ram(layer)
            reserve = BEYOND_ANY_DISK if layer >= 2 else 0
            keep_place(
                {HIDDEN: walk}, journal, f"walk {layer}", layer, clock, reserve=lambda n=reserve: n
            )
            if layer < 2:
                assert generations(journal) == [layer + 1]
            else:
                assert generations(journal) == ([2] if budget is None else [2, layer + 1])
    (warning,) = caplog.records
    assert "no room to save" in warning.getMessage()
    reached = {n: walk.hidden_states.take(4, n)["hidden_states"] for n in walk.own}
    journal.close()

    later = Journal.open(tmp_path / "out", {"command": "test"})
    again = walk_through(tmp_path, later, budget)
    assert begin_at(again, later, "walk") == 2
    for layer in (2, 3):
        again.run(layer)
    for number, hidden in reached.items():
        assert torch.equal(again.hidden_states.take(4, number)["hidden_states"], hidden)
    later.close()


@pytest.mark.parametrize("leaves", [False, True])
def test_behind_the_last_layer_only_what_is_read_stays(leaves: bool, tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "out", {"command": "test"})
    walk = walk_through(tmp_path, journal, None)
    begin_at(walk, journal, "walk")
    for layer in range(walk.num_layers):
        walk.run(layer)
        walk.hidden_states.forget_from_ram(layer)
        clock = SnapshotClock(share=1e9 if layer == 1 else 1e-9)
        clock.last_cost = 1.0
        keep_place({HIDDEN: walk}, journal, f"walk {layer}", layer, clock, leaves=leaves)
        if layer in (1, 2, 3):
            assert generations(journal) == [2]
    assert generations(journal) == ([walk.num_layers] if leaves else [])
    assert begin_at(walk, journal, "walk") == walk.num_layers
    journal.close()
