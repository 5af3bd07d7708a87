"""One journal for the several processes of a job: the first process's.

It alone holds the lock and writes. The others start from a copy of what was recorded and go on
recording the same units in their own memory, because all decide by the journal what is left to do.
The output folder must be one that all of them see: hidden states lie there, and a job that is
resumed with another number of processes deals the batches anew.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import InputError
from models.journal import Journal, difference
from models.processes import Processes


class JournalCopy(Journal):
    """What a process that does not write knows of the job."""

    def __init__(
        self, out: Path, job: Mapping[str, Any], complete: bool, facts: Mapping[str, dict[str, Any]]
    ) -> None:
        super().__init__(out, job, None)
        self.complete = complete
        self._facts = dict(facts)

    def record(self, unit: str, **facts: Any) -> None:
        """Note that `unit` is finished, in memory."""
        self._facts[unit] = json.loads(json.dumps(facts))


def open_journal(out: Path, job: Mapping[str, Any], force: bool, processes: Processes) -> Journal:
    """`Journal.open` for every process of a job.

    InputError also when the processes were not asked for the same job, or do not see one folder.
    """
    jobs = processes.gather(job)
    for rank, other in enumerate(jobs):
        if other != jobs[0]:
            raise InputError(
                f"process {rank} has a job with another {difference(jobs[0], other)} than "
                "process 0; start the same command, with the same inputs, everywhere"
            )
    journal: Journal | None = None

    def begin() -> tuple[bool, dict[str, Mapping[str, Any]]]:
        nonlocal journal
        journal = Journal.open(out, job, force)
        return journal.complete, {unit: journal.facts(unit) for unit in journal.units()}

    complete, facts = processes.from_first(begin)
    if journal is None:
        journal = JournalCopy(out, job, complete, {unit: dict(own) for unit, own in facts.items()})
        if not complete and not (journal.folder / "job.json").exists():
            raise InputError(
                f"{socket.gethostname()} does not see {journal.folder}, which another machine "
                "made; give an output folder on a file system that all machines share"
            )
    return journal
