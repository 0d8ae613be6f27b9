# SPDX-License-Identifier: Apache-2.0
"""Records of a small fleet: a machine for each thing that can be wrong, and one that is well."""

from __future__ import annotations

from vmapipe.fleet.records import (
    ArchiveRecord,
    DrillRecord,
    MachineRecord,
    RunRecord,
    VerificationRecord,
)
from vmapipe.fleet.report.facts import Promise, ReportInput

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
#: 2026-11-30 12:00 UTC
NOW_S = 1796040000.0
PROMISES = {
    "": Promise(DAY_S, 30 * DAY_S),
    "parked": Promise(skip="told by the owner"),
    "homeless": Promise(has_target=False),
    "unseen": Promise(verify_every_s=DAY_S),
}


def archive(machine: str, age_s: float, name: str = "", **more: object) -> ArchiveRecord:
    name = name or f"{machine}-{age_s:.0f}.vma"
    at_s = NOW_S - age_s
    fields: dict[str, object] = {
        "location": f"/srv/{name}",
        "instant_s": at_s,
        "stored_s": at_s + 60,
        "disk_bytes": 8 << 30,
        "size_bytes": 1 << 30,
        "transferred_bytes": 1 << 20,
        **more,
    }
    return ArchiveRecord(machine, "b1", name, **fields)  # type: ignore[arg-type]


def machine(name: str, **more: object) -> MachineRecord:
    return MachineRecord(name, f"id-{name}", "pve1", "qmp", **more)  # type: ignore[arg-type]


def drill(machine: str, name: str, verdict: str, age_s: float = HOUR_S) -> DrillRecord:
    return DrillRecord(
        machine,
        "b1",
        name,
        NOW_S - age_s,
        verdict,  # type: ignore[arg-type]
        21.0,
        "text on the serial console",
        f"/srv/{name}.drill/screen.png",
        30.0,
        "" if verdict == "booted" else "the firmware found no disk to boot from",
    )


def failed(machine: str, age_s: float) -> RunRecord:
    return RunRecord(
        f"run-{machine}",
        "backup",
        machine,
        "pve1",
        "b1",
        "",
        state="failed",
        ended_s=NOW_S - age_s,
        text="cannot connect to /run/vm.qmp: is QEMU running?",
    )


def small_fleet() -> ReportInput:
    names = ["well", "late", "never", "broken", "stuck", "retry", "untested", "gone", "parked"]
    names += ["new", "homeless", "unseen"]
    more = {"gone": {"vanished_s": NOW_S - 3 * DAY_S}, "new": {"first_seen_s": NOW_S - HOUR_S}}
    return ReportInput(
        machines=[machine(name, **more.get(name, {})) for name in names],
        archives=[
            archive("well", 3 * HOUR_S, "well.vma"),
            archive("well", 27 * HOUR_S),
            archive("late", 40 * HOUR_S),
            archive("broken", HOUR_S, "broken.vma"),
            archive("stuck", HOUR_S, "stuck.vma"),
            archive("retry", 20 * HOUR_S),
            archive("untested", HOUR_S),
            archive("untested", 90 * DAY_S),
            archive("gone", HOUR_S),
            archive("unseen", 90 * HOUR_S),
            archive("unseen", HOUR_S),
        ],
        verifications=[
            VerificationRecord("well", "b1", "well.vma", NOW_S - HOUR_S, "ok", True),
            VerificationRecord(
                "broken", "b1", "broken.vma", NOW_S, "damaged", True, text="disk sda at 7 MiB"
            ),
        ],
        drills=[drill("well", "well.vma", "booted"), drill("stuck", "stuck.vma", "not-booted")],
        runs=[failed("retry", 2 * HOUR_S), failed("never", HOUR_S)],
    )
