# SPDX-License-Identifier: Apache-2.0
"""What a job's events add up to."""

from __future__ import annotations

import uuid

import pytest

from vmapipe.control.coordinator.status import JobState
from vmapipe.runtime.event_types import (
    BackupProgressEvent,
    BaseDevice,
    BegunEvent,
    DoneEvent,
    ProgressDevice,
    StoredEvent,
)

JOB, ARCHIVE = "1" * 32, "2" * 32
BEGUN: BegunEvent = {
    "event": "begun",
    "uuid": ARCHIVE,
    "devices": [
        {"dev_id": 1, "name": "a", "bytes": 1000},
        {"dev_id": 2, "name": "b", "bytes": 3000},
    ],
}


def progress(a: int, b: int, zero: int = 0) -> BackupProgressEvent:
    return {
        "event": "progress",
        "stored_bytes": a + b,
        "plain_bytes": 2 * (a + b),
        "devices": [
            {"name": "a", "bytes": 1000, "done_bytes": a, "zero_bytes": zero},
            {"name": "b", "bytes": 3000, "done_bytes": b, "zero_bytes": 0},
        ],
    }


def begun() -> JobState:
    state = JobState("vm.vma", 100.0, job=JOB)
    state.take(BEGUN, 101.0)
    return state


def test_the_status_is_the_rfcs() -> None:
    state = begun()
    state.take(progress(500, 1500, zero=100), 102.0)
    assert state.members() == {
        "status": "active",
        "total": 4000,
        "transferred": 2000,
        "zero-bytes": 100,
        "start-time": 100,
        "backupfile": "vm.vma",
        "uuid": str(uuid.UUID(ARCHIVE)),
    }


def test_when_it_is_done_all_is_transferred() -> None:
    state = begun()
    state.take(progress(1000, 2000), 103.0)
    assert state.members()["status"] == "active"
    stored: StoredEvent = {
        "event": "stored",
        "archive": "vm.vma",
        "uuid": ARCHIVE,
        "stored_bytes": 9,
        "plain_bytes": 9,
    }
    done: DoneEvent = {
        "event": "done",
        "seconds": 4.5,
        "read_bytes": 9,
        "speed_bytes_s": 0,
        "cpu_s": 1.0,
        "peak_rss_bytes": 9,
    }
    state.take(stored, 104.0)
    state.take(done, 104.5)
    status = state.members()
    assert (status["status"], status["end-time"]) == ("done", 104)
    assert status["transferred"] == status["total"] == 4000


def test_the_first_error_is_the_one_that_is_told() -> None:
    state = begun()
    state.fail("the disk is on fire", 105.0)
    state.fail("the producer has ended", 106.0)
    status = state.members()
    assert (status["status"], status["errmsg"]) == ("error", "the disk is on fire")
    assert status["end-time"] == 105


def test_before_it_has_begun_its_archive_has_no_uuid() -> None:
    assert JobState("vm.vma", 100.0, job=JOB).members() == {
        "status": "active",
        "total": 0,
        "transferred": 0,
        "zero-bytes": 0,
        "start-time": 100,
        "backupfile": "vm.vma",
    }


def test_the_rate_is_that_of_the_last_ten_seconds_and_the_time_left_follows_it() -> None:
    state = begun()
    for second in range(10):
        state.take(progress(0, 10 * second), 101.0 + second)
    for second in range(1, 11):
        state.take(progress(0, 90 + 100 * second), 110.0 + second)
    details = state.details(120.0)
    assert details["rate_bytes_s"] == pytest.approx(100, rel=0.02)
    assert details["left_s"] == pytest.approx((4000 - 1090) / 100, rel=0.02)


def test_what_producers_tell_is_told_of_each_device() -> None:
    state = begun()
    state.take(
        {"event": "transfer", "device": "b", "read_bytes": 7, "sent_bytes": 6, "saved_bytes": 5},
        102.0,
    )
    state.take(
        {
            "event": "buffer",
            "device": "b",
            "memory_bytes": 4,
            "spool_bytes": 3,
            "waiting_writes": 2,
        },
        102.0,
    )
    a, b = state.details(103.0)["devices"]
    assert a["read_bytes"] == a["memory_bytes"] == 0
    assert b == {
        "name": "b",
        "bytes": 3000,
        "done_bytes": 0,
        "zero_bytes": 0,
        "unchanged_bytes": 0,
        "full_reason": None,
        "read_bytes": 7,
        "sent_bytes": 6,
        "saved_bytes": 5,
        "memory_bytes": 4,
        "spool_bytes": 3,
        "waiting_writes": 2,
    }


def test_a_base_is_told_with_what_came_of_it() -> None:
    state = JobState("a", 100.0, job="1" * 32)
    devices: list[BaseDevice] = [
        {"name": "a", "incremental": True, "reason": ""},
        {"name": "b", "incremental": False, "reason": "its size differs"},
    ]
    state.take(
        {"event": "base", "archive": "/old.vma", "uuid": "3" * 32, "devices": devices}, 100.0
    )
    took: list[ProgressDevice] = [
        {"name": "a", "bytes": 9, "done_bytes": 9, "zero_bytes": 1, "unchanged_bytes": 5},
        {"name": "b", "bytes": 9, "done_bytes": 9, "zero_bytes": 0},
    ]
    state.take({"event": "progress", "stored_bytes": 1, "plain_bytes": 1, "devices": took}, 101.0)
    state.take(
        {
            "event": "stored",
            "archive": "a",
            "uuid": "2" * 32,
            "stored_bytes": 18,
            "plain_bytes": 18,
            "base_bytes": 5,
            "shared_bytes": 4,
        },
        102.0,
    )
    details = state.details(103.0)
    assert (details["base"], details["base_bytes"], details["shared_bytes"]) == ("/old.vma", 5, 4)
    found = [(each["unchanged_bytes"], each["full_reason"]) for each in details["devices"]]
    assert found == [(5, ""), (0, "its size differs")]
