"""`kvfs admin`: lists of nodes, chains, targets and clients, by the names that 3FS's operators know."""

from __future__ import annotations

from typing import Any

import click

from kvfs.cli.admin_drain import drain
from kvfs.cli.admin_loss import accept_loss
from kvfs.cli.admin_scrub import scrub
from kvfs.cli.context import Options, common_options, console, human_bytes, print_json, table
from kvfs.cli.manager_calls import ask, routing_of
from kvfs.cli.status import describe_chains, describe_client, describe_node, describe_target
from kvfs.common.wire import base_pb2, cluster_pb2


@click.group()
def admin() -> None:
    """Nodes, chains, targets, clients."""


admin.add_command(scrub)
admin.add_command(drain)
admin.add_command(accept_loss)


def show(options: Options, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Rows as JSON, or as a table of {heading: key}; keys that end in _bytes are printed for people."""
    if options.as_json:
        print_json(rows)
        return
    made = table(*columns, right=tuple(heading for heading, key in columns.items() if key.endswith("_bytes")))
    for row in rows:
        made.add_row(*(human_bytes(row[key]) if key.endswith("_bytes") else str(row[key]) for key in columns.values()))
    console.print(made)


@admin.command("list-nodes")
@common_options
def list_nodes(options: Options) -> None:
    """Registered services."""
    rows = [describe_node(node) for node in routing_of(options).nodes]
    show(options, rows, {"node": "node_id", "role": "role", "state": "state", "pid": "pid", "host": "hostname", "address": "address"})


@admin.command("list-chains")
@common_options
def list_chains(options: Options) -> None:
    """Chains with their targets, head first."""
    rows = describe_chains(routing_of(options))
    if options.as_json:
        print_json(rows)
        return
    show(
        options,
        [row | {"text": "  ".join(f"{t['id']}:{t['state']}" for t in row["targets"])} for row in rows],
        {"chain": "id", "version": "version", "targets": "text"},
    )


@admin.command("list-targets")
@common_options
def list_targets(options: Options) -> None:
    """Targets with their states and space."""
    rows = [describe_target(target) for target in routing_of(options).targets]
    columns = {
        "target": "id",
        "node": "node",
        "disk": "disk",
        "chain": "chain",
        "state": "state",
        "local": "local_state",
        "used": "used_bytes",
        "free": "free_bytes",
    }
    show(options, rows, columns)


@admin.command("list-clients")
@common_options
def list_clients(options: Options) -> None:
    """Mounts and native clients that are alive."""
    rows = [describe_client(client) for client in ask(options, "ListClients", base_pb2.Empty()).clients]
    show(options, rows, {"client": "id", "role": "role", "host": "hostname", "pid": "pid", "what": "description"})


@admin.command("create-chains")
@click.option("--replicas", type=click.IntRange(1, 5), default=3, help="Copies of each chunk.")
@click.option("--nodes", type=click.IntRange(1, 4096), required=True, help="Storage services that must be alive: waits for them.")
@click.option("--table", "table_id", type=click.IntRange(1, 65535), default=1, help="Number of the chain table; new files use table 1.")
@click.option("--targets-per-disk", type=click.IntRange(0, 1024), default=0, help="0: chosen so that load spreads evenly.")
@common_options
def create_chains(options: Options, replicas: int, nodes: int, table_id: int, targets_per_disk: int) -> None:
    """Make targets on every disk and balanced chains over them. `kvfs up` does this by itself; a table that exists is left as it is."""
    request = cluster_pb2.CreateTargetsRequest(
        table_id=table_id, replicas=replicas, targets_per_disk=targets_per_disk, expected_nodes=nodes, description="kvfs admin create-chains"
    )
    reply = ask(options, "CreateTargets", request)
    found = {
        "table": reply.table.table_id,
        "replicas": reply.table.replicas,
        "chains": list(reply.table.chain_ids),
        "worst_pair_chains": reply.worst_pair_chains,
        "best_pair_chains": reply.best_pair_chains,
    }
    if options.as_json:
        print_json(found)
    else:
        console.print(f"table {found['table']}: {len(found['chains'])} chains of {found['replicas']} replicas")
        console.print(f"two disks share {found['best_pair_chains']} to {found['worst_pair_chains']} chains")
