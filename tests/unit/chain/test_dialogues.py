"""Golden dialogues: each *.txt here is a story of one chain. Lines with "> " are what happens to the chain, the indented lines are what it does.

    > chain 2 A B C?            a chain version; A serving, C syncing (~ waiting, ! offline, * lastsrv); "@AB": only these learn of it
    > write A c1 hello #x.1     a client's update arrives at A; #client.number is its tag, +5 an offset, "old" a chain version that was, e.g. =1
    > truncate A c1 3 / remove A c1 %7 (turn 7 of a truncation) / create A c1 hello #x.1 / read A c1
    > run / deliver N / lose N / again N        messages: all; the Nth under way (from 1); lost; delivered, and once more later
    > hold A / release A        A's disk works no more / does what has come up
    > fail A NoSpace / flip A   A's next write to disk fails so, or goes wrong unnoticed
    > spoil A c1               a bit turns in the pending version that A has of c1
    > kill A / restart A / break A B / resume / give-up
    > show                      what is on the disks

KVFS_GOLDEN=write rewrites the answers: look at the difference before you believe it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from chain_world import Change, World

from kvfs.common import errors
from kvfs.storage.chain.messages import TagKey
from kvfs.storage.chain.view import PublicState
from kvfs.storage.engine.requests import UpdateKind

HERE = Path(__file__).parent
MARKS = {"?": PublicState.SYNCING, "~": PublicState.WAITING, "!": PublicState.OFFLINE, "*": PublicState.LASTSRV}


def states(words: list[str]) -> tuple[list[tuple[str, PublicState]], str]:
    members, only = [], ""
    for word in words:
        if word.startswith("@"):
            only = word[1:]
        else:
            members.append((word[0], MARKS.get(word[1:], PublicState.SERVING)))
    return members, only


def update(world: World, kind: UpdateKind, words: list[str]) -> None:
    name, chunk, *rest = words
    change = Change(kind)
    version = None
    for word in rest:
        if word.startswith("#"):
            client, _, number = word[1:].partition(".")
            change.tag = TagKey(client.encode(), 0, int(number))
        elif word.startswith("+"):
            change.offset = int(word)
        elif word.startswith("%"):
            change.turn = int(word[1:])
        elif word.startswith("="):
            version = int(word[1:])
        else:
            change.data = b"t" * int(word) if kind is UpdateKind.TRUNCATE else word.encode()
    world.update(name, chunk.encode(), change, version=version)


def show(world: World) -> None:
    for name, node in world.nodes.items():
        chunks = [f"{chunk.decode()} v{version} {data.decode()}" for chunk, (version, data) in sorted(node.disk.chunks.items())]
        for chunk, pending in sorted(node.disk.pending.items()):
            chunks.append(f"{chunk.decode()} pending v{pending.version} {'removed' if pending.removes else pending.data.decode()}")
        world.say(f"{name}: {', '.join(chunks) or 'nothing'}")


def do(world: World, line: str) -> None:
    command, *words = line.split()
    number = int(words[0]) - 1 if words and words[0].isdecimal() else 0
    if command == "chain":
        world.chain(int(words[0]), *states(words[1:]))
    elif command in ("write", "truncate", "remove", "create"):
        update(world, UpdateKind[command.upper()], words)
    elif command == "read":
        world.read(words[0], words[1].encode())
    elif command == "run":
        world.run(limit=100)
    elif command in ("deliver", "lose", "again"):
        world.deliver(number, lose=command == "lose", again=command == "again")
    elif command == "hold":
        world.hold(words[0])
    elif command == "release":
        world.release(words[0])
    elif command == "fail":
        world.nodes[words[0]].disk.fail_next = getattr(errors, words[1])("planted")
    elif command == "flip":
        world.nodes[words[0]].disk.flip_next = True
    elif command == "spoil":
        world.nodes[words[0]].disk.pending[words[1].encode()].spoiled = True
    elif command == "kill":
        world.kill(words[0])
    elif command == "restart":
        world.restart(words[0])
    elif command == "break":
        world.break_connection(*words)
    elif command in ("resume", "give-up"):
        for node in world.nodes.values():
            for flight in list(node.waiting):
                (world.resume if command == "resume" else world.give_up)(node, flight)
    elif command == "show":
        show(world)
    else:
        raise ValueError(f"{line!r} is no command")


def play(text: str) -> str:
    """The script with the answers that it gets now."""
    world: World | None = None
    answer: list[str] = []
    for line in text.splitlines():
        if line.startswith("> "):
            answer.append(line)
            if world is None:
                assert line.startswith("> chain "), "a dialogue begins with its chain"
                world = World("".join(word[0] for word in line.split()[3:]))
            begin = len(world.lines)
            do(world, line[2:])
            answer += [f"    {said}" for said in world.lines[begin:]]
        elif not line.startswith("    "):
            answer.append(line)
    return "\n".join(answer) + "\n"


@pytest.mark.parametrize("path", sorted(HERE.glob("*.txt")), ids=lambda path: path.stem)
def test_dialogue(path: Path) -> None:
    text = path.read_text()
    found = play(text)
    if os.environ.get("KVFS_GOLDEN") == "write":
        path.write_text(found)
    assert found == text
