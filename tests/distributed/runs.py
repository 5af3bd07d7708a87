"""Command lines run by several processes, as a launcher would start them, without its seconds.

    python -m tests.distributed.runs < RUNS.json

One process imports everything and forks the others, so that a run costs its work and not imports.
RUNS is a list of `Run`s as JSON; what each process did comes back on stdout, as `Ended`s.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 90.0  # seconds; what runs longer is killed and fails its test


@dataclass(frozen=True, kw_only=True)
class Run:
    """`arguments` of the program in `size` processes, with `more` behind them in some.

    `kill`: these processes are killed once the journal of the output folder has `units` lines.
    `before`: "module:function", called with the rank in each process before it begins.
    """

    size: int
    arguments: list[str]
    more: dict[str, list[str]] = field(default_factory=dict)
    kill: list[int] = field(default_factory=list)
    units: int = 1
    before: str = ""

    @property
    def journal(self) -> Path:
        return Path(self.arguments[self.arguments.index("-o") + 1]) / ".thresher" / "journal.jsonl"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Exit codes by rank (minus the signal for a killed one), and what each printed."""

    codes: list[int]
    stdout: list[str]
    stderr: list[str]
    seconds: float


def run_all(*runs: Run) -> list[Ended]:
    """Run them one after another, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.runs"],
        input=json.dumps([asdict(run) for run in runs]),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Ended(**ended) for ended in json.loads(done.stdout)]


def main() -> None:
    import cli.main

    cli.main.prepare_environment()
    for module in ("models.processes", "quant.quantize", "quant.verify", "reap.ahead"):
        importlib.import_module(module)
    ended = [carry_out(Run(**run)) for run in json.load(sys.stdin)]
    sys.stdout.write(json.dumps([asdict(one) for one in ended]))


def carry_out(run: Run) -> Ended:
    """Fork the processes, kill those that are to be, and wait for the rest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pids = [start(run, rank, port, Path(folder)) for rank in range(run.size)]
        codes: dict[int, int] = {}
        to_kill = list(run.kill)
        while len(codes) < run.size:
            late = time.monotonic() - began > LIMIT
            if late or (to_kill and recorded(run.journal) >= run.units):
                for rank in range(run.size) if late else to_kill:
                    if rank not in codes:
                        os.kill(pids[rank], signal.SIGKILL)
                to_kill = []
            for rank in set(range(run.size)) - set(codes):
                pid, status = os.waitpid(pids[rank], os.WNOHANG)
                if pid:
                    codes[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return Ended(
            codes=[codes[rank] for rank in range(run.size)],
            stdout=[Path(folder, f"out{rank}").read_text() for rank in range(run.size)],
            stderr=[Path(folder, f"err{rank}").read_text() for rank in range(run.size)],
            seconds=time.monotonic() - began,
        )


def recorded(journal: Path) -> int:
    """Lines of a journal."""
    try:
        return journal.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def start(run: Run, rank: int, port: int, folder: Path) -> int:
    """Fork one process; its pid."""
    pid = os.fork()
    if pid:
        return pid
    import cli.main

    code = 1
    try:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), stream)
        if run.size > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(run.size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        if run.before:
            module, function = run.before.split(":")
            getattr(importlib.import_module(module), function)(rank)
        code = cli.main.run([*run.arguments, *run.more.get(str(rank), [])])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
