"""What a long job has finished, on disk, so that the same command can go on after any kill.

While a job runs, `OUT/.thresher/` holds

- `job.json`: command, settings, digests of all inputs, versions. A run whose job differs in
  anything is refused; the same job resumes.
- `journal.jsonl`: one line a finished unit with its facts, flushed to the disk before the job
  goes on. A line torn by a crash is cut off: that unit is simply done again.
- `lock`: held with flock, so that two processes cannot work on one job. The kernel drops it with
  the process; no stale lock files.

A finished job leaves `OUT/thresher.json` (the manifest, written last; it repeats the job) and no
`.thresher`. One file a unit ("part-7.done") was refused: a journal also keeps facts, in order, and
is one fsync a unit.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any

from models.errors import InputError

FOLDER = ".thresher"
MANIFEST = "thresher.json"
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, missing or read-only disk below `path` into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise InputError(
                f"the disk is full ({error.strerror}) while writing {path}; "
                "free space and run the same command again to go on"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise InputError(
                f"{path} cannot be written ({error.strerror}); choose another output folder"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all, even across a power cut."""
    part = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        with part.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
        sync_folder(path.parent)


def json_bytes(value: object) -> bytes:
    """Readable JSON with a closing newline; keys stay in their order."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


class Journal:
    """An open job folder. `complete` tells that the output is already finished."""

    def __init__(self, out: Path, job: Mapping[str, Any], lock: int | None) -> None:
        """Use `open`."""
        self.out = out
        self.job = job
        self.folder = out / FOLDER
        self.complete = lock is None
        self._lock = lock
        self._facts: dict[str, dict[str, Any]] = {}
        self._log: int | None = None
        self._removing: list[Thread] = []

    @classmethod
    def open(cls, out: Path, job: Mapping[str, Any], force: bool = False) -> Journal:
        """Begin or resume `job` (a JSON object) in the output folder `out`.

        Raises InputError when another job, or files that are not ours, are there (with `force`,
        the other job's own files are removed and foreign ones left alone), and when another
        process holds the job.
        """
        job = json.loads(json.dumps(job))
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        folder = out / FOLDER
        if folder.is_symlink():
            raise InputError(f"{folder} is a link; remove it or choose another output folder")
        finished = read_object(out / MANIFEST)
        if finished is not None and not force and finished.get("job") == job:
            # A kill between the manifest and the clean-up ends here as well.
            if folder.is_dir():
                os.close(take_lock(folder))
                shutil.rmtree(folder)
            return cls(out, job, None)
        if not folder.is_dir():
            refuse_foreign(out, job, finished, force)
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        lock = take_lock(folder)
        try:
            journal = cls(out, job, lock)
            journal._begin(finished, force)
        except BaseException:
            os.close(lock)
            raise
        return journal

    def _begin(self, finished: Mapping[str, Any] | None, force: bool) -> None:
        stored = read_object(self.folder / "job.json")
        self._read_log()
        if stored is not None and stored != self.job and not self._facts:
            force = True  # a job that was refused or stopped before its first unit is no loss
        if stored is None and (self.folder / "job.json").exists() and not force:
            raise InputError(
                f"{self.folder}/job.json is damaged; run with --force to start over in {self.out}"
            )
        if stored is not None and stored != self.job and not force:
            raise InputError(
                f"{self.out} holds an unfinished job with another {difference(stored, self.job)}; "
                "repeat that command, choose another output folder, or use --force to start over"
            )
        if force and (stored != self.job or finished is not None):
            self._remove_outputs(finished)
            stored = None
        if stored is None:
            write_atomically(self.folder / "job.json", json_bytes(self.job))
        if self._log is None:
            self._read_log()

    def _remove_outputs(self, finished: Mapping[str, Any] | None) -> None:
        """Delete what the former job wrote, by its own account, and its folder's contents."""
        names = [str(facts["file"]) for facts in self._facts.values() if "file" in facts]
        listed = finished.get("files") if finished else None
        names += [str(name) for name in listed] if isinstance(listed, dict) else []
        for name in names:
            path = self.out / name
            inner = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
            if inner and path.is_file() and path.resolve().is_relative_to(self.out.resolve()):
                path.unlink()
        (self.out / MANIFEST).unlink(missing_ok=True)
        self._close_log()
        for path in self.folder.iterdir():
            if path.name == "lock":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._facts.clear()

    def _read_log(self) -> None:
        """Load the finished units and cut off what a crash tore."""
        log = self.folder / "journal.jsonl"
        with disk_errors(log):
            self._log = os.open(log, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        whole = 0
        with os.fdopen(os.dup(self._log), "rb") as handle:
            for line in handle:
                entry = parse_line(line)
                if entry is None:
                    break
                self._facts[entry.pop("unit")] = entry
                whole += len(line)
        os.ftruncate(self._log, whole)
        os.lseek(self._log, whole, os.SEEK_SET)

    def done(self, unit: str) -> bool:
        """True when `unit` was recorded, by this run or one before."""
        return unit in self._facts

    def facts(self, unit: str) -> Mapping[str, Any]:
        """What was recorded with a finished unit."""
        return self._facts[unit]

    def units(self) -> tuple[str, ...]:
        """All finished units in the order of their recording."""
        return tuple(self._facts)

    def record(self, unit: str, **facts: Any) -> None:
        """Note that `unit` is finished; on return the line is on the disk.

        A fact `file` names an output that belongs to this job (removed by a later --force).
        """
        assert self._log is not None, "the journal is closed"
        line = json.dumps({"unit": unit, **facts}, ensure_ascii=False) + "\n"
        with disk_errors(self.folder / "journal.jsonl"):
            data = line.encode()
            while data:
                data = data[os.write(self._log, data) :]
            os.fsync(self._log)
        self._facts[unit] = json.loads(json.dumps(facts))  # as a later run reads them

    def forget(self, unit: str) -> None:
        """Do not count `unit` as finished in this run (its result was found to be missing)."""
        self._facts.pop(unit, None)

    def discard(self, folder: Path) -> None:
        """Remove a folder within the job's, which nobody reads any more. That goes on beside the
        job: to free the blocks of 10 GB can take a file system some seconds."""
        thread = Thread(target=shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True})
        thread.start()
        self._removing.append(thread)

    def close(self, complete: bool = False) -> None:
        """Let go of the job; with `complete`, its folder is removed."""
        for thread in self._removing:
            thread.join()
        self._close_log()
        if self._lock is not None:
            if complete:
                shutil.rmtree(self.folder)
                sync_folder(self.out)
                self.complete = True
            os.close(self._lock)
            self._lock = None

    def _close_log(self) -> None:
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object from disk; None when the file is missing or holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def parse_line(line: bytes) -> dict[str, Any] | None:
    """One journal line; None when it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("unit"), str) else None


def refuse_overlap(root: Path, out: Path) -> None:
    """InputError when the output would lie in the source or the source in the output: --force
    would then remove what is still to be read."""
    here, there = root.resolve(), out.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise InputError(f"{out} overlaps with the source {root}; choose another output folder")


def refuse_itself(root: Path, out: Path) -> None:
    """InputError when results would go into the folder of the model itself."""
    if root.resolve() == out.resolve():
        raise InputError(f"{out} is the model's own folder; choose another output folder")


def refuse_foreign(
    out: Path, job: Mapping[str, Any], finished: Mapping[str, Any] | None, force: bool
) -> None:
    """InputError when `out` holds a finished job of another kind, or files that are not ours."""
    if force:
        return
    if finished is not None and isinstance(finished.get("job"), dict):
        raise InputError(
            f"{out} holds the result of a job with another {difference(finished['job'], job)}; "
            "choose another output folder, or use --force to replace it"
        )
    present = sorted(path.name for path in out.iterdir())
    if present:
        raise InputError(
            f"{out} is not empty ({present[0]!r}) and not an output of Thresher; "
            "choose another output folder, or use --force to write beside what is there"
        )


def difference(old: object, new: object, at: str = "") -> str:
    """The first setting in which two jobs differ, as "name (old, now new)"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            if old.get(key) != new.get(key):
                return difference(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    return f"{at or 'job'} ({short(old)}, now {short(new)})"


def short(value: object) -> str:
    """A value on one line, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def take_lock(folder: Path) -> int:
    """A descriptor holding the job's lock. InputError when another process holds it."""
    path = folder / "lock"
    while True:
        with disk_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = path.stat()
        except BlockingIOError:
            os.close(fd)
            raise InputError(
                f"another process is working on {folder.parent}; wait for it or choose another "
                "output folder"
            ) from None
        except FileNotFoundError:  # the holder finished and removed the folder meanwhile
            os.close(fd)
            with disk_errors(folder):
                folder.mkdir(exist_ok=True)
            continue
        if current.st_ino == os.fstat(fd).st_ino:
            return fd
        os.close(fd)
