"""The Manager service of cluster.proto over a Manager.

Each handler asks for the reign first, so that a standby answers NotPrimary with the primary's address; what waits for nothing is a plain def.
It must never change state itself.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from kvfs.common.errors import BadRequest
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.common.wire.server import Call
from kvfs.meta.cluster import drains, losses
from kvfs.meta.cluster.manager import Manager
from kvfs.meta.cluster.primary import Primary
from kvfs.meta.cluster.registry import chain_to_wire

MAX_WAIT_S = 30.0
ANSWER_MARGIN_S = 0.2
"""A long wait ends this much before the caller's deadline, so that the answer still reaches it."""
MAX_CONFIG_BYTES = 64 * 1024


class ManagerService:
    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def get_routing(self, request: pb.GetRoutingRequest, call: Call) -> pb.GetRoutingReply | Coroutine[Any, Any, pb.GetRoutingReply]:
        reign = self._manager.primary()
        if request.known_version < reign.records.version:
            return pb.GetRoutingReply(changed=True, routing=reign.routing(fresh=request.known_version == 0))
        if not request.wait_ms:
            return pb.GetRoutingReply(changed=False)
        return self._wait_routing(reign, request.known_version, _wait_s(request.wait_ms / 1000, call))

    async def _wait_routing(self, reign: Primary, known_version: int, wait_s: float) -> pb.GetRoutingReply:
        info = await reign.routing_above(known_version, wait_s)
        return pb.GetRoutingReply(changed=info is not None, routing=info)

    async def register(self, request: pb.RegisterRequest, call: Call) -> pb.RegisterReply:
        return await self._manager.primary().register(request)

    def heartbeat(self, request: pb.HeartbeatRequest, call: Call) -> pb.HeartbeatReply:
        return self._manager.primary().heartbeat(request)

    async def create_targets(self, request: pb.CreateTargetsRequest, call: Call) -> pb.CreateTargetsReply:
        return await self._manager.primary().create_targets(request, _wait_s(MAX_WAIT_S, call))

    async def client_heartbeat(self, request: pb.ClientHeartbeatRequest, call: Call) -> pb.ClientHeartbeatReply:
        return await self._manager.primary().client_heartbeat(request)

    def list_clients(self, request: base.Empty, call: Call) -> pb.ListClientsReply:
        return self._manager.primary().list_clients()

    async def set_config(self, request: pb.ConfigBlob, call: Call) -> pb.ConfigBlob:
        if (size := len(request.toml.encode())) > MAX_CONFIG_BYTES:
            raise BadRequest(f"a configuration of {size} bytes: at most {MAX_CONFIG_BYTES}")
        return await self._manager.primary().set_config(request)

    def get_config(self, request: pb.GetConfigRequest, call: Call) -> pb.ConfigBlob:
        """Version 0 and empty where there is none."""
        found = self._manager.primary().records.configs.get(request.name)
        return found if found is not None else pb.ConfigBlob(name=request.name)

    def status(self, request: base.Empty, call: Call) -> pb.ManagerStatusReply:
        return self._manager.status()

    async def drain(self, request: pb.DrainRequest, call: Call) -> pb.DrainReply:
        reign, now_ns = self._manager.primary(), self._manager.wall_ns()
        if request.cancel:
            await reign.change(lambda records: drains.cancel(records, request, now_ns))
        else:
            await reign.change(lambda records: drains.begin(records, reign.reports, request, now_ns))
        wanted = set(drains.named(reign.records, request))
        return _drains(reign, lambda drain: drain.target_id in wanted or (drain.cancelled and drain.replacement in wanted))

    def list_drains(self, request: base.Empty, call: Call) -> pb.DrainReply:
        return _drains(self._manager.primary(), lambda drain: True)

    async def accept_loss(self, request: pb.AcceptLossRequest, call: Call) -> pb.AcceptLossReply:
        reign = self._manager.primary()
        await reign.change(lambda records: losses.accept(records, request))
        return pb.AcceptLossReply(chain=chain_to_wire(reign.records.chains[request.chain_id]))

    async def withdraw(self, request: pb.WithdrawRequest, call: Call) -> base.Empty:
        await self._manager.primary().change(lambda records: losses.withdraw(records, request))
        return base.Empty()


def _drains(reign: Primary, wanted: Callable[[pb.Drain], bool]) -> pb.DrainReply:
    found = [drain for _, drain in sorted(reign.records.drains.items()) if wanted(drain)]
    return pb.DrainReply(drains=[drains.describe(reign.records, drain) for drain in found])


def _wait_s(wished_s: float, call: Call) -> float:
    return max(0.0, min(wished_s, MAX_WAIT_S, call.remaining_s() - ANSWER_MARGIN_S))
