"""Copying and hashing byte ranges of files.

The kernel copies (copy_file_range: page cache to page cache, or shared extents where the file
system can), in 16 MB pieces: one call for a whole range measured slower on ext4, and reading
through a Python buffer to feed both the write and the hash cost a third of the rate. Where the
kernel refuses (across file systems, old kernels) a buffer does it. Hashing reads the same source
pages a second time, from the page cache, in pieces that stay in a core's own cache.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from models.errors import InputError

COPY_BYTES = 1 << 24
HASH_BYTES = 1 << 18  # stays in a core's own cache
NOT_COPIED_BY_KERNEL = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}
)


Bytes = bytes | memoryview  # of single bytes


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`nbytes` bytes of `file` from `offset` on."""

    file: Path
    offset: int
    nbytes: int


class Stopped(Exception):
    """A copy given up because another one failed."""


def joins(run: ByteRange, piece: ByteRange) -> bool:
    """True when `piece` follows `run` in the same file."""
    return run.file == piece.file and run.offset + run.nbytes == piece.offset


def copy_pieces(pieces: Sequence[Bytes | ByteRange], target: int, stop: Event) -> None:
    """Write the pieces one after another to the descriptor `target`."""
    position = 0
    with SourceFiles() as files:
        for piece in pieces:
            if not isinstance(piece, ByteRange):
                done = 0
                while done < len(piece):
                    done += os.pwrite(target, piece[done:], position + done)
                position += len(piece)
            else:
                copy_range(files.open(piece.file), piece, target, position, stop)
                position += piece.nbytes


def copy_range(source: int, piece: ByteRange, target: int, position: int, stop: Event) -> None:
    """Copy one range within the kernel; through a buffer where the file systems cannot."""
    done, by_kernel, buffer = 0, hasattr(os, "copy_file_range"), bytearray()
    while done < piece.nbytes:
        if stop.is_set():
            raise Stopped
        size = min(COPY_BYTES, piece.nbytes - done)
        if by_kernel:
            try:
                count = os.copy_file_range(
                    source, target, size, piece.offset + done, position + done
                )
            except OSError as error:
                if error.errno not in NOT_COPIED_BY_KERNEL:
                    raise
                count = 0
            if count == 0:  # refused, or a file system that cannot: read and write ourselves
                by_kernel = False
                continue
        else:
            buffer = buffer or bytearray(min(COPY_BYTES, piece.nbytes))
            count = os.preadv(source, [memoryview(buffer)[:size]], piece.offset + done)
            written = 0
            while written < count:
                view = memoryview(buffer)[written:count]
                written += os.pwrite(target, view, position + done + written)
        if count == 0:
            raise became_shorter(piece)
        done += count


def hash_pieces(pieces: Sequence[Bytes | ByteRange], stop: Event) -> str:
    """sha256 of the pieces, source ranges read from their own files."""
    whole, buffer = hashlib.sha256(), memoryview(bytearray(HASH_BYTES))
    with SourceFiles() as files:
        for piece in pieces:
            if not isinstance(piece, ByteRange):
                whole.update(piece)
                continue
            source, done = files.open(piece.file), 0
            while done < piece.nbytes:
                if stop.is_set():
                    raise Stopped
                size = min(HASH_BYTES, piece.nbytes - done)
                count = os.preadv(source, [buffer[:size]], piece.offset + done)
                if count == 0:
                    raise became_shorter(piece)
                whole.update(buffer[:count])
                done += count
    return whole.hexdigest()


def became_shorter(piece: ByteRange) -> InputError:
    """The refusal of a source that shrank while it was copied."""
    return InputError(f"{piece.file} became shorter while it was copied; restore it and run again")


class SourceFiles:
    """Open descriptors of the files that one copy reads, closed together."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def open(self, file: Path) -> int:
        """A descriptor of `file`. InputError when it cannot be read."""
        if file not in self._files:
            try:
                self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise InputError(
                    f"{file} cannot be read ({error.strerror}); restore it and run again"
                ) from error
        return self._files[file]

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        for fd in self._files.values():
            os.close(fd)
