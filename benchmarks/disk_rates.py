"""What a disk does, cold and flushed: reading, writing and `cp`."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def forget(folder: Path) -> None:
    """Write back and drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def read_rate(folder: Path, threads: int = 8) -> float:
    """Bytes a second of cold reads, files cut among threads."""
    forget(folder)
    piece = 64 << 20
    jobs = [
        (path, start)
        for path in sorted(folder.glob("*.safetensors"))
        for start in range(0, path.stat().st_size, piece)
    ]

    def read(job: tuple[Path, int]) -> int:
        descriptor = os.open(job[0], os.O_RDONLY)
        try:
            return len(os.pread(descriptor, piece, job[1]))
        finally:
            os.close(descriptor)

    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, jobs))
    return total / (time.monotonic() - began)


def write_rate(folder: Path, gigabytes: int = 8, threads: int = 8) -> float:
    """Bytes a second of new files, flushed."""
    noise = os.urandom(64 << 20)
    share = gigabytes * 1_000_000_000 // threads // len(noise)

    def write(number: int) -> None:
        with open(folder / f"noise-{number}", "wb", buffering=0) as file:
            for _ in range(share):
                file.write(noise)
            os.fsync(file.fileno())

    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(threads)))
    seconds = time.monotonic() - began
    for number in range(threads):
        (folder / f"noise-{number}").unlink()
    return share * len(noise) * threads / seconds


def copy_rate(source: Path, out: Path) -> float:
    """Bytes a second of `cp` from a cold source, flushed; each byte is read and written."""
    forget(source)
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for path in out.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.monotonic() - began
    moved = size(out)
    shutil.rmtree(out)
    return moved / seconds
