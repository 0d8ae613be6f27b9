# SPDX-License-Identifier: Apache-2.0
"""What a fleet's catalogue has records of: machines, archives, runs, tests, pictures, and where each task stands.

Times are seconds since 1970 by the clock of the host that plans, except `ArchiveRecord.instant_s` of a catalogue
that was made again (by the clock of the host that made the archive).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

DrillVerdict = Literal["booted", "not-booted", "undecided"]
Verb = Literal["backup", "verify", "drill", "copy", "prune"]
VERBS: tuple[Verb, ...] = ("backup", "verify", "drill", "copy", "prune")
#: `lost`: whoever ran it died; its end is not known, and it is due again.
RunState = Literal["waiting", "running", "done", "failed", "cancelled", "lost"]
#: Clocks of hosts differ by minutes; what claims to be done later than that counts for nothing.
AHEAD_S = 900.0
#: History is kept for so long: a year and what a report of a year shows of the weeks before. 10,000 machines with
#: five jobs a night are 20 million runs by then; ten are 20,000.
KEPT_S = 400 * 86400.0
ENDED: frozenset[RunState] = frozenset({"done", "failed", "cancelled", "lost"})


@dataclasses.dataclass(frozen=True, slots=True)
class MachineRecord:
    """A machine that a scan has found. `identity`: what it keeps when it moves (a uuid, a VMID)."""

    machine: str
    identity: str
    host: str
    kind: str
    tags: str = ""  # with commas
    state: str = ""  # running, off, or what its host says
    storages: str = ""  # with commas
    size_bytes: int = 0
    first_seen_s: float = 0.0
    last_seen_s: float = 0.0
    vanished_s: float = 0.0  # 0: it is there
    title: str = ""  # what people call it, if that is not its name
    source: str = ""  # JSON: how its host reaches it


@dataclasses.dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """A stored archive. `location`: what `vmapipe verify` takes on the target's host."""

    machine: str
    target: str
    archive: str  # its name, without folder or bucket
    location: str = ""
    host: str = ""  # of the machine, when it was made
    uuid: str = ""
    instant_s: float = 0.0  # of the disks' contents
    stored_s: float = 0.0
    seconds: float = 0.0  # how long the backup, or the copy, took
    disk_bytes: int = 0  # of the machine's disks
    plain_bytes: int = 0  # of the archive before compression
    size_bytes: int = 0  # of the stored file
    transferred_bytes: int = 0  # that were read of the disks, or sent
    shared_bytes: int = 0  # that it shares with others in its store
    base: str = ""  # the archive that the unchanged was taken from
    copy_of: str = ""  # the target that it was copied from
    manifest: str = ""  # SHA-256 of the manifest, or empty
    removed_s: float = 0.0  # 0: it is there

    def removed(self, at_s: float) -> ArchiveRecord:
        """Return the record of the same archive, which is not there any more."""
        return dataclasses.replace(self, removed_s=at_s)


@dataclasses.dataclass(frozen=True, slots=True)
class RunRecord:
    """One job, from its planning to its end. `text`: one line, for a failure with the way out."""

    run: str
    verb: Verb
    machine: str
    host: str  # that does the work
    target: str
    archive: str
    state: RunState = "waiting"
    planned_s: float = 0.0
    started_s: float = 0.0
    seen_s: float = 0.0  # its latest sign of life
    ended_s: float = 0.0
    exit_code: int = -1
    text: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_s: float = 0.0
    attempt: int = 0
    storages: str = ""  # with commas; the source storages that it holds a slot of


@dataclasses.dataclass(frozen=True, slots=True)
class VerificationRecord:
    """One look at an archive. `has_digests`: every byte of data was compared."""

    machine: str
    target: str
    archive: str
    checked_s: float
    verdict: Literal["ok", "damaged", "failed"]
    has_digests: bool = False
    seconds: float = 0.0
    text: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class DrillRecord:
    """One restore test. `picture`: the path of the screen's picture on the target's host, or empty."""

    machine: str
    target: str
    archive: str
    tested_s: float
    verdict: DrillVerdict
    boot_s: float = 0.0
    proof: str = ""
    picture: str = ""
    seconds: float = 0.0
    text: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class PictureRecord:
    """What the screen showed in a machine's last restore test of a target. `png`: in base 64, checked (screen.is_png)."""

    machine: str
    target: str
    archive: str
    tested_s: float
    png: str


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """Where one task of a machine stands: all that a plan needs of the history.

    `done_s`: the begin of the last one that was done; `failures`: how many have failed since, the last
    one ended at `failed_s` with `text`; `archive`: the one that the last done was about.
    """

    machine: str
    verb: Verb
    target: str
    done_s: float = 0.0
    ended_s: float = 0.0
    archive: str = ""
    failures: int = 0
    failed_s: float = 0.0
    text: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class CancelRecord:
    """Somebody has asked for a run to be ended."""

    run: str
    asked_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class HostRecord:
    """A host's latest sign of life. `beats` grows with each; `down`: why it did not answer, or empty."""

    host: str
    seen_s: float = 0.0
    beats: int = 0
    down: str = ""
    answer: str = ""  # JSON: its machines, as its worker has found them


Record = (
    MachineRecord
    | ArchiveRecord
    | RunRecord
    | VerificationRecord
    | DrillRecord
    | Standing
    | CancelRecord
    | HostRecord
    | PictureRecord
)
