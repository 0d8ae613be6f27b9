# SPDX-License-Identifier: Apache-2.0
"""Findings about a machine or a host, and how they are told: text, and a JSON object. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from vmapipe.control.qemu.disks import DiskChoice, LeftOut
from vmapipe.runtime.text import human_bytes, name_text, one_line

#: `problem`: a backup would fail. `warning`: it would succeed, and something be worth knowing before.
Verdict = Literal["ok", "info", "warning", "problem"]

_SIGNS: dict[Verdict, str] = {"ok": "ok", "info": "--", "warning": "!!", "problem": "XX"}
_TEXT_CHARS = 2000


class Finding(NamedTuple):
    """One thing that was looked at. `way_out`: what to do about it, in words; empty: nothing."""

    verdict: Verdict
    topic: str
    text: str
    way_out: str = ""


class DiskTaken(NamedTuple):
    """A disk that a backup takes, by its name in the archive; `size_bytes` 0: not known."""

    name: str
    size_bytes: int = 0


class Diagnosis(NamedTuple):
    """All that was found of one machine, or of this host."""

    about: str
    findings: Sequence[Finding]
    disks: Sequence[DiskTaken] = ()
    left_out: Sequence[LeftOut] = ()

    @property
    def problems(self) -> list[Finding]:
        """Return why a backup would fail; none: it would not, as far as this can be known before."""
        return [finding for finding in self.findings if finding.verdict == "problem"]


def taken(choice: DiskChoice) -> list[DiskTaken]:
    return [DiskTaken(disk.name, disk.size_bytes) for disk in choice.disks]


def as_text(diagnosis: Diagnosis) -> list[str]:
    """Return the lines for a terminal, without anything of a stranger's that could move its cursor."""
    lines = [f"{one_line(diagnosis.about, _TEXT_CHARS)}:"]
    for finding in diagnosis.findings:
        text = one_line(finding.text, _TEXT_CHARS)
        lines.append(f"  {_SIGNS[finding.verdict]}  {finding.topic}: {text}")
        if finding.way_out:
            lines.append(f"        -> {one_line(finding.way_out, _TEXT_CHARS)}")
    for disk in diagnosis.disks:
        size = human_bytes(disk.size_bytes) if disk.size_bytes else "size not known"
        lines.append(f"  ok  disk {name_text(disk.name)}: is backed up, {size}")
    for left in diagnosis.left_out:
        if left.level != "debug":
            sign = "!!" if left.level == "warn" else "--"
            reason = one_line(left.reason, _TEXT_CHARS)
            lines.append(f"  {sign}  disk {name_text(left.device)}: is left out: {reason}")
    return lines


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the same as an object; `ready`: a backup would not fail, as far as this is known."""
    return {
        "about": diagnosis.about,
        "ready": not diagnosis.problems,
        "findings": [finding._asdict() for finding in diagnosis.findings],
        "disks": [{"name": d.name, "bytes": d.size_bytes or None} for d in diagnosis.disks],
        "left_out": [
            {"name": left.device, "reason": left.reason, "level": left.level}
            for left in diagnosis.left_out
        ],
    }
