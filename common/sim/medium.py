"""What a simulated disk keeps: pages of files, names of folders, maps, and which of them a loss of power would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sortedcontainers import SortedDict

from kvfs.common.boundary.random import Random

if TYPE_CHECKING:
    from kvfs.common.sim.disk import SimDisk

PAGE_BYTES: Final = 4096


class Content:
    """A file's pages; a page that is missing reads as zeros."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}
        self.reserved: set[int] = set()
        self.size = 0
        self.durable_pages: dict[int, bytes] = {}
        self.durable_size = 0
        self.dirty: set[int] = set()

    def put(self, page: int, data: bytes | None) -> None:
        if data is None:
            self.pages.pop(page, None)
        else:
            self.pages[page] = data
        self.dirty.add(page)

    def sync(self) -> None:
        for page in self.dirty:
            if page in self.pages:
                self.durable_pages[page] = self.pages[page]
            else:
                self.durable_pages.pop(page, None)
        self.dirty.clear()
        self.durable_size = self.size

    def crash(self, random: Random | None) -> None:
        if random is not None and self.dirty:
            for page in sorted(self.dirty):
                if random.randrange(2):
                    if page in self.pages:
                        self.durable_pages[page] = self.pages[page]
                    else:
                        self.durable_pages.pop(page, None)
            if random.randrange(2):
                self.durable_size = self.size
        self.size = self.durable_size
        last = -(-self.size // PAGE_BYTES)
        self.durable_pages = {page: data for page, data in self.durable_pages.items() if page < last}
        if self.size % PAGE_BYTES and last - 1 in self.durable_pages:
            kept = self.durable_pages[last - 1][: self.size % PAGE_BYTES]
            self.durable_pages[last - 1] = kept + bytes(PAGE_BYTES - len(kept))
        self.pages = dict(self.durable_pages)
        self.reserved = {page for page in self.reserved if page < last}
        self.dirty.clear()


class Folder:
    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.durable: dict[str, Any] = {}
        self.changes: list[dict[str, Any | None]] = []

    def change(self, names: dict[str, Any | None]) -> None:
        """One atomic change: None removes."""
        self.changes.append(names)
        _apply(self.names, names)

    def sync(self) -> None:
        self.durable = dict(self.names)
        self.changes.clear()

    def crash(self, random: Random | None) -> None:
        keep = random.randrange(len(self.changes) + 1) if random is not None else 0
        for names in self.changes[:keep]:
            _apply(self.durable, names)
        self.names = dict(self.durable)
        self.changes.clear()
        for entry in self.names.values():
            entry.crash(random)


def _apply(names: dict[str, Any], change: dict[str, Any | None]) -> None:
    for name, entry in change.items():
        if entry is None:
            names.pop(name, None)
        else:
            names[name] = entry


def _has_bytes(entry: Any) -> bool:
    return bool(entry.pages) if isinstance(entry, Content) else isinstance(entry, MapContent) and any(entry.rows.values())


def _flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


class MapContent:
    def __init__(self) -> None:
        self.rows: Any = SortedDict()
        self.open = False

    def crash(self, random: Random | None) -> None:
        self.open = False


class Medium:
    """What outlives a crash."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.root = Folder()
        self.holders: dict[str, SimDisk] = {}
        """Who has locked which directory."""
        self.life = 0

    def flip(self, folder: str, random: Random) -> str:
        """Turn one bit of a file, or of a value of a map, in that folder; where, empty when there is nothing to turn."""
        found: Any = self.root
        for part in folder.split("/"):
            found = found.names.get(part) if isinstance(found, Folder) else None
        entries = sorted(found.names.items()) if isinstance(found, Folder) else []
        files = [(name, entry) for name, entry in entries if _has_bytes(entry)]
        if not files:
            return ""
        name, content = random.choice(files)
        if isinstance(content, MapContent):
            key = random.choice([key for key, value in content.rows.items() if value])
            bit = random.randrange(8 * len(content.rows[key]))
            content.rows[key] = _flipped(content.rows[key], bit)
            return f"{folder}/{name}, row {key.hex()} at {bit // 8}"
        page = random.choice(sorted(content.pages))
        bit = random.randrange(8 * PAGE_BYTES)
        for pages in (content.pages, content.durable_pages):
            if page in pages:
                pages[page] = _flipped(pages[page], bit)
        return f"{folder}/{name} at {page * PAGE_BYTES + bit // 8}"

    def used_bytes(self) -> int:
        total = 0
        folders = [self.root]
        while folders:
            for entry in folders.pop().names.values():
                if isinstance(entry, Folder):
                    folders.append(entry)
                elif isinstance(entry, Content):
                    total += len(entry.pages.keys() | entry.reserved) * PAGE_BYTES
        return total
