"""Pure core: moving chains away from targets that are to be emptied.

A drain is a record of one target on its way out of its chain. Its steps, each one change of the records, decided from record and chain alone, so that
whoever is the primary goes on where the last one was:
  1. a replacement is placed on another disk and joins the chain as offline: it becomes waiting, syncing and serving like any target that returns;
  2. once it serves, the target is asked to leave (`Target.retiring`). It stops serving by itself, so no reader finds it behind, and says so;
  3. once the chain has it offline and the replacement still serves, it is taken out of the chain. Its service then deletes its data.
Invariants: a target is asked to leave only while its replacement serves, so a chain never has fewer serving replicas for it than before; a target
that turns out to be the last one serving is asked back; a cancelled drain is the drain of its replacement, with the target itself in its place. At
most SYNCING_MAX replacements are filled at a time. Records of finished drains stay, and keep their disks free of chains, until they are cancelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from kvfs.common.errors import InvalidArgument, NoSpace, NotEnoughTargets, UnknownTarget
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster.placing import new_target, open_places, place_of
from kvfs.meta.cluster.registry import Change, Records, changed
from kvfs.meta.cluster.states import Chain, Member, Public
from kvfs.meta.cluster.tables import Place, choose

SYNCING_MAX = 4
Reports = Mapping[int, pb.TargetReport]


class Step(Enum):
    WAIT = auto()
    PLACE = auto()
    ASK = auto()
    """The target is to leave the chain."""
    ASK_BACK = auto()
    REMOVE = auto()
    FINISH = auto()
    """The target is in the chain no more."""


def next_step(drain: pb.Drain, chain: Chain) -> Step:
    states = {member.target_id: member.state for member in chain.members}
    if drain.done:
        return Step.WAIT
    if drain.target_id not in states:
        return Step.FINISH
    if not drain.replacement or drain.replacement not in states:
        return Step.PLACE
    replaced = states[drain.replacement] is Public.SERVING
    state = states[drain.target_id]
    if not drain.leaving:
        return Step.ASK if replaced else Step.WAIT
    if state is Public.LASTSRV or (state is Public.SERVING and not replaced):
        return Step.ASK_BACK
    return Step.REMOVE if replaced and state is Public.OFFLINE else Step.WAIT


def advance(records: Records, reports: Reports, change: Change) -> None:
    """One step of every drain whose chain is not being changed already; adds to the change."""
    drains = [drain for _, drain in sorted(records.drains.items()) if not drain.done]
    filling = sum(bool(drain.replacement) and not drain.leaving for drain in drains)
    for drain in drains:
        chain = records.chains[drain.chain_id]
        if chain.chain_id in change.chains:
            continue
        step = next_step(drain, chain)
        if step is Step.PLACE and filling < SYNCING_MAX:
            try:
                _place(records, reports, change, drain, chain)
                filling += 1
            except (NotEnoughTargets, NoSpace, InvalidArgument):
                continue  # there was a place when it was asked for: it waits until there is one again
        elif step in (Step.ASK, Step.ASK_BACK):
            change.targets[drain.target_id] = _target(records, change, drain.target_id, retiring=step is Step.ASK)
            change.drains[drain.target_id] = changed(drain, leaving=step is Step.ASK)
        elif step is Step.REMOVE:
            change.chains[chain.chain_id] = chain.without(drain.target_id)
            change.targets[drain.target_id] = _target(records, change, drain.target_id, retiring=True, chain_id=0)
            change.drains[drain.target_id] = None if drain.cancelled else changed(drain, done=True)
        elif step is Step.FINISH:
            change.drains[drain.target_id] = None if drain.cancelled else changed(drain, done=True)


def _place(records: Records, reports: Reports, change: Change, drain: pb.Drain, chain: Chain) -> None:
    target = new_target(records, change, find_place(records, reports, drain.target_id, chain), chain.chain_id)
    change.targets[target.target_id] = target
    change.chains[chain.chain_id] = chain.with_members([*chain.members, Member(target.target_id, Public.OFFLINE)])
    change.drains[drain.target_id] = changed(drain, replacement=target.target_id)


def find_place(records: Records, reports: Reports, leaving: int, chain: Chain) -> Place:
    """The best disk for what takes the place of a target. NotEnoughTargets, NoSpace."""
    rest = [place_of(records, member.target_id) for member in chain.members if member.target_id != leaving]
    nodes = {place.node_id for place in rest}
    own = place_of(records, leaving)
    candidates = [place for place in open_places(records) if place.node_id not in nodes and place != own]
    if not candidates:
        raise NotEnoughTargets(
            f"there is no place to move target {leaving} to: chain {chain.chain_id} has its other {len(rest)} replicas on nodes "
            f"{', '.join(map(str, sorted(nodes))) or '-'}, and no other storage node is alive and stays: start another storage service first"
        )
    needed = reports[leaving].used_bytes if leaving in reports else 0
    roomy = [place for place in candidates if _free_bytes(records, reports, place) > needed]
    if not roomy:
        raise NoSpace(f"target {leaving} holds {needed} bytes, and no disk that its chain could move to has so much free: add a disk first")
    chains = [[place_of(records, member.target_id) for member in other.members] for other in records.chains.values()]
    return choose(chains, rest, roomy)


def _free_bytes(records: Records, reports: Reports, place: Place) -> int:
    """As its targets say, or as its node said when it registered."""
    told = [
        reports[target.target_id].free_bytes
        for target in records.targets_of_node(place.node_id)
        if target.disk == place.disk and target.target_id in reports and reports[target.target_id].capacity_bytes
    ]
    return max(told) if told else max((disk.free_bytes for disk in records.nodes[place.node_id].disks if disk.disk == place.disk), default=0)


# --- what operators ask for --------------------------------------------------------------------------------------------------------------


def named(records: Records, request: pb.DrainRequest) -> list[int]:
    """The targets that a request means."""
    if request.node_id:
        if request.node_id not in records.nodes:
            raise UnknownTarget(f"there is no node {request.node_id}: `kvfs admin list-nodes` shows them")
        own = {target.target_id for target in records.targets_of_node(request.node_id)}
        return sorted(target_id for target_id in own if records.targets[target_id].chain_id or target_id in records.drains)
    for target_id in request.target_ids:
        if target_id not in records.targets:
            raise UnknownTarget(f"there is no target {target_id}: `kvfs admin list-targets` shows them")
    return sorted(set(request.target_ids))


def begin(records: Records, reports: Reports, request: pb.DrainRequest, now_ns: int) -> Change:
    """Records for what is not drained yet. Nothing when one of the targets has no place to go to: NotEnoughTargets, NoSpace, InvalidArgument."""
    change = Change()
    fresh = [target_id for target_id in named(records, request) if target_id not in records.drains]
    for target_id in fresh:
        target = records.targets[target_id]
        if not target.chain_id:
            raise InvalidArgument(f"target {target_id} is in no chain: there is nothing to drain")
        if any(drain.replacement == target_id and not drain.done for drain in records.drains.values()):
            raise InvalidArgument(f"target {target_id} is taking the place of another one: cancel that drain, or wait for its end")
        change.drains[target_id] = pb.Drain(target_id=target_id, chain_id=target.chain_id, whole_node=bool(request.node_id), started_ns=now_ns)
    # With all of them leaving, each must have somewhere to go.
    after = Records(records.cluster_id, nodes=records.nodes, targets=records.targets, chains=records.chains, drains={**records.drains})
    after.drains.update({target_id: drain for target_id, drain in change.drains.items() if drain is not None})
    for target_id in fresh:
        find_place(after, reports, target_id, records.chains[records.targets[target_id].chain_id])
    return change


def cancel(records: Records, request: pb.DrainRequest, now_ns: int) -> Change:
    """What is not done goes back to what it was; what is done is forgotten, so that its disk may be used again."""
    change = Change()
    for target_id in named(records, request):
        drain = records.drains.get(target_id)
        if drain is None or drain.cancelled:
            continue
        change.drains[target_id] = None
        if drain.done:
            continue
        if drain.leaving:
            change.targets[target_id] = _target(records, change, target_id, retiring=False)
        if drain.replacement:
            change.drains[drain.replacement] = pb.Drain(
                target_id=drain.replacement, chain_id=drain.chain_id, replacement=target_id, cancelled=True, started_ns=now_ns
            )
    return change


def describe(records: Records, drain: pb.Drain) -> pb.Drain:
    """With its state in words."""
    chain = records.chains[drain.chain_id]
    states = {member.target_id: member.state.name.lower() for member in chain.members}
    step = next_step(drain, chain)
    if drain.done:
        words = "done"
    elif step is Step.PLACE:
        words = "waits for a place"
    elif drain.leaving:
        words = "leaving its chain"
    elif drain.cancelled:
        words = "cancelled"
    else:
        words = f"replacement is {states.get(drain.replacement, 'being placed')}"
    return changed(drain, state=words)


def _target(records: Records, change: Change, target_id: int, **fields: object) -> pb.Target:
    return changed(change.targets.get(target_id, records.targets[target_id]), **fields)
