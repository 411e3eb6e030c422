"""The engine against a dict of bytes: random calls, clean restarts and kills; every content, length, version and the space
must agree, and fsck stay clean."""

from __future__ import annotations

from dataclasses import replace

from engine_world import SMALL, LogDisk, cid, content_of, noise, open_engine, remove, replacement, truncate, write
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvfs.storage.engine.requests import Tag, Update

CONFIG = replace(SMALL, overlay_entries=15, journal_bytes=8 << 10, unsynced_bytes=1 << 20, quarantine_bytes=1 << 20, cached_metas=3)
CHUNKS = st.integers(0, 4).map(cid)
UNIT = 32768
PLACES = st.one_of(st.integers(0, 150_000), st.sampled_from([0, UNIT, 2 * UNIT, 65_536, 131_072, 4096]))
LENGTHS = st.one_of(st.integers(1, 80_000), st.sampled_from([1, 4096, UNIT, 2 * UNIT, 65_536]))


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.disk = LogDisk()
        self.engine = open_engine(self.disk, CONFIG)
        self.committed: dict[bytes, tuple[int, bytes]] = {}
        self.pending: dict[bytes, bytes | None] = {}
        """None: a removal."""
        self.tag = 0
        self.seed = 0

    def base(self, chunk: bytes) -> tuple[int, bytes]:
        return self.committed.get(chunk, (0, b""))

    def fresh(self, length: int) -> bytes:
        self.seed += 1
        return noise(self.seed, length)

    def written(self, chunk: bytes, offset: int, length: int, append: bool) -> tuple[Update, bytes]:
        _, old = self.base(chunk)
        data = self.fresh(length)
        if append and len(old) < 900_000:
            offset = len(old)
        grown = old.ljust(offset, b"\0")
        return write(chunk, offset, data), grown[:offset] + data + grown[offset + length :]

    @rule(chunk=CHUNKS, offset=PLACES, length=LENGTHS, append=st.booleans(), direct=st.booleans())
    def write(self, chunk: bytes, offset: int, length: int, append: bool, direct: bool) -> None:
        update, after = self.written(chunk, offset, length, append)
        self.do(update, after, direct)

    @rule(chunk=CHUNKS, length=st.one_of(PLACES, st.just(0)), direct=st.booleans())
    def truncate(self, chunk: bytes, length: int, direct: bool) -> None:
        version, old = self.base(chunk)
        after = old[:length].ljust(length, b"\0")
        self.do(truncate(chunk, length), after if version or length else None, direct)

    @rule(chunk=CHUNKS, direct=st.booleans())
    def remove(self, chunk: bytes, direct: bool) -> None:
        self.do(remove(chunk), None, direct)

    def do(self, update: Update, after: bytes | None, direct: bool) -> None:
        chunk = update.chunk_id
        if not direct:
            self.engine.prepare(update)
            self.pending[chunk] = after
            return
        self.tag += 1
        self.engine.apply(update, 5, Tag(b"m" * 16, 0, self.tag))
        self.pending.pop(chunk, None)
        self.settle(chunk, after)

    def settle(self, chunk: bytes, after: bytes | None) -> None:
        if after is None:
            self.committed.pop(chunk, None)
        else:
            self.committed[chunk] = (self.base(chunk)[0] + 1, after)

    @rule(chunks=st.sets(CHUNKS))
    def commit(self, chunks: set[bytes]) -> None:
        self.engine.commit(sorted(chunks), 6)
        for chunk in chunks & self.pending.keys():
            self.settle(chunk, self.pending.pop(chunk))

    @rule(chunks=st.sets(CHUNKS))
    def drop(self, chunks: set[bytes]) -> None:
        self.engine.drop_pending(sorted(chunks))
        for chunk in chunks:
            self.pending.pop(chunk, None)

    @rule(offset=PLACES, length=LENGTHS)
    def prepare_all(self, offset: int, length: int) -> None:
        made = [self.written(cid(index), offset, length, index % 2 == 0) for index in range(4)]
        self.engine.prepare_many([update for update, _ in made])
        self.pending.update({update.chunk_id: after for update, after in made})

    @rule(chunk=CHUNKS, length=st.one_of(LENGTHS, st.just(0)), version=st.integers(1, 9))
    def replace(self, chunk: bytes, length: int, version: int) -> None:
        data = self.fresh(length)
        self.engine.replace(replacement(chunk, data, version))
        self.pending.pop(chunk, None)
        self.committed[chunk] = (version, data)

    @rule(chunks=st.sets(CHUNKS))
    def resync_removes(self, chunks: set[bytes]) -> None:
        assert self.engine.remove(sorted(chunks)) == len(chunks & (self.committed.keys() | self.pending.keys()))
        for chunk in chunks:
            self.committed.pop(chunk, None)
            self.pending.pop(chunk, None)

    @rule()
    def sync(self) -> None:
        self.engine.sync()

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        if clean:
            self.engine.close()
        self.engine = open_engine(self.disk, CONFIG)

    @invariant()
    def contents_agree(self) -> None:
        for index in range(5):
            chunk = cid(index)
            meta = self.engine.get(chunk)
            version, data = self.base(chunk)
            assert (meta.version if meta else 0) == version
            assert content_of(self.engine, chunk) == (data if version else None)
            assert (meta.pending is not None if meta else False) == (chunk in self.pending)
            if self.pending.get(chunk) is not None:
                assert content_of(self.engine, chunk, version=version + 1) == self.pending[chunk]

    @invariant()
    def the_rest_agrees(self) -> None:
        assert [meta.chunk_id for meta in self.engine.list()[0]] == sorted(self.committed.keys() | self.pending.keys())
        filled = [chunk for chunk, (_, data) in sorted(self.committed.items()) if data]
        last = self.engine.last_chunk(5)
        assert (last.chunks if last else 0) == len(filled)
        if last:
            assert cid(last.index) == filled[-1] and last.length == len(self.committed[filled[-1]][1])
        tag = self.engine.tag(b"m" * 16, 0)
        assert (tag.sequence if tag else 0) == self.tag
        metas, _ = self.engine.list()
        assert self.engine.space().used_bytes == sum(meta.allocated_bytes for meta in metas)
        report = self.engine.check(read_data=True)
        assert not report.problems, report.problems


EngineMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestEngine = EngineMachine.TestCase
