"""One unit is written while the next is computed, and what goes wrong there is heard of."""

from __future__ import annotations

from threading import Event

import pytest
import torch

from models.errors import InputError
from models.writer import OutputTensor
from quant.output import Download, UnitWriter, output_of


def failing() -> None:
    raise InputError("the disk is full")


def test_a_unit_begins_when_the_one_before_has_ended() -> None:
    written: list[int] = []
    go_on = Event()

    def first() -> None:
        go_on.wait(10)
        written.append(1)

    with UnitWriter() as writer:
        writer.begin(first)
        assert not written  # the caller goes on meanwhile
        go_on.set()
        writer.begin(lambda: written.append(2))
        assert written[0] == 1
        writer.wait()
        assert written == [1, 2]
        writer.begin(lambda: written.append(3))
    assert written == [1, 2, 3]


def test_errors_are_raised_by_the_next_call() -> None:
    with UnitWriter() as writer:
        writer.begin(failing)
        with pytest.raises(InputError, match="full"):
            writer.begin(lambda: None)
        writer.begin(failing)
        with pytest.raises(InputError, match="full"):
            writer.wait()
        writer.wait()  # once is enough


def test_errors_are_raised_at_the_end() -> None:
    with pytest.raises(InputError, match="full"), UnitWriter() as writer:
        writer.begin(failing)


def test_what_failed_first_is_what_is_raised() -> None:
    def work() -> None:
        with UnitWriter() as writer:
            writer.begin(failing)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")
def test_what_comes_from_a_gpu_is_what_was_computed() -> None:
    """Behind work that is still queued, in sizes up and down, through one piece of memory."""
    tensors, made = {}, {}
    for number, size in enumerate([5, 1 << 22, 300, 1 << 23, 1]):
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(10):
            busy = (busy @ busy).clamp(-1, 1)
        name = f"tensor {number}"
        tensors[name] = torch.arange(size, device="cuda").add_(busy[0, 0].long()).bfloat16()
        made[name] = output_of(name, tensors[name])
    plain = output_of("plain", torch.ones(3))
    assert isinstance(plain, OutputTensor)
    download = Download()
    found = download.all({**made, "plain": plain})
    assert found.pop("plain") == plain
    for name, tensor in tensors.items():
        assert found[name].data == tensor.cpu().view(torch.uint8).numpy().tobytes()
        assert (found[name].dtype, found[name].shape) == ("BF16", tuple(tensor.shape))
