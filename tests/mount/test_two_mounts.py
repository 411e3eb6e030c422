"""Two mounts of one cluster: names at once, data after close or fsync, appends that never overlap, locks on nothing."""

from __future__ import annotations

import mmap
import os
import random
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

MIB = 1 << 20
Pair = tuple[Path, Path]


def test_creations_removals_and_renames_are_seen_at_once(pair: Pair) -> None:
    one, two = pair
    for number in range(100):
        name = f"n{number}"
        assert not (two / name).exists()
        (one / name).touch()
        assert (two / name).exists() and name in os.listdir(two)
        os.rename(two / name, two / f"{name}-moved")
        assert not (one / name).exists() and (one / f"{name}-moved").exists()
        (one / f"{name}-moved").unlink()
        assert not (two / f"{name}-moved").exists() and os.listdir(two) == []


def test_directories_too(pair: Pair) -> None:
    one, two = pair
    (one / "d").mkdir()
    (two / "d" / "below").mkdir()
    assert os.listdir(one / "d") == ["below"]
    os.rename(one / "d", one / "e")
    assert os.listdir(two) == ["e"] and os.listdir(two / "e") == ["below"]
    with pytest.raises(OSError):
        (two / "e").rmdir()
    (one / "e" / "below").rmdir()
    (two / "e").rmdir()
    assert not (one / "e").exists()


def test_replacement_by_rename(pair: Pair) -> None:
    one, two = pair
    for number in range(50):
        (one / "new").write_bytes(b"%d" % number)
        os.replace(one / "new", one / "current")
        assert (two / "current").read_bytes() == b"%d" % number


def test_data_after_close(pair: Pair) -> None:
    one, two = pair
    for size in (1, 4095, 4096, 100_000, MIB, MIB + 1, 5 * MIB + 333):
        data = os.urandom(size)
        (one / "f").write_bytes(data)
        assert (two / "f").stat().st_size == size
        assert (two / "f").read_bytes() == data
        back = os.urandom(size // 2 + 1)
        (two / "f").write_bytes(back)
        assert (one / "f").read_bytes() == back


def test_data_after_fsync_while_both_have_it_open(pair: Pair) -> None:
    one, two = pair
    (one / "f").write_bytes(bytes(10_000))
    writer, reader = os.open(one / "f", os.O_RDWR), os.open(two / "f", os.O_RDONLY)
    try:
        for number in range(30):
            data = os.urandom(3000)
            os.pwrite(writer, data, number * 100)
            os.fsync(writer)
            assert os.pread(reader, 3000, number * 100) == data
            assert os.fstat(reader).st_size == os.fstat(writer).st_size
    finally:
        os.close(writer)
        os.close(reader)


def test_growth_after_fsync(pair: Pair) -> None:
    one, two = pair
    writer = os.open(one / "f", os.O_CREAT | os.O_WRONLY, 0o644)
    reader = os.open(two / "f", os.O_RDONLY)
    try:
        for number in range(20):
            os.write(writer, b"%08d" % number)
            os.fsync(writer)
            assert os.fstat(reader).st_size == 8 * (number + 1)
            assert os.pread(reader, 8, 8 * number) == b"%08d" % number
    finally:
        os.close(writer)
        os.close(reader)


def test_truncate_is_seen(pair: Pair) -> None:
    one, two = pair
    (one / "f").write_bytes(b"x" * 3 * MIB)
    assert (two / "f").read_bytes() == b"x" * 3 * MIB
    os.truncate(one / "f", 100)
    assert (two / "f").read_bytes() == b"x" * 100
    os.truncate(two / "f", 2 * MIB)
    assert (one / "f").read_bytes() == b"x" * 100 + bytes(2 * MIB - 100)


def test_cached_pages_do_not_outlive_a_change(pair: Pair) -> None:
    """Read until the kernel has it cached, change it elsewhere, read again: through a new open, an old descriptor and a mapping."""
    one, two = pair
    for number in range(10):
        old, new = os.urandom(300_000), os.urandom(300_000)
        (one / "f").write_bytes(old)
        fd = os.open(two / "f", os.O_RDONLY)
        mapping = mmap.mmap(fd, 300_000, mmap.MAP_SHARED, mmap.PROT_READ)
        assert (two / "f").read_bytes() == old == mapping[:]
        with open(one / "f", "r+b") as file:
            file.write(new)
        assert (two / "f").read_bytes() == new, f"round {number}: new open"
        assert os.pread(fd, 300_000, 0) == new, f"round {number}: old descriptor"
        assert mapping[:] == new, f"round {number}: mapping"
        mapping.close()
        os.close(fd)


def test_attributes_are_seen(pair: Pair) -> None:
    one, two = pair
    (one / "f").touch()
    for number in range(20):
        os.chmod(one / "f", 0o600 + number)
        assert (two / "f").stat().st_mode & 0o777 == 0o600 + number
        os.utime(two / "f", ns=(number, number * 1000))
        assert (one / "f").stat().st_mtime_ns == number * 1000
        os.chown(one / "f", number, number)
        assert ((two / "f").stat().st_uid, (two / "f").stat().st_gid) == (number, number)
    os.setxattr(one / "f", "user.a", b"1")
    assert os.getxattr(two / "f", "user.a") == b"1"
    os.link(one / "f", one / "g")
    assert (two / "f").stat().st_nlink == 2


def test_file_removed_on_one_stays_readable_on_the_other(pair: Pair) -> None:
    one, two = pair
    (one / "f").write_bytes(b"still here" * 1000)
    reader, writer = os.open(two / "f", os.O_RDONLY), os.open(two / "f", os.O_RDWR)
    (one / "f").unlink()
    assert not (two / "f").exists()
    time.sleep(1.5)
    assert os.pread(reader, 10, 0) == b"still here"
    os.pwrite(writer, b"NEW", 0)
    os.fsync(writer)
    assert os.pread(reader, 10, 0) == b"NEWll here"
    os.close(reader)
    os.close(writer)


APPENDER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
for number in range(int(sys.argv[3])):
    record = f"{sys.argv[2]}:{number:06d}:" + "x" * (number % 200)
    os.write(fd, (record + "\\n").encode())
os.close(fd)
"""


def test_append_across_mounts_loses_nothing(pair: Pair) -> None:
    one, two = pair
    (one / "log").touch()
    count = 150
    writers = [subprocess.Popen([sys.executable, "-S", "-c", APPENDER, str(pair[i % 2] / "log"), f"w{i}", str(count)]) for i in range(4)]
    for writer in writers:
        assert writer.wait(120) == 0
    for path in (one / "log", two / "log"):
        lines = path.read_text().splitlines()
        assert len(lines) == 4 * count
        for i in range(4):
            mine = [line for line in lines if line.startswith(f"w{i}:")]
            assert mine == [f"w{i}:{number:06d}:" + "x" * (number % 200) for number in range(count)]


def test_exclusive_creation_has_one_winner(pair: Pair) -> None:
    for number in range(30):
        won: list[int] = []

        def race(which: int, number: int = number, won: list[int] = won) -> None:
            try:
                os.close(os.open(pair[which % 2] / f"lock{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                won.append(which)
            except FileExistsError:
                pass

        threads = [threading.Thread(target=race, args=(which,)) for which in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(won) == 1


def test_writers_at_disjoint_offsets(pair: Pair) -> None:
    """Sixteen threads over both mounts, interleaved ranges of one file."""
    piece, rounds = 70_000, 6
    (pair[0] / "shared").touch()
    blocks = {(which, turn): os.urandom(piece) for which in range(16) for turn in range(rounds)}
    errors: list[BaseException] = []

    def write(which: int) -> None:
        try:
            fd = os.open(pair[which % 2] / "shared", os.O_WRONLY)
            for turn in range(rounds):
                os.pwrite(fd, blocks[which, turn], (turn * 16 + which) * piece)
            os.close(fd)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(which,)) for which in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    expected = b"".join(blocks[which, turn] for turn in range(rounds) for which in range(16))
    assert (pair[0] / "shared").read_bytes() == expected
    assert (pair[1] / "shared").read_bytes() == expected


def test_many_workers_in_one_directory_always_see_the_truth(pair: Pair) -> None:
    """Each worker owns a few names, changes them through either mount, and asks both after every change: what is cached of the directory by the one
    or the other, while all the rest of it changes, must never answer for what was."""
    errors: list[BaseException] = []

    def work(which: int) -> None:
        dice = random.Random(which)
        exists: dict[str, int] = {}
        try:
            for turn in range(60):
                changer, name, other = dice.choice(pair), f"w{which}-{dice.randrange(3)}", f"w{which}-{dice.randrange(3)}"
                if name not in exists:
                    if dice.random() < 0.3:
                        (changer / name).mkdir()
                        exists[name] = -1
                    else:
                        (changer / name).write_bytes(b"x" * turn)
                        exists[name] = turn
                elif dice.random() < 0.4 and other not in exists:
                    os.rename(changer / name, changer / other)
                    exists[other] = exists.pop(name)
                elif exists[name] < 0:
                    (changer / name).rmdir()
                    del exists[name]
                elif dice.random() < 0.5:
                    (changer / name).unlink()
                    del exists[name]
                else:
                    (changer / name).write_bytes(b"y" * turn)
                    exists[name] = turn
                for asked in (name, other):
                    for mount in pair:
                        found = outcome(mount / asked)
                        expected = exists.get(asked)
                        assert found == expected, f"worker {which} turn {turn}: {mount / asked} is {found}, should be {expected}"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not errors, errors[0]


def outcome(path: Path) -> int | None:
    """None: not there; -1: a directory; else the file's length."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return -1 if stat.S_ISDIR(found.st_mode) else found.st_size


# --- names that the kernel keeps: it has been shown them, and another mount changes what they stand for


@pytest.fixture(params=[0.0, 0.35], ids=["just-seen", "seen-a-while-ago"])
def seen_ago_s(request: pytest.FixtureRequest) -> float:
    """A name that was given to the kernel a moment ago is taken back otherwise than one that has settled."""
    return float(request.param)


def test_kept_name_is_gone_when_another_mount_removes_or_moves_it(pair: Pair, seen_ago_s: float) -> None:
    one, two = pair
    for number in range(6):
        name = f"n{number}"
        (one / name).write_text(name)
        assert (two / name).read_text() == name and (two / name).exists()
        time.sleep(seen_ago_s)
        if number % 2:
            (one / name).unlink()
        else:
            os.rename(one / name, one / f"{name}-moved")
        assert not (two / name).exists()
        assert (two / f"{name}-moved").exists() == (number % 2 == 0)


def test_kept_name_stands_for_the_new_file_after_a_replacement(pair: Pair, seen_ago_s: float) -> None:
    one, two = pair
    (one / "current").write_text("0")
    for number in range(1, 6):
        assert (two / "current").stat().st_size > 0
        time.sleep(seen_ago_s)
        (one / "new").write_text(str(number))
        os.replace(one / "new", one / "current")
        assert (two / "current").read_text() == str(number)
        assert (two / "current").stat().st_ino == (one / "current").stat().st_ino


def test_name_known_to_be_absent_is_there_once_another_mount_makes_it(pair: Pair, seen_ago_s: float) -> None:
    one, two = pair
    for number in range(6):
        name = f"n{number}"
        for _ in range(3):
            assert not (two / name).exists()
        time.sleep(seen_ago_s)
        if number % 2:
            (one / name).mkdir()
        else:
            (one / name).touch()
        assert (two / name).is_dir() == bool(number % 2) and (two / name).exists()


def test_directory_renamed_above_a_kept_path(pair: Pair, seen_ago_s: float) -> None:
    one, two = pair
    (one / "a" / "b" / "c").mkdir(parents=True)
    (one / "a" / "b" / "c" / "f").write_text("deep")
    above = "a"
    for number in range(4):
        assert (two / above / "b" / "c" / "f").read_text() == "deep" and not (two / above / "b" / "none").exists()
        time.sleep(seen_ago_s)
        os.rename(one / above, one / f"r{number}")
        assert not (two / above / "b" / "c" / "f").exists() and not (two / above).exists()
        above = f"r{number}"
        assert (two / above / "b" / "c" / "f").read_text() == "deep"
    os.rename(one / above / "b", one / "b")
    assert (two / "b" / "c" / "f").read_text() == "deep" and not (two / above / "b").exists()


def test_name_that_this_mount_moved_is_taken_back_where_it_is_now(pair: Pair, seen_ago_s: float) -> None:
    """The kernel carries the time for which it keeps a name along when the name moves."""
    one, two = pair
    for directory in ("from", "to"):
        (two / directory).mkdir()
    for number in range(4):
        (two / "from" / "f").touch()
        assert (two / "from" / "f").exists()
        os.rename(two / "from" / "f", two / "to" / "g")
        time.sleep(seen_ago_s)
        if number % 2:
            (one / "to" / "g").unlink()
        else:
            os.rename(one / "to" / "g", one / "elsewhere")
        assert not (two / "to" / "g").exists() and not (two / "from" / "f").exists()


def test_programs_inside_a_directory_stay_there_while_others_change_it(pair: Pair, seen_ago_s: float) -> None:
    one, two = pair
    (one / "d").mkdir()
    (one / "d" / "f").write_text("x")
    with open(two / "d" / "f") as held:
        script = "import os, sys, time\nfor _ in range(20):\n    os.stat('f'); os.stat('.'); print(os.getcwd()); time.sleep(0.1)"
        program = subprocess.Popen([sys.executable, "-S", "-c", script], cwd=two / "d", stdout=subprocess.PIPE, text=True)
        for number in range(3):
            time.sleep(seen_ago_s)
            (one / "d" / f"n{number}").touch()
            (one / f"beside{number}").touch()
            assert (two / "d" / f"n{number}").exists()
        out, _ = program.communicate(timeout=60)
        assert program.returncode == 0 and set(out.split()) == {str(two / "d")}
        assert os.readlink(f"/proc/self/fd/{held.fileno()}") == str(two / "d" / "f")


def test_both_mounts_creating_in_one_directory_do_not_wait_for_leases_to_run_out(pair: Pair) -> None:
    """Each takes names back from the other while its own kernel holds the directory's lock for a creation."""
    for turn in range(3):
        for path in pair:
            os.listdir(path)
            assert not (path / f"none{turn}").exists()
    longest: list[float] = []

    def create(which: int) -> None:
        for number in range(40):
            (pair[1 - which] / f"absent{which}-{number}").exists()
            started = time.monotonic()
            (pair[which] / f"w{which}-{number}").touch()
            longest.append(time.monotonic() - started)

    threads = [threading.Thread(target=create, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(longest) == 80
    assert sorted(longest)[40] < 0.5, "half of the creations took as long as a lease"
    assert set(os.listdir(pair[0])) == set(os.listdir(pair[1])) and len(os.listdir(pair[0])) == 80
