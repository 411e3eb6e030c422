"""Supplementary groups of the process that made a system call: read from /proc, only when a decision hangs on them.

The kernel sends uid, gid and pid with a request, not the groups. With default_permissions it has checked them itself, so a request is first made
without.
"""

from __future__ import annotations


def supplementary_groups(pid: int) -> tuple[int, ...]:
    """Empty when the process is gone or lives in another pid namespace (pid 0): then the primary group must do."""
    if pid <= 0:
        return ()
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                if line.startswith(b"Groups:"):
                    return tuple(int(word) for word in line.split()[1:])
    except (OSError, ValueError):
        pass
    return ()
