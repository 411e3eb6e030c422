"""The file system operations by inode number: plain async methods, no kernel and no protocol.

base         what all families share: the client, users, attributes as a mount shows them
attributes   getattr, setattr, access, statfs
entries      lookup, mknod, mkdir, symlink, link, unlink, rmdir, rename, readlink
files        open, create, read, write, flush, fsync, release
directories  opendir, readdir, releasedir, fsyncdir
spaces       KV-cache spaces: what the others do about their directories and blocks
xattrs       setxattr, getxattr, listxattr, removexattr, and the virtual user.kvfs.*
"""

from __future__ import annotations

from kvfs.fuse.operations.attributes import AttributeOperations
from kvfs.fuse.operations.directories import DirectoryOperations
from kvfs.fuse.operations.entries import EntryOperations
from kvfs.fuse.operations.files import FileOperations
from kvfs.fuse.operations.xattrs import XattrOperations

__all__ = ["FileSystem"]


class FileSystem(AttributeOperations, EntryOperations, FileOperations, DirectoryOperations, XattrOperations):
    """Every operation of a mount. Errors are KvfsError; each call ends within the client's deadline."""
