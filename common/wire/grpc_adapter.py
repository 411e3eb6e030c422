"""Serves the handlers of an RpcServer through gRPC as well: for administration, other languages, health checks and reflection.

One adapter for every service: method names and message classes come from the same table. grpcio runs in threads of its own; each call crosses into
the trio thread, runs the handler there as a framed call would, and crosses back. Methods with bulk bytes are left out: those never go through a
message. Errors carry their number in the trailing metadata "kvfs-error-code".
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc
import trio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvfs.common import errors
from kvfs.common.errors import AddressInUse, BadRequest, ConfigError, KvfsError
from kvfs.common.wire.bulk import ServerBulk
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import Call, RpcServer
from kvfs.common.wire.service import SERVICES, Method

log = logging.getLogger("kvfs.wire.grpc")

_THREADS: Final = 16
_DEFAULT_DEADLINE_S: Final = 30.0
_STOP_GRACE_S: Final = 2.0
_PACKAGE: Final = "kvfs.wire"

_STATUS: Final[list[tuple[type[KvfsError], grpc.StatusCode]]] = [
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.ClusterNotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.AccessDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.NotPermitted, grpc.StatusCode.PERMISSION_DENIED),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NameTooLong, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.BadRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NoSpace, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.QuotaExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.MessageTooBig, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.UnknownMethod, grpc.StatusCode.UNIMPLEMENTED),
    (errors.NotSupported, grpc.StatusCode.UNIMPLEMENTED),
    (errors.InternalError, grpc.StatusCode.INTERNAL),
    (errors.DataError, grpc.StatusCode.DATA_LOSS),
]


def status_of(error: KvfsError) -> grpc.StatusCode:
    for cls, status in _STATUS:
        if isinstance(error, cls):
            return status
    return grpc.StatusCode.UNAVAILABLE if error.retryable else grpc.StatusCode.FAILED_PRECONDITION


class _Adapter:
    def __init__(self, server: RpcServer) -> None:
        self._server = server
        self._token = trio.lowlevel.current_trio_token()
        self._scopes: set[trio.CancelScope] = set()
        self._stopping = False

    def handler(self, method: Method, function: Callable[[Any, Call], Any]) -> Any:
        def serve(data: bytes, context: Any) -> Any:
            """In a thread of grpcio's."""
            try:
                request = method.request.FromString(data)
            except Exception:
                refused = BadRequest(f"a {method.full_name} request does not parse")
                context.set_trailing_metadata((("kvfs-error-code", str(refused.code)),))
                context.abort(status_of(refused), refused.message)
            left = context.time_remaining()
            remaining_s = _DEFAULT_DEADLINE_S if left is None else min(left, 86400.0)
            peer = Identity(role="grpc", host_id="", pid=0, hostname=context.peer(), software="", client_id=_client_id(context))
            try:
                return trio.from_thread.run(self._run, method, function, request, peer, remaining_s, trio_token=self._token)
            except KvfsError as error:
                context.set_trailing_metadata((("kvfs-error-code", str(error.code)),))
                context.abort(status_of(error), error.message)
            except (trio.RunFinishedError, trio.Cancelled):
                context.abort(grpc.StatusCode.UNAVAILABLE, "the service is stopping")

        # Without a deserializer: what does not parse is answered as on the framed wire, and not as a fault of the service.
        return grpc.unary_unary_rpc_method_handler(serve, response_serializer=lambda reply: reply.SerializeToString())

    async def _run(self, method: Method, function: Callable[[Any, Call], Any], request: Any, peer: Identity, remaining_s: float) -> Any:
        """In the trio thread."""
        if self._stopping:
            raise errors.ServiceStopping("the service is stopping")
        server = self._server
        bulk = ServerBulk([], [], server.payload_pool)
        call = Call(peer, server.clock.monotonic() + remaining_s, bulk, method, server.clock)
        scope = trio.CancelScope(deadline=trio.current_time() + remaining_s)
        self._scopes.add(scope)
        try:
            with scope:
                reply = function(request, call)
                if type(reply) is not method.reply:
                    reply = await reply
                if type(reply) is not method.reply:
                    raise TypeError(f"the handler gave a {type(reply).__name__}")
                return reply
            if self._stopping:
                raise errors.ServiceStopping("the service is stopping")
            raise errors.DeadlineExceeded(f"{method.full_name} did not finish within its deadline")
        except KvfsError:
            raise
        except Exception:
            log.exception("%s failed", method.full_name)
            raise errors.InternalError(f"{method.full_name} failed in the service: its log says why") from None
        finally:
            self._scopes.discard(scope)

    def stop(self) -> None:
        self._stopping = True
        for scope in self._scopes:
            scope.cancel()


def _client_id(context: Any) -> bytes:
    for key, value in context.invocation_metadata():
        if key == "kvfs-client-id-bin":
            return bytes(value)
    return b""


async def serve_grpc(server: RpcServer, address: str, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Serves everything that was added to `server`, until cancelled. Starts with the real address, as host:port."""
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"address {address!r}: gRPC needs HOST:PORT")
    adapter = _Adapter(server)
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", server.limits.message_bytes)]
    grpc_server = grpc.server(ThreadPoolExecutor(_THREADS, thread_name_prefix="kvfs-grpc"), options=options, maximum_concurrent_rpcs=256)
    names = []
    for service in server.services:
        methods = {
            method.name: adapter.handler(method, server.handlers[method.key][1])
            for method in SERVICES[service].values()
            if method.key in server.handlers and not method.has_bulk
        }
        names.append(f"{_PACKAGE}.{service}")
        grpc_server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(names[-1], methods),))
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, grpc_server)
    reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), grpc_server)
    try:
        real_port = grpc_server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        real_port = 0
    if real_port == 0:
        raise AddressInUse(f"{address} cannot be listened on: stop the process that has it, or choose another port for gRPC")
    grpc_server.start()
    for name in ("", *names):
        checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        task_status.started(f"{host}:{real_port}")
        await trio.sleep_forever()
    finally:
        adapter.stop()
        with trio.CancelScope(shield=True):
            checks.enter_graceful_shutdown()
            stopped = grpc_server.stop(_STOP_GRACE_S)
            await trio.to_thread.run_sync(lambda: stopped.wait(_STOP_GRACE_S + 1))
