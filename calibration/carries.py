"""The way of carries between `HiddenStates` and the device that runs the layers.

    HiddenStates --(reader thread)--> pinned memory --(copy stream)--> GPU     a batch ahead
    GPU --(copy stream)--> pinned memory --(writer thread)--> HiddenStates     a batch behind

A batch of 16,384 tokens of DeepSeek-V3.2 is 235 MB each way; copied from and to pageable memory
that is as much time as its experts take. Here the GPU goes on meanwhile: what it is fed next lies
there already, what it gave leaves behind its back, files of spilled carries are read, checked and
written by the same threads. Pinned memory is two carries each way, allocated once: it costs a
second a GB. No more than two batches are under way on the GPU, so nothing piles up there.

Refused: keeping all carries pinned, which is no faster (the threads have time to copy) and takes
40 GB of the host that cannot be paged, 40 s to allocate.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from calibration.hidden_states import HiddenStates
from models.fp8_upload import aligned
from models.layer_slot import Carry

SLOTS = 2  # pinned carries each way: one that a thread works on, one on the bus
SPARE = 4  # carries whose memory waits for its next use


class Carries:
    """Carries to and from `device`, where that is the CPU."""

    def __init__(self, states: HiddenStates, device: torch.device) -> None:
        self.states, self.device = states, device

    def entering(self, layer: int, batches: Sequence[int], *, keep: bool) -> Iterator[Carry]:
        """What enters `layer`, for each of `batches` in turn, on the device; for one user at a
        time. `keep` leaves it in `states` for another pass."""
        for batch in batches:
            yield self.states.take(layer, batch, keep=keep)

    def put(self, layer: int, batch: int, carry: Carry) -> None:
        """Store what enters `layer`. InputError, here or later, when it cannot be written."""
        self.states.put(layer, batch, carry)

    def settle(self) -> None:
        """Return when everything that was put is in `states`."""


class GpuCarries(Carries):
    """The same for a GPU, beside its computation on the current stream."""

    def __init__(self, states: HiddenStates, device: torch.device) -> None:
        super().__init__(states, device)
        self.copies_in, self.copies_out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="carries-in")
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="carries-out")
        self.spare = SpareMemory(SPARE)
        self.slots_in = deque(Slot() for _ in range(SLOTS))
        self.slots_out = deque(Slot() for _ in range(SLOTS))

    def entering(self, layer: int, batches: Sequence[int], *, keep: bool) -> Iterator[Carry]:
        if not batches:
            return
        stream = torch.cuda.current_stream(self.device)
        running: deque[torch.cuda.Event] = deque()
        following = self.reader.submit(self._fetch, layer, batches[0], keep)
        try:
            for after in (*batches[1:], None):
                carry, copied = following.result()
                if after is not None:
                    following = self.reader.submit(self._fetch, layer, after, keep)
                stream.wait_event(copied)
                for tensor in carry.values():
                    tensor.record_stream(stream)
                yield carry
                del carry
                running.append(stream.record_event())
                if len(running) == SLOTS:
                    running.popleft().synchronize()
        finally:
            following.cancel()

    def _fetch(self, layer: int, batch: int, keep: bool) -> tuple[Carry, torch.cuda.Event]:
        """In the reader's thread: the carry on its way to the GPU, and what says it is there."""
        used_up = self.states.holds(layer, batch) and not keep  # files are read into other memory
        stored = self.states.take(layer, batch, keep=keep)
        slot = self.slots_in[0]
        self.slots_in.rotate(-1)
        slot.copied.synchronize()  # of its last carry
        pinned = slot.views(stored)
        for name, tensor in stored.items():
            pinned[name].copy_(tensor)
        if used_up:
            self.spare.give(stored)
        with torch.cuda.stream(self.copies_in):
            carry = {name: view.to(self.device, non_blocking=True) for name, view in pinned.items()}
            slot.copied = self.copies_in.record_event()
        return carry, slot.copied

    def put(self, layer: int, batch: int, carry: Carry) -> None:
        slot = self.slots_out[0]
        self.slots_out.rotate(-1)
        slot.settle()
        self.copies_out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies_out), torch.inference_mode():
            pinned = slot.views(carry)
            for name, tensor in carry.items():
                pinned[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(self.copies_out)
            slot.copied = self.copies_out.record_event()
        slot.stored = self.writer.submit(self._store, layer, batch, pinned, slot.copied)

    def _store(self, layer: int, batch: int, pinned: Carry, copied: torch.cuda.Event) -> None:
        """In the writer's thread: what has come from the GPU, to memory of its own."""
        copied.synchronize()
        own = self.spare.like(pinned)
        for name, view in pinned.items():
            own[name].copy_(view)
        self.states.put(layer, batch, own)

    def settle(self) -> None:
        for slot in self.slots_out:
            slot.settle()


class SpareMemory:
    """Memory of carries that are used up, for those that come: of a generation that replaces
    another of its size every page would else be returned and asked for again, which takes the
    kernel longer than to copy what goes there. At most `most` carries wait; for two threads."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.free: list[torch.Tensor] = []  # uint8, whole pieces of memory
        self._lock = threading.Lock()

    def give(self, carry: Carry) -> None:
        """Nobody else uses the tensors of `carry` any more."""
        for tensor in carry.values():
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            with self._lock:
                if len(self.free) < self.most:
                    self.free.append(whole)

    def like(self, carry: Carry) -> Carry:
        """Tensors of the shapes and types of `carry`; the contents are whatever lay there."""
        return {name: self._piece(tensor) for name, tensor in carry.items()}

    def _piece(self, like: torch.Tensor) -> torch.Tensor:
        raw = None
        with self._lock:
            for number, piece in enumerate(self.free):
                if like.nbytes <= len(piece) <= like.nbytes * 5 // 4:
                    raw = self.free.pop(number)
                    break
        if raw is None:
            return torch.empty(like.shape, dtype=like.dtype)
        return raw[: like.nbytes].view(like.dtype).view(like.shape)


class Slot:
    """Pinned memory for one carry, and what it waits for before it is used again."""

    def __init__(self) -> None:
        self.raw = torch.empty(0, dtype=torch.uint8)
        self.copied = torch.cuda.Event()  # between it and the GPU
        self.stored: Future[None] | None = None  # from it to `HiddenStates`

    def views(self, carry: Carry) -> Carry:
        """Room for tensors like those of `carry`; what was in the slot is no longer needed."""
        size = sum(aligned(tensor.nbytes) for tensor in carry.values())
        if self.raw.numel() < size:
            self.raw = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        views, start = {}, 0
        for name, tensor in carry.items():
            part = self.raw[start : start + tensor.nbytes]
            views[name] = part.view(tensor.dtype).view(tensor.shape)
            start += aligned(tensor.nbytes)
        return views

    def settle(self) -> None:
        """Wait until what it holds is stored; raises what went wrong there."""
        if self.stored is not None:
            stored, self.stored = self.stored, None
            stored.result()


def carries_of(states: HiddenStates, device: torch.device) -> Carries:
    """The way between `states` and `device`."""
    return (GpuCarries if device.type == "cuda" else Carries)(states, device)
