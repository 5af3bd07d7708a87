"""Hidden states between a GPU and pinned host memory, beside the computing.

Copies from and to pageable memory run at 6 GB/s and stop the host; pinned ones at 53 GB/s and on
streams of their own, so that batch n + 1 arrives and batch n - 1 leaves while batch n is computed.
Pinning costs a second a gigabyte, so buffers are used again from layer to layer: what one batch
had is free once it is on the GPU, and the next layer's output of some batch goes there.

Order is kept by events: a buffer is read or written only after the copy that used it last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.errors import InputError
from models.skeleton import Carry


@dataclass(slots=True)
class OnHost:
    """A carry in host memory; `arrived` when the copy from the GPU is done (None: long ago)."""

    carry: Carry
    arrived: torch.cuda.Event | None = None

    def settled(self) -> Carry:
        """The carry, once it has arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
            self.arrived = None
        return self.carry


@dataclass(slots=True)
class OnDevice:
    """A carry on its way to the GPU; `arrives` is None where nothing had to move."""

    carry: Carry
    arrives: torch.cuda.Event | None = None

    def ready(self) -> Carry:
        """The carry, for the current stream."""
        if self.arrives is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.arrives)
            for tensor in self.carry.values():
                tensor.record_stream(stream)
            self.arrives = None
        return self.carry


class Transfers:
    """Copies both ways for one GPU, and the pinned buffers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.down, self.up = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        self.in_use_until: dict[int, torch.cuda.Event] = {}  # by buffer address

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        spare = self.free.get((like.shape, like.dtype))
        if spare:
            return spare.pop()
        try:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        except RuntimeError as error:
            raise InputError(
                f"{like.nbytes} bytes of host memory cannot be pinned for hidden states "
                f"({str(error).splitlines()[0]}); lower --memory"
            ) from error

    def fetch(self, carry: Carry) -> OnHost:
        """Start the copy of a carry to the host."""
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        kept: Carry = {}
        with torch.cuda.stream(self.down):
            for name, tensor in carry.items():
                source = tensor.detach().contiguous()
                buffer = self._buffer(source)
                last_read = self.in_use_until.pop(buffer.data_ptr(), None)
                if last_read is not None:
                    self.down.wait_event(last_read)
                kept[name] = buffer.copy_(source, non_blocking=True)
                source.record_stream(self.down)
            arrived = torch.cuda.Event()
            arrived.record(self.down)
        return OnHost(kept, arrived)

    def send(self, held: OnHost) -> OnDevice:
        """Start the copy of a carry to the GPU."""
        with torch.cuda.stream(self.up):
            if held.arrived is not None:
                self.up.wait_event(held.arrived)
            sent = {
                name: tensor.to(self.device, non_blocking=True)
                for name, tensor in held.carry.items()
            }
            arrives = torch.cuda.Event()
            arrives.record(self.up)
        for tensor in held.carry.values():
            self.in_use_until[tensor.data_ptr()] = arrives
        return OnDevice(sent, arrives)

    def release(self, carry: Carry) -> None:
        """The carry's buffers may be used again, once copies from them are done."""
        for tensor in carry.values():
            if tensor.is_pinned():
                self.free.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
