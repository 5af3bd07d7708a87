"""A layer walk that can be killed at any moment: snapshots of hidden states, noted in a journal.

After a layer, when `SnapshotClock` says so, the carries entering the next layer are written to
disk and *then* the journal records the layer. A later run of the same job starts behind the last
recorded layer; layers computed after it are computed again, from the same bytes to the same
bytes. Results a caller keeps for each layer are written before the record (see `after`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from calibration.stream import BatchObserver, CarryObserver, LayerWalk, SnapshotClock
from models.journal import Journal
from models.progress import Progress, Step

LayerDone = Callable[[int], None]
Finish = tuple[CarryObserver | None, Callable[[], None] | None]  # `left`, `before_freed` of `run`


def walk_layers(
    walk: LayerWalk,
    journal: Journal,
    *,
    name: str,
    observer: Callable[[int], BatchObserver | None],
    after: LayerDone,
    progress: Progress,
    extra_units: int = 0,
    finisher: Callable[[int], Finish] = lambda layer: (None, None),
) -> None:
    """Run every decoder layer that `journal` has not recorded under `name`.

    `observer(layer)` gives what watches a layer, `finisher(layer)` (asked after it) what sees the
    layer's output and its end; `after(layer)` saves what they saw, durably.
    Afterwards the carries that left the last layer are in `walk.hidden_states`, under the index
    `walk.num_layers`.
    """
    start = begin_at(walk, journal, name)
    total = walk.num_layers + extra_units
    clock = SnapshotClock()
    for layer in range(start, walk.num_layers):
        observe = observer(layer)
        walk.run(layer, observe, *finisher(layer))
        after(layer)
        walk.hidden_states.forget_from_ram(layer)
        keep_place(walk, journal, f"{name} {layer}", layer, clock)
        progress(
            Step(
                job=name,
                done=layer + 1,
                total=total,
                tokens=(layer + 1 - start) * walk.num_tokens,
                note=f"layer {layer}",
            )
        )


def keep_place(
    walk: LayerWalk,
    journal: Journal,
    unit: str,
    layer: int,
    clock: SnapshotClock,
    settle: Callable[[], None] = lambda: None,
    *,
    leaves: bool = True,
) -> None:
    """Make `layer` one that a later run goes on behind, when `clock` says so or it is the last.

    `settle` returns when what belongs to the layers up to it is on the disk. What leaves the last
    layer is kept only if something reads it (`leaves`).
    """
    last = layer == walk.num_layers - 1
    if last or walk.processes.from_first(clock.due):
        settle()
        began = time.monotonic()
        forgotten = last and not leaves
        journal.record(unit, hidden=[] if forgotten else walk.snapshot(layer + 1))
        walk.forget_before(layer + 2 if forgotten else layer + 1)
        clock.took(time.monotonic() - began)


def begin_at(walk: LayerWalk, journal: Journal, name: str) -> int:
    """The layer to go on with: behind the last one recorded under `name`, or 0, embedded."""
    recorded = (layer for layer in range(walk.num_layers) if journal.done(f"{name} {layer}"))
    last = max(recorded, default=-1)
    if last < 0:
        walk.embed()
    else:
        walk.hidden_states.expect(last + 1, journal.facts(f"{name} {last}").get("hidden", []))
    return last + 1
