# SPDX-License-Identifier: Apache-2.0
"""The result of the last backup, as a text file for Prometheus' node_exporter. Pure but for `write`."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from typing import Any

from vmapipe.control.coordinator.status import JobState
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import HeldFolder
from vmapipe.runtime.side_files import write_whole
from vmapipe.runtime.text import MAX_NAME_CHARS, one_line

SUFFIX = ".prom"
_LAST_SUCCESS = "vmapipe_backup_last_success_timestamp_seconds"
# Far more than such a file has.
_MAX_OLD_BYTES = 1 << 20

_HELP = {
    "vmapipe_backup_success": "Whether the last backup was stored (1) or failed (0).",
    "vmapipe_backup_last_run_timestamp_seconds": "When the last backup ended, well or not.",
    _LAST_SUCCESS: "When a backup was last stored.",
    "vmapipe_backup_duration_seconds": "How long the last backup took.",
    "vmapipe_backup_archive_bytes": "Size of the last archive as stored; 0 if it failed.",
    "vmapipe_backup_cpu_seconds": "Processor time of all processes of the last backup.",
    "vmapipe_backup_peak_memory_bytes": "Largest resident memory of all its processes together.",
    "vmapipe_backup_base_bytes": "How much of the last archive was taken from an earlier one, its base.",
    "vmapipe_backup_shared_bytes": "How much of that the file system stores once for both.",
    "vmapipe_backup_guest_latency_worst_seconds": "What the guest waited in its worst second (p99).",
    "vmapipe_backup_guest_latency_bound_seconds": "What it was to wait at most (--guest-latency).",
    "vmapipe_backup_guest_latency_above_seconds": "For how long the guest waited longer than that.",
    "vmapipe_backup_disk_size_bytes": "Size of a disk.",
    "vmapipe_backup_disk_done_bytes": "How much of a disk the last backup took.",
    "vmapipe_backup_disk_zero_bytes": "How much of that is zero.",
    "vmapipe_backup_disk_read_bytes": "How much was read from the disk.",
    "vmapipe_backup_disk_saved_bytes": "How much was saved before the guest overwrote it.",
    "vmapipe_backup_disk_sent_bytes": "How much was sent to the archiver.",
    "vmapipe_backup_disk_unchanged_bytes": "How much of a disk was as in the base.",
    "vmapipe_backup_disk_incremental": "Whether of a disk only what has changed was sent (1), or all (0).",
}
_DISK_FIELDS = {
    "vmapipe_backup_disk_size_bytes": "bytes",
    "vmapipe_backup_disk_done_bytes": "done_bytes",
    "vmapipe_backup_disk_zero_bytes": "zero_bytes",
    "vmapipe_backup_disk_read_bytes": "read_bytes",
    "vmapipe_backup_disk_saved_bytes": "saved_bytes",
    "vmapipe_backup_disk_sent_bytes": "sent_bytes",
    "vmapipe_backup_disk_unchanged_bytes": "unchanged_bytes",
    "vmapipe_backup_disk_incremental": "incremental",
}


def render(backup: str, state: JobState, last_success: float, ended_s: float | None = None) -> str:
    """`backup` tells this file's metrics from those of others. `last_success` 0: never.

    `ended_s`: the end by the clock as it is now; the state's times only ever go on.
    """
    ended_s = state.ended if ended_s is None else ended_s
    stored = state.status == "done"
    values: dict[str, float] = {
        "vmapipe_backup_success": int(stored),
        "vmapipe_backup_last_run_timestamp_seconds": round(ended_s, 3),
        "vmapipe_backup_duration_seconds": round(state.ended - state.started, 3),
        "vmapipe_backup_archive_bytes": state.stored_bytes if stored else 0,
        "vmapipe_backup_cpu_seconds": state.cpu_s,
        "vmapipe_backup_peak_memory_bytes": state.peak_rss_bytes,
        "vmapipe_backup_base_bytes": state.base_bytes,
        "vmapipe_backup_shared_bytes": state.shared_bytes,
    }
    if state.felt:
        values["vmapipe_backup_guest_latency_worst_seconds"] = state.felt["worst_s"]
        values["vmapipe_backup_guest_latency_bound_seconds"] = state.felt["bound_s"]
        values["vmapipe_backup_guest_latency_above_seconds"] = state.felt["seconds_above"]
    if stored or last_success:
        values[_LAST_SUCCESS] = round(ended_s if stored else last_success, 3)
    lines = []
    for name, text in _HELP.items():
        samples: list[tuple[Mapping[str, str], float]] = []
        if name in values:
            samples.append(({"backup": backup}, values[name]))
        elif name in _DISK_FIELDS:
            samples += [
                ({"backup": backup, "disk": label}, disk[_DISK_FIELDS[name]])
                for label, disk in _labelled(state)
            ]
        if samples:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
            lines += [f"{name}{{{_labels(labels)}}} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _labelled(state: JobState) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Disks by names that are short enough for a label, and still differ: no exporter takes two alike."""
    seen: set[str] = set()
    for disk in state.devices.values():
        label = one_line(disk["name"], MAX_NAME_CHARS)
        while label in seen:
            label += "'"
        seen.add(label)
        yield label, {**disk, "incremental": int(state.full_reasons.get(disk["name"]) == "")}


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{key}="{escaped_label(value)}"' for key, value in labels.items())


def escaped_label(text: str) -> str:
    text = one_line(text, MAX_NAME_CHARS)
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def write(path: str, state: JobState) -> None:
    """All of it or nothing: the exporter may read at any moment. Raises Failure."""
    place, name = os.path.split(path)
    backup = name.removesuffix(SUFFIX)
    try:
        with HeldFolder(place) as folder:
            text = render(backup, state, old_value(folder, name, _LAST_SUCCESS), time.time())
        write_whole(path, text.encode(), 0o644)  # the exporter is another user
    except OSError as error:
        raise Failure(f"cannot write the metrics {path}: {os_error_text(error)}") from error


def old_value(folder: HeldFolder, name: str, metric: str) -> float:
    """Return a metric's value from the file that is there, as when it last went well; 0: not known."""
    line = re.compile(rf"^{metric}\{{[^\n]*\}} ([0-9.e+]+)$", re.MULTILINE)
    try:
        fd = folder.open(name, os.O_RDONLY | os.O_NONBLOCK)
        with open(fd, encoding="utf-8", errors="replace") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return 0.0
            found = line.search(file.read(_MAX_OLD_BYTES))
        return float(found[1]) if found else 0.0
    except (OSError, ValueError):
        return 0.0
