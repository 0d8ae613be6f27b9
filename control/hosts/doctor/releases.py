# SPDX-License-Identifier: Apache-2.0
"""QEMU's releases: features by their schema, and the faults that are known of them. Pure.

The faults were found by backups of Debian's 7.2.22, 10.0.13 and 11.1.3; where something is said of
others it is upstream's change log and source (docs/decisions/0022-read-errors.md,
docs/decisions/0013-memory.md), or the report that is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vmapipe.control.hosts.doctor.findings import Finding, Verdict
from vmapipe.control.qemu.features import Features

Release = tuple[int, ...]

# The oldest that anything is tried with.
_OLDEST: Release = (7, 2)
_BACKUP_MEMBERS = ("on-cbw-error", "cbw-timeout")


class KnownFault(NamedTuple):
    """A fault of releases from `first` on and before `fixed`, if `needs` is what a backup uses."""

    first: Release
    fixed: Release
    verdict: Verdict
    text: str
    needs: str = "qmp"  # qmp, state, nbd


FAULTS: Sequence[KnownFault] = (
    KnownFault(
        *((0,), (7, 2), "warning"),
        "it is older than 7.2, the oldest that backups are tried with",
    ),
    KnownFault(
        *((8, 0), (10, 0), "warning"),
        "8.0 to 9.2 may end themselves when a snapshot is read through a filter, so none is used: an error "
        "of the storage while old data is saved fails the guest's write too",
    ),
    KnownFault(
        *((7, 2), (7, 2, 15), "warning"),
        "7.2 before 7.2.15 may end itself when a snapshot is read through a filter, so none is used: an "
        "error of the storage while old data is saved fails the guest's write too",
    ),
    KnownFault(
        *((10, 1), (99,), "info"),
        "from 10.1 on a backup job completes although its snapshot was broken by an error of the storage; "
        "each job waits at its end until that was looked at",
    ),
    KnownFault(
        *((7, 2), (8, 0), "info"),
        "7.2 leaves memory write-protected when a stream of --state breaks, and the guest stands still; "
        "ours cannot break, whoever dies",
        "state",
    ),
    KnownFault(
        *((7, 2), (9, 0), "warning"),
        "before 9.0 it may crash when a client leaves its NBD server and a disk has an I/O thread "
        "(virtnbdbackup's issue 254): do not export such a disk for --nbd or --libvirt",
        "nbd",
    ),
)


def release_of(version: Mapping[str, Any]) -> Release:
    """Read the answer to query-version."""
    qemu = version.get("qemu") or {}
    return tuple(int(qemu.get(part, 0)) for part in ("major", "minor", "micro"))


def known_faults(release: Release, needs: Sequence[str]) -> Iterator[Finding]:
    """Yield what is known of this release, of what a backup uses."""
    for fault in FAULTS:
        if fault.first <= release < fault.fixed and fault.needs in needs:
            yield Finding(fault.verdict, "QEMU", fault.text)


def features_of(schema: Sequence[Mapping[str, Any]]) -> Features:
    """Read the answer to query-qmp-schema: what `find_features` finds out by commands that are refused."""
    by_name = {str(entry.get("name", "")): entry for entry in schema}
    backup = by_name.get(str(by_name.get("blockdev-backup", {}).get("arg-type", "")), {})
    members = {str(member.get("name", "")): member for member in backup.get("members", ())}
    perf = by_name.get(str(members.get("x-perf", {}).get("type", "")), {})
    x_perf = {str(member.get("name", "")) for member in perf.get("members", ())}
    nodes = by_name.get(str(by_name.get("blockdev-add", {}).get("arg-type", "")), {})
    drivers = {str(variant.get("case", "")) for variant in nodes.get("variants", ())}
    return Features(
        frozenset(name for name in _BACKUP_MEMBERS if name in members),
        frozenset({"max-workers"} & x_perf),
        frozenset({"copy-before-write", "snapshot-access", "null-co"} & drivers),
    )
