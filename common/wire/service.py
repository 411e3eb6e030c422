"""The table of services and methods, made from the compiled .proto files.

A method's number on the wire is its place in its service; service numbers are given here and never reused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf import message_factory

from kvfs.common.errors import UnknownMethod
from kvfs.common.wire import cluster_pb2, inference_pb2, meta_pb2, storage_pb2

SERVICE_NUMBERS: Final = {"Manager": 1, "Meta": 2, "Storage": 3, "Worker": 4}


@dataclass(frozen=True, slots=True)
class Method:
    service: str
    name: str
    attribute: str
    """Name of the handler's method: Create is create, ListChunks is list_chunks."""
    key: int
    """service number * 256 + method number: the header's field."""
    request: type[Any] = field(repr=False)
    reply: type[Any] = field(repr=False)
    has_bulk: bool = False

    @property
    def full_name(self) -> str:
        return f"{self.service}.{self.name}"


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def table_of(descriptor: Any, number: int) -> dict[str, Method]:
    """Methods of a service descriptor, by name."""
    table = {}
    for place, entry in enumerate(descriptor.methods):
        request = message_factory.GetMessageClass(entry.input_type)
        reply = message_factory.GetMessageClass(entry.output_type)
        bulk = "bulk" in entry.input_type.fields_by_name
        table[entry.name] = Method(descriptor.name, entry.name, _snake(entry.name), number << 8 | place, request, reply, bulk)
    return table


SERVICES: Final[dict[str, dict[str, Method]]] = {
    name: table_of(module.DESCRIPTOR.services_by_name[name], SERVICE_NUMBERS[name])
    for name, module in (("Manager", cluster_pb2), ("Meta", meta_pb2), ("Storage", storage_pb2), ("Worker", inference_pb2))
}
METHODS: Final[dict[int, Method]] = {entry.key: entry for table in SERVICES.values() for entry in table.values()}


def method(service: str, name: str) -> Method:
    """Look it up once, at import: `READ = method("Storage", "Read")`."""
    try:
        return SERVICES[service][name]
    except KeyError:
        raise UnknownMethod(f"there is no method {service}.{name}") from None
