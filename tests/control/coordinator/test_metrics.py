# SPDX-License-Identifier: Apache-2.0
"""The metrics file: read by Prometheus' own parser."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.machine import bad, good, make_disk
from vmapipe.control.coordinator.metrics import render, write
from vmapipe.control.coordinator.status import JobState
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.event_types import BegunDevice


def samples(text: str) -> dict[tuple[str, str], float]:
    """By name and disk."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            found[sample.name, sample.labels.get("disk", "")] = sample.value
    return found


def test_a_backup_that_was_stored_and_one_that_failed(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "A0h")
    file = tmp_path / "vm100.prom"
    words = ("backup", "--disk", f"d={disk}", "--metrics", file, tmp_path / "vm.vma")
    good(*words)
    first = samples(file.read_text())
    assert first["vmapipe_backup_success", ""] == 1
    assert first["vmapipe_backup_archive_bytes", ""] == (tmp_path / "vm.vma").stat().st_size
    assert first["vmapipe_backup_disk_size_bytes", "d"] == 3 * 65536
    assert first["vmapipe_backup_disk_zero_bytes", "d"] == 2 * 65536
    assert first["vmapipe_backup_disk_read_bytes", "d"] == 2 * 65536
    assert first["vmapipe_backup_cpu_seconds", ""] > 0
    success = first["vmapipe_backup_last_success_timestamp_seconds", ""]
    assert success == first["vmapipe_backup_last_run_timestamp_seconds", ""]
    assert 'backup="vm100"' in file.read_text()

    bad(*words)  # the archive exists
    second = samples(file.read_text())
    assert second["vmapipe_backup_success", ""] == 0
    assert second["vmapipe_backup_archive_bytes", ""] == 0
    assert second["vmapipe_backup_last_success_timestamp_seconds", ""] == success
    assert second["vmapipe_backup_last_run_timestamp_seconds", ""] > success
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"disk", "vm100.prom", "vm.vma", "vm.vma.manifest.json"}
    assert file.stat().st_mode & 0o777 == 0o644


def test_names_with_every_odd_character_stay_one_label() -> None:
    state = JobState("a", 1.0, job="1" * 32)
    name = 'a"b\\c\nd\udcff'
    device: BegunDevice = {"dev_id": 1, "name": name, "bytes": 7}
    state.take({"event": "begun", "uuid": "2" * 32, "devices": [device]}, 2.0)
    text = render(name, state, 0.0)
    assert samples(text)["vmapipe_backup_disk_size_bytes", 'a"b\\c\\nd\\xff'] == 7
    assert "last_success" not in text


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"cannot write the metrics .*: No such file"):
        write(str(tmp_path / "no" / "x.prom"), JobState("a", 1.0, job="1" * 32))


def test_metrics_that_cannot_be_written_do_not_fail_the_backup(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "A")
    metrics = tmp_path / "no" / "x.prom"
    out = good("backup", "--disk", disk, "--metrics", metrics, tmp_path / "vm.vma")
    assert b"cannot write the metrics" in out


def test_a_file_that_the_exporter_would_not_read_is_refused(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", "A")
    text = bad("backup", "--disk", disk, "--metrics", "x.txt", tmp_path / "vm.vma", code=2)
    assert "reads *.prom files only" in text
