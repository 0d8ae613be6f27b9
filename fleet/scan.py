# SPDX-License-Identifier: Apache-2.0
"""The machines of a fleet: the answers of its hosts put together, and what is new, gone, moved or doubled."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vmapipe.fleet.catalogue import Catalogue
from vmapipe.fleet.inventory import Fleet, FleetHost, FleetMachine
from vmapipe.fleet.records import MachineRecord
from vmapipe.runtime.text import MAX_NAME_CHARS, one_line

# Hosts that are asked at the same time; each costs a thread and an ssh.
_AT_ONCE = 32
# As many as a host's agent tells; and the paths of a machine's disks.
_MOST_MACHINES, _MOST_SOURCE_CHARS = 20_000, 1 << 16
_KINDS = frozenset({"qmp", "libvirt", "proxmox", "disks"})

Ask = Callable[[FleetHost], tuple[dict[str, Any] | None, str]]


@dataclasses.dataclass
class Scan:
    """What a look at all hosts has found. `down`: hosts that did not answer, and why."""

    machines: list[FleetMachine]
    down: dict[str, str]
    notices: list[str]
    new: list[str] = dataclasses.field(default_factory=list)
    vanished: list[str] = dataclasses.field(default_factory=list)
    moved: list[str] = dataclasses.field(default_factory=list)


def scan(fleet: Fleet, catalogue: Catalogue, ask: Ask, now_s: float) -> Scan:
    """Ask all hosts, note what they have in the catalogue, and return it. Raises Failure."""
    hosts = list(fleet.hosts.values())
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = dict(zip((h.name for h in hosts), pool.map(ask, hosts), strict=True))
    return put_together(fleet, catalogue, answers, now_s)


def put_together(
    fleet: Fleet,
    catalogue: Catalogue,
    answers: Mapping[str, tuple[dict[str, Any] | None, str]],
    now_s: float,
) -> Scan:
    """Make one list of the hosts' answers, and note it in the catalogue. Raises Failure."""
    found, unsure = list[FleetMachine](), set[str]()
    result = Scan([], {}, [])
    for name, (answer, why) in answers.items():
        if answer is None:
            result.down[name] = one_line(why, 500)
            unsure.add(name)
            continue
        for notice in _listed(answer, "notices"):
            # What this rule would have found has not vanished.
            unsure.add(name)
            result.notices.append(one_line(f"host {name}: {notice}", 1000))
        for item in _listed(answer, "machines"):
            try:
                found.append(_machine(fleet.hosts[name], item))
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
                # What it was has not vanished, either.
                unsure.add(name)
                result.notices.append(f"host {name}: an answer that is not understood")
    known = {record.machine: record for record in catalogue.select(MachineRecord)}
    result.machines = _unique(found, known, result)
    _note(catalogue, known, result, unsure, now_s)
    return result


def _listed(answer: Mapping[str, Any], key: str) -> list[Any]:
    found = answer.get(key)
    return found[:_MOST_MACHINES] if isinstance(found, list) else []


def _machine(host: FleetHost, item: Mapping[str, Any]) -> FleetMachine:
    """Raises AttributeError, KeyError, TypeError, ValueError, OverflowError for what is not a machine."""
    kind, name = str(item["kind"]), host.prefix + str(item["name"])
    if kind not in _KINDS or not 0 < len(name) <= MAX_NAME_CHARS:
        raise ValueError(kind)
    size_bytes, source = int(item.get("size_bytes", 0)), dict(item["source"])
    if not 0 <= size_bytes < 1 << 62 or len(json.dumps(source)) > _MOST_SOURCE_CHARS:
        raise ValueError(name)
    tags = tuple(str(tag)[:MAX_NAME_CHARS] for tag in item.get("tags", [])[:100])
    title = str(item.get("title", ""))[:MAX_NAME_CHARS]
    return FleetMachine(
        name,
        host.name,
        str(item["identity"])[:_MOST_SOURCE_CHARS],
        kind,
        str(item.get("state", ""))[:MAX_NAME_CHARS],
        tags,
        tuple(sorted({str(s)[:4096] for s in item.get("storages", [])[:100]})),
        size_bytes,
        tuple(sorted(source.items())),
        title=title,
    )


def _is_everywhere(identity: str) -> bool:
    """Tell whether an identity is a machine's wherever it is: one that is a path is its host's own."""
    return identity.startswith(("libvirt:", "pve:"))


def _key(machine: FleetMachine) -> str:
    if _is_everywhere(machine.identity):
        return machine.identity
    return f"{machine.host}:{machine.identity}"


def _unique(
    found: Iterable[FleetMachine], known: Mapping[str, MachineRecord], result: Scan
) -> list[FleetMachine]:
    """One of each machine, and no name twice."""
    by_identity = defaultdict[str, list[FleetMachine]](list)
    for machine in found:
        by_identity[_key(machine)].append(machine)
    by_name = defaultdict[str, list[FleetMachine]](list)
    for same in by_identity.values():
        if len(same) > 1:
            hosts = ", ".join(m.host for m in same)
            result.notices.append(
                f"machine {same[0].name}: on {hosts} at the same time (it moves, or is defined twice)"
            )
        # Where it runs, it is; a definition that was left behind is none.
        chosen = min(same, key=lambda m: (m.state != "running", m.host))
        by_name[chosen.name].append(chosen)
    machines = list[FleetMachine]()
    for name, same in by_name.items():
        record = known.get(name)
        # Who has had the name keeps it, and its history.
        same.sort(key=lambda m: (record is None or _key(m) != record.identity, m.host))
        machines.append(same[0])
        for other in same[1:]:
            machines.append(dataclasses.replace(other, name=f"{name}@{other.host}"))
            result.notices.append(
                f"machine {name}: hosts {same[0].host} and {other.host} have different ones of this "
                f'name; the second is called {name}@{other.host} (prefix = "…" of a host names them apart)'
            )
    return machines


def _note(
    catalogue: Catalogue,
    known: Mapping[str, MachineRecord],
    result: Scan,
    unsure: set[str],
    now_s: float,
) -> None:
    records = list[MachineRecord]()
    machines = list[FleetMachine]()
    for machine in result.machines:
        before = known.get(machine.name)
        first_s = before.first_seen_s if before and before.first_seen_s <= now_s else now_s
        if before is None or before.vanished_s:
            result.new.append(machine.name)
        elif before.host != machine.host:
            result.moved.append(f"{machine.name}: {before.host} to {machine.host}")
        machines.append(dataclasses.replace(machine, first_seen_s=first_s))
        records.append(record_of(machine, first_s, now_s))
    there = {machine.name for machine in machines}
    for name, record in known.items():
        if name not in there and not record.vanished_s and record.host not in unsure:
            result.vanished.append(name)
            records.append(dataclasses.replace(record, vanished_s=now_s))
    result.machines = machines
    # Of hosts that do not answer the last that is known counts: their jobs wait and are told.
    result.machines += [
        machine_of(record)
        for name, record in known.items()
        if name not in there and not record.vanished_s and record.host in unsure
    ]
    catalogue.put(*records)


def record_of(machine: FleetMachine, first_s: float, now_s: float) -> MachineRecord:
    """Return what the catalogue keeps of a machine."""
    return MachineRecord(
        machine.name,
        _key(machine),
        machine.host,
        machine.kind,
        ",".join(machine.tags),
        machine.state,
        ",".join(machine.storages),
        machine.size_bytes,
        first_s,
        now_s,
        title=machine.title,
        source=json.dumps(dict(machine.source)),
    )


def machine_of(record: MachineRecord) -> FleetMachine:
    """Return a machine as the last scan has found it."""
    return FleetMachine(
        record.machine,
        record.host,
        record.identity,
        record.kind,
        record.state,
        tuple(filter(None, record.tags.split(","))),
        tuple(filter(None, record.storages.split(","))),
        record.size_bytes,
        tuple(json.loads(record.source or "{}").items()),
        record.first_seen_s,
        record.title,
    )


def known_machines(catalogue: Catalogue) -> Sequence[FleetMachine]:
    """Return the machines of the last scan. Raises Failure."""
    return [machine_of(r) for r in catalogue.select(MachineRecord, "machine", vanished_s=0)]
