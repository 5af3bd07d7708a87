"""The end of a server: answers under way get a grace period, and none is cut without a word.

    first signal   nothing new is taken: the listening socket is closed, what waits gets its 503
    + grace        answers still being written are ended: a 503, or an error event and [DONE]
    second signal  the process ends at once, by that signal

uvicorn's own way differs in three points, for each of which it has a method to override: it does
not tell the application of the signal before connections are closed, it sends itself the signal
again when all is done (the exit status would be that of a kill), and a second SIGTERM does
nothing.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.server import Service

LAST_SECONDS = 2  # for last words to clients that read slowly, or not at all
log = logging.getLogger("thresher.server")


class Server(uvicorn.Server):
    """uvicorn over one service, ended with grace."""

    def __init__(self, service: Service, grace: float) -> None:
        super().__init__(
            uvicorn.Config(
                untraced(service.app()),
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=int(grace) + LAST_SECONDS,
            )
        )
        self.service, self.grace = service, grace
        self.interrupted = False  # by Ctrl-C, not SIGTERM

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks for the end, the second is the end."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.should_exit, self.interrupted = True, sig == signal.SIGINT

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers end; those that outlast the grace period are ended."""
        self.service.close()
        if writing := self.service.num_open:
            log.warning(
                "stopping: answers under way (%d) have %g seconds; a second signal ends them",
                writing,
                self.grace,
            )
        ending = asyncio.get_running_loop().call_later(self.grace, self.service.cut)
        await super().shutdown(sockets)
        ending.cancel()


def untraced(app: ASGIApp) -> ASGIApp:
    """The application, for whose requests being cancelled is an end, not a mistake to be traced."""

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:  # uvicorn's, after LAST_SECONDS; it closes the connection
            log.warning("a client that neither sent nor read was cut off")

    return called
