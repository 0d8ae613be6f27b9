# SPDX-License-Identifier: Apache-2.0
"""The features of a QEMU that a backup uses, probed by commands that name a missing node.

QEMU checks a command's members before it looks for the nodes that they name: the missing node is
its reason only when it knows all the members. Each of these takes QEMU a millisecond; its schema
(`query-qmp-schema`) takes 40 ms of processor time, during which its monitor serves no other client.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vmapipe.control.qmp.connection import Command, Qmp, QmpRefused

_ADD, _BACKUP = "blockdev-add", "blockdev-backup"


class Features(NamedTuple):
    """The members that this QEMU's blockdev-backup has, those of its x-perf, and its drivers."""

    members: frozenset[str]
    x_perf: frozenset[str]
    drivers: frozenset[str] = frozenset()

    @property
    def breaks_snapshots(self) -> bool:
        """True when old data that cannot be saved fails the backup, not the guest's write."""
        return "on-cbw-error" in self.members

    def without_snapshots(self) -> Features:
        """Return the features without snapshots, for a QEMU that cannot show whether one is broken."""
        members = self.members - {"on-cbw-error", "cbw-timeout"}
        return self._replace(members=members, drivers=self.drivers - {"snapshot-access"})


def find_features(qmp: Qmp, name: str) -> Features:
    """Probe QEMU's features; `name` has our prefix, and no node or job has it. Raises QmpGone."""
    backup = {"job-id": name, "device": name, "target": name, "sync": "full"}
    members: dict[str, Any] = {
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": 1,
        "x-perf": {"max-workers": 1},
    }
    known = {
        member
        for member, value in members.items()
        if _misses(qmp, Command(_BACKUP, {**backup, member: value}), name)
    }
    nodes: dict[str, dict[str, Any]] = {
        "copy-before-write": {"file": name, "target": name},
        "snapshot-access": {"file": name},
        # It is above no node: what is missing is a member of this name.
        "null-co": {name: 1},
    }
    drivers = {
        driver
        for driver, arguments in nodes.items()
        if _misses(qmp, Command(_ADD, {"driver": driver, "node-name": name, **arguments}), name)
    }
    x_perf = frozenset({"max-workers"} if "x-perf" in known else ())
    return Features(frozenset(known - {"x-perf"}), x_perf, frozenset(drivers))


def _misses(qmp: Qmp, command: Command, name: str) -> bool:
    """Tell whether QEMU refuses the command only because of that name."""
    try:
        qmp.execute(command)
    except QmpRefused as refused:
        return name in str(refused)
    return False
