# SPDX-License-Identifier: Apache-2.0
"""The state of one backup: its events in, the answers to who asks out. Pure."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmapipe.control.qmp.backup_status import BackupStatus
from vmapipe.runtime.events import Event

if TYPE_CHECKING:
    from vmapipe.runtime.event_types import BackupProgressEvent, FeltByGuest, GuestLatencyEvent

_STARTED_S, _STARTED_MONOTONIC_S = time.time(), time.monotonic()


def now_s() -> float:
    """The clock's time at this process' start, and what has passed since."""
    return _STARTED_S + (time.monotonic() - _STARTED_MONOTONIC_S)


# The rate "now" is that of so long: it follows a change soon, and does not jump.
_RATE_S = 10.0
# Of what the guest feels; as many as a line of a terminal holds.
_FELT_SECONDS = 60

# By event, the fields that a device's state takes over as they are.
_DEVICE_FIELDS = {
    "transfer": ("read_bytes", "sent_bytes", "saved_bytes"),
    "buffer": ("memory_bytes", "spool_bytes", "waiting_writes"),
}
_PROGRESS_FIELDS = ("done_bytes", "zero_bytes", "unchanged_bytes")


def _new_device(name: str, size_bytes: int) -> dict[str, Any]:
    counts = dict.fromkeys(_PROGRESS_FIELDS, 0)
    for fields in _DEVICE_FIELDS.values():
        counts |= dict.fromkeys(fields, 0)
    return {"name": name, "bytes": size_bytes, **counts}


class JobState(BackupStatus):
    """`now` is seconds since 1970 everywhere. `job` is the job's id, in hex."""

    def __init__(self, archive: str, started: float = 0.0, *, job: str = "") -> None:
        super().__init__(archive, started)
        self.job = job
        self.speed_bytes_s = 0
        self.stored_bytes = 0
        self.cpu_s = 0.0
        self.peak_rss_bytes = 0
        self.plain_bytes = 0
        #: The archive that this one builds on, empty if none; what came from it, and what is shared on disk.
        self.base = ""
        self.base_bytes = 0
        self.shared_bytes = 0
        #: Why a device is backed up in full all the same, by its name; empty: it is not.
        self.full_reasons: dict[str, str] = {}
        self.devices: dict[str, dict[str, Any]] = {}
        #: What the guest has felt in all, when the backup is done; None: it was not measured.
        self.felt: FeltByGuest | None = None
        # The same of each of the last seconds, the newest last.
        self._felt_seconds: deque[GuestLatencyEvent] = deque(maxlen=_FELT_SECONDS)
        self._worst_s = 0.0
        # (when, bytes done, bytes read), of the last seconds.
        self._history = deque[tuple[float, int, int]]()

    @property
    def read_bytes(self) -> int:
        return sum(device["read_bytes"] for device in self.devices.values())

    def take(self, event: Event, now: float) -> None:
        super().take(event, now)
        match event["event"]:
            case "base":
                self.base = event["archive"]
                self.full_reasons = {
                    device["name"]: "" if device["incremental"] else device["reason"]
                    for device in event["devices"]
                }
            case "begun":
                for device in event["devices"]:
                    self.devices[device["name"]] = _new_device(device["name"], device["bytes"])
            case "progress" if "devices" in event:
                self._take_progress(event, now)
            case "stored":
                self.uuid, self.stored_bytes = event["uuid"], event["stored_bytes"]
                self.plain_bytes = event["plain_bytes"]
                self.base_bytes = event.get("base_bytes", 0)
                self.shared_bytes = event.get("shared_bytes", 0)
            case "guest-latency":
                self._felt_seconds.append(event)
                self._worst_s = max(self._worst_s, event["p99_s"])
            case "speed":
                self.speed_bytes_s = event["bytes_per_s"]
            case "done":
                self.succeed(now)
                self.felt = event.get("guest_latency")
                self.cpu_s, self.peak_rss_bytes = event["cpu_s"], event["peak_rss_bytes"]
            case "transfer" | "buffer":
                known = self.devices.get(event["device"])
                fields: Mapping[str, object] = event
                if known is not None:
                    known |= {key: fields[key] for key in _DEVICE_FIELDS[event["event"]]}

    def _take_progress(self, event: BackupProgressEvent, now: float) -> None:
        self.stored_bytes, self.plain_bytes = event["stored_bytes"], event["plain_bytes"]
        for told in event["devices"]:
            device = self.devices.setdefault(told["name"], _new_device(told["name"], told["bytes"]))
            fields: Mapping[str, object] = told
            device |= {key: fields.get(key, 0) for key in _PROGRESS_FIELDS}
        self._history.append((now, self.done_bytes, self.read_bytes))
        while len(self._history) > 1 and now - self._history[0][0] > _RATE_S:
            self._history.popleft()

    def rates_bytes_s(self, now: float) -> tuple[float, float]:
        """Done, and read: of the last seconds; of all of it once it has ended."""
        since, done, read = self.started, 0, 0
        if self._history and not self.ended:
            since, done, read = self._history[0]
        seconds = max(0.001, (self.ended or now) - since)
        return (self.done_bytes - done) / seconds, (self.read_bytes - read) / seconds

    def _latency(self) -> dict[str, Any] | None:
        """What the guest feels, and what the backup may read therefore; lists of the last minute."""
        if not self._felt_seconds:
            return None
        last = self._felt_seconds[-1]
        return {
            "bound_s": last["bound_s"],
            "p99_s": last["p99_s"],
            "worst_s": self._worst_s,
            "limit_bytes_s": last["limit_bytes_s"],
            "last_p99_s": [each["p99_s"] for each in self._felt_seconds],
            "last_read_bytes_s": [each["read_bytes_s"] for each in self._felt_seconds],
        }

    def details(self, now: float) -> dict[str, Any]:
        """All that is known, in the words of the JSON events."""
        rate, read_rate = self.rates_bytes_s(now)
        left = self.total_bytes - self.done_bytes
        return {
            "job": self.job,
            "uuid": self.uuid,
            "archive": self.archive,
            "status": self.status,
            "errmsg": self.errmsg,
            "started": round(self.started, 3),
            "seconds": round((self.ended or now) - self.started, 3),
            "total_bytes": self.total_bytes,
            "done_bytes": self.done_bytes,
            "zero_bytes": self.zero_bytes,
            "stored_bytes": self.stored_bytes,
            "plain_bytes": self.plain_bytes,
            "speed_bytes_s": self.speed_bytes_s,
            "rate_bytes_s": round(rate),
            "read_rate_bytes_s": round(read_rate),
            "left_s": round(left / rate) if rate and self.devices else None,
            "guest_latency": self._latency(),
            "base": self.base,
            "base_bytes": self.base_bytes,
            "shared_bytes": self.shared_bytes,
            "devices": [
                {**device, "full_reason": self.full_reasons.get(name)}
                for name, device in self.devices.items()
            ],
        }
