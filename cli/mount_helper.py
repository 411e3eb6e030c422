"""`mount.kvfs SPEC DIR [-sfnv] [-o OPTIONS]`: what mount(8) calls for an fstab line of type kvfs.

    meta1:7001,meta2:7001   /mnt/kvfs  kvfs  _netdev,nofail,allow_other  0 0
    /srv/kvfs               /mnt/kvfs  kvfs  nofail                      0 0

SPEC is manager addresses (a /name behind them is taken for the cluster's name and ignored) or a directory made by `kvfs up`.
Returns after the mount is visible. Exit status as in mount(8): 0 done, 1 wrong usage, 32 the mount failed.
"""

from __future__ import annotations

import os
import sys

from kvfs.cli.children import kvfs_argv
from kvfs.cli.context import report
from kvfs.cli.mount import check_mount_point, start_detached

USAGE = 1
FAILED = 32


def parse(arguments: list[str]) -> tuple[str, str, str, bool] | None:
    """(spec, directory, options, fake), or None for wrong usage. -s -n -v change nothing here; -f asks for a dry run."""
    places: list[str] = []
    options: list[str] = []
    fake = False
    rest = iter(arguments)
    for argument in rest:
        if argument == "-o" or (argument == "-t"):
            value = next(rest, None)
            if value is None:
                return None
            if argument == "-o":
                options.append(value)
        elif argument.startswith("-o"):
            options.append(argument[2:])
        elif argument.startswith("-"):
            if set(argument[1:]) - set("sfnvw"):
                return None
            fake = fake or "f" in argument
        else:
            places.append(argument)
    return (places[0], places[1], ",".join(options), fake) if len(places) == 2 else None


def main() -> None:
    parsed = parse(sys.argv[1:])
    if parsed is None:
        print("usage: mount.kvfs SPEC DIR [-sfnv] [-o OPTIONS]", file=sys.stderr)
        sys.exit(USAGE)
    spec, directory, options, fake = parsed
    if not spec.startswith("/"):
        spec = spec.split("/", 1)[0] if "://" not in spec else spec
    path = os.path.abspath(directory)
    try:
        check_mount_point(path)
        if not fake:
            start_detached(kvfs_argv("mount", path, "--foreground", "--cluster", spec, *(["-o", options] if options else [])), path)
    except Exception as error:
        report(error)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
