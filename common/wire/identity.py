"""Who speaks on a connection, as the handshake tells it, and the check that both sides belong together.

Nothing here is proof: until credentials are checked, a peer is who it says it is.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

import kvfs
from kvfs.common.boundary.net import Net
from kvfs.common.boundary.system_net import boot_id
from kvfs.common.errors import MalformedFrame, VersionMismatch, WrongCluster
from kvfs.common.wire import base_pb2 as pb
from kvfs.common.wire.frame import PROTOCOL_MAX, PROTOCOL_MIN


@dataclass(frozen=True, slots=True)
class Identity:
    cluster_id: str = ""
    """Empty: not known yet; then any cluster will do."""
    client_id: bytes = b""
    """16 random bytes, one per process."""
    role: str = "client"
    node_id: int = 0
    host_id: str = field(default_factory=boot_id)
    software: str = field(default_factory=lambda: str(getattr(kvfs, "__version__", "")))
    credentials: bytes = field(default=b"", repr=False)
    pid: int = field(default_factory=os.getpid)
    hostname: str = field(default_factory=socket.gethostname)
    lends_files: bool = False
    """A server: to this caller."""

    @classmethod
    def of(cls, net: Net, *, cluster_id: str, client_id: bytes, role: str) -> Identity:
        """Of the process that uses this network."""
        here = net.here
        return cls(cluster_id, client_id, role, host_id=here.host_id, pid=here.pid, hostname=here.hostname)

    def hello(self, *, lends_files: bool = False) -> bytes:
        return pb.Hello(
            version_min=PROTOCOL_MIN,
            version_max=PROTOCOL_MAX,
            cluster_id=self.cluster_id,
            client_id=self.client_id,
            role=self.role,
            node_id=self.node_id,
            host_id=self.host_id,
            software=self.software,
            credentials=self.credentials,
            pid=self.pid,
            hostname=self.hostname,
            lends_files=lends_files,
        ).SerializeToString()

    def hear(self, message: bytes) -> Identity:
        """As `meet`, from the Hello as it came."""
        try:
            hello = pb.Hello.FromString(message)
        except Exception:
            raise MalformedFrame("the first message is no Hello") from None
        return self.meet(hello)

    def meet(self, hello: pb.Hello) -> Identity:
        """The peer's identity, if the two can work together."""
        if hello.version_min > PROTOCOL_MAX or hello.version_max < PROTOCOL_MIN:
            raise VersionMismatch(
                f"the peer ({hello.software}) speaks protocol versions {hello.version_min} to {hello.version_max}, "
                f"this side {PROTOCOL_MIN} to {PROTOCOL_MAX}: upgrade the older one"
            )
        if hello.cluster_id and self.cluster_id and hello.cluster_id != self.cluster_id:
            raise WrongCluster(f"the peer belongs to cluster {hello.cluster_id!r}, this side to {self.cluster_id!r}: check the addresses")
        return Identity(
            cluster_id=hello.cluster_id,
            client_id=hello.client_id,
            role=hello.role,
            node_id=hello.node_id,
            host_id=hello.host_id,
            software=hello.software,
            credentials=hello.credentials,
            pid=hello.pid,
            hostname=hello.hostname,
            lends_files=hello.lends_files,
        )
