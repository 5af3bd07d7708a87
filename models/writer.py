"""Writing a checkpoint as a plan of byte ranges, atomically, resumably, at the speed of `cp`.

Every output tensor is either bytes already made or a list of ranges of source files. From names,
shapes and sizes alone all shards, their headers and names (`model-00001-of-000NN.safetensors`)
are fixed before the first byte is written, so the disk need is known and every unit of work has
its final name.

A shard is copied by the kernel (copy_file_range; page cache to page cache, or shared extents
where the file system can) into OUT/.thresher/, flushed, renamed into place and journaled. The
index comes last: a folder without it is no checkpoint. The manifest's sha256 are taken by a
second thread from the same source pages while they are copied, and three shards are in flight, so
hashing and the flush of one hide behind the copy of the other (benchmarks/prune_copy.py). The
hash is thus of what was meant to be written, not merely of what arrived.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from models.byte_copy import ByteRange, Bytes, Stopped, copy_pieces, hash_pieces, joins
from models.errors import InputError
from models.journal import Journal, disk_errors, sync_folder
from models.progress import Progress, Step, silent
from models.shard_index import INDEX
from models.shards import DTYPE_BITS, TensorInfo

MAX_SHARD_BYTES = 5_000_000_000
SHARDS_IN_FLIGHT = 3


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor to write: its bytes are `data`, or the source `ranges` one after another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[ByteRange, ...] = ()
    data: Bytes | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return len(self.data) if self.data is not None else sum(r.nbytes for r in self.ranges)


def copied(info: TensorInfo, name: str) -> OutputTensor:
    """A source tensor's bytes under a name."""
    return OutputTensor(
        name, info.dtype, info.shape, (ByteRange(info.file, info.offset, info.nbytes),)
    )


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its name, its raw header and its tensors in the order of their bytes."""

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    nbytes: int = field(compare=False)

    def pieces(self) -> Iterator[Bytes | ByteRange]:
        """The file's content in order; neighbouring source ranges come as one."""
        yield self.header
        run: ByteRange | None = None
        for tensor in self.tensors:
            for piece in (tensor.data,) if tensor.data is not None else tensor.ranges:
                if not isinstance(piece, ByteRange):
                    if run is not None:
                        yield run
                    run = None
                    yield piece
                elif run is not None and joins(run, piece):
                    run = ByteRange(run.file, run.offset, run.nbytes + piece.nbytes)
                else:
                    if run is not None:
                        yield run
                    run = piece
        if run is not None:
            yield run


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """All files of an output checkpoint's weights. `total_size` counts tensor bytes."""

    shards: tuple[Shard, ...]
    total_size: int

    @property
    def file_bytes(self) -> int:
        """Bytes of all shards with their headers."""
        return sum(shard.nbytes for shard in self.shards)

    def index(self) -> bytes:
        """The content of model.safetensors.index.json."""
        weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
        whole = {
            "metadata": {"total_size": self.total_size},
            "weight_map": dict(sorted(weight_map.items())),
        }
        return (json.dumps(whole, indent=2) + "\n").encode()


def plan_shards(
    tensors: Iterable[OutputTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> ShardPlan:
    """Distribute tensors over shards in the order given, each at most `max_shard_bytes` of data
    (a larger tensor gets a shard of its own). A single shard is `model.safetensors`.
    """
    groups: list[list[OutputTensor]] = [[]]
    filled, seen = 0, set()
    for tensor in tensors:
        elements = 1
        for size in tensor.shape:
            elements *= size
        assert elements * DTYPE_BITS[tensor.dtype] == tensor.nbytes * 8, tensor.name
        assert tensor.name not in seen, tensor.name
        seen.add(tensor.name)
        if groups[-1] and filled + tensor.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    count = len(groups)
    shards = []
    for number, group in enumerate(groups, start=1):
        # Wide types first, as the safetensors library does: every tensor stays aligned.
        group.sort(key=lambda tensor: -DTYPE_BITS[tensor.dtype])
        name = (
            f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        )
        header = header_bytes(group)
        data_bytes = sum(tensor.nbytes for tensor in group)
        shards.append(Shard(name, header, tuple(group), len(header) + data_bytes))
    return ShardPlan(tuple(shards), sum(s.nbytes - len(s.header) for s in shards))


def header_bytes(tensors: Sequence[OutputTensor]) -> bytes:
    """The raw safetensors header: length, JSON, blanks up to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def check_space(out: Path, needed: int) -> None:
    """InputError when the disk of `out` has fewer than `needed` free bytes."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise InputError(
            f"{out} needs {needed:,} bytes and its disk has {free:,} free; "
            f"free {needed - free:,} bytes or choose another disk"
        )


def unfinished(plan: ShardPlan, journal: Journal) -> list[Shard]:
    """The shards that still have to be written."""
    missing = []
    for shard in plan.shards:
        path = journal.out / shard.name
        there = path.is_file() and path.stat().st_size == shard.nbytes
        if not (journal.done(unit_of(shard.name)) and there):
            journal.forget(unit_of(shard.name))
            missing.append(shard)
    return missing


def check_output(plan: ShardPlan, journal: Journal) -> list[Shard]:
    """The shards still to be written, when the output folder can take them (InputError if not)."""
    refuse_strange_weights(plan, journal.out)
    todo = unfinished(plan, journal)
    for shard in todo:
        (journal.folder / (shard.name + ".part")).unlink(missing_ok=True)
    check_space(journal.out, sum(shard.nbytes for shard in todo))
    return todo


def unit_of(name: str) -> str:
    """The journal's unit for an output file."""
    return f"file:{name}"


def refuse_strange_weights(plan: ShardPlan, out: Path) -> None:
    """InputError when `out` holds weights or an index that are not part of this output."""
    ours = {shard.name for shard in plan.shards}
    if len(plan.shards) > 1:
        ours.add(INDEX)
    for path in sorted(out.iterdir()):
        if path.name not in ours and (path.suffix == ".safetensors" or path.name == INDEX):
            raise InputError(
                f"{path} does not belong to this output and would be taken for a part of it; "
                "remove it or choose another output folder"
            )


def write_shards(plan: ShardPlan, journal: Journal, progress: Progress = silent) -> None:
    """Write all shards that the journal does not know yet, then the index.

    Each finished file is recorded as unit `file:NAME` with facts file, bytes and sha256. Raises
    InputError when the disk is too small (before the first byte) or full, and when a source file
    became shorter; what is finished stays and counts.
    """
    todo = check_output(plan, journal)
    done = len(plan.shards) - len(todo)
    stop = Event()
    with ThreadPoolExecutor(SHARDS_IN_FLIGHT) as pool:
        futures = {pool.submit(write_shard, shard, journal, stop): shard for shard in todo}
        try:
            for future in as_completed(futures):
                shard = futures[future]
                try:
                    digest = future.result()
                except Stopped:
                    continue  # another shard failed: its own error is still to come
                journal.record(
                    unit_of(shard.name), file=shard.name, bytes=shard.nbytes, sha256=digest
                )
                done += 1
                progress(Step(job="write", done=done, total=len(plan.shards), unit="shards"))
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if len(plan.shards) > 1:
        write_file(journal, INDEX, plan.index())


def write_shard(shard: Shard, journal: Journal, stop: Event) -> str:
    """Write one shard beside the output, flush it and rename it into place; its sha256."""
    part = journal.folder / (shard.name + ".part")
    pieces = list(shard.pieces())
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(hash_pieces, pieces, stop)
        try:
            with disk_errors(part):
                fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                try:
                    copy_pieces(pieces, fd, stop)
                    os.fsync(fd)
                finally:
                    os.close(fd)
            digest = hashing.result()
        except BaseException:
            stop.set()
            part.unlink(missing_ok=True)
            raise
    with disk_errors(journal.out / shard.name):
        part.replace(journal.out / shard.name)
        sync_folder(journal.out)
    return digest


def write_file(journal: Journal, name: str, data: bytes) -> None:
    """Write a small output file atomically and record it as unit `file:NAME`."""
    path, part = journal.out / name, journal.folder / "small.part"
    digest = hashlib.sha256(data).hexdigest()
    if journal.done(unit_of(name)) and path.is_file():
        same_facts = journal.facts(unit_of(name)).get("sha256") == digest
        if same_facts and path.read_bytes() == data:
            return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
        sync_folder(path.parent)
    journal.record(unit_of(name), file=name, bytes=len(data), sha256=digest)


def carry_files(root: Path, names: Iterable[Path], journal: Journal) -> None:
    """Copy tokenizer, code and licence files (paths relative to `root`) into the output."""
    for name in names:
        try:
            data = (root / name).read_bytes()
        except OSError as error:
            raise InputError(
                f"{root / name} cannot be read ({error.strerror}); restore it and run again"
            ) from error
        write_file(journal, name.as_posix(), data)


def written_files(journal: Journal) -> dict[str, dict[str, object]]:
    """Name -> {sha256, bytes} of every file that this job wrote, for the manifest."""
    facts = [journal.facts(unit) for unit in journal.units() if unit.startswith("file:")]
    return {
        str(fact["file"]): {"sha256": fact["sha256"], "bytes": fact["bytes"]}
        for fact in sorted(facts, key=lambda fact: str(fact["file"]))
    }
