"""A network between processes of one machine that can be cut: a bridge, and a network namespace for each member.

Needs root and `ip` (iproute2); `why_not` says what is missing. A cut is a false neighbour entry: packets leave for a hardware address that nobody
has, so they vanish in silence, as on a broken cable, and connections live on when the cut is mended. It can be one-way. Members are named; "outside"
is this process's own namespace, with an address on the bridge. Names and the subnet carry this process's id, so that suites run side by side;
what an earlier run that was killed left behind is taken away first.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache

OUTSIDE = "outside"
NOBODY = "02:00:00:00:00:01"
NAME = re.compile(r"kvfs-(\d+)-\w+")


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@cache
def why_not() -> str:
    """Why no such network can be made here; '' if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2: apt-get install iproute2"
    try:
        with Network(["probe"]):
            return ""
    except OSError as error:
        return f"this machine makes no network namespaces: {error}"


class Network:
    def __init__(self, members: Sequence[str]) -> None:
        _tidy()
        self._id = os.getpid()
        self._bridge = f"kvbr{self._id}"
        self._subnet = f"10.{64 + self._id // 250 % 60}.{self._id % 250}"
        self._numbers = {OUTSIDE: 254, **{name: number for number, name in enumerate(members, 1)}}
        self._cuts: set[tuple[str, str]] = set()
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self.address(OUTSIDE)}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for name in members:
                self._add(name)
        except OSError:
            self.close()
            raise

    def _add(self, name: str) -> None:
        namespace, port = self._namespace(name), f"kv{self._id}p{self._numbers[name]}"
        _ip("netns", "add", namespace)
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", port, "master", self._bridge, "up")
        _ip("-n", namespace, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", namespace, "link", "set", device, "up")

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _namespace(self, name: str) -> str:
        return f"kvfs-{self._id}-{name.replace('-', '')}"

    def address(self, name: str) -> str:
        return f"{self._subnet}.{self._numbers[name]}"

    def inside(self, name: str, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` as that member."""
        return ["ip", "netns", "exec", self._namespace(name), *argv]

    def cut(self, one: str, other: str, *, one_way: bool = False) -> None:
        """Nothing that `one` sends arrives at `other` any more, nor the other way round."""
        for sender, receiver in ((one, other),) if one_way else ((one, other), (other, one)):
            self._neighbour(sender, "replace", self.address(receiver), "lladdr", NOBODY, "nud", "permanent")
            self._cuts.add((sender, receiver))

    def mend(self) -> None:
        """All cuts."""
        for sender, receiver in self._cuts:
            self._neighbour(sender, "del", self.address(receiver))
        self._cuts.clear()

    def _neighbour(self, name: str, action: str, address: str, *more: str) -> None:
        where = () if name == OUTSIDE else ("-n", self._namespace(name))
        _ip(*where, "neigh", action, address, *more, "dev", self._bridge if name == OUTSIDE else "eth0")

    def close(self) -> None:
        for name in self._numbers:
            if name != OUTSIDE:
                _ip("netns", "del", self._namespace(name), check=False)
                _ip("link", "del", f"kv{self._id}p{self._numbers[name]}", check=False)
        _ip("link", "del", self._bridge, check=False)


def _tidy() -> None:
    """What runs left behind whose processes are gone."""
    for line in _ip("netns", "list", check=False).splitlines():
        found = NAME.match(line)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            _ip("netns", "del", line.split()[0], check=False)
            _ip("link", "del", f"kvbr{found[1]}", check=False)
