"""A layer walk that can be killed at any moment: snapshots of hidden states, noted in a journal.

After a layer, when `SnapshotClock` says so, the carries entering the next layer are written to
disk and *then* the journal records the layer. A later run of the same job starts behind the last
recorded layer; layers computed after it are computed again, from the same bytes to the same
bytes. Results a caller keeps for each layer are written before the record (see `after`). A
snapshot that the disk has no room for is left out: it is insurance, not the job.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from calibration.stream import BatchObserver, CarryObserver, LayerWalk, SnapshotClock
from models.journal import Journal
from models.progress import Progress, Step

log = logging.getLogger("thresher.resume")

HIDDEN = "hidden"  # the name of a job's only walk

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
    leaves: bool = True,
    finisher: Callable[[int], Finish] = lambda layer: (None, None),
) -> None:
    """Run every decoder layer that `journal` has not recorded under `name`.

    `observer(layer)` gives what watches a layer, `finisher(layer)` (asked after it) what sees the
    layer's output and its end; `after(layer)` saves what they saw, durably.
    Afterwards the carries that left the last layer are in `walk.hidden_states`, under the index
    `walk.num_layers`, where something reads them (`leaves`).
    """
    start = begin_at(walk, journal, name)
    total = walk.num_layers + extra_units
    clock = SnapshotClock()
    for layer in range(start, walk.num_layers):
        observe = observer(layer)
        walk.run(layer, observe, *finisher(layer))
        after(layer)
        walk.hidden_states.forget_from_ram(layer)
        keep_place({HIDDEN: walk}, journal, f"{name} {layer}", layer, clock, leaves=leaves)
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
    walks: Mapping[str, LayerWalk],
    journal: Journal,
    unit: str,
    layer: int,
    clock: SnapshotClock,
    settle: Callable[[], None] = lambda: None,
    *,
    leaves: bool = True,
    reserve: Callable[[], int] = lambda: 0,
    **facts: Any,
) -> None:
    """Make `layer` one that a later run goes on behind, when `clock` says so or it is the last,
    and the disk has room for it beside the `reserve` of bytes that the output still wants.

    `walks` stand behind the layer together; the digests of each are recorded under its name, with
    other `facts` of the layer.

    `settle` returns when what belongs to the layers up to it is on the disk. What leaves the last
    layer is kept only if something reads it (`leaves`).
    """
    first = next(iter(walks.values()))
    last = layer == first.num_layers - 1
    if last or first.processes.from_first(clock.due):
        settle()
        began = time.monotonic()
        forgotten = last and not leaves
        if forgotten or first.processes.from_first(
            lambda: has_room(walks.values(), journal, layer + 1, clock, reserve())
        ):
            saved = {n: [] if forgotten else w.snapshot(layer + 1) for n, w in walks.items()}
            journal.record(unit, **facts, **saved)
            for walk in walks.values():
                walk.forget_before(layer + 2 if forgotten else layer + 1)
            clock.took(time.monotonic() - began)
            return
    for walk in walks.values():
        walk.forget_used(layer + 1)


def has_room(
    walks: Iterable[LayerWalk], journal: Journal, layer: int, clock: SnapshotClock, reserve: int
) -> bool:
    """Whether what enters `layer` can be saved; says once where it cannot."""
    needed = sum(w.hidden_states.unsaved_bytes(layer) * w.processes.size for w in walks)
    free = shutil.disk_usage(journal.folder).free
    fits = needed + reserve <= free
    if not fits and not clock.warned:
        clock.warned = True
        log.warning(
            "%s: no room to save %s bytes of hidden states beside %s of output still to be "
            "written (%s free); going on, but after a kill layers are computed again",
            *(journal.folder, f"{needed:,}", f"{reserve:,}", f"{free:,}"),
        )
    return fits


def begin_at(walk: LayerWalk, journal: Journal, name: str) -> int:
    """The layer to go on with: behind the last one recorded under `name`, or 0, embedded."""
    recorded = (layer for layer in range(walk.num_layers) if journal.done(f"{name} {layer}"))
    last = max(recorded, default=-1)
    if last < 0:
        walk.embed()
    else:
        walk.hidden_states.expect(last + 1, journal.facts(f"{name} {last}").get(HIDDEN, []))
    return last + 1
