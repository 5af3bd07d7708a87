"""Several processes that work on one job, on one machine or many, started by torchrun.

Every process runs the same program on batches of its own; what they must know of one another goes
through the four exchanges of `Processes`, which is passed to whoever needs it. One process is the
ordinary case: torch.distributed is then not touched at all.

    gather      a small object of each, to all
    from_first  an object of the first process (the one that writes), to all
    exchange    tensors, from each to each
    share       tensors of each, to all

Small objects and CPU tensors go over gloo, CUDA tensors over NCCL. A process that fails says so in
a counter of the rendezvous store and ends; the others find the connection closed, look at the
counter, and end without a word: one failure is one line, whoever had it. So a CUDA exchange always
comes behind a gather, because NCCL alone would wait for a process that is gone.

Refused: one process with a thread for each GPU (the layers' Python would take turns), and handing
an exception round in every exchange (it cannot reach a process that waits in another one).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from models.errors import AnotherProcessFailed, InputError
from models.launch import launched
from models.opening import compute_device

# How long a process waits for another that is connected but silent. Rounding a layer's experts on
# a CPU or building a mix may take the others many minutes.
TIMEOUT = timedelta(hours=1)
LEAVING_SECONDS = 60.0
GONE = (
    "another process of this job ended without saying why (killed, or its machine is gone); run "
    "the same command again to go on"
)
ALIGNMENT = 16  # bytes; no dtype is wider

T = TypeVar("T")
Parcel = Mapping[str, torch.Tensor]
Label = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Processes:
    """Process `rank` of `size` that work on a job."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True in the one process that writes the output."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with connected():
            dist.all_gather_object(found, value)
        return found

    def gather_dealt(self, own: Sequence[T]) -> list[T]:
        """Things that were dealt out one to each process, round after round, in their order."""
        by_process = self.gather(list(own))
        count = sum(map(len, by_process))
        return [by_process[number % self.size][number // self.size] for number in range(count)]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process; the others do not call it."""
        if self.size == 1:
            return make()
        held: list[Any] = [make() if self.is_first else None]
        with connected():
            dist.broadcast_object_list(held)
        value: T = held[0]
        return value

    def exchange(self, outgoing: Sequence[Parcel], device: torch.device) -> list[Parcel]:
        """Send `outgoing[r]` to process r; returns what each process sent here, on `device`."""
        if self.size == 1:
            return list(outgoing)
        labels = self.gather([labels_of(parcel) for parcel in outgoing])
        coming = [from_one[self.rank] for from_one in labels]
        sent = torch.cat([packed(parcel, device) for parcel in outgoing])
        sizes = [sum(room(label) for label in parcel) for parcel in coming]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        with connected():
            dist.all_to_all_single(
                received, sent, sizes, [sum(map(room, labels_of(parcel))) for parcel in outgoing]
            )
        return [
            unpacked(part, parcel)
            for part, parcel in zip(received.split(sizes), coming, strict=True)
        ]

    def share(self, own: Parcel, device: torch.device) -> list[Parcel]:
        """Every process's tensors, by rank, on `device`."""
        if self.size == 1:
            return [own]
        shared: list[Parcel] = []
        for rank, labels in enumerate(self.gather(labels_of(own))):
            parcel = {}
            for name, dtype, shape in labels:
                if rank == self.rank:
                    tensor = own[name].to(device).contiguous()
                else:
                    tensor = torch.empty(shape, dtype=dtype, device=device)
                if tensor.numel():
                    with connected():
                        dist.broadcast(tensor.view(-1).view(torch.uint8), rank)
                parcel[name] = tensor
            shared.append(parcel)
        return shared


ALONE = Processes()


def labels_of(parcel: Parcel) -> list[Label]:
    """Names, types and shapes, in the parcel's order."""
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in parcel.items()]


def num_bytes(label: Label) -> int:
    """Bytes of a labelled tensor."""
    return torch.Size(label[2]).numel() * label[1].itemsize


def room(label: Label) -> int:
    """Bytes a labelled tensor takes in a message."""
    return -(-num_bytes(label) // ALIGNMENT) * ALIGNMENT


def packed(parcel: Parcel, device: torch.device) -> torch.Tensor:
    """A parcel as bytes, each tensor at a multiple of ALIGNMENT."""
    labels = labels_of(parcel)
    message = torch.zeros(sum(map(room, labels)), dtype=torch.uint8, device=device)
    start = 0
    for label in labels:
        tensor = parcel[label[0]].to(device).contiguous()
        message[start : start + num_bytes(label)] = tensor.view(-1).view(torch.uint8)
        start += room(label)
    return message


def unpacked(message: torch.Tensor, labels: Sequence[Label]) -> Parcel:
    """The reverse of `packed`."""
    parcel, start = {}, 0
    for label in labels:
        name, dtype, shape = label
        parcel[name] = message[start : start + num_bytes(label)].view(dtype).view(shape)
        start += room(label)
    return parcel


@contextmanager
def connected() -> Iterator[None]:
    """Turns what torch raises when a process is gone into AnotherProcessFailed."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise AnotherProcessFailed(GONE) from error


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes of this job, for the time of the block; `device` as the user gave it.

    Of several failing processes only the first raises what it had to say, the others
    AnotherProcessFailed without words.
    """
    if launched()[1] == 1:
        yield ALONE
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    try:
        kind = kind_of_all(store, rank, size, device)
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("exchanges", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
        processes = Processes(rank, size)
        yield processes
        processes.gather(None)
        leave(store, size)
    except BaseException as error:
        if is_first_to_fail(store):
            raise
        raise AnotherProcessFailed("") from error
    dist.destroy_process_group()


def kind_of_all(store: dist.Store, rank: int, size: int, device: str) -> str:
    """Where all processes compute, cpu or cuda. InputError when they do not agree.

    Each sees one GPU at most (models/launch.py), so a process too many on a machine has none.
    """
    if device.startswith("cuda:"):
        raise InputError(
            f"--device {device}: each of several processes takes the GPU of its own number; "
            "leave --device out"
        )
    kind = "none"
    try:
        kind = compute_device(device).type
    finally:
        store.set(f"device {rank}", kind)
    with connected():
        kinds = [store.get(f"device {number}").decode() for number in range(size)]
    if "none" in kinds:
        raise AnotherProcessFailed(GONE)
    if "cpu" in kinds and "cuda" in kinds:
        raise InputError(
            f"process {kinds.index('cpu')} finds no GPU and process {kinds.index('cuda')} has one; "
            "start on each machine as many processes as it has GPUs, or use --device cpu"
        )
    return kinds[0]


def is_first_to_fail(store: dist.Store) -> bool:
    """True in the first process that asks. Without the store (it may live in a process that has
    ended) nobody is: whoever ended has spoken."""
    try:
        return int(store.add("failures", 1)) == 1
    except RuntimeError:
        return False


def leave(store: dist.Store, size: int) -> None:
    """Wait until every process is past its last exchange, so that no connection closes early."""
    deadline = time.monotonic() + LEAVING_SECONDS
    try:
        left = store.add("left", 1)
        while left < size and time.monotonic() < deadline:
            time.sleep(0.01)
            left = store.add("left", 0)
    except RuntimeError:  # the store's host has seen all leave and left
        return
