# SPDX-License-Identifier: Apache-2.0
"""The report as a text file for Prometheus: every machine, every place. Pure.

The dashboard of packaging/grafana-dashboard.json draws these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from vmapipe.control.coordinator.metrics import escaped_label
from vmapipe.fleet.report.facts import FleetReport, MachineReport, Severity

_STATES: Mapping[Severity, int] = {"ok": 0, "warning": 1, "critical": 2}
# None: of this machine there is no such value.
_Value = Callable[[MachineReport], float | None]
_OF_MACHINES: Mapping[str, tuple[str, _Value]] = {
    "vmapipe_machine_state": (
        "0: as promised, 1: needs a look, 2: not safe.",
        lambda row: _STATES[row.severity],
    ),
    "vmapipe_machine_newest_archive_timestamp_seconds": (
        "When the disks were as the newest archive has them.",
        lambda row: (row.newest.instant_s or row.newest.stored_s) if row.newest else None,
    ),
    "vmapipe_machine_promised_interval_seconds": (
        "How often an archive was promised.",
        lambda row: None if row.skip else row.promised_s,
    ),
    "vmapipe_machine_archives": ("How many archives there are.", lambda row: row.archives),
    "vmapipe_machine_stored_bytes": ("Their size as stored.", lambda row: row.stored_bytes),
    "vmapipe_machine_shared_bytes": (
        "How much of that their store has once for several.",
        lambda row: row.shared_bytes,
    ),
    "vmapipe_machine_newest_archive_bytes": (
        "Size of the newest archive as stored.",
        lambda row: row.newest.size_bytes if row.newest else None,
    ),
    "vmapipe_machine_disk_bytes": (
        "Size of its disks at the newest archive.",
        lambda row: (row.newest.disk_bytes or None) if row.newest else None,
    ),
    "vmapipe_machine_transferred_bytes": (
        "How much was transferred on the days of the report.",
        lambda row: row.transferred_bytes,
    ),
    "vmapipe_machine_last_verified_timestamp_seconds": (
        "When one of its archives was verified last.",
        lambda row: row.verified.checked_s if row.verified else None,
    ),
    "vmapipe_machine_last_drill_timestamp_seconds": (
        "When one of its archives had a restore test last.",
        lambda row: row.drill.tested_s if row.drill else None,
    ),
    "vmapipe_machine_last_drill_booted": (
        "Whether it booted then (1) or not (0).",
        lambda row: int(row.drill.verdict == "booted") if row.drill else None,
    ),
    "vmapipe_machine_boot_seconds": (
        "How long it took to boot then.",
        lambda row: row.drill.boot_s if row.drill and row.drill.verdict == "booted" else None,
    ),
}
_OF_TARGETS: Mapping[str, tuple[str, str]] = {
    "vmapipe_target_archives": ("How many archives a place has.", "archives"),
    "vmapipe_target_stored_bytes": ("Their size as stored.", "stored_bytes"),
    "vmapipe_target_shared_bytes": ("How much of that it has once for several.", "shared_bytes"),
    "vmapipe_target_newest_archive_timestamp_seconds": (
        "When it got the newest one.",
        "newest_s",
    ),
}


def render_metrics(report: FleetReport) -> str:
    """Return the file's content."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: FleetReport) -> Iterator[str]:
    yield from _head("vmapipe_report_timestamp_seconds", "When this was found out.")
    yield f"vmapipe_report_timestamp_seconds {report.made_s:.0f}"
    for name, (text, value_of) in _OF_MACHINES.items():
        samples = [(row, value_of(row)) for row in report.machines]
        if any(value is not None for _, value in samples):
            yield from _head(name, text)
        for row, value in samples:
            if value is not None:
                yield f"{name}{{{_machine(row)}}} {value}"
    yield from _head("vmapipe_machine_problem", "What is wrong with a machine; 1 each.")
    for row in report.machines:
        for kind in sorted({problem.kind for problem in row.problems}):
            yield f'vmapipe_machine_problem{{{_machine(row)},kind="{kind}"}} 1'
    for name, (text, field) in _OF_TARGETS.items():
        yield from _head(name, text)
        for target in report.targets:
            value = getattr(target, field)
            yield f'{name}{{target="{escaped_label(target.target)}"}} {value}'


def _head(name: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} gauge"


def _machine(row: MachineReport) -> str:
    return f'machine="{escaped_label(row.machine)}",host="{escaped_label(row.host)}"'
