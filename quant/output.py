"""The shards of a quantized checkpoint, one or more for each layer, named before anything runs.

What a layer's file will hold follows from the recipe and the source's shapes, so all names
(`model-00007-of-000NN.safetensors`), sizes and the disk need are known at the start. A layer's
shards are written when the layer is rounded; a killed job writes only what is not recorded yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from types import TracebackType

import torch

from models.byte_copy import Bytes
from models.errors import InputError
from models.journal import Journal
from models.shard_index import INDEX
from models.shards import DTYPE_BITS
from models.writer import (
    MAX_SHARD_BYTES,
    OutputTensor,
    Shard,
    ShardPlan,
    check_space,
    header_bytes,
    refuse_strange_weights,
    unit_of,
    write_file,
    write_shard,
)

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor still to be computed: name, safetensors type and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor to write that lies on a GPU; `ready` is when it is computed."""

    name: str
    tensor: torch.Tensor
    ready: torch.cuda.Event


def output_of(name: str, tensor: torch.Tensor) -> OutputTensor | Computed:
    """A computed tensor, its bytes taken now or, from a GPU, by a `Download`."""
    if tensor.is_cuda:
        tensor = tensor.detach().contiguous()
        return Computed(name, tensor, torch.cuda.current_stream(tensor.device).record_event())
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return with_data(name, tensor, flat.numpy().tobytes())


def with_data(name: str, tensor: torch.Tensor, data: Bytes) -> OutputTensor:
    """What is to be written of a tensor whose little-endian bytes are `data`."""
    return OutputTensor(name, SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape), data=data)


class Download:
    """Takes computed tensors from a GPU behind what it computes meanwhile, for one thread: on a
    stream of its own and through pinned memory (pageable memory is 8 times as slow, and to pin
    new memory for each takes longer still)."""

    def __init__(self) -> None:
        self.pinned = torch.empty(0, dtype=torch.uint8)
        self.stream: torch.cuda.Stream | None = None

    def all(self, made: dict[str, OutputTensor | Computed]) -> dict[str, OutputTensor]:
        """The same by name, all with their bytes. `made` is emptied: a tensor goes when it has
        come down."""
        return {name: self._one(made.pop(name)) for name in list(made)}

    def _one(self, made: OutputTensor | Computed) -> OutputTensor:
        if isinstance(made, OutputTensor):
            return made
        tensor = made.tensor
        flat = tensor.view(-1).view(torch.uint8)
        with torch.cuda.device(tensor.device):
            if len(self.pinned) < len(flat):
                self.pinned = torch.empty(len(flat), dtype=torch.uint8, pin_memory=True)
            if self.stream is None:
                self.stream = torch.cuda.Stream()
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(made.ready)
                pinned = self.pinned[: len(flat)].copy_(flat, non_blocking=True)
            self.stream.synchronize()
        # copied by torch, which lets other threads run meanwhile, as numpy does not
        return with_data(made.name, tensor, pinned.clone().numpy().data)


class UnitShards:
    """Shards grouped by unit (a layer, or what lies outside the layers)."""

    def __init__(
        self, units: Mapping[str, Iterable[Planned]], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        groups: list[tuple[str, list[Planned]]] = []
        for unit, tensors in units.items():
            groups.append((unit, []))
            filled = 0
            for tensor in tensors:
                if groups[-1][1] and filled + tensor.nbytes > max_shard_bytes:
                    groups.append((unit, []))
                    filled = 0
                groups[-1][1].append(tensor)
                filled += tensor.nbytes
        groups = [(unit, tensors) for unit, tensors in groups if tensors]
        self.files: list[tuple[str, str, list[Planned]]] = [
            (unit, f"model-{number:05d}-of-{len(groups):05d}.safetensors", tensors)
            for number, (unit, tensors) in enumerate(groups, start=1)
        ]
        self.total_size = sum(t.nbytes for _, _, tensors in self.files for t in tensors)

    def check(self, journal: Journal) -> None:
        """InputError when the disk is too small or foreign weights lie in the output."""
        names = ShardPlan(tuple(Shard(name, b"", (), 0) for _, name, _ in self.files), 0)
        refuse_strange_weights(names, journal.out)
        check_space(journal.out, self.missing_bytes(journal))

    def missing_bytes(self, journal: Journal) -> int:
        """What is still to be written."""
        todo = (ts for _, name, ts in self.files if not journal.done(unit_of(name)))
        return sum(tensor.nbytes for tensors in todo for tensor in tensors)

    def written(self, unit: str, journal: Journal) -> bool:
        """True when every shard of the unit is recorded and lies there."""
        return all(is_whole(name, journal) for own, name, _ in self.files if own == unit)

    def write(self, unit: str, tensors: Mapping[str, OutputTensor], journal: Journal) -> None:
        """Write the unit's shards. `tensors` must be what was planned, by name."""
        for own, name, planned in self.files:
            if own != unit or is_whole(name, journal):
                continue
            ordered = sorted(planned, key=lambda t: -DTYPE_BITS[t.dtype])
            made = tuple(tensors[tensor.name] for tensor in ordered)
            for tensor, plan in zip(made, ordered, strict=True):
                assert (tensor.dtype, tensor.shape) == (plan.dtype, plan.shape), (tensor, plan)
            header = header_bytes(made)
            size = len(header) + sum(tensor.nbytes for tensor in made)
            digest = write_shard(Shard(name, header, made, size), journal, Event())
            journal.record(unit_of(name), file=name, bytes=size, sha256=digest)

    def write_index(self, journal: Journal) -> None:
        """The index, last of the weights. InputError when a shard is missing."""
        for _, name, _ in self.files:
            if not is_whole(name, journal):
                raise InputError(
                    f"{journal.out / name} is missing or cut short though it was written; give the "
                    "command --force to start over"
                )
        shards = tuple(
            Shard(name, b"", tuple(OutputTensor(t.name, t.dtype, t.shape) for t in tensors), 0)
            for _, name, tensors in self.files
        )
        write_file(journal, INDEX, ShardPlan(shards, self.total_size).index())


def is_whole(name: str, journal: Journal) -> bool:
    """Whether a shard is recorded and lies there with all its bytes."""
    path, unit = journal.out / name, unit_of(name)
    if not journal.done(unit) or not path.is_file():
        return False
    return path.stat().st_size == journal.facts(unit)["bytes"]


class UnitWriter:
    """Writes one unit in a thread of its own while the next one is computed.

    What went wrong there is raised by the next call, or at the end. A unit is recorded where it
    was written, so the order of the journal is that of the units.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._running: Future[None] | None = None
        self.download = Download()  # used by what is written, one unit after another

    def wait(self) -> None:
        """Until what was begun is on the disk."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def begin(self, write: Callable[[], None]) -> None:
        """Have `write` called, once the unit before is written."""
        self.wait()
        self._running = self._pool.submit(write)

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait, and raise unless something else went wrong first."""
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown()
