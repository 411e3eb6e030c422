"""Counters on their way to vLLM's metrics."""

from __future__ import annotations


class OffloadingConnectorStats:
    def __init__(self) -> None:
        self._values: dict[str, dict[tuple[str, ...], float]] = {}

    def increase_counter(self, counter_name: str, counter_increase_value: float = 1, labelvalues: tuple[str, ...] = ()) -> None:
        values = self._values.setdefault(counter_name, {})
        values[labelvalues] = values.get(labelvalues, 0) + counter_increase_value

    def is_empty(self) -> bool:
        return not self._values
