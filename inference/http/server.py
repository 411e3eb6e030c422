"""The application on a port: Hypercorn under trio.

Owns the listening socket and its options. Invariants: a port that is taken is said so before anything else starts; a client that takes nothing for
`client_timeout_s` is dropped by the kernel (Hypercorn would wait for it for ever); when told to stop, the server takes no new connections and lets
answers under way end for `shutdown_s`.
"""

from __future__ import annotations

import socket
from functools import partial

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve
from starlette.types import ASGIApp

from kvfs.common.errors import AddressInUse, SetupError
from kvfs.inference.http.config import HttpConfig

BACKLOG = 512
HEADER_BYTES_MAX = 32 << 10
KEEP_ALIVE_S = 30


def listen(config: HttpConfig) -> socket.socket:
    """A socket that listens; its options go to the connections that it accepts."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.client_timeout_s * 1000))
        made.bind((config.host, config.port))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        message = f"cannot listen on {config.host}:{config.port}: {error.strerror}. Say another --host or --port"
        raise (AddressInUse if error.errno == 98 else SetupError)(message) from None
    return made


async def serve(
    app: ASGIApp, config: HttpConfig, *, stop: trio.Event | None = None, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serves until `stop`, or cancelled. Tells its URL when it answers."""
    listener = listen(config)
    host, port = listener.getsockname()[:2]
    settings = Config()
    settings.bind = [f"fd://{listener.detach()}"]  # Hypercorn's from here on
    settings.backlog = BACKLOG
    settings.h11_max_incomplete_size = HEADER_BYTES_MAX
    settings.keep_alive_timeout = KEEP_ALIVE_S
    settings.graceful_timeout = config.shutdown_s
    settings.include_server_header = False
    settings.accesslog = None
    settings.loglevel = "WARNING"
    asked_to_stop = trio.Event() if stop is None else stop
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(hypercorn_serve, app, settings, shutdown_trigger=asked_to_stop.wait))
        task_status.started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
