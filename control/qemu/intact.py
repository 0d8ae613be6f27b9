# SPDX-License-Identifier: Apache-2.0
"""Whether a disk's snapshot is still whole, asked of QEMU itself.

A copy-before-write filter with `on-cbw-error: break-snapshot` lets a guest's write go on
when the old data cannot be saved, saves nothing from then on, and tells nobody. But who
reads its snapshot is refused then, so one sector of it is copied to nowhere. Asked when
all of a disk has been copied, the answer counts for all of it.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from vmapipe.control.qemu.plan import look_nodes
from vmapipe.control.qmp.connection import ANSWER_S, Command, Qmp, QmpRefused

# It takes some milliseconds.
_LOOK_S = 0.002
# The whole of a null device, and of what is read: QEMU counts in sectors.
_SECTOR_BYTES = 512
#: What QEMU says to a reader of a broken snapshot, and what that means.
REFUSED = "Permission denied"
BROKEN = (
    "old data that a write of the guest was about to replace could not be read or sent; the write "
    "went on, but the archive would be wrong: look for read errors of the disk in the host's log, "
    "and back it up again"
)


class Look(NamedTuple):
    """The commands of one look through the filter node `filter_node`; `name` is the job's."""

    name: str
    filter_node: str

    def begin(self) -> list[Command]:
        piece, view, nowhere = look_nodes(self.name)
        return [
            _node(view, "snapshot-access", {"file": self.filter_node, "read-only": True}),
            _node(piece, "raw", {"file": view, "size": _SECTOR_BYTES, "read-only": True}),
            _node(nowhere, "null-co", {"size": _SECTOR_BYTES}),
            Command(
                "blockdev-backup",
                {
                    "job-id": self.name,
                    "device": piece,
                    "target": nowhere,
                    "sync": "full",
                    "on-source-error": "report",
                    "auto-dismiss": False,
                },
            ),
        ]

    def end(self) -> list[Command]:
        """When the job has ended."""
        nodes = [Command("blockdev-del", {"node-name": node}) for node in look_nodes(self.name)]
        return [Command("job-dismiss", {"id": self.name}), *nodes]


def _node(name: str, driver: str, words: dict[str, object]) -> Command:
    return Command("blockdev-add", {"driver": driver, "node-name": name, **words})


def why_not_intact(qmp: Qmp, look: Look) -> str:
    """The reason why the snapshot does not count; empty: it is whole. Raises QmpGone.

    Any doubt is a reason. What it has added to QEMU is gone afterwards, or is left to
    whoever cleans up.
    """
    try:
        for command in look.begin():
            qmp.execute(command)
        error = _end_of(qmp, look.name)
        for command in look.end():
            qmp.execute(command)
    except QmpRefused as refused:
        return f"QEMU does not show whether all old data was saved: {refused}"
    if error == REFUSED:
        return BROKEN
    return f"QEMU does not show whether all old data was saved: {error}" if error else ""


def _end_of(qmp: Qmp, name: str) -> str:
    """The error of a job that has ended."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        jobs = qmp.execute(Command("query-jobs", {}))
        job = next((job for job in jobs if job.get("id") == name), None)
        if job is None:
            return "somebody has removed the job that looks"
        if job.get("status") == "concluded":
            return str(job.get("error", ""))
        if time.monotonic() > deadline:
            raise QmpRefused(f"reading one sector takes more than {ANSWER_S:.0f} s")
        time.sleep(_LOOK_S)
