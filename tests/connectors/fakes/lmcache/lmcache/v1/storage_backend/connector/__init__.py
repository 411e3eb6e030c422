"""LMCache's side of a remote connector (0.5.6), for machines without LMCache."""

from __future__ import annotations


class ConnectorAdapter:
    def __init__(self, schema: str = "") -> None:
        self.schema = schema

    def can_parse(self, url: str) -> bool:
        return self.schema != "" and url.startswith(self.schema)
