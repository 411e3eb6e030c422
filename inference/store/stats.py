"""What a store of prefixes has done, for metrics. Plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StoreStats:
    lookups: int = 0
    """Pages asked for."""
    found: int = 0
    """Pages found, from the start of the prompt without a gap."""
    declined: int = 0
    """Pages that were there and not read, as computing them takes less time."""
    read_pages: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0
    """While pages were under way, prompt by prompt: those that came and those that did not."""
    failed_reads: int = 0
    """Prompts whose pages did not come whole and in time: they were computed."""
    written_pages: int = 0
    written_bytes: int = 0
    present_pages: int = 0
    """Another worker had stored them already."""
    refused_pages: int = 0
    """Storage did not take them."""
    dropped_pages: int = 0
    """Not even tried: too much was waiting to be written."""
    waiting_bytes: int = 0
    """To be written now."""
