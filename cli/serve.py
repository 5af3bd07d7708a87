"""`thresher serve`: OpenAI's HTTP API over one checkpoint."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import quiet_option, stdout_kept, together
from cli.progress import shown
from cli.sampling import load, run_options
from models.errors import InputError

if TYPE_CHECKING:
    from runtime.server import Service

GRACE_SECONDS = 25  # Kubernetes kills after 30

server_options = together(
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
                 help="Port to listen on; 0 takes a free one."),
    click.option("--name", metavar="NAME",
                 help="The model's name in requests; default: its folder's."),
    click.option("--max-batch", type=click.IntRange(min=1), default=16, show_default=True,
                 metavar="N", help="Requests that are written at once."),
    click.option("--queue", type=click.IntRange(min=1), default=256, show_default=True,
                 metavar="N", help="Requests that may wait; more are answered 429."),
    click.option("--grace", type=click.IntRange(min=0), default=GRACE_SECONDS, show_default=True,
                 metavar="SECONDS", help="Time for answers under way after SIGTERM or Ctrl-C."),
)  # fmt: skip


@click.command()
@click.argument("ckpt", metavar="CKPT")
@server_options
@run_options
@quiet_option
def serve(
    ckpt: str,
    host: str,
    port: int,
    name: str | None,
    max_batch: int,
    queue: int,
    grace: int,
    device: str,
    dtype: str,
    backend: str,
    gpu_memory: int | None,
    cuda_graphs: bool,
    quiet: bool,
) -> None:
    """Serve CKPT: /v1/chat/completions, /v1/completions, /v1/models, /health.

    For more than one machine's load use an engine: the commands for this checkpoint are printed
    when the server starts, docs/serving.md explains them.
    """
    with stdout_kept(), shown(quiet) as progress:
        from calibration.chat import load_tokenizer
        from runtime.engine import Engine
        from runtime.load import default_sampling
        from runtime.server import Service

        tokenizer = load_tokenizer(ckpt)
        with listening(host, port) as listener:
            loaded = load(ckpt, device, dtype, backend, gpu_memory, progress)
            engine = Engine(
                loaded,
                max_batch=max_batch,
                queue=queue,
                cuda_graphs=cuda_graphs,
                eos=tokenizer.eos_token_id,
            )
            served = name or Path(ckpt).resolve().name
            defaults = default_sampling(loaded)
            service = Service(engine, tokenizer, served, defaults)
            if not quiet:
                for line in engine_lines(ckpt):
                    click.echo(line, err=True)
            run(service, listener, grace)


def listening(host: str, port: int) -> socket.socket:
    """The socket, taken before the weights are read: a port in use is told at once."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}:{port} ({error.strerror}); use another --port or --host"
        ) from error


def run(service: Service, listener: socket.socket, grace: int) -> None:
    """Serve until the process is told to stop and the answers under way have ended."""
    from runtime.stopping import Server

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"serving {service.name} on http://{shown}:{port}/v1", err=True)
    server = Server(service, grace)
    server.run(sockets=[listener])
    if service.thread.alive:  # in a step of a minute; Python's own end would abort below it
        sys.stderr.flush()
        os._exit(130 if server.interrupted else 0)
    if server.interrupted:
        raise KeyboardInterrupt


def engine_lines(ckpt: str) -> list[str]:
    """How vLLM and SGLang serve this checkpoint, over as many GPUs as there are here."""
    import torch

    from models.checkpoint import load_config
    from runtime.engines import commands

    return commands(load_config(ckpt), ckpt, max(1, torch.cuda.device_count()))
