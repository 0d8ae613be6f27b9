# SPDX-License-Identifier: Apache-2.0
"""What a drill leaves: ARCHIVE.drill.json, a folder of evidence, metrics; a stranger's file is none."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from vmapipe.access.drill.result import (
    EVIDENCE_NAMES,
    DrillResult,
    StepResult,
    decode_result,
    encode_result,
    keep_evidence,
    read_result,
    remove_evidence,
    write_metrics,
    write_result,
)
from vmapipe.access.machine.spec import Omission
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import HeldFolder

UUID = uuid.UUID("9c2b2a2e-3c1e-4cf2-9b0a-0fb4ad10a9a3")
RESULT = DrillResult(
    str(UUID),
    "2026-11-30T09:40:00Z",
    "booted",
    "the guest agent answered",
    12.5,
    "agent",
    (StepResult("agent", "answered", 12.5, ""), StepResult("screen", "silent", None, "")),
    (Omission("hostpci0", "a device of the host"),),
    "tcg",
    "bios",
    False,
    18_600_000,
    "vm.vma.drill",
)
TEXTS = st.text(st.characters(categories=("L", "N", "P", "S")), max_size=50)


def test_a_result_is_read_back_for_its_archive_only(tmp_path: Path) -> None:
    archive = str(tmp_path / "vm.vma")
    assert read_result(archive, UUID.bytes) is None
    write_result(archive, RESULT)
    assert read_result(archive, UUID.bytes) == RESULT
    assert read_result(archive, bytes(16)) is None
    write_result(archive, RESULT._replace(verdict="not booted", seconds=None))
    found = read_result(archive, UUID.bytes)
    assert found is not None
    assert found.verdict == "not booted"
    assert sorted(os.listdir(tmp_path)) == ["vm.vma.drill.json"]
    assert (tmp_path / "vm.vma.drill.json").stat().st_mode & 0o777 == 0o600


@given(
    st.builds(
        DrillResult,
        archive_uuid=st.uuids().map(str),
        date=st.just("2026-01-01T00:00:00Z"),
        verdict=st.just("booted"),
        reason=TEXTS,
        seconds=st.floats(0, 1e6),
        proof=TEXTS,
        steps=st.lists(
            st.builds(
                StepResult,
                TEXTS,
                st.sampled_from(["answered", "silent", "wrong"]),
                st.none() | st.floats(0, 1e6),
                TEXTS,
            ),
            max_size=3,
        ).map(tuple),
        left_out=st.lists(st.builds(Omission, TEXTS, TEXTS), max_size=3).map(tuple),
        accelerator=TEXTS,
        firmware=TEXTS,
        is_resumed=st.booleans(),
        bytes_read=st.integers(0, 1 << 60),
        evidence=st.just("vm.vma.drill"),
    )
)
def test_every_result_survives_its_file(result: DrillResult) -> None:
    assert decode_result(encode_result(result)) == result


@pytest.mark.parametrize(
    "change",
    [
        {"vmapipe_drill": 2},
        {"verdict": "fine"},
        {"verdict": ["booted"]},
        {"verdict": "not booted"},
        {"seconds": None},
        {"seconds": "1"},
        {"seconds": -1},
        {"seconds": True},
        {"archive_uuid": "x"},
        {"archive_uuid": UUID.hex},
        {"date": "yesterday"},
        {"reason": "\x1b[2J"},
        {"reason": "two\nlines"},
        {"reason": None},
        {"evidence": "../other"},
        {"evidence": ".."},
        {"bytes_read": -1},
        {"bytes_read": 1.5},
        {"is_resumed": 0},
        {"steps": {}},
        {"steps": [1]},
        {"steps": [{"kind": "a", "state": "b", "seconds": 1, "detail": ""}]},
        {"left_out": [{}]},
        {"left_out": [{"key": "a", "reason": "b"}] * 501},
    ],
    ids=str,
)
def test_what_no_drill_has_written_is_not_read(change: dict[str, Any], tmp_path: Path) -> None:
    raw = json.dumps({**json.loads(encode_result(RESULT)), **change}).encode()
    with pytest.raises(ValueError, match=r"\w"):
        decode_result(raw)
    (tmp_path / "vm.vma.drill.json").write_bytes(raw)
    assert read_result(str(tmp_path / "vm.vma"), UUID.bytes) is None


@given(st.binary(max_size=300) | st.recursive(st.none(), st.lists).map(lambda x: str(x).encode()))
def test_no_bytes_get_past_the_reader_but_as_not_valid(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode_result(raw)


def test_a_deep_an_endless_or_a_special_file_is_none(tmp_path: Path) -> None:
    place, archive = tmp_path / "vm.vma.drill.json", str(tmp_path / "vm.vma")
    place.write_bytes(b"[" * 100_000)
    assert read_result(archive, UUID.bytes) is None
    place.write_bytes(encode_result(RESULT) + b" " * (1 << 20))
    assert read_result(archive, UUID.bytes) is None
    place.unlink()
    os.mkfifo(place)
    assert read_result(archive, UUID.bytes) is None
    # And a result takes its place: nobody is waited for, nothing is written elsewhere.
    write_result(archive, RESULT)
    assert read_result(archive, UUID.bytes) == RESULT


# --- Evidence and metrics ---


def test_evidence_takes_the_place_of_an_earlier_tests_and_of_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "vm.vma.drill"
    keep_evidence(str(place), {"screen.png": b"1", "serial.log": b"2"})
    (place / "mine").write_text("x")
    keep_evidence(str(place), {"serial.log": b"3", "../evil": b"x", "firmware.log": bytes(9 << 20)})
    assert sorted(os.listdir(place)) == ["mine", "serial.log"]
    assert (place / "serial.log").read_bytes() == b"3"
    assert place.stat().st_mode & 0o777 == 0o700
    with HeldFolder(str(tmp_path)) as above:
        remove_evidence(above, "vm.vma.drill")
        assert os.listdir(place) == ["mine"]
        (place / "mine").unlink()
        remove_evidence(above, "vm.vma.drill")
        remove_evidence(above, "vm.vma.drill")
    assert os.listdir(tmp_path) == []
    assert "result.json" in EVIDENCE_NAMES


def test_evidence_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "vm.vma.drill").symlink_to("victim")
    with pytest.raises(Failure, match="cannot keep the evidence"):
        keep_evidence(str(tmp_path / "vm.vma.drill"), {"serial.log": b"x"})
    (tmp_path / "vm.vma.drill").unlink()
    keep_evidence(str(tmp_path / "vm.vma.drill"), {})
    (tmp_path / "vm.vma.drill" / "serial.log").symlink_to("/etc/passwd")
    keep_evidence(str(tmp_path / "vm.vma.drill"), {"serial.log": b"x"})
    assert not (tmp_path / "vm.vma.drill" / "serial.log").is_symlink()


def test_the_metrics_keep_when_it_last_went_well(tmp_path: Path) -> None:
    path = tmp_path / 'vm"1.prom'
    write_metrics(str(path), RESULT)
    before = _values(path)
    assert before["vmapipe_drill_success"] == 1
    assert before["vmapipe_drill_boot_seconds"] == 12.5
    write_metrics(str(path), RESULT._replace(verdict="not booted", seconds=None))
    after = _values(path)
    assert after["vmapipe_drill_success"] == 0
    last = "vmapipe_drill_last_success_timestamp_seconds"
    assert after[last] == before[last]
    assert "vmapipe_drill_boot_seconds" not in after
    with pytest.raises(Failure, match="cannot write the metrics"):
        write_metrics(str(tmp_path / "no" / "x.prom"), RESULT)


def _values(path: Path) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(path.read_text()):
        for sample in family.samples:
            assert sample.labels == {"drill": 'vm"1'}
            found[sample.name] = sample.value
    return found
