"""Values: equal, hashed and copied by their fields, and as cheap to make as ordinary objects."""

from __future__ import annotations

from dataclasses import replace

from kvfs.common.values import value


@value
class Point:
    x: int
    y: int = 2


def test_values_are_compared_hashed_and_copied_by_their_fields() -> None:
    assert Point(1) == Point(1, 2) != Point(1, 3)
    assert {Point(1): "a"}[Point(1, 2)] == "a"
    assert replace(Point(1), y=5) == Point(1, 5)
    assert not hasattr(Point(1), "__dict__")
    assert "__setattr__" not in vars(Point), "what makes frozen dataclasses slow"
