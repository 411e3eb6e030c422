"""`kvfs status`: one page about a cluster — processes, chains, capacity, clients — or the same as JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click
import trio
from rich.text import Text

from kvfs.cli import cluster_dir, control
from kvfs.cli.context import Options, common_options, console, human_bytes, print_json, table
from kvfs.cli.manager_calls import ManagerCalls, channel_pool, manager_addresses, target_statuses
from kvfs.cli.missing import missing_chains
from kvfs.cli.supervisor import children_of
from kvfs.common.errors import ClusterNotFound, TransportError
from kvfs.common.routing import Routing
from kvfs.common.wire import base_pb2, cluster_pb2, storage_pb2

PUBLIC_STATES = {
    cluster_pb2.SERVING: "serving",
    cluster_pb2.SYNCING: "syncing",
    cluster_pb2.WAITING: "waiting",
    cluster_pb2.LASTSRV: "lastsrv",
    cluster_pb2.PUBLIC_OFFLINE: "offline",
}
LOCAL_STATES = {cluster_pb2.UPTODATE: "up-to-date", cluster_pb2.ONLINE: "online", cluster_pb2.LOCAL_OFFLINE: "offline"}
ROLES = {cluster_pb2.ROLE_MANAGER: "manager", cluster_pb2.ROLE_META: "meta", cluster_pb2.ROLE_STORAGE: "storage"}
GOOD = {"running", "serving", "ready"}


async def collect(managers: Sequence[str], directory: cluster_dir.ClusterDir | None) -> dict[str, Any]:
    """Everything `kvfs status` knows: from the supervisor, if the cluster's directory is here, and from the manager, if it answers."""
    report: dict[str, Any] = {"cluster_id": "", "directory": None, "managers": list(managers), "phase": "unknown", "processes": [], "chains": []}
    report |= {
        "tables": [],
        "clients": [],
        "scrub": [],
        "missing": [],
        "drains": [],
        "capacity_bytes": 0,
        "free_bytes": 0,
        "used_bytes": 0,
        "routing_version": 0,
        "problem": "",
    }
    if directory is not None:
        report["cluster_id"], report["directory"] = directory.cluster_id, str(directory.path)
        try:
            state = control.request(directory.control_socket, "status")
            report["phase"], report["processes"], report["problem"] = state["phase"], state["processes"], state["error"]
        except ClusterNotFound:
            report["phase"] = "stopped"
            report["processes"] = [child.describe() for child in children_of(directory)]
            return report
    try:
        async with channel_pool() as pool:
            manager = ManagerCalls(pool, managers)
            routing = (await manager.call("GetRouting", cluster_pb2.GetRoutingRequest())).routing
            clients = (await manager.call("ListClients", base_pb2.Empty())).clients
            targets = await target_statuses(pool, routing)
            drains = (await manager.call("ListDrains", base_pb2.Empty())).drains
    except TransportError as error:
        if directory is None:
            raise
        report["problem"] = report["problem"] or error.message
        return report
    report["cluster_id"] = routing.cluster_id
    report["routing_version"] = routing.version
    if directory is None:
        report["phase"] = "ready"
        emptied = emptied_nodes(routing, drains)
        report["processes"] = [describe_node(node) | ({"state": "drained"} if node.node_id in emptied else {}) for node in routing.nodes]
    add_routing(report, routing)
    report["clients"] = [describe_client(client) for client in clients]
    report["missing"] = [{"chain": chain.chain_id, "reason": chain.reason} for chain in missing_chains(routing, targets)]
    report["drains"] = [describe_drain(drain) for drain in drains]
    report["scrub"] = [describe_scrub(target) for _, target in sorted(targets.items())]
    return report


def describe_node(node: cluster_pb2.Node) -> dict[str, Any]:
    return {
        "role": ROLES.get(node.role, "unknown"),
        "id": f"{ROLES.get(node.role, 'node')}-{node.node_id}",
        "node_id": node.node_id,
        "pid": node.pid,
        "address": node.addresses[0] if node.addresses else "",
        "addresses": list(node.addresses),
        "state": "running" if node.alive else "dead",
        "hostname": node.hostname,
        "software": node.software,
    }


def emptied_nodes(routing: cluster_pb2.RoutingInfo, drains: Sequence[cluster_pb2.Drain]) -> set[int]:
    """Nodes that were drained and may be stopped."""
    node_of = {target.target_id: target.node_id for target in routing.targets}
    nodes = {node_of[drain.target_id] for drain in drains if drain.whole_node}
    return nodes - {target.node_id for target in routing.targets if target.chain_id}


def describe_client(client: cluster_pb2.ClientInfo) -> dict[str, Any]:
    return {
        "id": client.client_id.hex(),
        "role": client.role,
        "hostname": client.hostname,
        "pid": client.pid,
        "description": client.description,
        "since_ns": client.since_ns,
        "seen_ns": client.seen_ns,
    }


def describe_target(target: cluster_pb2.Target) -> dict[str, Any]:
    return {
        "id": target.target_id,
        "node": target.node_id,
        "disk": target.disk,
        "chain": target.chain_id,
        "state": PUBLIC_STATES.get(target.public_state, "unknown"),
        "local_state": LOCAL_STATES.get(target.local_state, "unknown"),
        "capacity_bytes": target.capacity_bytes,
        "used_bytes": target.used_bytes,
        "free_bytes": target.free_bytes,
    }


def describe_drain(drain: cluster_pb2.Drain) -> dict[str, Any]:
    fields = {"target": drain.target_id, "chain": drain.chain_id, "replacement": drain.replacement, "done": drain.done}
    return fields | {"whole_node": drain.whole_node, "cancelled": drain.cancelled, "state": drain.state}


def describe_scrub(target: storage_pb2.TargetStatus) -> dict[str, Any]:
    scrub = target.scrub
    return {
        "target": target.target_id,
        "state": ("at once" if scrub.at_once else "running") if scrub.running else "idle",
        "passes": scrub.passes,
        "started_ns": scrub.started_ns,
        "finished_ns": scrub.finished_ns,
        "checked_chunks": scrub.checked_chunks,
        "total_chunks": scrub.total_chunks,
        "checked_bytes": scrub.checked_bytes,
        "found": scrub.found,
        "repaired": scrub.repaired,
        "damaged": scrub.damaged,
    }


def describe_chains(routing: cluster_pb2.RoutingInfo) -> list[dict[str, Any]]:
    node_of = {target.target_id: target.node_id for target in routing.targets}
    return [
        {
            "id": chain.chain_id,
            "version": chain.version,
            "targets": [
                {"id": t.target_id, "node": node_of.get(t.target_id, 0), "state": PUBLIC_STATES.get(t.state, "unknown")} for t in chain.targets
            ],
        }
        for chain in routing.chains
    ]


def add_routing(report: dict[str, Any], routing: cluster_pb2.RoutingInfo) -> None:
    """Chains, tables, space."""
    report["chains"] = describe_chains(routing)
    report["tables"] = [{"id": t.table_id, "version": t.version, "chains": list(t.chain_ids), "replicas": t.replicas} for t in routing.tables]
    report["capacity_bytes"], report["free_bytes"], report["used_bytes"] = Routing(routing).space()


def colored(state: str) -> Text:
    return Text(state, style="green" if state in GOOD else "yellow" if state in ("starting", "syncing", "waiting", "restarting") else "red")


def print_status(report: dict[str, Any]) -> None:
    where = f"  {report['directory']}" if report["directory"] else ""
    console.print(Text(report["cluster_id"] or "cluster", style="bold") + Text(f"  {report['phase']}{where}"))
    if report["problem"]:
        console.print(report["problem"], style="red")
    processes = table("process", "pid", "state", "address", right=("pid",))
    for entry in report["processes"]:
        processes.add_row(entry["id"], str(entry["pid"] or "-"), colored(entry["state"]), entry["address"])
    console.print(processes)
    for chain in report["missing"]:
        console.print(chain["reason"], style="red")
    moving = [drain for drain in report["drains"] if not drain["done"]]
    if moving:
        console.print(f"{len(moving)} of {len(report['drains'])} chains are still being moved off drained targets: `kvfs admin drain` shows them")
    if report["scrub"]:
        console.print(scrub_line(report["scrub"], time.time_ns()))
    if report["chains"]:
        console.print()
        chains = table("chain", "version", "targets (head first)", right=("version",))
        for chain in report["chains"]:
            row = Text(" → ").join([Text(f"{t['id']}@{t['node']} ") + colored(t["state"]) for t in chain["targets"]])
            chains.add_row(str(chain["id"]), str(chain["version"]), row)
        console.print(chains)
        console.print(
            f"\ncapacity {human_bytes(report['capacity_bytes'])}, free {human_bytes(report['free_bytes'])}, "
            f"chunks {human_bytes(report['used_bytes'])}; routing version {report['routing_version']}; {len(report['clients'])} clients"
        )


def scrub_line(targets: list[dict[str, Any]], now_ns: int) -> Text:
    """All targets' scrubs in one line; `kvfs admin scrub` shows each."""
    running = [target for target in targets if target["state"] != "idle"]
    words = []
    if running:
        done, total = (sum(target[key] for target in running) for key in ("checked_chunks", "total_chunks"))
        words.append(f"{len(running)} of {len(targets)} targets are being read ({min(100, 100 * done // max(1, total))} %)")
    finished = [target["finished_ns"] for target in targets if target["finished_ns"]]
    words.append(f"{len(finished)} of {len(targets)} targets read through" + (f", the oldest {ago(now_ns - min(finished))} ago" if finished else ""))
    words.append(f"{sum(target['repaired'] for target in targets)} of {sum(target['found'] for target in targets)} damaged places mended")
    line = Text("scrub: " + "; ".join(words))
    damaged = sum(target["damaged"] for target in targets)
    return line + Text(f"; {damaged} DAMAGED: `kvfs fsck` names them", style="red") if damaged else line


def ago(nanoseconds: int) -> str:
    seconds = max(0, nanoseconds) // 1_000_000_000
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


@click.command()
@common_options
def status(options: Options) -> None:
    """One page about the cluster: processes, chains, capacity, clients."""
    directory = options.directory()
    managers = directory.managers if directory else manager_addresses(options.cluster_spec())[0]
    report = trio.run(collect, managers, directory)
    if options.as_json:
        print_json(report)
    else:
        print_status(report)
