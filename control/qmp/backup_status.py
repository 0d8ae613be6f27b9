# SPDX-License-Identifier: Apache-2.0
"""The status of one backup, as `query-backup` tells it: a monitor's, and a running backup's own. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vmapipe.runtime.events import Event
from vmapipe.runtime.text import one_line
from vmapipe.runtime.uuids import uuid_text


class BackupStatus:
    """Times are seconds since 1970; `archive` is called as its user called it."""

    def __init__(self, archive: str, started: float = 0.0) -> None:
        self.archive = archive
        self.started = started
        #: In hex; empty until the archive's header is written.
        self.uuid = ""
        #: The first error.
        self.errmsg = ""
        #: 0: it is running.
        self.ended = 0.0
        self.total_bytes = 0
        self.done_bytes = 0
        self.zero_bytes = 0

    @property
    def status(self) -> str:
        if not self.ended:
            return "active"
        return "error" if self.errmsg else "done"

    def take(self, event: Event, now: float) -> None:
        """Take an event of the backup's coordinator into account."""
        match event["event"]:
            case "begun":
                self.uuid = event["uuid"]
                self._count(event["devices"])
            case "progress" if "devices" in event:
                self._count(event["devices"])

    def fail(self, reason: str, now: float) -> None:
        """Record a failure, unless it has ended already."""
        if not self.ended:
            self.errmsg = self.errmsg or one_line(reason)
            self.ended = max(now, self.started)

    def succeed(self, now: float) -> None:
        """Record success, whatever was reported on the way."""
        self.errmsg = ""
        self.done_bytes = self.total_bytes
        self.ended = max(now, self.started)

    def members(self) -> dict[str, Any]:
        """The answer to `query-backup`; what is not known yet is left out."""
        members: dict[str, Any] = {"status": self.status}
        if members["status"] == "error":
            members["errmsg"] = self.errmsg
        members |= self.counts()
        members["start-time"] = int(self.started)
        if self.ended:
            members["end-time"] = int(self.ended)
        members["backupfile"] = self.archive
        if self.uuid:
            members["uuid"] = uuid_text(bytes.fromhex(self.uuid))
        return members

    def counts(self) -> dict[str, int]:
        return {
            "total": self.total_bytes,
            "transferred": self.done_bytes,
            "zero-bytes": self.zero_bytes,
        }

    def _count(self, devices: Sequence[Mapping[str, Any]]) -> None:
        self.done_bytes = sum(device.get("done_bytes", 0) for device in devices)
        # A memory's size is an estimate, and may be exceeded.
        self.total_bytes = max(self.done_bytes, sum(device["bytes"] for device in devices))
        self.zero_bytes = sum(device.get("zero_bytes", 0) for device in devices)
