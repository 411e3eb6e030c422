"""Extended attributes: user.* lives in the metadata service; user.kvfs.layout, .chains and .cluster are made up here, read-only, and of the directory
of a KV-cache space user.kvfs.space (what it is) and user.kvfs.stats (what it holds) by the client.

`user.kvfs.cluster`, on anything, says how a program that stands on the mount gets to the cluster itself: {"cluster_id": ..., "managers": [...]}.

The kernel asks for security.capability before every write, and programs for system.posix_acl_*: those are refused here, without a call.
The virtual ones are not listed, so that copying tools (cp -a, rsync -X, shutil.copy2) do not try to set them on the copy.
"""

from __future__ import annotations

import json
import os
from typing import Any

from kvfs.client.spaces import SPACE_XATTRS, space_attribute
from kvfs.common.errors import InvalidArgument, NoAttribute, NotFound, NotPermitted, NotSupported
from kvfs.common.wire import cluster_pb2
from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse.block_table import BLOCK_BIT
from kvfs.fuse.model import Caller
from kvfs.fuse.operations.spaces import SpaceOperations

LAYOUT = b"user.kvfs.layout"
CHAINS = b"user.kvfs.chains"
CLUSTER = b"user.kvfs.cluster"
VIRTUAL = (LAYOUT, CHAINS, CLUSTER, *SPACE_XATTRS)
USER_NAMESPACE = b"user."
ASKED_BY_THE_KERNEL = b"security.capability"


class XattrOperations(SpaceOperations):
    async def getxattr(self, inode: int, name: bytes, caller: Caller) -> bytes:
        if name == ASKED_BY_THE_KERNEL:
            raise NoAttribute("no capabilities")
        _check_namespace(name)
        if name == CLUSTER:
            return json.dumps({"cluster_id": self._client.routing.cluster_id, "managers": self._client.managers}).encode()
        if inode & BLOCK_BIT:
            raise NoAttribute("a KV-cache block has no attributes: its space has")
        if name in VIRTUAL:
            return await self._virtual(inode, name)
        return await self._as(caller, lambda user: self._meta.get_xattr(inode, name, user=user))

    async def setxattr(self, inode: int, name: bytes, value: bytes, caller: Caller, *, flags: int = 0) -> None:
        """`flags`: XATTR_CREATE, XATTR_REPLACE."""
        create, replace = bool(flags & os.XATTR_CREATE), bool(flags & os.XATTR_REPLACE)
        _check_namespace(name)
        _check_writable(name)
        self._check_no_block(inode)
        self._cache.changing(inode)
        try:
            await self._as(caller, lambda user: self._meta.set_xattr(inode, name, value, user=user, create=create, replace=replace))
        finally:
            self._cache.changing(inode)

    async def removexattr(self, inode: int, name: bytes, caller: Caller) -> None:
        _check_namespace(name)
        _check_writable(name)
        self._check_no_block(inode)
        self._cache.changing(inode)
        try:
            await self._as(caller, lambda user: self._meta.remove_xattr(inode, name, user=user))
        finally:
            self._cache.changing(inode)

    async def listxattr(self, inode: int, caller: Caller) -> list[bytes]:
        if inode & BLOCK_BIT:
            return []
        return await self._as(caller, lambda user: self._meta.list_xattr(inode, user=user))

    async def _virtual(self, inode: int, name: bytes) -> bytes:
        found = (await self._meta.get_attr([inode], user=self._client.user))[0]
        if found.type == pb.TYPE_INVALID:
            raise NotFound(f"inode {inode} is gone")
        if name in SPACE_XATTRS:
            return await space_attribute(self._client.storage, found, name)
        if found.type not in (pb.FILE, pb.DIRECTORY) or (name == CHAINS and found.type != pb.FILE):
            raise NoAttribute("only files and directories have a layout, and only files have chains")
        value = self._layout(found) if name == LAYOUT else self._chains(found)
        return json.dumps(value).encode()

    @staticmethod
    def _layout(inode: pb.Inode) -> dict[str, Any]:
        layout = inode.layout
        value: dict[str, Any] = {"table": layout.table_id, "chunk_size": layout.chunk_size, "stripe": layout.stripe or len(layout.chain_ids)}
        if inode.type == pb.FILE:
            value["chains"] = list(layout.chain_ids)
        return value

    def _chains(self, inode: pb.Inode) -> list[dict[str, Any]]:
        """Where the file lies: chunk i on entry i modulo the length, its targets head first."""
        routing = self._client.routing
        value = []
        for chain_id in inode.layout.chain_ids:
            chain = routing.chain(chain_id)
            targets = [
                {
                    "target": target.target_id,
                    "node": routing.target(target.target_id).node_id,
                    "state": cluster_pb2.PublicState.Name(target.state).lower().removeprefix("public_"),
                }
                for target in chain.targets
            ]
            value.append({"chain": chain_id, "version": chain.version, "targets": targets})
        return value


def _check_namespace(name: bytes) -> None:
    if not name.startswith(USER_NAMESPACE):
        raise NotSupported(f"extended attributes are kept in the user. namespace only, not {name!r}")
    if name == USER_NAMESPACE:
        raise InvalidArgument("an extended attribute needs a name behind user.")


def _check_writable(name: bytes) -> None:
    if name in VIRTUAL:
        raise NotPermitted(f"{name.decode()} is read-only: kvfs tells it, nobody sets it")
