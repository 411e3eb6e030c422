"""Every test of the namespace gets a fresh tree and ends with a check of the metadata."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.meta.namespace.tree import Tree


@pytest.fixture
def tree() -> Iterator[Tree]:
    made = Tree()
    yield made
    assert made.problems() == []
