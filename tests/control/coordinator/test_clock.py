# SPDX-License-Identifier: Apache-2.0
"""A clock that is set while a backup runs changes nothing of how long it took."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vmapipe.control.coordinator.metrics import write
from vmapipe.control.coordinator.status import now_s
from vmapipe.control.coordinator.status_socket import JobServer
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import ChildCommands


@pytest.mark.parametrize("jump_s", [5 * 3600, -5 * 3600, 10 * 365 * 86400, -30 * 365 * 86400])
@pytest.mark.usefixtures("runtime_folder")
def test_durations_are_true_when_the_clock_jumps_and_the_end_is_by_the_clock_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: int
) -> None:
    cancel, commands = Cancel(), ChildCommands()
    wall = time.time
    with JobServer("1" * 32, "vm.vma", cancel, commands) as server:
        monkeypatch.setattr(time, "time", lambda: wall() + jump_s)
        details = server.state.details(now_s())
        assert 0 <= details["seconds"] < 60
        server.take(
            {
                "event": "done",
                "seconds": 1,
                "read_bytes": 0,
                "speed_bytes_s": 0,
                "cpu_s": 0,
                "peak_rss_bytes": 0,
            }
        )
        write(str(tmp_path / "vm.prom"), server.state)
    lines = dict(
        line.rsplit(" ", 1)
        for line in (tmp_path / "vm.prom").read_text().splitlines()
        if not line.startswith("#")
    )
    assert 0 <= float(lines['vmapipe_backup_duration_seconds{backup="vm"}']) < 60
    ended = float(lines['vmapipe_backup_last_run_timestamp_seconds{backup="vm"}'])
    assert abs(ended - time.time()) < 60
    cancel.close()
    os.close(commands.fd)
