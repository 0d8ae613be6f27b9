# SPDX-License-Identifier: Apache-2.0
"""Incremental backups of a running QEMU: only what has changed is sent, and every archive is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.control.qemu.hammer import CLUSTER
from tests.control.qemu.tracked_machine import (
    NAMES,
    Report,
    check_archive,
    make_images,
    tracked_machine,
)
from tests.machine import Need, good, next_event, started, without_limit


@pytest.mark.every_qemu
def test_only_what_has_changed_is_sent_and_the_archive_shows_the_instant(
    qemu: str, need: Need, tmp_path: Path, out: Path
) -> None:
    """With a filter of ours in the job's place (7.2, 10.0), with an I/O thread, below a throttle filter."""
    need("qemu-img", "qemu-system-x86_64")
    contents = make_images(tmp_path)
    first, second = out / "vm-2026-01-01.vma", out / "vm-2026-01-02.vma"
    with tracked_machine(need, tmp_path, contents) as tracked:
        report = Report(good(*tracked.command(first)))
        assert all("no earlier archive" in reason for reason in report.reasons.values())
        check_archive(first, contents, tmp_path / "restored")
        for name in NAMES:
            tracked.write(name, 3, 77)
            tracked.write(name, 5, 0)
            tracked.write(name, 40, 78)
        before = {name: bytes(content) for name, content in contents.items()}
        with started(*tracked.command(second, "--speed", "64K")) as process:
            next_event(process, "instant")
            for name in NAMES:  # what has changed before, and what has not, twice
                for pattern in (99, 98):
                    tracked.write(name, 3, pattern)
                    tracked.write(name, 20, pattern, 2)
            without_limit(process)
            said, complaints = process.communicate()
        assert process.returncode == 0, complaints
        report = Report(said)
        assert report.reasons == dict.fromkeys(NAMES, "")
        changed = {device["name"]: device["changed_bytes"] for device in report["base"]["devices"]}
        assert changed == dict.fromkeys(NAMES, 3 * CLUSTER)
        check_archive(second, before, tmp_path / "restored")
        assert tracked.machine.is_untouched()
        records = tracked.records()
        (name,) = records["disk0"]
        assert records == {f"disk{number}": [name] for number in range(3)}
        assert name == f"vmapipe-{report['stored']['uuid']}"
    good("verify", second)
