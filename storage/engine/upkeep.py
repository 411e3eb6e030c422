"""When the journal moves into the index and when the engine syncs by itself: in a thread, or in the call that reaches a limit (simulation). The
thread also gives back to the disk what KV-cache blocks left behind, once a second while they do, and sees when nothing happens: then also what was
kept for the next writes.

Invariant: writers cannot run away from the upkeep: past several times the limit they do it themselves, and so wait for it.
"""

from __future__ import annotations

import threading

from kvfs.common.boundary.clock import Clock
from kvfs.storage.engine.ledger import Ledger

TIDY_S = 1.0


class Upkeep:
    def __init__(self, ledger: Ledger, clock: Clock, *, background: bool) -> None:
        self._ledger = ledger
        self._clock = clock
        self._wake = threading.Event()
        self._stopping = False
        self._tidying = False
        """The thread knows that there is something to tidy."""
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
        elif ledger.allocator.untidy and not self._tidying and self._thread is not None:
            self._tidying = True
            self._wake.set()

    def _run(self) -> None:
        seen = -1
        tidied_s = self._clock.monotonic()
        while True:
            self._tidying = self._tidying or self._ledger.allocator.untidy
            woken = self._wake.wait(TIDY_S if self._tidying else self._ledger.config.rest_s)
            self._wake.clear()
            if self._stopping:
                return
            if woken:
                self._ledger.maintain()
            elif not self._tidying:
                seen = self._ledger.rest(seen)
            if self._tidying and self._clock.monotonic() >= tidied_s + TIDY_S:
                self._tidying = False  # before: what comes in from now on says so again
                self._ledger.tidy()
                tidied_s = self._clock.monotonic()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
