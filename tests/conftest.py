"""What holds for every suite: hypothesis has no deadlines, as the machines that run these tests are shared."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")
