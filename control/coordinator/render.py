# SPDX-License-Identifier: Apache-2.0
"""The looks of a job's events: a bar on a terminal, lines in a log, JSON lines, or nothing."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, TextIO

from vmapipe.runtime.events import Emit, Event, encode_line, ignore
from vmapipe.runtime.process import failure_of
from vmapipe.runtime.text import MAX_NAME_CHARS, human_bytes, name_text, one_line

if TYPE_CHECKING:
    from vmapipe.runtime.event_types import (
        BackupProgressEvent,
        BaseEvent,
        BufferEvent,
        DamageFields,
        DefinedEvent,
        DoneEvent,
        DrilledEvent,
        DrillingEvent,
        ExportedEvent,
        InstantEvent,
        MachinesEvent,
        MountedEvent,
        ReadProgressEvent,
        RestoredEvent,
        ServingEvent,
        StoredEvent,
        VerifiedEvent,
    )

# In a log, a line at least so often, however slow the job is.
_LOG_LINE_S = 10.0
_LOG_STEP_PERCENT = 10
# Often enough for a bar that moves, seldom enough to cost nothing.
_PROGRESS_S = 0.25
# Of a disk that is not whole: more than a person reads.
_SHOWN_RANGES = 20


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="report as JSON lines (docs/operations/reports.md)"
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing unless it fails")


@contextlib.contextmanager
def renderer(verb: str, options: argparse.Namespace, stream: TextIO) -> Iterator[Emit]:
    """Yield the function that takes a job's events. `stream` takes text that is not data."""
    if options.json:

        def write_json(event: Event) -> None:
            stream.write(encode_line({"time": round(time.time(), 3), **event}).decode())
            stream.flush()

        report = _going_on(write_json, stream)
        try:
            yield report
        except BaseException as error:
            failure = failure_of(error)
            if failure is not None:
                report({"event": "failed", "text": one_line(failure[0]), "exit_code": failure[1]})
            raise
    elif options.quiet:
        yield ignore
    elif sys.stderr.isatty():
        bar = Bar(verb, sys.stderr)
        try:
            yield _going_on(bar, sys.stderr)
        finally:
            with contextlib.suppress(OSError):
                bar.clear()
    else:
        yield _going_on(Log(verb, stream), stream)


def _going_on(report: Emit, stream: TextIO) -> Emit:
    """Report as long as there is a reader: a closed pipe must not end a backup."""

    def careful(event: Event) -> None:
        try:
            report(event)
        except OSError:
            # What is still in the buffer goes nowhere, and so does all that follows.
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), stream.fileno())

    return careful


def read_progress(emit: Emit, total_bytes: int) -> Callable[[int], None]:
    """Return what is told how many bytes are read, however often, and reports it; 0: the end is not known."""
    next_s = 0.0

    def tell(at: int) -> None:
        nonlocal next_s
        if (now := time.monotonic()) < next_s:
            return
        next_s = now + _PROGRESS_S
        emit(
            {
                "event": "progress",
                "done_bytes": at,
                "total_bytes": max(at, total_bytes),
                "archive_bytes": at,
            }
        )

    return tell


def human_time(seconds: float) -> str:
    """75 to `1:15`."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}"


class _Text:
    """The common part of bar and log: totals, and the words at the end."""

    def __init__(self, verb: str, stream: TextIO) -> None:
        self.verb = verb
        self.stream = stream
        self.started = time.monotonic()
        self.done_bytes = self.total_bytes = self.zero_bytes = 0
        # By device, how hard a slow archiver presses on the guest: an index of _PRESSURE.
        self._pressure: dict[str, int] = {}

    def take_progress(self, event: BackupProgressEvent | ReadProgressEvent) -> None:
        if "devices" in event:
            devices = event["devices"]
            self.done_bytes = sum(d["done_bytes"] for d in devices)
            self.zero_bytes = sum(d["zero_bytes"] for d in devices)
            self.total_bytes = sum(d["bytes"] for d in devices)
        else:
            self.done_bytes, self.total_bytes = event["done_bytes"], event["total_bytes"]

    @property
    def rate(self) -> float:
        return self.done_bytes / max(0.001, time.monotonic() - self.started)

    @property
    def percent(self) -> int:
        return min(100, 100 * self.done_bytes // self.total_bytes) if self.total_bytes else 100

    @property
    def left(self) -> str:
        if not self.done_bytes:
            return "--:--"
        return human_time(max(0, self.total_bytes - self.done_bytes) / self.rate)

    def summary(self, event: Event) -> str | None:  # noqa: PLR0911, PLR0912  a case an event
        """The line for an event that is worth one in any form."""
        match event["event"]:
            case "stored":
                return self._stored_text(event)
            case "base":
                return _base_text(event)
            case "done":
                text = f"{self.verb} done in {event['seconds']:.1f} s, {self._rate_text(event)}"
                return text + _felt_text(event)
            case "buffer":
                return self._pressure_text(event)
            case "skipped" if event["level"] != "debug":
                device, reason = one_line(event["device"]), one_line(event["reason"])
                return f"not in the archive: {device}: {reason}"
            case "restored":
                return _restored_text(event)
            case "moved":
                device, path = name_text(event["device"]), one_line(event["path"])
                return f"the machine's disk {device} is now {path}, and whole"
            case "defined":
                return _defined_text(event)
            case "verified":
                return verified_text(event)
            case "instant":
                return _instant_text(event)
            case "serving":
                return _serving_text(event)
            case "exported" | "mounted":
                return _opened_text(event)
            case "ready":
                return f"ready; backups ask {one_line(event['listen'])}"
            case "drilling" | "drilled":
                return _drill_text(event)
            case "notice":
                return one_line(event["text"])
            case "machine":
                # Totals and rates are of one machine.
                self.started = time.monotonic()
                self.done_bytes = self.total_bytes = self.zero_bytes = 0
                self._pressure.clear()
                name = f" ({one_line(event['name'], MAX_NAME_CHARS)})" if event["name"] else ""
                how = "it runs" if event["runs"] else "it does not run"
                return f"VM {event['vmid']}{name}: backup mode {event['mode']}, {how}"
            case "machines":
                return _machines_text(event)
            case "speed":
                speed = event["bytes_per_s"]
                limit = f"{human_bytes(speed)}/s"
                return f"the speed limit is now {limit}" if speed else "speed limit removed"
        return None

    def _stored_text(self, event: StoredEvent) -> str:
        text = (
            f"stored {one_line(event['archive'])}: {human_bytes(event['stored_bytes'])} for "
            f"{human_bytes(self.total_bytes)} of disks"
        )
        if not event.get("base_bytes"):
            # With a base, how much of what has not changed is zero is not known.
            text += f" ({human_bytes(self.zero_bytes)} of them zero)"
        else:
            shared = event.get("shared_bytes", 0)
            also = f", {human_bytes(shared)} shared with it" if shared else ""
            text += f"; {human_bytes(event['base_bytes'])} from the base{also}"
        return text

    def _rate_text(self, event: DoneEvent) -> str:
        limit = event["speed_bytes_s"]
        if not limit:
            return f"{human_bytes(self.rate)}/s"
        # The limit is one on reading, which holes need none of.
        read = event["read_bytes"] / max(0.001, event["seconds"])
        return f"{human_bytes(read)}/s read (limit {human_bytes(limit)}/s)"

    def _pressure_text(self, event: BufferEvent) -> str | None:
        """A line when it gets worse; that it got better is not told."""
        now = 2 if event["waiting_writes"] else 1 if event["spool_bytes"] else 0
        before = self._pressure.get(event["device"], 0)
        self._pressure[event["device"]] = max(now, before)
        return f"{one_line(event['device'])}: {_PRESSURE[now]}" if now > before else None


def _felt_text(event: DoneEvent) -> str:
    """Return what the guest has felt, as the rest of a line."""
    felt = event.get("guest_latency")
    if not felt:
        return ""
    return (
        f"; in its worst second the guest waited {1000 * felt['worst_s']:.3g} ms, in "
        f"{felt['seconds_above']} of {felt['seconds']} s more than {1000 * felt['bound_s']:.3g} ms"
    )


def _base_text(event: BaseEvent) -> str | None:
    """Tell of the base, and why disks are sent in full."""
    full = [
        f"{name_text(device['name'])} in full: {one_line(device['reason'])}"
        for device in event["devices"]
        if not device["incremental"]
    ]
    if event["archive"]:
        return "; ".join([f"based on {one_line(event['archive'])}", *full])
    return "; ".join(full) or None


def _machines_text(event: MachinesEvent) -> str:
    stored = len(event["stored"])
    words = [f"{stored} machine{'s' * (stored != 1)} stored"]
    words += [f"{len(event[key])} {key.replace('_', ' ')}" for key in _NOT_STORED if event[key]]
    return ", ".join(words)


_NOT_STORED: tuple[Literal["left_out", "failed"], ...] = ("left_out", "failed")


_PRESSURE = (
    "",
    "the archiver is slow: old data goes to the spool file",
    "the archiver is slow and the buffers are full: writes of the guest wait",
)


def _restored_text(event: RestoredEvent) -> str:
    checked = "every byte checked" if event["digests_checked"] else "not every byte checked"
    if event["salvaged"]:
        checked = "what there is of a damaged archive"
    rate = event["archive_bytes"] / max(0.001, event["seconds"])
    return (
        f"restored {one_line(event['archive'])}: {human_bytes(event['data_bytes'])} of data and "
        f"{human_bytes(event['zero_bytes'])} of zeroes in {event['seconds']:.1f} s, "
        f"{human_bytes(rate)}/s ({checked})"
    )


def _defined_text(event: DefinedEvent) -> str:
    lines = [
        f"not as it was: {one_line(one['key'])}: {one_line(one['reason'])}"
        for one in event["left_out"]
    ]
    for disk in event["disks"]:
        device, path = name_text(disk["device"]), one_line(disk["path"])
        lines.append(f"disk {disk['name']}: {device} in {path} ({disk['format']})")
    lines.append(f"defined the domain {event['domain']} (uuid {event['uuid']})")
    return "\n".join(lines)


def _instant_text(event: InstantEvent) -> str:
    held = f"held for {1000 * event['held_s']:.0f} ms: this is the instant"
    if "memory" in event:
        return f"the machine was {held} ({one_line(event['memory'])})"
    return f"all disks {held}"


def _serving_text(event: ServingEvent) -> str:
    size = human_bytes(event["bytes"])
    return f"serving {one_line(event['disk'])}: {one_line(event['path'])}, {size}"


def _opened_text(event: ExportedEvent | MountedEvent) -> str:
    if event["event"] == "mounted":
        return f"{one_line(event['archive'])} is mounted on {one_line(event['folder'])}"
    device = one_line(event["device"], MAX_NAME_CHARS)
    access = "writable" if event["writable"] else "read-only"
    size = human_bytes(event["bytes"])
    return f"{device} of {one_line(event['archive'])}, {size}, {access}: {event['uri']}"


def _drill_text(event: DrillingEvent | DrilledEvent) -> str:
    archive = one_line(event["archive"])
    if event["event"] == "drilling":
        way = "going on from the memory in" if event["resumed"] else "booting"
        how = "KVM" if event["accelerator"] == "kvm" else "emulated: some 10 times slower"
        lines = [f"{way} {archive} ({how}), {event['limit_s']:.0f} s at most"]
        lines += [f"  not as it was: {one['key']}: {one['reason']}" for one in event["left_out"]]
        return "\n".join(lines)
    seconds = event["seconds"]
    after = f" in {seconds:.1f} s" if seconds is not None else ""
    verdict = "goes on" if event["resumed"] and seconds is not None else event["verdict"]
    where = f"; look at {one_line(event['evidence'])}" if event["evidence"] else ""
    read = human_bytes(event["bytes_read"])
    return f"{archive}: {verdict}{after}: {event['reason']}; the guest read {read}{where}"


def verified_text(event: VerifiedEvent) -> str:
    """Return the lines of a verification: each finding, each disk's state, and how much was checked."""
    # Here: backups use this file, too, and nothing of a restore.
    from vmapipe.restore.verify.report import range_text, state_text

    lines = [_damage_text(find) for find in event["damage"]]
    if event["damage_count"] > len(lines):
        lines.append(f"... and {event['damage_count'] - len(lines)} more")
    for disk in event["devices"]:
        lines.append(state_text(disk))
        lines += [f"  {range_text(one)}" for one in disk["ranges"][:_SHOWN_RANGES]]
        if disk["range_count"] > _SHOWN_RANGES:
            lines.append(
                f"  ... and {disk['range_count'] - _SHOWN_RANGES} more (--json: up to 1000)"
            )
    if event["stored_bytes"]:
        lines.append(_stored_verdict(event))
        return "\n".join(lines)
    size = human_bytes(event["archive_bytes"])
    speed = human_bytes(event["archive_bytes"] / max(0.001, event["seconds"]))
    if event["data_checked"]:
        scope = "structure and every byte of data compared with the manifest"
    elif event["proved"] is not None:
        scope = f"no manifest: structure, and {event['proved']}"
    elif event["manifest"] is not None:
        scope = "structure, and what data could be compared with the manifest"
    else:
        scope = "structure only: the data cannot be checked without a manifest"
    verdict = "nothing is wrong" if event["ok"] else "DAMAGED"
    lines.append(f"{one_line(event['archive'])}: {verdict}; {size}, {scope}, {speed}/s")
    return "\n".join(lines)


def _stored_verdict(event: VerifiedEvent) -> str:
    """Return what can be said of an encrypted archive without a key."""
    verdict = "DAMAGED"
    if event["ok"]:
        verdict = "the stored file is, byte for byte, the one that its manifest vouches for"
    size = human_bytes(event["stored_bytes"])
    return (
        f"{one_line(event['archive'])}: {verdict}; {size}, encrypted: that is all that can be checked "
        "without a key (--identity FILE)"
    )


def _damage_text(find: DamageFields) -> str:
    text = str(find["text"])
    if find["device"] is not None and find["offset"] is not None and find["length"] is not None:
        end = find["offset"] + find["length"] - 1
        text = f"device {name_text(find['device'])}, bytes {find['offset']}..{end}: {text}"
    if find["archive_offset"] is not None:
        text += f" (archive offset {find['archive_offset']})"
    return one_line(text)


def _fit(text: str) -> str:
    """Once more for whatever an event's words have not thought of; their own line breaks stay."""
    return "\n".join(one_line(line) for line in text.split("\n"))


class Bar(_Text):
    """One line that moves, and above it the lines that stay."""

    def __call__(self, event: Event) -> None:
        if event["event"] == "progress":
            self.take_progress(event)
            self.stream.write("\r\x1b[K" + self._line())
            self.stream.flush()
        elif (text := self.summary(event)) is not None:
            self.clear()
            self.stream.write(_fit(text) + "\n")

    def _line(self) -> str:
        head = f"{self.verb} {self.percent:3d} % "
        tail = (
            f" {human_bytes(self.done_bytes)} of {human_bytes(self.total_bytes)}, "
            f"{human_bytes(self.rate)}/s, {self.left} left"
        )
        columns = shutil.get_terminal_size().columns
        room = min(40, columns - len(head) - len(tail) - 3)
        if room < 5:
            return (head + tail)[: columns - 1]
        filled = room * self.percent // 100
        return head + "[" + "#" * filled + "." * (room - filled) + "]" + tail

    def clear(self) -> None:
        self.stream.write("\r\x1b[K")
        self.stream.flush()


class Log(_Text):
    """A line every 10 %, or every 10 s when that is seldom."""

    def __init__(self, verb: str, stream: TextIO) -> None:
        super().__init__(verb, stream)
        self._said_at = self.started
        self._said_percent = 0

    def __call__(self, event: Event) -> None:
        if event["event"] == "progress":
            self.take_progress(event)
            now = time.monotonic()
            step = self.percent - self._said_percent >= _LOG_STEP_PERCENT
            if (step and now - self._said_at >= 1.0) or now - self._said_at >= _LOG_LINE_S:
                self._said_at, self._said_percent = now, self.percent
                self._say(
                    f"{self.verb} {self.percent} % ({human_bytes(self.done_bytes)} of "
                    f"{human_bytes(self.total_bytes)}, {human_bytes(self.rate)}/s, "
                    f"{self.left} left)"
                )
        elif (text := self.summary(event)) is not None:
            self._say(text)
        if event["event"] == "machine":
            self._said_percent = 0

    def _say(self, text: str) -> None:
        self.stream.write(_fit(text) + "\n")
        self.stream.flush()
