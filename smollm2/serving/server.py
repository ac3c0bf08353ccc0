"""The socket, the signals and the end: uvicorn around the application."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from asyncio import CancelledError
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from smollm2.errors import UsageError
from smollm2.serving.scheduler import Scheduler

CUT_OFF = 5  # seconds after the rows' end in which clients may read what is left


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet. Raises UsageError for one that cannot be had."""
    if not 0 <= port <= 65535:  # the system would take its lowest 16 bits
        raise UsageError(f"port: expected 0 (a free one) to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # there it would share the port with whoever has it
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = error.strerror or error
        hint = "choose another with --host or --port"
        raise UsageError(f"address: {host} port {port} cannot be had ({reason}); {hint}") from None
    return bound


def url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, which tells the scheduler of its end.

    The first SIGTERM or SIGINT ends it when everything that runs or waits is finished, or cancelled after
    `grace` seconds; a SIGINT after that ends it at once.
    """

    def __init__(
        self, app: FastAPI, scheduler: Scheduler, *, grace: int, ready: Callable[[], None], log: bool
    ) -> None:
        config = uvicorn.Config(
            app, lifespan="off", ws="none", log_config=None, access_log=log, server_header=False,
            timeout_graceful_shutdown=grace + CUT_OFF,
        )  # fmt: skip
        super().__init__(config)
        self.scheduler, self.grace, self.ready = scheduler, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if count := self.scheduler.running + self.scheduler.queued:
            what = f"{count} requests have" if count > 1 else "1 request has"
            print(f"ending: {what} {self.grace} s to finish; Ctrl-C again ends at once", file=sys.stderr)
        # The event loop goes on meanwhile: it is what passes on the last pieces.
        threading.Thread(target=self.scheduler.close, args=(self.grace,), daemon=True).start()
        await super().shutdown(sockets)


def run(server: Server, bound: socket.socket) -> None:
    """Serves until a signal comes, which is raised again at the end: SIGINT as a KeyboardInterrupt."""
    server.scheduler.start()
    try:
        server.run([bound])
    finally:
        server.scheduler.close(0)


def log_to_stderr(verbose: bool) -> None:
    """Warnings, and the traceback of a fault in the server; with verbose a line for each request too."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO if verbose else logging.ERROR)
    faults = logging.getLogger("uvicorn.error")
    faults.setLevel(logging.WARNING if verbose else logging.ERROR)
    # At a second Ctrl-C uvicorn cancels what runs, and would report each of these tasks as a fault.
    faults.addFilter(lambda record: record.exc_info is None or record.exc_info[0] is not CancelledError)
