"""A checkpoint on disk: config.json and safetensors shards, nothing loaded.

Everything that can be checked without reading weights is checked on opening: the index, each
shard's header (models/shards.py), names held twice, missing shards, paths that leave the folder.

Tensors are read with preadv into fresh memory. Mapping the files (mmap) was refused: pages of a
mapping count as resident memory of the process until the kernel takes them back, so "one layer in
memory" could be neither measured nor promised, and a shard truncated behind our back would kill
the process (SIGBUS) where a read gives an error.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from models.errors import InputError
from models.location import download_file, download_snapshot, inside, local_directory
from models.shard_index import INDEX, lone_shards, read_json, read_weight_map
from models.shards import Header, TensorInfo, read_header

__all__ = ["Checkpoint", "TensorInfo", "load_config", "load_index", "torch_dtype"]

PREFETCH_BYTES = 1 << 17  # one advice call reads no more than the device's read-ahead window
DIGEST_SAMPLES, DIGEST_PIECE_BYTES = 64, 1024  # of each shard

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,  # two values a byte: the last dimension is halved
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}

# What an output carries over from its source besides weights, config and index.
CARRIED_SUFFIXES = frozenset({".json", ".jinja", ".py", ".txt", ".model", ".tiktoken"})
CARRIED_NAMES = ("LICENSE", "NOTICE")
# Rewritten by us, or stale once experts are gone (vendors' own inference code and its configs).
NOT_CARRIED = frozenset({"config.json", "plan.json", "thresher.json", "requirements.txt"})
NOT_CARRIED_FOLDERS = frozenset({"inference", "original", "metal", "onnx", "figures", "assets"})


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """torch's dtype of a stored tensor. InputError where torch has none (6-bit floats)."""
    if info.dtype not in TORCH_DTYPES:
        raise InputError(
            f"{info.file}: tensor {info.name} has dtype {info.dtype}, which torch cannot hold; "
            "use a checkpoint in another precision"
        )
    return TORCH_DTYPES[info.dtype]


def load_config(model: str | Path) -> dict[str, Any]:
    """config.json alone; of a hub id only that file is downloaded."""
    root = local_directory(model)
    path = download_file(str(model), "config.json") if root is None else root / "config.json"
    return read_json(path, "give a directory that holds config.json and *.safetensors")


def load_index(model: str | Path) -> dict[str, Any] | None:
    """The shard index alone, None where there is none; of a hub id only that file is fetched."""
    root = local_directory(model)
    if root is not None:
        return read_json(root / INDEX, "") if (root / INDEX).is_file() else None
    try:
        return read_json(download_file(str(model), INDEX), "")
    except InputError:
        return None


class Checkpoint:
    """A directory with config.json and safetensors files; safe to share between threads.

    `tensors` maps physical names to where their bytes are, in the order of files and offsets.
    """

    def __init__(self, root: Path) -> None:
        """Use `open`. Raises InputError on anything wrong that can be seen without weights."""
        self.root = root
        self.config = load_config(root)
        self.headers: dict[Path, Header] = {}
        self.tensors: dict[str, TensorInfo] = self._find_tensors()
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Open a directory, or download a hub id and open its snapshot."""
        root = local_directory(model)
        return cls(download_snapshot(str(model)) if root is None else root)

    def _find_tensors(self) -> dict[str, TensorInfo]:
        index_path = self.root / INDEX
        weight_map = read_weight_map(index_path) if index_path.is_file() else None
        names = lone_shards(self.root) if weight_map is None else sorted(set(weight_map.values()))
        for name in names:
            file = self.root / name
            if not file.is_file():
                raise InputError(f"{file} is missing; download this shard again")
            if not inside(self.root, file):
                raise InputError(
                    f"{file} is a link out of the model's folder; put the file itself there"
                )
        tensors: dict[str, TensorInfo] = {}
        for name in names:
            file = self.root / name
            self.headers[file] = read_header(file)
            for info in self.headers[file].tensors:
                if weight_map is not None:
                    if info.name not in weight_map:
                        raise InputError(
                            f"{file} holds tensor {info.name[:200]!r}, which {index_path} does "
                            "not name; download both again, or remove the index"
                        )
                    if weight_map[info.name] != name:
                        continue  # a second copy: the index says which one counts
                if info.name in tensors:
                    raise InputError(
                        f"tensor {info.name[:200]!r} is both in {tensors[info.name].file} and in "
                        f"{file}; remove the files that do not belong to this checkpoint"
                    )
                tensors[info.name] = info
        missing = [name for name in weight_map or () if name not in tensors]
        if missing:
            assert weight_map is not None
            raise InputError(
                f"{self.root / weight_map[missing[0]]} does not hold tensor {missing[0][:200]!r}, "
                f"as {index_path} says ({len(missing)} such); download both again"
            )
        return tensors

    def _fd(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                try:
                    self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise InputError(f"{file}: cannot be read ({error.strerror})") from error
            return self._files[file]

    def close(self) -> None:
        """Close the shards' file descriptors; reading opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def info(self, name: str) -> TensorInfo:
        """Where a physical tensor is. InputError naming the checkpoint when it has none such."""
        if name not in self.tensors:
            raise InputError(f"{self.root} holds no tensor {name}; the checkpoint is incomplete")
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor in its stored dtype and shape, in memory of its own."""
        info = self.info(name)
        return self._read_bytes(info, 0, info.nbytes, info.shape)

    def read_into(self, info: TensorInfo, raw: torch.Tensor) -> None:
        """A tensor's stored bytes into `raw`, uint8 of that size on the CPU."""
        assert raw.numel() == info.nbytes, info.name
        fill(raw, self._fd(info.file), info.offset, info.file)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of dim 0; only their bytes are read."""
        info = self.info(name)
        assert info.shape, name
        assert 0 <= start <= stop <= info.shape[0], (name, start, stop)
        row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
        assert row_bytes * info.shape[0] == info.nbytes, (name, "rows of whole bytes")
        shape = (stop - start, *info.shape[1:])
        return self._read_bytes(info, start * row_bytes, (stop - start) * row_bytes, shape)

    def _read_bytes(
        self, info: TensorInfo, start: int, nbytes: int, shape: tuple[int, ...]
    ) -> torch.Tensor:
        dtype = torch_dtype(info)
        if info.dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        raw = torch.empty(nbytes, dtype=torch.uint8)
        fill(raw, self._fd(info.file), info.offset + start, info.file)
        return raw.view(dtype).reshape(shape)

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the kernel read these tensors into its page cache; returns at once."""
        infos = sorted((self.info(name) for name in names), key=lambda i: (str(i.file), i.offset))
        threading.Thread(target=warm_page_cache, args=(infos,), daemon=True).start()

    def digest(self) -> str:
        """A cheap identity: sha256 over config.json and, of every shard, name, size, header and
        DIGEST_SAMPLES pieces of its bytes, evenly spread.

        Another training of the same shapes differs in every piece; a single changed weight need
        not be noticed.
        """
        whole = hashlib.sha256((self.root / "config.json").read_bytes())
        for file, header in sorted(self.headers.items()):
            whole.update(f"\n{file.name} {header.file_bytes} {header.sha256}".encode())
            with file.open("rb", buffering=0) as handle:
                for piece in range(DIGEST_SAMPLES):
                    start = header.file_bytes * (piece + 1) // (DIGEST_SAMPLES + 1)
                    whole.update(os.pread(handle.fileno(), DIGEST_PIECE_BYTES, start))
        return whole.hexdigest()

    def other_files(self) -> list[Path]:
        """What an output carries along, relative to `root`: tokenizer, templates, code, licence.

        Not carried: weights of any kind, config and index (rewritten), the README (it describes
        another model), hidden files, links that leave the folder, vendors' inference folders.
        """
        carried: list[Path] = []
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(
                name for name in folders if name[0] != "." and name not in NOT_CARRIED_FOLDERS
            )
            for name in files:
                path = Path(folder, name)
                if is_carried(name) and path.is_file() and inside(self.root, path):
                    carried.append(path.relative_to(self.root))
        return sorted(carried)


def is_carried(name: str) -> bool:
    """True for file names that an output carries over."""
    if name.startswith(".") or name in NOT_CARRIED or name.endswith(".index.json"):
        return False
    return Path(name).suffix in CARRIED_SUFFIXES or name.startswith(CARRIED_NAMES)


def not_finite(name: str, checkpoint: Checkpoint) -> InputError:
    """What to say of a tensor with values that no weight can have."""
    return InputError(
        f"tensor {name} in {checkpoint.root} holds NaN or infinite values; "
        "download the checkpoint again"
    )


def fill(raw: torch.Tensor, fd: int, offset: int, file: Path) -> None:
    """Fill a uint8 tensor from a file. InputError when the file has become shorter."""
    view = raw.numpy().data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise InputError(
                f"{file}: reading failed at byte {offset + done} ({error.strerror}); "
                "check the disk, download this file again"
            ) from error
        if count == 0:
            raise InputError(f"{file}: became shorter while in use; download this file again")
        done += count


def warm_page_cache(infos: list[TensorInfo]) -> None:
    """Ask for the tensors' pages piece by piece, with own descriptors.

    One POSIX_FADV_WILLNEED call is cut by Linux to the device's read-ahead window (measured: 8 MB
    of a 1 GB range), hence small pieces. Where there is no such call, the bytes are read and
    dropped.
    """
    scratch = bytearray(PREFETCH_BYTES)
    fd, file = -1, None
    try:
        for info in infos:
            if info.file != file:
                if fd >= 0:
                    os.close(fd)
                fd, file = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC), info.file
            for offset in range(info.offset, info.offset + info.nbytes, PREFETCH_BYTES):
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, offset, PREFETCH_BYTES, os.POSIX_FADV_WILLNEED)
                else:
                    os.preadv(fd, [scratch], offset)
    except OSError:
        return  # a hint only: the read that follows reports what is wrong
    finally:
        if fd >= 0:
            os.close(fd)
