"""The file patterns of the engines' plain file backends on a mount: SGLang's `file`, vLLM's `fs`, LMCache's `fs://`."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest

BLOCK = 1 << 20


def page_aligned(content: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    return memory


def store(path: Path, content: mmap.mmap, flags: int) -> None:
    """As vLLM's tier does it: a temporary file of its own, one write, a rename over whatever is there."""
    temporary = path.with_name(f"{path.name}_{threading.get_ident()}.tmp")
    fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_TRUNC | flags, 0o644)
    try:
        assert os.write(fd, content) == len(content)
    finally:
        os.close(fd)
    os.replace(temporary, path)


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_blocks_are_written_beside_and_renamed_into_place(pair: tuple[Path, Path], flags: int) -> None:
    here, there = pair
    folder = here / "model_0123456789ab_r0" / "abc" / "de_g0"
    os.makedirs(folder, exist_ok=True)
    os.makedirs(folder, exist_ok=True)
    contents = [os.urandom(BLOCK) for _ in range(8)]
    for number, content in enumerate(contents):
        assert not os.access(folder / f"{number}.bin", os.F_OK)
        store(folder / f"{number}.bin", page_aligned(content), flags)
    other = there / folder.relative_to(here)
    assert sorted(os.listdir(other)) == [f"{number}.bin" for number in range(8)], "no temporary file is left, on either mount"
    for number, content in enumerate(contents):
        fd = os.open(other / f"{number}.bin", os.O_RDONLY | flags)
        try:
            into = mmap.mmap(-1, BLOCK)
            assert os.readv(fd, [into]) == BLOCK and into[:] == content
        finally:
            os.close(fd)
    with pytest.raises(FileNotFoundError):
        os.open(other / "8.bin", os.O_RDONLY | flags)


def test_two_writers_of_one_block_and_readers_never_see_half_of_it(pair: tuple[Path, Path]) -> None:
    contents = [bytes([number]) * BLOCK for number in range(2)]
    seen: list[bytes] = []
    stop = threading.Event()

    def write(mount: Path, content: bytes) -> None:
        for _ in range(10):
            store(mount / "block.bin", page_aligned(content), 0)

    def read(mount: Path) -> None:
        while not stop.is_set():
            try:
                with open(mount / "block.bin", "rb", buffering=0) as file:
                    into = bytearray(BLOCK)
                    assert file.readinto(into) == BLOCK
                    seen.append(bytes(into[:1]) + bytes(into[-1:]))
                    assert into.count(into[0]) == BLOCK
            except FileNotFoundError:
                pass

    failures: list[BaseException] = []

    def guarded(function: object, *arguments: object) -> None:
        try:
            function(*arguments)  # type: ignore[operator]
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=guarded, args=(write, mount, content)) for mount, content in zip(pair, contents, strict=True)]
    readers = [threading.Thread(target=guarded, args=(read, mount)) for mount in pair]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not failures and seen


def test_short_files_are_noticed_and_removed(work: Path) -> None:
    (work / "cut.bin").write_bytes(b"x" * 1000)
    fd = os.open(work / "cut.bin", os.O_RDONLY)
    assert os.readv(fd, [bytearray(BLOCK)]) == 1000
    os.close(fd)
    os.remove(work / "cut.bin")
    assert os.listdir(work) == [] and not os.path.isfile(work / "cut.bin")


def test_sglang_s_and_lmcache_s_way(work: Path) -> None:
    """tofile, replace, isfile, readinto, glob, remove; a header and a body written apart."""
    key = "deepseek-ai-SEP-DeepSeek-V3@8@0@1f2e@bfloat16.data"
    with open(work / f".{key}.tmp", "wb") as file:
        file.write(b"h" * 28)
        file.write(b"b" * BLOCK)
    os.replace(work / f".{key}.tmp", work / key)
    assert os.path.isfile(work / key) and [path.name for path in work.glob("*.data")] == [key]
    with open(work / key, "rb", buffering=0) as file:
        header, body = bytearray(28), bytearray(BLOCK)
        assert (file.readinto(header), file.readinto(body), file.readinto(bytearray(1))) == (28, BLOCK, 0)
    assert header == b"h" * 28 and body == b"b" * BLOCK
    for name in os.listdir(work):
        os.remove(work / name)
    assert os.listdir(work) == []
