"""One unit is written while the next is computed, and what goes wrong there is heard of."""

from __future__ import annotations

from threading import Event

import pytest

from models.errors import InputError
from quant.output import UnitWriter


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
