"""Entry point of the `kvfs` script. Imports nothing heavy before Ctrl-C is taken care of: an interrupt at any moment is no traceback."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are imported, end without a word
    from kvfs.cli.commands import cli
    from kvfs.cli.context import guarded

    signal.signal(signal.SIGINT, handler)
    guarded(cli)(prog_name="kvfs")


if __name__ == "__main__":
    main()
