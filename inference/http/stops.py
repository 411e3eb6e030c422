"""Stop strings: where an answer ends because its text says so, wherever tokens begin and end.

Owns `StopStrings`. Invariants: what comes out does not depend on how the text was cut into pieces; nothing of a stop string comes out, and nothing
after it; text is held back only while it may still become one. Of several, the one that is complete first ends the answer; of two that are complete
at once, the longer.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What is certain now. Nothing, once a stop string was found."""
        if self.found:
            return ""
        self._held += text
        ends = [(begin + len(stop), begin) for stop in self._stops if (begin := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            _, begin = min(ends)
            certain, self._held = self._held[:begin], ""
            return certain
        keep = max((self._beginning_of(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self) -> str:
        """The answer is over: what was held back is no stop string."""
        rest, self._held = self._held, ""
        return rest

    def _beginning_of(self, stop: str) -> int:
        """Characters at the end of the text that the stop string begins with."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
