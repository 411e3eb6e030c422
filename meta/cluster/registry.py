"""The manager's records in the KV store, and their copy in the primary's memory.

Owns the keys (docs/format.md repeats them): four letters, then big-endian numbers or bytes. Values are the messages of cluster.proto.
Invariants: every change is one transaction that begins with the fence (lease.py) and, if routing is affected, raises the routing version; the copy in
memory is changed only after the commit. Only a primary writes, so its copy is what the store holds.
It must never write without the fence, except for the lease itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from struct import Struct
from typing import TypeVar, cast

from google.protobuf.message import Message

from kvfs.common.errors import FormatTooNew, WrongDataDirectory
from kvfs.common.primary import not_primary
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster.lease import Lease, same_reign
from kvfs.meta.cluster.states import Chain, Member, Public
from kvfs.meta.kv import Transaction

_Message = TypeVar("_Message", bound=Message)

FORMAT_VERSION = 1

FORMAT = b"CFMT"
"""CFMT -> format version (be32) and cluster id."""
LEASE = b"CLSE"
"""CLSE -> ManagerLease."""
VERSION = b"CVER"
"""CVER -> routing version (be64)."""
NODE = b"CNOD"
"""CNOD node (be32) -> Node."""
TARGET = b"CTGT"
"""CTGT target (be64) -> Target, without states and space."""
CHAIN = b"CCHN"
"""CCHN chain (be32) -> Chain."""
TABLE = b"CTAB"
"""CTAB table (be32) -> ChainTable."""
CLIENT = b"CCLI"
"""CCLI client id -> ClientInfo."""
DRAIN = b"CDRN"
"""CDRN target (be64) -> Drain."""
CONFIG = b"CCFG"
"""CCFG name (UTF-8) -> ConfigBlob."""

_U32 = Struct(">I")
_U64 = Struct(">Q")


@dataclass(slots=True)
class Change:
    """What one transaction writes; None removes."""

    nodes: dict[int, pb.Node] = field(default_factory=dict)
    targets: dict[int, pb.Target] = field(default_factory=dict)
    chains: dict[int, Chain] = field(default_factory=dict)
    tables: dict[int, pb.ChainTable] = field(default_factory=dict)
    clients: dict[bytes, pb.ClientInfo | None] = field(default_factory=dict)
    configs: dict[str, pb.ConfigBlob] = field(default_factory=dict)
    drains: dict[int, pb.Drain | None] = field(default_factory=dict)

    @property
    def routes(self) -> bool:
        """Whether others must learn of it through the routing."""
        return bool(self.nodes or self.targets or self.chains or self.tables)

    def __bool__(self) -> bool:
        return bool(self.routes or self.clients or self.configs or self.drains)


@dataclass(slots=True)
class Records:
    cluster_id: str
    version: int = 0
    nodes: dict[int, pb.Node] = field(default_factory=dict)
    targets: dict[int, pb.Target] = field(default_factory=dict)
    chains: dict[int, Chain] = field(default_factory=dict)
    tables: dict[int, pb.ChainTable] = field(default_factory=dict)
    clients: dict[bytes, pb.ClientInfo] = field(default_factory=dict)
    configs: dict[str, pb.ConfigBlob] = field(default_factory=dict)
    drains: dict[int, pb.Drain] = field(default_factory=dict)

    def node_of_uuid(self, node_uuid: str) -> pb.Node | None:
        return next((node for node in self.nodes.values() if node.node_uuid == node_uuid), None)

    def targets_of_node(self, node_id: int) -> list[pb.Target]:
        return [target for target in self.targets.values() if target.node_id == node_id]

    def take(self, change: Change) -> None:
        """After the commit."""
        self.nodes.update(change.nodes)
        self.targets.update(change.targets)
        self.chains.update(change.chains)
        self.tables.update(change.tables)
        self.configs.update(change.configs)
        for target_id, drain in change.drains.items():
            if drain is None:
                self.drains.pop(target_id, None)
            else:
                self.drains[target_id] = drain
        for client_id, info in change.clients.items():
            if info is None:
                self.clients.pop(client_id, None)
            else:
                self.clients[client_id] = info
        if change.routes:
            self.version += 1


def read_lease(txn: Transaction) -> Lease | None:
    """With a read conflict: a commit that depends on it fails if it changes before."""
    data = txn.get(LEASE)
    return None if data is None else Lease.decode(data)


def write_lease(txn: Transaction, lease: Lease) -> None:
    txn.set(LEASE, lease.encode())


def fence(txn: Transaction, mine: Lease) -> None:
    """Every write transaction of a manager begins with this."""
    current = read_lease(txn)
    if not same_reign(current, mine):
        raise not_primary(current.address if current else "")


def open_store(txn: Transaction, cluster_id: str, new_cluster_id: str) -> str:
    """Check that the store is one of ours and of this cluster, or make it so; the cluster's id."""
    data = txn.get(FORMAT)
    if data is None:
        chosen = cluster_id or new_cluster_id
        txn.set(FORMAT, _U32.pack(FORMAT_VERSION) + chosen.encode())
        return chosen
    (version,) = _U32.unpack_from(data)
    if version > FORMAT_VERSION:
        raise FormatTooNew(f"the manager's records have format {version}, this kvfs knows up to {FORMAT_VERSION}: upgrade kvfs; nothing was touched")
    stored = data[_U32.size :].decode()
    if cluster_id and cluster_id != stored:
        raise WrongDataDirectory(f"the manager's records belong to cluster {stored!r}, the configuration says {cluster_id!r}; nothing was touched")
    return stored


def load(txn: Transaction, cluster_id: str) -> Records:
    records = Records(cluster_id)
    data = txn.snapshot_get(VERSION)
    records.version = _U64.unpack(data)[0] if data else 0
    for key, value in _all(txn, NODE):
        records.nodes[_U32.unpack(key)[0]] = pb.Node.FromString(value)
    for key, value in _all(txn, TARGET):
        records.targets[_U64.unpack(key)[0]] = pb.Target.FromString(value)
    for key, value in _all(txn, CHAIN):
        records.chains[_U32.unpack(key)[0]] = chain_from_wire(pb.Chain.FromString(value))
    for key, value in _all(txn, TABLE):
        records.tables[_U32.unpack(key)[0]] = pb.ChainTable.FromString(value)
    for key, value in _all(txn, CLIENT):
        records.clients[key] = pb.ClientInfo.FromString(value)
    for key, value in _all(txn, DRAIN):
        records.drains[_U64.unpack(key)[0]] = pb.Drain.FromString(value)
    for key, value in _all(txn, CONFIG):
        records.configs[key.decode()] = pb.ConfigBlob.FromString(value)
    return records


def write(txn: Transaction, mine: Lease, records: Records, change: Change) -> None:
    """The change, fenced. Puts only: doing it again after an unknown outcome is harmless."""
    fence(txn, mine)
    for node_id, node in change.nodes.items():
        txn.set(NODE + _U32.pack(node_id), node.SerializeToString())
    for target_id, target in change.targets.items():
        txn.set(TARGET + _U64.pack(target_id), target.SerializeToString())
    for chain_id, chain in change.chains.items():
        txn.set(CHAIN + _U32.pack(chain_id), chain_to_wire(chain).SerializeToString())
    for table_id, table in change.tables.items():
        txn.set(TABLE + _U32.pack(table_id), table.SerializeToString())
    for client_id, info in change.clients.items():
        if info is None:
            txn.clear(CLIENT + client_id)
        else:
            txn.set(CLIENT + client_id, info.SerializeToString())
    for target_id, drain in change.drains.items():
        if drain is None:
            txn.clear(DRAIN + _U64.pack(target_id))
        else:
            txn.set(DRAIN + _U64.pack(target_id), drain.SerializeToString())
    for name, blob in change.configs.items():
        txn.set(CONFIG + name.encode(), blob.SerializeToString())
    if change.routes:
        txn.set(VERSION, _U64.pack(records.version + 1))


def writer(mine: Lease, records: Records, change: Change) -> Callable[[Transaction], None]:
    return lambda txn: write(txn, mine, records, change)


def changed(record: _Message, **fields: object) -> _Message:
    """A copy with these fields: what the primary has in memory stays as it is until the change is committed."""
    made = type(record)()
    made.CopyFrom(record)
    for name, content in fields.items():
        setattr(made, name, content)
    return made


def chain_from_wire(chain: pb.Chain) -> Chain:
    members = tuple(Member(member.target_id, Public(member.state)) for member in chain.targets)
    return Chain(chain.chain_id, chain.version, members, chain.lost_below, chain.loss, chain.last_boot)


def chain_to_wire(chain: Chain) -> pb.Chain:
    members = [pb.ChainTarget(target_id=member.target_id, state=state_to_wire(member.state)) for member in chain.members]
    return pb.Chain(
        chain_id=chain.chain_id,
        version=chain.version,
        targets=members,
        lost_below=chain.lost_below,
        loss=chain.loss,
        last_boot=chain.last_boot,
    )


def state_to_wire(state: Public) -> pb.PublicState:
    """The numbers are the same (a test keeps them so); at run time the wire's enums are plain ints."""
    return cast(pb.PublicState, int(state))


def _all(txn: Transaction, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every row under a prefix, in pages, keys without it."""
    begin, end = prefix, prefix[:-1] + bytes([prefix[-1] + 1])
    inclusive = True
    while True:
        rows, more = txn.snapshot_get_range(begin, end, begin_inclusive=inclusive)
        for key, value in rows:
            yield key[len(prefix) :], value
        if not more:
            return
        begin, inclusive = rows[-1][0], False
