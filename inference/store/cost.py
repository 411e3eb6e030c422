"""Whether pages are read sooner than they are computed, by what both have cost lately.

Owns `Cost`, a core without I/O. Reading n bytes takes latency + n / bandwidth: a line through the readings measured, older ones counting less.
Computing takes seconds a token, from steps that computed prompts. Invariants: without measurements, reading is chosen (it is measured then); what is
not chosen any more is still tried now and then, and a try that goes well is believed at once, so that a store that was slow once is not left for
ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvfs.inference.cache.format import PAGE_TOKENS

DECAY = 0.95
"""How much the measurements so far count after one more."""
STEP_TOKENS_MIN = 32
"""Steps with fewer tokens decode: they tell nothing of prompts."""
TRY_EVERY = 20


@dataclass(slots=True)
class _Line:
    """Least squares, y = base + slope * x, neither negative."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def note(self, x: float, y: float) -> None:
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, getattr(self, name) * DECAY + value)

    def fit(self) -> tuple[float, float]:
        """base, slope; zeros without measurements."""
        if not self.weight:
            return 0.0, 0.0
        through = self.y / self.x if self.x else 0.0
        spread = self.weight * self.xx - self.x * self.x
        slope = (self.weight * self.xy - self.x * self.y) / spread if spread > 1e-9 * self.weight * self.xx else through
        base = (self.y - slope * self.x) / self.weight
        return (base, slope) if slope >= 0 and base >= 0 else (0.0, through)  # noise: the line through the origin and the mean


@dataclass(slots=True)
class Cost:
    page_bytes: int
    _reading: _Line = field(default_factory=_Line)
    _tokens: float = 0.0
    _seconds: float = 0.0
    _declined: int = 0
    _trying: bool = False

    def read(self, pages: int, seconds: float) -> None:
        """So many pages of one prompt came in this time, or had not come."""
        if self._trying and seconds <= self.compute_seconds(pages):
            self._reading = _Line()
        self._trying = False
        self._reading.note(pages * self.page_bytes, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        if tokens >= STEP_TOKENS_MIN:
            self._tokens = self._tokens * DECAY + tokens
            self._seconds = self._seconds * DECAY + seconds

    def read_seconds(self, pages: int) -> float:
        base, slope = self._reading.fit()
        return base + slope * pages * self.page_bytes

    @property
    def page_seconds(self) -> float:
        """What one page more takes to read; 0 as long as nothing was read."""
        return self._reading.fit()[1] * self.page_bytes

    def compute_seconds(self, pages: int) -> float:
        """0 as long as nothing was computed."""
        return pages * PAGE_TOKENS * self._seconds / self._tokens if self._tokens else 0.0

    def worth(self, pages: int) -> int:
        """How many of so many pages to read: all, since one more costs less than the first, or none."""
        if not pages or not self._tokens or not self._reading.weight or self.read_seconds(pages) <= self.compute_seconds(pages):
            return pages
        self._declined += 1
        self._trying = self._declined % TRY_EVERY == 0
        return pages if self._trying else 0
