# SPDX-License-Identifier: Apache-2.0
"""What a monitor says of its backups, against a model that is driven at random."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vmapipe.control.monitor.backups import (
    Accepted,
    Backups,
    Moment,
    Outcome,
    QmpEvent,
    Rejected,
)
from vmapipe.control.qmp.server import QmpError
from vmapipe.runtime.event_types import BackupProgressEvent, BegunDevice

COUNTS = st.lists(
    st.tuples(st.integers(1, 1 << 40), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3
)


def devices_of(counts: list[tuple[int, float, float]]) -> list[dict[str, Any]]:
    return [
        {
            "name": f"d{index}",
            "bytes": size,
            "done_bytes": int(size * done),
            "zero_bytes": int(size * done * zero),
        }
        for index, (size, done, zero) in enumerate(counts)
    ]


class Machine(RuleBasedStateMachine):
    """The model is the answer that `query-backup` owes, and what is known of the one that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.backups = Backups()
        self.now = Moment(1_000_000.0, 50.0)
        self.status: dict[str, Any] = {}
        self.running = self.begun = self.instant = self.started = self.canceled = False
        self.with_state = False
        self.error = ""
        self.new: dict[str, Any] = {}
        self.numbers = 0
        self.told_progress_at = 0.0

    # --- what clients do ---

    @rule(with_state=st.booleans())
    def backup(self, with_state: bool) -> None:
        self.numbers += 1
        file = f"/srv/{self.numbers}.vma"
        if self.running:
            with pytest.raises(QmpError, match=r"^previous backup not finished$"):
                self.backups.begin(file, with_state=with_state)
            return
        self.backups.begin(file, with_state=with_state)
        self.running, self.with_state = True, with_state
        self.begun = self.instant = self.started = self.canceled = False
        self.error = ""
        self.new = {"backupfile": file}

    @rule()
    def cancel(self) -> None:
        self.backups.cancel()
        if self.running and not self.error:
            self.canceled, self.error = True, "backup canceled"

    # --- what its process tells ---

    @rule(counts=COUNTS)
    def begins(self, counts: list[tuple[int, float, float]]) -> None:
        if self.begun:
            return
        identity = uuid.UUID(int=self.numbers)
        devices = [{"name": d["name"], "bytes": d["bytes"]} for d in devices_of(counts)]
        total = sum(device["bytes"] for device in devices)
        out = self.hear({"event": "begun", "uuid": identity.hex, "devices": devices})
        if self.running:
            self.begun = True
            self.new |= {"uuid": str(identity), "total": total, "transferred": 0, "zero-bytes": 0}
        self.expect_start(out)

    @rule()
    def chooses_the_instant(self) -> None:
        out = self.hear({"event": "instant", "held_s": 0.01})
        self.instant = self.instant or self.running
        self.expect_start(out)

    @rule(counts=COUNTS, later_s=st.floats(0, 3))
    def progresses(self, counts: list[tuple[int, float, float]], later_s: float) -> None:
        if self.running and not self.begun:
            return
        self.now = Moment(self.now.wall_s + later_s, self.now.clock_s + later_s)
        devices = devices_of(counts)
        out = self.hear({"event": "progress", "devices": devices})
        if not self.running:
            assert out == []
            return
        self.new |= {
            "total": sum(d["bytes"] for d in devices),
            "transferred": sum(d["done_bytes"] for d in devices),
            "zero-bytes": sum(d["zero_bytes"] for d in devices),
        }
        if self.started and self.now.clock_s >= self.told_progress_at + 1.0:
            self.told_progress_at = self.now.clock_s
            keys = ("uuid", "total", "transferred", "zero-bytes")
            assert out == [QmpEvent("BACKUP_PROGRESS", {key: self.new[key] for key in keys})]
        else:
            assert out == []

    @rule(text=st.sampled_from(("disk full", "read error")))
    def says_what_is_wrong(self, text: str) -> None:
        assert self.hear({"event": "error", "text": text}) == []
        if self.running and not self.error:
            self.error = text

    @rule(name=st.sampled_from(("notice", "buffer", "reading", "attached", "stored", "done")))
    def tells_something_else(self, name: str) -> None:
        assert self.hear({"event": name, "text": "x", "device": "d"}) == []

    @rule()
    def ends_well(self) -> None:
        if self.running and not self.started:
            return
        out = self.backups.end("", self.now)
        if not self.running:
            assert out == []
            return
        self.running = False
        self.new["transferred"] = self.new["total"]
        self.status = self.finished("done")
        assert out == [QmpEvent("BACKUP_COMPLETED", self.status)]

    @rule(verdict=st.sampled_from(("it was killed by SIGKILL", "ended with exit code 1")))
    def ends_badly(self, verdict: str) -> None:
        out = self.backups.end(verdict, self.now)
        if not self.running:
            assert out == []
            return
        self.running = False
        errmsg = self.error or verdict
        if not self.started:
            (rejected,) = out
            assert isinstance(rejected, Rejected)
            assert str(rejected.error) == errmsg
            return
        self.status = {**self.finished("error"), "errmsg": errmsg}
        name = "BACKUP_CANCELLED" if self.canceled else "BACKUP_FAILED"
        assert out == [QmpEvent(name, self.status)]

    @rule()
    def never_becomes_a_process(self) -> None:
        if self.running and (self.begun or self.instant):
            return
        out = self.backups.refuse(QmpError("Device 'x' not found", "DeviceNotFound"))
        if not self.running:
            assert out == []
            return
        (rejected,) = out
        assert isinstance(rejected, Rejected)
        if self.canceled:
            assert str(rejected.error) == "backup canceled"
        elif not self.error:
            assert rejected.error.kind == "DeviceNotFound"
        self.running = False

    # --- what must hold ---

    @invariant()
    def statuses_agree(self) -> None:
        expected = self.status
        if self.running and self.started:
            expected = {**self.new, "status": "active"}
        assert self.backups.status() == expected
        assert self.backups.busy == self.running

    def hear(self, event: Any) -> list[Outcome]:
        return self.backups.handle_event(event, self.now)

    def expect_start(self, out: list[Outcome]) -> None:
        at_instant = self.begun if self.with_state else self.instant
        if not self.running or self.started or not (self.begun and at_instant):
            assert out == []
            return
        self.started = True
        self.told_progress_at = self.now.clock_s
        self.new["start-time"] = int(self.now.wall_s)
        active = {**self.new, "status": "active"}
        assert out == [Accepted(self.new["uuid"]), QmpEvent("BACKUP_STARTED", active)]

    def finished(self, status: str) -> dict[str, Any]:
        return {**self.new, "status": status, "end-time": int(self.now.wall_s)}


TestStatusesAgree = Machine.TestCase
# A thousand commands at least, in lives long enough for several backups.
TestStatusesAgree.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


def test_a_clock_that_goes_back_does_not_let_it_end_before_it_began() -> None:
    backups = Backups()
    backups.begin("x")
    backups.handle_event({"event": "begun", "uuid": "0" * 32, "devices": []}, Moment(100.0, 1.0))
    backups.handle_event({"event": "instant", "held_s": 0.0}, Moment(100.0, 1.0))
    backups.end("", Moment(50.0, 2.0))
    assert backups.status()["end-time"] == backups.status()["start-time"] == 100


def test_a_memory_that_was_larger_than_estimated_is_never_more_than_all() -> None:
    backups = Backups()
    now = Moment(1.0, 1.0)
    backups.begin("x", with_state=True)
    begun: list[BegunDevice] = [
        {"dev_id": 1, "name": "vmstate", "bytes": 10},
        {"dev_id": 2, "name": "a", "bytes": 5},
    ]
    backups.handle_event({"event": "begun", "uuid": "0" * 32, "devices": begun}, now)
    more: BackupProgressEvent = {
        "event": "progress",
        "stored_bytes": 90,
        "plain_bytes": 90,
        "devices": [{"name": "vmstate", "bytes": 10, "done_bytes": 90, "zero_bytes": 0}],
    }
    backups.handle_event(more, now)
    status = backups.status()
    assert status["transferred"] == status["total"] == 90
