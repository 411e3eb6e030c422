"""Simulated disk: files in memory that forget what was not synced when `crash` is called, as a machine does that loses power.

Durable are: the bytes of a file as of its last `sync`, the names of a folder as of its last `sync_directory`, what `write_file`, `makedirs` and map
commits promise. Of the rest a crash keeps a random part: each 4 KiB page of an unsynced file survives or not by itself (the disk writes in any
order), and of a folder's unsynced name changes the first few survive (a journal keeps their order). With `crash(None)` nothing unsynced survives.

Faults: `hook(operation, name)` is called before every operation and may raise; a KvfsError is an I/O error, anything else (a test's own exception)
stops the writer at that point. A `SimDisk` opened before a crash is dead after it: `reopen` gives the next life.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from kvfs.common.boundary.disk import Disk, DiskFile, OrderedMap
from kvfs.common.boundary.random import Random
from kvfs.common.errors import DirectoryInUse, InputOutput, InvalidArgument, IsDirectory, NoSpace, NotDirectory, NotFound
from kvfs.common.sim.medium import PAGE_BYTES, Content, Folder, MapContent, Medium

_ZEROS: Final = bytes(PAGE_BYTES)


class SimDisk(Disk):
    def __init__(
        self, *, capacity_bytes: int = 1 << 40, hook: Callable[[str, str], None] | None = None, medium: Medium | None = None, inside: str = ""
    ) -> None:
        """`inside`: the folder of the medium that is this directory."""
        self._medium = medium if medium is not None else Medium(capacity_bytes)
        self._inside = inside
        self._life = self._medium.life
        self.hook = hook

    def crash(self, random: Random | None = None) -> None:
        """Power goes. Every handle opened until now is dead."""
        self.kill()
        self._medium.root.crash(random)

    def kill(self) -> None:
        """The process ends: every handle opened until now is dead, what was written stays (in the page cache)."""
        self._medium.life += 1
        self._medium.holders.clear()

    def reopen(self, hook: Callable[[str, str], None] | None = None) -> SimDisk:
        """The same disk, for the next process."""
        return SimDisk(medium=self._medium, hook=hook, inside=self._inside)

    def _enter(self, operation: str, name: str) -> None:
        if self._life != self._medium.life:
            raise InputOutput(f"{operation} {name}: the process that opened this disk is over")
        if self.hook is not None:
            self.hook(operation, name)

    def _folder(self, name: str) -> Folder:
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise InvalidArgument(f"{name!r} is not a name inside this disk")
        folder = self._medium.root
        for part in f"{self._inside}/{name}".split("/"):
            if part in ("", "."):
                continue
            entry = folder.names.get(part)
            if entry is None:
                raise NotFound(f"{name}: no such file or directory")
            if not isinstance(entry, Folder):
                raise NotDirectory(f"{name}: not a directory")
            folder = entry
        return folder

    def _locate(self, name: str) -> tuple[Folder, str]:
        above, last = posixpath.split(name)
        return self._folder(above), last

    def open(self, name: str, *, create: bool = False) -> DiskFile:
        folder, last = self._locate(name)
        self._enter("open", name)
        entry = folder.names.get(last)
        if entry is None:
            if not create:
                raise NotFound(f"open {name}: no such file or directory")
            entry = Content()
            folder.change({last: entry})
        if not isinstance(entry, Content):
            raise IsDirectory(f"open {name}: is a directory")
        return SimFile(self, name, entry)

    def exists(self, name: str) -> bool:
        try:
            folder, last = self._locate(name)
        except (NotFound, NotDirectory):
            return False
        return not last or last in folder.names

    def list(self, name: str = "") -> list[str]:
        self._enter("list", name)
        return sorted(self._folder(name).names)

    def makedirs(self, name: str) -> None:
        self._enter("makedirs", name)
        folder = self._medium.root
        self._folder(posixpath.dirname(name)) if self.exists(posixpath.dirname(name)) else None
        for part in f"{self._inside}/{name}".split("/"):
            if part in ("", "."):
                continue
            if part == "..":
                raise InvalidArgument(f"{name!r} is not a name inside this disk")
            if part not in folder.names:
                made = Folder()
                folder.names[part] = made
                folder.durable[part] = made
            entry = folder.names[part]
            if not isinstance(entry, Folder):
                raise NotDirectory(f"make directory {name}: not a directory")
            folder = entry

    def rename(self, old: str, new: str) -> None:
        (old_folder, old_last), (new_folder, new_last) = self._locate(old), self._locate(new)
        self._enter("rename", old)
        entry = old_folder.names.get(old_last)
        if entry is None:
            raise NotFound(f"rename {old}: no such file or directory")
        if old_folder is new_folder:
            old_folder.change({old_last: None, new_last: entry})
        else:
            new_folder.change({new_last: entry})
            old_folder.change({old_last: None})

    def unlink(self, name: str) -> None:
        folder, last = self._locate(name)
        self._enter("unlink", name)
        entry = folder.names.get(last)
        if entry is None:
            raise NotFound(f"remove {name}: no such file or directory")
        if isinstance(entry, Folder):
            raise IsDirectory(f"remove {name}: is a directory")
        folder.change({last: None})

    def remove_tree(self, name: str) -> None:
        self._enter("remove_tree", name)
        if self.exists(name):
            folder, last = self._locate(name)
            folder.change({last: None})
            folder.sync()

    def sync_directory(self, name: str = "") -> None:
        folder = self._folder(name)
        self._enter("sync_directory", name)
        folder.sync()

    def read_file(self, name: str) -> bytes:
        file = self.open(name)
        data = bytearray(file.size())
        file.read_into([memoryview(data)], 0)
        return bytes(data)

    def write_file(self, name: str, data: bytes) -> None:
        folder, last = self._locate(name)
        self._enter("write_file", name)
        content = Content()
        SimFile(self, name, content)._store(data, 0)
        content.sync()
        folder.change({last: content})
        folder.sync()

    def space(self) -> tuple[int, int]:
        self._enter("space", "")
        return self._medium.capacity_bytes, max(0, self._medium.capacity_bytes - self._medium.used_bytes())

    def lock(self) -> None:
        self._enter("lock", "LOCK")
        if self._medium.holders.setdefault(self._inside, self) is not self:
            raise DirectoryInUse("this disk is open in another process: stop it first, or use another directory")

    def open_map(self, name: str, *, size_bytes: int) -> OrderedMap:
        self.makedirs(name)
        folder = self._folder(name)
        self._enter("open_map", name)
        content = folder.names.get("data")
        if content is None:
            content = MapContent()
            folder.names["data"] = folder.durable["data"] = content
        return SimMap(self, name, content, size_bytes)

    def close(self) -> None:
        if self._medium.holders.get(self._inside) is self:
            del self._medium.holders[self._inside]

    def _reserve(self, pages: int) -> None:
        if self._medium.capacity_bytes < 1 << 40 and pages * PAGE_BYTES > self._medium.capacity_bytes - self._medium.used_bytes():
            raise NoSpace("no space left on this disk")


class SimFile(DiskFile):
    def __init__(self, disk: SimDisk, name: str, content: Content) -> None:
        self._disk = disk
        self._name = name
        self._content = content
        self.cached = True
        """False: try_read_into would block."""

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        self._disk._enter("read", self._name)
        content = self._content
        total = 0
        for buffer in buffers:
            view = buffer.cast("B")
            wanted = min(view.nbytes, content.size - offset)
            if wanted <= 0:
                break
            done = 0
            while done < wanted:
                page, inside = divmod(offset + done, PAGE_BYTES)
                count = min(PAGE_BYTES - inside, wanted - done)
                view[done : done + count] = content.pages.get(page, _ZEROS)[inside : inside + count]
                done += count
            total += wanted
            offset += wanted
        return total

    def try_read_into(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        return self.read_into(buffers, offset) if self.cached else None

    def write(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        self._disk._enter("write", self._name)
        self._store(b"".join(buffers), offset)

    def _store(self, data: bytes, offset: int) -> None:
        content = self._content
        if not data:
            return
        first, last = offset // PAGE_BYTES, (offset + len(data) - 1) // PAGE_BYTES
        new = sum(1 for page in range(first, last + 1) if page not in content.pages and page not in content.reserved)
        if new:
            self._disk._reserve(new)
        done = 0
        while done < len(data):
            page, inside = divmod(offset + done, PAGE_BYTES)
            part = data[done : done + PAGE_BYTES - inside]
            if len(part) < PAGE_BYTES:
                old = content.pages.get(page, _ZEROS)
                content.put(page, old[:inside] + part + old[inside + len(part) :])
            else:
                content.put(page, part)
            done += len(part)
        content.size = max(content.size, offset + len(data))

    def allocate(self, offset: int, length: int) -> None:
        self._disk._enter("allocate", self._name)
        content = self._content
        pages = range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES))
        self._disk._reserve(sum(1 for page in pages if page not in content.pages and page not in content.reserved))
        content.reserved.update(pages)
        content.size = max(content.size, offset + length)

    def punch(self, offset: int, length: int) -> None:
        self._disk._enter("punch", self._name)
        content = self._content
        end = min(offset + length, content.size)
        while offset < end:
            page, inside = divmod(offset, PAGE_BYTES)
            count = min(PAGE_BYTES - inside, end - offset)
            if count == PAGE_BYTES or (inside == 0 and offset + count == content.size):
                content.put(page, None)
                content.reserved.discard(page)
            elif page in content.pages:
                old = content.pages[page]
                content.put(page, old[:inside] + bytes(count) + old[inside + count :])
            offset += count

    def truncate(self, length: int) -> None:
        self._disk._enter("truncate", self._name)
        content = self._content
        if length < content.size:
            last = -(-length // PAGE_BYTES)
            for page in [page for page in content.pages if page >= last]:
                content.put(page, None)
            content.reserved = {page for page in content.reserved if page < last}
            if length % PAGE_BYTES and last - 1 in content.pages:
                kept = content.pages[last - 1][: length % PAGE_BYTES]
                content.put(last - 1, kept + bytes(PAGE_BYTES - len(kept)))
        content.size = length

    def size(self) -> int:
        self._disk._enter("size", self._name)
        return self._content.size

    def sync(self) -> None:
        self._disk._enter("sync", self._name)
        self._content.sync()

    def close(self) -> None:
        """Nothing to free."""


class SimMap(OrderedMap):
    def __init__(self, disk: SimDisk, name: str, content: MapContent, size_bytes: int) -> None:
        self._disk = disk
        self._name = name
        self._rows = content.rows
        self._size_bytes = size_bytes

    def get(self, key: bytes) -> bytes | None:
        self._disk._enter("map_get", self._name)
        found: bytes | None = self._rows.get(key)
        return found

    def range(self, begin: bytes, end: bytes | None, *, limit: int = 0, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        self._disk._enter("map_range", self._name)
        rows: list[tuple[bytes, bytes]] = []
        for key in self._rows.irange(begin, end, inclusive=(True, False), reverse=reverse):
            rows.append((key, self._rows[key]))
            if len(rows) == limit:
                break
        return rows

    def commit(self, writes: Mapping[bytes, bytes | None]) -> None:
        self._disk._enter("map_commit", self._name)
        for key in writes:
            if not 0 < len(key) <= 511:
                raise InvalidArgument(f"a key of {len(key)} bytes")
        for key, value in writes.items():
            if value is None:
                self._rows.pop(key, None)
            else:
                self._rows[key] = bytes(value)

    def check(self) -> Iterator[int]:
        self._disk._enter("map_check", self._name)
        yield 0  # rows in memory are what they are

    def count(self) -> int:
        self._disk._enter("map_count", self._name)
        return len(self._rows)

    def close(self) -> None:
        """Nothing to free."""
