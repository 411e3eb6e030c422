"""Pure: what the registration of a node's process changes in the records.

Invariants: a node is its data directory's uuid; each start of its process gets a higher incarnation; a known uuid gets its old id and targets back.
A node id passes to another uuid only when its node is dead and the newcomer asks for that id (a machine whose disks were replaced).
A target that was seen once and that the node comes back without is blank: it may be filled by a predecessor, but it must never revive a chain.
"""

from __future__ import annotations

import itertools

from kvfs.common.errors import BadRequest, Busy, InvalidArgument
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster.registry import Change, Records, changed
from kvfs.meta.cluster.states import Member, Public

MAX_ADDRESSES = 16
MAX_DISKS = 64


def plan(records: Records, request: pb.RegisterRequest) -> tuple[Change, pb.Node]:
    """The change, and the node as it will be. Chains are not touched here: the caller moves them with the node's targets taken as offline."""
    if not request.node_uuid or len(request.node_uuid) > 100:
        raise BadRequest("a registration needs a node uuid of 1 to 100 characters")
    if request.role not in (pb.ROLE_META, pb.ROLE_STORAGE):
        raise BadRequest(f"role {request.role} does not register: meta and storage do")
    if len(request.addresses) > MAX_ADDRESSES or len(request.disks) > MAX_DISKS:
        raise BadRequest(
            f"a registration with {len(request.addresses)} addresses and {len(request.disks)} disks: at most {MAX_ADDRESSES} and {MAX_DISKS}"
        )
    old = records.node_of_uuid(request.node_uuid)
    if old is not None and old.role != request.role:
        raise InvalidArgument(
            f"node {old.node_id} registered as {pb.NodeRole.Name(old.role)} and now says {pb.NodeRole.Name(request.role)}: "
            "do two services share a data directory?"
        )
    node = pb.Node(
        node_id=old.node_id if old else _new_id(records, request),
        role=request.role,
        addresses=request.addresses,
        host_id=request.host_id,
        hostname=request.hostname,
        pid=request.pid,
        incarnation=1,
        alive=True,
        software=request.software,
        node_uuid=request.node_uuid,
        disks=request.disks,
    )
    if (before := records.nodes.get(node.node_id)) is not None:
        node.incarnation = before.incarnation + 1
    change = Change(nodes={node.node_id: node})
    there = {target_id for disk in request.disks for target_id in disk.targets}
    for target in records.targets_of_node(node.node_id):
        if target.born and not target.blank and target.target_id not in there:
            change.targets[target.target_id] = changed(target, blank=True)
        elif target.blank and target.target_id in there and _waits_for(records, target):
            # Nobody makes an empty target where the last copy was: what is there is that copy, on a disk that had only been away.
            change.targets[target.target_id] = changed(target, blank=False)
    return change, node


def _waits_for(records: Records, target: pb.Target) -> bool:
    """Whether a chain has nothing but this target to go on with."""
    chain = records.chains.get(target.chain_id)
    return chain is not None and Member(target.target_id, Public.LASTSRV) in chain.members


def _new_id(records: Records, request: pb.RegisterRequest) -> int:
    wished = request.node_id
    if not wished:
        # The lowest that was never given: ids that others wish for by their configuration lie above, and must not be taken from them.
        return next(number for number in itertools.count(1) if number not in records.nodes)
    holder = records.nodes.get(wished)
    if holder is None:
        return wished
    if holder.alive:
        raise Busy(f"node id {wished} belongs to a node that is alive ({holder.hostname} pid {holder.pid}): stop that one, or ask for another id")
    if holder.role != request.role:
        raise InvalidArgument(f"node id {wished} belongs to a node with role {pb.NodeRole.Name(holder.role)}: ask for another id")
    return wished
