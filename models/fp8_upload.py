"""Matrices in FP8 blocks from files to a GPU, in the compute type: read, sent and decoded at once.

    file --(threads)--> pinned memory --(copy stream)--> GPU, as stored --(one kernel)--> place

Matrices go in loads of `LOAD_BYTES` through a ring of `SLOTS` pinned buffers: while one load is
read from the page cache, the one before is on the bus and the one before that is being decoded.
Pinned memory is slow to allocate (1 GB/s), so the ring outlives its layers. Codes travel as FP8:
half the bytes of bfloat16, and decoding where memory is fast (models/kernels/fp8.py).

Refused: one copy and one decoding for each matrix (768 a layer of DeepSeek-V3.2, each waiting for
pageable memory), and pinning the files' pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch

from models.checkpoint import Checkpoint, TensorInfo, not_finite
from models.dequantize import blocks_of
from models.source_formats import Source

LOAD_BYTES = 256 << 20
SLOTS = 3
READERS = 8
ALIGNMENT = 256  # of a matrix in a load: kernels read 16 bytes at a time


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix on disk and where it is to stand, on the GPU, decoded."""

    name: str
    codes: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]
    out: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes in a load."""
        return sum(aligned(info.nbytes) for info in (self.codes, self.scales))


def aligned(size: int) -> int:
    """`size` rounded up to ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Fp8Upload:
    """The ring, its threads and its stream; for one GPU and one thread of use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="fp8-upload")
        self.host: list[torch.Tensor] = []
        self.staged: list[torch.Tensor] = []
        self.decoded: list[torch.cuda.Event] = []

    def _grow(self, nbytes: int) -> None:
        if self.host and self.host[0].numel() >= nbytes:
            return
        torch.cuda.synchronize(self.device)
        self.host = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
        self.staged = [
            torch.empty(nbytes, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)
        ]
        self.decoded = [torch.cuda.Event() for _ in range(SLOTS)]

    def run(self, checkpoint: Checkpoint, matrices: Sequence[Fp8Matrix]) -> None:
        """Fill every `out`. InputError for files that cannot be read, and for values that are not
        finite, naming the tensor."""
        from models.kernels.fp8 import dequantize

        if not matrices:
            return
        largest = max(matrix.nbytes for matrix in matrices)
        self._grow(max(largest, min(LOAD_BYTES, sum(matrix.nbytes for matrix in matrices))))
        flags: list[torch.Tensor] = []
        order: list[Fp8Matrix] = []
        for number, load in enumerate(loads(matrices, self.host[0].numel())):
            slot = number % SLOTS
            self.decoded[slot].synchronize()  # of this slot's last load: buffers are free
            places = list(placed(load))
            host, staged = self.host[slot], self.staged[slot]

            def read(place: tuple[TensorInfo, int], host: torch.Tensor = host) -> None:
                info, start = place
                checkpoint.read_into(info, host[start : start + info.nbytes])

            list(self.readers.map(read, places))
            used = places[-1][1] + places[-1][0].nbytes
            with torch.cuda.stream(self.stream):
                staged[:used].copy_(host[:used], non_blocking=True)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            parts = [staged[start : start + info.nbytes] for info, start in places]
            triples = [
                (
                    codes.view(torch.float8_e4m3fn).view(matrix.codes.shape),
                    scales.view(torch.float32).view(matrix.scales.shape),
                    matrix.out,
                )
                for matrix, codes, scales in zip(load, parts[::2], parts[1::2], strict=True)
            ]
            flags.append(dequantize(triples, load[0].block))
            order += load
            self.decoded[slot].record(torch.cuda.current_stream(self.device))
        broken = torch.cat(flags).nonzero().flatten().tolist()
        if broken:
            raise not_finite(order[broken[0]].name, checkpoint)


def loads(matrices: Sequence[Fp8Matrix], limit: int) -> Iterator[list[Fp8Matrix]]:
    """Matrices of one shape and block at a time, as many as fit in `limit` bytes."""
    kinds: dict[object, list[Fp8Matrix]] = {}
    for matrix in matrices:
        key = (matrix.codes.shape, matrix.block, matrix.out.stride(), matrix.out.dtype)
        kinds.setdefault(key, []).append(matrix)
    for same in kinds.values():
        count = max(1, limit // same[0].nbytes)
        for start in range(0, len(same), count):
            yield same[start : start + count]


def placed(load: Sequence[Fp8Matrix]) -> Iterator[tuple[TensorInfo, int]]:
    """Codes and scales of each matrix in turn, and where in the load they begin."""
    start = 0
    for matrix in load:
        for info in (matrix.codes, matrix.scales):
            yield info, start
            start += aligned(info.nbytes)


def fp8_parts(
    parts: Sequence[TensorInfo], block: tuple[int, int]
) -> tuple[TensorInfo, TensorInfo] | None:
    """(codes, scales) where they are E4M3 and float32 of the shapes that `block` gives."""
    by_type = {info.dtype: info for info in parts}
    codes, scales = by_type.get("F8_E4M3"), by_type.get("F32")
    if len(parts) != 2 or codes is None or scales is None or len(codes.shape) != 2:
        return None
    if scales.shape != blocks_of(codes.shape, block) or not prod(codes.shape):
        return None
    return codes, scales


def fp8_matrix(source: Source, logical: str, out: torch.Tensor) -> Fp8Matrix | None:
    """A logical tensor as it lies on disk, where that is FP8 blocks that go to `out` as they are;
    None for anything else."""
    if source.format(logical) != "fp8_block":
        return None
    block = source.scale_block(logical)
    parts = fp8_parts(source.parts(logical), block)
    if parts is None or parts[0].shape != out.shape:
        return None
    return Fp8Matrix(logical, *parts, block, out)
