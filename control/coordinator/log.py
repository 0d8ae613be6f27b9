# SPDX-License-Identifier: Apache-2.0
"""The log of one backup, in the words that vzdump's users know: time, level, text."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import TYPE_CHECKING

from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.events import Emit, Event, ignore
from vmapipe.runtime.logs import LEVELS
from vmapipe.runtime.side_files import open_new, open_to_append
from vmapipe.runtime.text import human_bytes, one_line

if TYPE_CHECKING:
    from vmapipe.runtime.event_types import BackupProgressEvent, StoredEvent


class JobLog:
    """`what` is what is backed up, `kind` its kind: `Starting Backup of VM 100 (qemu)`."""

    def __init__(
        self,
        path: str,
        what: str,
        kind: str = "",
        level: str = "info",
        *,
        append: bool = False,
        complain: Emit = ignore,
    ) -> None:
        """Raises Failure; without `append`, also when the file is there already.

        `complain` hears once that the log cannot be written any more.
        """
        self._path = path
        self._complain = complain
        self._has_failed = False
        self._what = what
        self._least = LEVELS.index(level)
        self._started = time.monotonic()
        self._percent = -1
        self._total_bytes = self._zero_bytes = 0
        try:
            self._fd = open_to_append(path) if append else open_new(path)
        except OSError as error:
            raise Failure(f"cannot write the log {path}: {os_error_text(error)}") from error
        self._say("info", f"Starting Backup of {what}{kind and f' ({kind})'}")
        self._say("info", f"Backup started at {_now()}")

    def __enter__(self) -> JobLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            seconds = int(time.monotonic() - self._started)
            took = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            self._say("info", f"Finished Backup of {self._what} ({took})")
            self._say("info", f"Backup finished at {_now()}")
        else:
            self._say("error", f"Backup of {self._what} failed - {error}")
            self._say("info", f"Failed at {_now()}")
        try:
            os.close(self._fd)
        except OSError as error:  # a network's file system may tell it only now
            self._fail(error)

    def __call__(self, event: Event) -> None:
        """Take in what the job tells."""
        match event["event"]:
            case "reading":
                name = event["device"].removeprefix("drive-")
                size = human_bytes(event["bytes"])
                self._say("info", f"include disk '{name}' '{event['path']}' {size}")
            case "machine":
                status = "running" if event["runs"] else "stopped"
                self._say("info", f"status = {status}")
                if event["name"]:
                    self._say("info", f"VM Name: {event['name']}")
                self._say("info", f"backup mode: {event['mode']}")
            case "skipped":
                name = event["device"].removeprefix("drive-")
                self._say(event["level"], f"exclude disk '{name}' ({event['reason']})")
            case "begun":
                self._say("info", f"started backup task '{event['uuid']}'")
            case "instant":
                self._say("info", f"all disks held for {1000 * event['held_s']:.0f} ms")
            case "progress" if "devices" in event:
                self._progress(event)
            case "buffer" if event["waiting_writes"]:
                self._say("warn", f"{event['device']}: {event['waiting_writes']} writes wait")
            case "speed":
                limit = human_bytes(event["bytes_per_s"])
                self._say("info", f"bandwidth limit: {limit}/s" if event["bytes_per_s"] else "none")
            case "stored":
                self._stored(event)
            case "notice":
                self._say("warn", str(event["text"]))
            case name:
                fields = " ".join(
                    f"{key}={value}" for key, value in event.items() if key != "event"
                )
                self._say("debug", f"{name}: {fields}")

    def _progress(self, event: BackupProgressEvent) -> None:
        done = sum(device["done_bytes"] for device in event["devices"])
        total = self._total_bytes = sum(device["bytes"] for device in event["devices"])
        self._zero_bytes = sum(device["zero_bytes"] for device in event["devices"])
        percent = 100 * done // total if total else 100
        # vzdump tells more at the beginning and less in the middle; a line a
        # percent at most says as much and keeps the log short.
        if percent > self._percent:
            self._percent = percent
            seconds = time.monotonic() - self._started
            rate = human_bytes(done / max(0.001, seconds))
            self._say(
                "info",
                f"{percent}% ({human_bytes(done)} of {human_bytes(total)}) in {int(seconds)}s, "
                f"read: {rate}/s",
            )

    def _stored(self, event: StoredEvent) -> None:
        seconds = max(0.001, time.monotonic() - self._started)
        total, zero = self._total_bytes, self._zero_bytes
        if zero:
            share = 100 * zero // total
            self._say("info", f"backup is sparse: {human_bytes(zero)} ({share}%) total zero data")
        rate = human_bytes(total / seconds)
        self._say("info", f"transferred {human_bytes(total)} in {int(seconds)} seconds ({rate}/s)")
        self._say("info", f"archive file size: {human_bytes(event['stored_bytes'])}")

    def _say(self, level: str, text: str) -> None:
        if LEVELS.index(level) < self._least:
            return
        line = f"{_now()} {level.upper()}: {one_line(text)}\n".encode(errors="backslashreplace")
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError as error:
            # A full disk must not end a backup for the sake of its log.
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._has_failed:
            self._has_failed = True
            text = f"the log {self._path} lacks lines: {os_error_text(error)}; the backup goes on"
            self._complain({"event": "notice", "text": text})


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
