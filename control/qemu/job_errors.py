# SPDX-License-Identifier: Apache-2.0
"""Why a backup job of QEMU has failed, in words."""

from __future__ import annotations

import time
from typing import Any

from vmapipe.control.qemu.cbw_filters import BROKEN, REFUSED
from vmapipe.control.qemu.disks import MachineDisk, disk_names
from vmapipe.control.qmp.connection import Answer, QmpLink, ask_if_known

# What a job was at when an error ended it, in its event's word.
_OPERATIONS = {"read": "read the disk", "write": "sent its data to us"}
# QEMU frees a device within milliseconds of the end of its drive's jobs.
_UNPLUG_S = 0.5
_POLL_S = 0.02


class JobErrors:
    """The errors of one backup's jobs: QEMU's events are noted, and a job's end is worded."""

    def __init__(self, link: QmpLink) -> None:
        self._link = link
        # By job: what it was at when QEMU met an error, in its own word.
        self._failed_at: dict[str, str] = {}

    def note(self, event: dict[str, Any]) -> None:
        data = event.get("data") or {}
        if event.get("event") == "BLOCK_JOB_ERROR":
            self._failed_at[str(data.get("device", ""))] = str(data.get("operation", ""))

    def why_failed(self, disk: MachineDisk, job: Answer) -> str:
        """Word a job's end; QEMU cancels a job itself when its -drive goes, which looks like a
        user's cancel.
        """
        if job["error"] != "Operation canceled":
            return self._error_of(job)
        # A device that goes is there a moment longer than the job of its drive.
        deadline = time.monotonic() + _UNPLUG_S
        while time.monotonic() < deadline:
            blocks = ask_if_known(self._link, "query-block") or ()
            plugged = [block for block in blocks if block.get("qdev")]
            if not any({disk.device, disk.name} & disk_names(block).aliases for block in plugged):
                return (
                    "it was removed from the machine while it was backed up (or somebody has "
                    "cancelled QEMU's backup job)"
                )
            time.sleep(_POLL_S)
        return "somebody has cancelled QEMU's backup job"

    def _error_of(self, job: Answer) -> str:
        """Word a job's error; QEMU reports how much was copied by then, not where it met the error."""
        if job["error"] == REFUSED:
            return BROKEN
        for event in self._link.events():  # its word of it comes before the job's state
            self.note(event)
        at = _OPERATIONS.get(self._failed_at.get(str(job["id"]), ""))
        copied = f"{job.get('current-progress', 0)} of {job.get('total-progress', 0)} bytes"
        what = f" while it {at}" if at else ""
        return f"QEMU's backup job failed{what}, with {copied} copied: {job['error']}"
