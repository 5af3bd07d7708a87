"""What one decoder layer hands to the next, for every batch, in RAM or on disk.

A *generation* is the set of carries that enter one layer. While layer L runs, generation L is
read and generation L + 1 written; carries beyond the memory budget go straight to files. A
*snapshot* writes the carries that are still in RAM beside the spilled ones, so that a killed job
finds a whole generation on disk. Files of a generation are never overwritten: an older one is
deleted only once a newer snapshot has been recorded. Every file's digest (128-bit XXH3 of names
and bytes) goes into the job's journal with the snapshot and is compared when the file is read, so
that a file which the disk or somebody else changed stops the job instead of bending its result.

    FOLDER/layer_00012/batch_00003.safetensors     what enters layer 12, batch 3
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.errors import InputError
from models.layer_slot import Carry

WRITERS = 3  # threads of a snapshot


def num_bytes(carry: Carry) -> int:
    """Bytes of a carry's tensors."""
    return sum(tensor.nbytes for tensor in carry.values())


def digest(carry: Carry) -> str:
    """128-bit XXH3 over names, shapes, types and bytes."""
    summed = xxhash.xxh3_128()
    for name, tensor in sorted(carry.items()):
        summed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        summed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return summed.hexdigest()


class HiddenStates:
    """Carries by (layer, batch). `budget` bounds the bytes held in RAM; the rest is spilled.
    `discard` removes the folder of a generation that is over.

    One thread may put while another takes.
    """

    def __init__(
        self,
        folder: Path,
        budget: int | None,
        discard: Callable[[Path], None] = shutil.rmtree,
    ) -> None:
        self.folder, self.budget, self.discard = folder, budget, discard
        self.held: dict[tuple[int, int], Carry] = {}
        self.held_bytes = 0
        self.spilled_bytes = 0
        self.digests: dict[tuple[int, int], str] = {}  # of the files
        self.saved: int | None = None  # the generation that a later run would begin with
        self._lock = threading.Lock()  # of what is held

    def _path(self, layer: int, batch: int) -> Path:
        return self.folder / f"layer_{layer:05d}" / f"batch_{batch:05d}.safetensors"

    def put(self, layer: int, batch: int, carry: Carry) -> None:
        """Store what enters `layer` for `batch` (moved to the CPU)."""
        kept = {name: tensor.detach().to("cpu").contiguous() for name, tensor in carry.items()}
        size = num_bytes(kept)
        with self._lock:
            fits = self.budget is None or self.held_bytes + size <= self.budget
            if fits:
                self.held[layer, batch] = kept
                self.held_bytes += size
        if not fits:
            self._write(layer, batch, kept)
            self.spilled_bytes += size

    def holds(self, layer: int, batch: int) -> bool:
        """Whether what enters `layer` for `batch` is in RAM."""
        return (layer, batch) in self.held

    def take(self, layer: int, batch: int, *, keep: bool = False) -> Carry:
        """What enters `layer` for `batch`; a carry held in RAM is given up unless `keep`."""
        with self._lock:
            carry = self.held.get((layer, batch))
            if carry is not None:
                if not keep:
                    del self.held[layer, batch]
                    self.held_bytes -= num_bytes(carry)
                return carry
        path = self._path(layer, batch)
        if not path.exists():
            raise InputError(
                f"{path} is missing; the job folder was changed, start again with --force"
            )
        try:
            loaded: Carry = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); start the job again with --force"
            ) from error
        if self.digests.get((layer, batch), "") not in ("", digest(loaded)):
            raise InputError(
                f"{path} is not what this job wrote; check the disk and start again with --force"
            )
        return loaded

    def expect(self, layer: int, digests: Sequence[str]) -> None:
        """What `snapshot` returned for the files entering `layer`, from an earlier run."""
        self.digests.update({(layer, batch): value for batch, value in enumerate(digests)})
        self.saved = layer

    def _write(self, layer: int, batch: int, carry: Carry) -> None:
        path = self._path(layer, batch)
        temporary = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(carry, temporary)
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except (OSError, SafetensorError) as error:  # the latter for a disk full in save_file
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"hidden states cannot be written to {path.parent}: {reason or error}; "
                "free space there or raise --memory"
            ) from error
        os.replace(temporary, path)
        self.digests[layer, batch] = digest(carry)

    def snapshot(self, layer: int) -> list[str]:
        """Write the carries entering `layer` that are only in RAM. They stay in RAM too.

        Returns the digest of each batch's file, for the journal.
        """
        self.saved = layer
        own = [batch for held_layer, batch in sorted(self.held) if held_layer == layer]
        with ThreadPoolExecutor(WRITERS) as pool:  # one is summed up while another is flushed
            list(pool.map(lambda batch: self._write(layer, batch, self.held[layer, batch]), own))
        return [value for (entered, _), value in sorted(self.digests.items()) if entered == layer]

    def unsaved_bytes(self, layer: int) -> int:
        """What `snapshot` would write."""
        return sum(num_bytes(carry) for (own, _), carry in self.held.items() if own == layer)

    def forget_before(self, layer: int, *, but: int | None = None) -> None:
        """Delete every generation older than `layer` from RAM and disk; that of layer `but` stays
        on disk."""
        for key in [key for key in self.held if key[0] < layer]:
            self.held_bytes -= num_bytes(self.held.pop(key))
        for key in [key for key in self.digests if key[0] < layer and key[0] != but]:
            del self.digests[key]
        if self.folder.exists():
            for path in sorted(self.folder.iterdir()):
                number = int(path.name[6:]) if path.name.startswith("layer_") else layer
                if number < layer and number != but:
                    self.discard(path)

    def forget_from_ram(self, layer: int) -> None:
        """Drop carries entering `layer` from RAM (their use is over)."""
        for key in [key for key in self.held if key[0] == layer]:
            self.held_bytes -= num_bytes(self.held.pop(key))
