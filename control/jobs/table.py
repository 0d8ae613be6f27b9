# SPDX-License-Identifier: Apache-2.0
"""A running backup for people: a line that says how far it is, its disks, its processes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vmapipe.control.render import human_bytes, human_time
from vmapipe.runtime.text import MAX_NAME_CHARS, one_line

Details = Mapping[str, Any]

# Column heads of the disks' table, and the fields below them.
_DISK_COLUMNS = (
    ("READ", "read_bytes"),
    ("SENT", "sent_bytes"),
    ("ZERO", "zero_bytes"),
    ("SAVED", "saved_bytes"),
    ("BUFFERED", "memory_bytes"),
    ("SPOOLED", "spool_bytes"),
)


def job_lines(job: Details, before: Details | None = None) -> list[str]:
    """`before`: the same job some time ago; processors are then those of the time between."""
    lines = [f"{one_line(job['archive'])}  {job['job'][:8]}  {_progress(job)}"]
    if job["plain_bytes"]:
        ratio = 100 * job["stored_bytes"] / job["plain_bytes"]
        lines.append(
            f"  archive so far: {human_bytes(job['stored_bytes'])}, "
            f"{ratio:.0f} % of {human_bytes(job['plain_bytes'])} before compression"
        )
    lines += _indented(_disks(job["devices"]))
    lines += _indented(_processes(job, before))
    return lines


def _progress(job: Details) -> str:
    if not job["devices"]:
        return "is starting"
    total, done = job["total_bytes"], job["done_bytes"]
    words = [f"{_percent(done, total)} of {human_bytes(total)}"]
    words.append(f"{human_bytes(job['rate_bytes_s'])}/s")
    # Holes and zeroes are done without much reading, and the limit is one on that.
    words.append(f"reads {human_bytes(job['read_rate_bytes_s'])}/s")
    if job["speed_bytes_s"]:
        words[-1] += f" (limit {human_bytes(job['speed_bytes_s'])}/s)"
    words.append(f"{human_time(job['seconds'])} so far")
    if done == total:
        words.append("finishing")
    elif job["left_s"] is not None:
        words.append(f"{human_time(job['left_s'])} left")
    return ", ".join(words)


def _disks(devices: Sequence[Details]) -> list[Sequence[str]]:
    if not devices:
        return []
    rows: list[Sequence[str]] = [
        ("DISK", "DONE", *(head for head, _ in _DISK_COLUMNS), "WAITING WRITES")
    ]
    for disk in devices:
        sizes = [human_bytes(disk[name]) for _, name in _DISK_COLUMNS]
        done = _percent(disk["done_bytes"], disk["bytes"])
        rows.append(
            (one_line(disk["name"], MAX_NAME_CHARS), done, *sizes, str(disk["waiting_writes"]))
        )
    return rows


def _processes(job: Details, before: Details | None) -> list[Sequence[str]]:
    earlier = {process["pid"]: process for process in before["processes"]} if before else {}
    rows: list[Sequence[str]] = [("PROCESS", "PID", "CPU", "MEMORY")]
    for process in job["processes"]:
        was = earlier.get(process["pid"], {"cpu_s": 0.0, "age_s": 0.0})
        seconds = max(0.01, process["age_s"] - was["age_s"])
        cpu = f"{100 * (process['cpu_s'] - was['cpu_s']) / seconds:.0f} %"
        memory = human_bytes(process["rss_bytes"])
        rows.append((one_line(process["name"], MAX_NAME_CHARS), str(process["pid"]), cpu, memory))
    return rows


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // whole if whole else 100} %"


def _indented(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as what is in them: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]
