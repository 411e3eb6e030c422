"""When the journal moves into the index and when the engine syncs by itself: in a thread, or in the call that reaches a limit (simulation). The
thread also sees when nothing happens, and gives then back to the disk what was kept for the next writes.

Invariant: writers cannot run away from the upkeep: past several times the limit they do it themselves, and so wait for it.
"""

from __future__ import annotations

import threading

from kvfs.storage.engine.ledger import Ledger


class Upkeep:
    def __init__(self, ledger: Ledger, *, background: bool) -> None:
        self._ledger = ledger
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="kvfs-engine-upkeep", daemon=True)
            self._thread.start()

    def after_change(self) -> None:
        """Not locked. Called after every change."""
        ledger = self._ledger
        if ledger.wants_checkpoint() or ledger.wants_sync() or ledger.wants_release():
            if self._thread is None or ledger.backlogged():
                ledger.maintain()
            else:
                self._wake.set()

    def _run(self) -> None:
        seen = -1
        while True:
            woken = self._wake.wait(self._ledger.config.rest_s)
            self._wake.clear()
            if self._stopping:
                return
            if woken:
                self._ledger.maintain()
            else:
                seen = self._ledger.rest(seen)

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
