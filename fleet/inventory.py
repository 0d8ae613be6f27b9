# SPDX-License-Identifier: Apache-2.0
"""The inventory of a fleet: hosts, source storages, targets, machines, and what is promised to each. Pure.

`configuration.py` reads it from a file, `scan.py` finds the machines, `planner.py` decides with it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vmapipe.fleet.windows import DAY_S, Window

#: What a rule may fit besides names, before a colon.
RULE_KINDS = ("tag", "host", "state", "kind")


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """What is promised to a machine. Empty texts and 0 leave it to the commands' own defaults."""

    every_s: float = DAY_S
    window: tuple[Window, ...] = ()  # of backups; empty: at any time
    work_window: tuple[Window, ...] = ()  # of verify, drill, copy, prune
    time_zone: str = "UTC"
    target: str = ""
    keep: tuple[tuple[str, int], ...] = ()
    verify_every_s: float = 0.0  # 0: never
    drill_every_s: float = 0.0
    drill: str = ""  # the plan of the restore test: a path on the target's host
    priority: int = 0
    disks: tuple[str, ...] = ()  # these alone; empty: all that the machine has
    exclude: tuple[str, ...] = ()  # disks
    not_together: str = ""  # of all machines with the same word one at a time
    skip: str = ""  # why it is not backed up
    compress: str = "zstd"
    base: str = ""  # auto: incremental
    guest_latency: str = ""
    speed: str = ""  # bytes a second, with K, M, G
    nice: int = 10
    ionice: str = "best-effort:7"
    freeze: bool = False
    time_limit_s: float = 12 * 3600.0


@dataclasses.dataclass(frozen=True, slots=True)
class FleetHost:
    """A host with machines, or with archives. `ssh`: its address for ssh; empty: this host itself."""

    name: str
    ssh: str = ""
    jobs: int = 2
    drills: int = 1
    guests: tuple[str, ...] = ()  # proxmox, libvirt, qmp:PATTERN, disks:PATTERN
    command: tuple[str, ...] = ()  # how vmapipe is called there; empty: as here
    prefix: str = ""  # before the names of its machines


@dataclasses.dataclass(frozen=True, slots=True)
class SourceStorage:
    """A storage that machines' disks lie on."""

    name: str
    jobs: int


@dataclasses.dataclass(frozen=True, slots=True)
class FleetTarget:
    """A place for archives: a service (`archiver`), a folder, or a bucket (`s3`), alone or together.

    `host`: where its archives are verified, booted, copied and pruned; empty: on the machine's own
    host. `directory`: there; `{host}` in it is the machine's host.
    """

    name: str
    archiver: str = ""
    keys: str = ""
    directory: str = ""
    s3: str = ""
    host: str = ""
    jobs: int = 8
    copy_from: str = ""
    lock: str = ""  # of an object store: how long its objects cannot be removed
    keep: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """Changes of the policy for machines by name (`web*`), `tag:NAME`, `host:NAME`, `state:NAME`."""

    pattern: str
    changes: tuple[tuple[str, Any], ...]

    def fits(self, machine: FleetMachine) -> bool:
        kind, colon, rest = self.pattern.partition(":")
        if colon and kind in RULE_KINDS:
            matches = _matcher(rest)
            if kind == "tag":
                return any(map(matches, machine.tags))
            return bool(matches(str(getattr(machine, kind))))
        matches = _matcher(self.pattern)
        return bool(matches(machine.name) or (machine.title and matches(machine.title)))


@functools.lru_cache(maxsize=1024)
def _matcher(pattern: str) -> Any:
    return re.compile(fnmatch.translate(pattern)).match


@dataclasses.dataclass(frozen=True, slots=True)
class FleetMachine:
    """A machine that was found. `source`: what a backup needs to know of it, for its host alone."""

    name: str
    host: str
    identity: str = ""
    kind: str = "qmp"
    state: str = ""
    tags: tuple[str, ...] = ()
    storages: tuple[str, ...] = ()
    size_bytes: int = 0
    source: tuple[tuple[str, Any], ...] = ()
    first_seen_s: float = 0.0
    title: str = ""  # what people call it, if that is not its name


@dataclasses.dataclass(frozen=True, slots=True)
class Fleet:
    """All that fleet.toml says."""

    hosts: Mapping[str, FleetHost]
    targets: Mapping[str, FleetTarget]
    storages: Mapping[str, SourceStorage] = dataclasses.field(default_factory=dict)
    rules: Sequence[Rule] = ()
    defaults: Policy = Policy()
    total: int = 40
    database: str = ""
    catalogue: str = ""

    def policy(self, machine: FleetMachine) -> Policy:
        """Return what is promised to a machine; of rules that fit the later one wins."""
        changes = {k: v for rule in self.rules if rule.fits(machine) for k, v in rule.changes}
        return dataclasses.replace(self.defaults, **changes) if changes else self.defaults

    def copies_of(self, target: str) -> Iterable[FleetTarget]:
        """Return the targets that take copies of what another one stores."""
        return (t for t in self.targets.values() if t.copy_from == target)

    def unused_rules(self, machines: Sequence[FleetMachine]) -> list[Rule]:
        """Return the rules that fit none of the machines."""
        return [rule for rule in self.rules if not any(map(rule.fits, machines))]
