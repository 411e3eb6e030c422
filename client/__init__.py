"""The native client: files of a cluster without a mount.

`Client` is for threads, `open_client` gives an `AsyncClient` for trio. Both offer path operations, file objects, and the raw zero-copy way
over registered
memory. Attributes are meta.proto's Inode.
"""

from kvfs.client.async_client import AsyncClient, open_client
from kvfs.client.config import ClientConfig
from kvfs.client.file.async_file import AsyncFile
from kvfs.client.file.memory import RegisteredBuffer
from kvfs.client.file.open_file import OpenFile
from kvfs.client.locate import ClusterAddress, locate
from kvfs.client.raw_io import RawFile
from kvfs.client.rings import Completion, IoRing
from kvfs.client.sync_client import Client
from kvfs.client.user import User

__all__ = [
    "AsyncClient",
    "AsyncFile",
    "Client",
    "ClientConfig",
    "ClusterAddress",
    "Completion",
    "IoRing",
    "OpenFile",
    "RawFile",
    "RegisteredBuffer",
    "User",
    "locate",
    "open_client",
]
