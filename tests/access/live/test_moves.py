# SPDX-License-Identifier: Apache-2.0
"""The decisions of a live restore, held against a model of QEMU that fails wherever it may."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vmapipe.access.live.moves import (
    IO_ERROR,
    GiveUp,
    MachineView,
    MirrorState,
    Move,
    Note,
    Noted,
    changes,
    is_finished,
    next_steps,
)
from vmapipe.control.qmp.connection import Command

# More looks than any healthy restore of three disks takes.
MOST_LOOKS = 60


def move(number: int) -> Move:
    names = (f"disk{number}", f"over{number}", f"archive{number}")
    adds = tuple(
        Command("blockdev-add", {"node-name": name})
        for name in (f"file{number}", f"target{number}")
    )
    return Move(f"drive{number}", f"job{number}", names[0], f"target{number}", names, adds, "/t")


@dataclass
class Disk:
    """What a guest has written to it (a number), as each of its two places has it."""

    move: Move
    on_target: bool = False
    written: int = 0
    overlay: int = 0
    target: int = 0


@dataclass
class Qemu:
    """The machine. A command that QEMU would refuse changes nothing, as there."""

    disks: list[Disk]
    nodes: set[str] = field(default_factory=set)
    jobs: dict[str, MirrorState] = field(default_factory=dict)
    run_state: str = "running"

    def seen(self) -> MachineView:
        used = {
            disk.move.target if disk.on_target else disk.move.source
            for disk in self.disks
            if disk.move.source in self.nodes or disk.on_target
        }
        return MachineView(self.run_state, dict(self.jobs), frozenset(self.nodes), frozenset(used))

    def disk(self, job: str) -> Disk:
        return next(disk for disk in self.disks if disk.move.job == job)

    def write(self, disk: Disk) -> None:
        """The guest writes, and hears that it is done."""
        disk.written += 1
        if disk.on_target:
            disk.target = disk.written
            return
        disk.overlay = disk.written
        job = self.jobs.get(disk.move.job)
        if job and job.status == "ready":
            disk.target = disk.written

    def execute(self, command: Command) -> None:  # noqa: PLR0912  a case a command
        words = command.arguments
        match command.name:
            case "blockdev-add":
                self.nodes.add(words["node-name"])
            case "blockdev-mirror":
                assert words["job-id"] not in self.jobs
                assert {words["device"], words["target"]} <= self.nodes
                assert words["copy-mode"] == "write-blocking"
                assert words["on-source-error"] == words["on-target-error"] == "stop"
                self.jobs[words["job-id"]] = MirrorState("running", speed=words["speed"])
            case "block-job-complete":
                job, disk = self.jobs.get(words["device"]), self.disk(words["device"])
                if job and job.status == "ready":
                    assert self.run_state != "running", "a crash now would lose what is written"
                    assert disk.target == disk.written
                    self.jobs[words["device"]] = MirrorState("waiting")
            case "block-job-resume":
                job = self.jobs.get(words["device"])
                if job and job.status == "paused":
                    self.jobs[words["device"]] = MirrorState("running")
            case "block-job-set-speed":
                job = self.jobs[words["device"]]
                self.jobs[words["device"]] = job._replace(speed=words["speed"])
            case "job-dismiss":
                if (job := self.jobs.get(words["id"])) and job.status == "concluded":
                    del self.jobs[words["id"]]
            case "blockdev-del":
                disk = next(d for d in self.disks if words["node-name"] in d.move.below)
                assert disk.on_target, "the machine would lose its disk"
                assert disk.move.job not in self.jobs
                self.nodes.discard(words["node-name"])
            case "stop":
                self.run_state = "paused"
            case "cont":
                self.run_state = "running"
            case name:
                pytest.fail(f"an unknown command: {name}")


class LiveRestoreMachine(RuleBasedStateMachine):
    """Coordinator, QEMU and host die at any moment; the guest's writes stay."""

    @initialize(count=st.integers(1, 3))
    def begin(self, count: int) -> None:
        moves = [move(number) for number in range(count)]
        self.moves = moves
        self.noted = Noted()
        self.qemu = Qemu([Disk(each) for each in moves])
        self.qemu.nodes = {node for each in moves for node in each.below}

    def step(self, most: int) -> None:
        """Do the first steps of what is decided now; what does not come was killed."""
        seen = self.qemu.seen()
        for step in next_steps(self.moves, seen, self.noted)[:most]:
            assert not isinstance(step, GiveUp), step.text
            if isinstance(step, Note):
                assert self.noted.moved <= step.noted.moved
                self.noted = step.noted
            else:
                self.qemu.execute(step)

    @rule(most=st.integers(0, 6))
    def coordinator(self, most: int) -> None:
        self.step(most)

    @precondition(lambda self: self.qemu.run_state == "running")
    @rule(data=st.data())
    def guest(self, data: st.DataObject) -> None:
        self.qemu.write(data.draw(st.sampled_from(self.qemu.disks)))

    @rule(data=st.data(), to=st.sampled_from(["ready", "failed", "nospace", "ended"]))
    def job(self, data: st.DataObject, to: str) -> None:
        running = sorted(n for n, job in self.qemu.jobs.items() if job.status == "running")
        if not running:
            return
        name = data.draw(st.sampled_from(running))
        if to == "ready":
            disk = self.qemu.disk(name)
            disk.target = disk.written
            self.qemu.jobs[name] = MirrorState("ready")
        elif to == "ended":
            self.qemu.jobs[name] = MirrorState("concluded", "Input/output error")
        else:
            self.qemu.jobs[name] = MirrorState("paused", io_status=to)

    @rule()
    def pivots(self) -> None:
        for name, job in list(self.qemu.jobs.items()):
            if job.status == "waiting" and not job.error:
                self.qemu.jobs[name] = MirrorState("concluded")
                self.qemu.disk(name).on_target = True

    @precondition(lambda self: self.qemu.run_state == "running")
    @rule()
    def request_fails(self) -> None:
        self.qemu.run_state = IO_ERROR

    @rule()
    def host_crashes(self) -> None:
        """The machine is started again: from a target where that is noted, else from an overlay."""
        for disk in self.qemu.disks:
            disk.on_target = disk.move.job in self.noted.moved
            if disk.on_target:
                assert disk.target == disk.written, "what the guest wrote is lost"
                disk.move = disk.move._replace(below=())
            else:
                assert disk.overlay == disk.written, "what the guest wrote is lost"
        self.moves = [disk.move for disk in self.qemu.disks]
        self.noted = self.noted._replace(held=False)
        self.qemu = Qemu(self.qemu.disks)
        for disk in self.qemu.disks:
            self.qemu.nodes |= {disk.move.target} if disk.on_target else set(disk.move.below)

    @invariant()
    def is_on_a_whole_disk(self) -> None:
        for disk in self.qemu.disks:
            place = disk.target if disk.on_target else disk.overlay
            assert place == disk.written

    def teardown(self) -> None:
        """When nothing fails any more it ends, and the machine runs."""
        if not hasattr(self, "qemu"):
            return
        for _ in range(MOST_LOOKS):
            if is_finished(self.moves, self.qemu.seen(), self.noted):
                break
            self.step(99)
            self.pivots()
            for name, job in list(self.qemu.jobs.items()):
                if job.status == "running":
                    self.qemu.disk(name).target = self.qemu.disk(name).written
                    self.qemu.jobs[name] = MirrorState("ready")
        else:
            pytest.fail(f"it does not end: {self.qemu} {self.noted}")
        assert all(disk.on_target for disk in self.qemu.disks)
        assert self.qemu.run_state in ("running", IO_ERROR)
        assert self.qemu.jobs == {}


TestLiveRestore = LiveRestoreMachine.TestCase

ONE = move(0)


def seen(run_state: str = "running", job: MirrorState | None = None, **more: object) -> MachineView:
    jobs = {} if job is None else {ONE.job: job}
    nodes = frozenset({*ONE.below, "file0", ONE.target})
    return MachineView(run_state, jobs, nodes, frozenset({ONE.source}), **more)  # type: ignore[arg-type]


def names(steps: Sequence[object]) -> list[str]:
    return [step.name if isinstance(step, Command) else type(step).__name__ for step in steps]


def test_a_machine_that_is_paused_by_its_user_is_not_let_go_on() -> None:
    steps = next_steps([ONE], seen("paused", MirrorState("ready")), Noted())
    assert names(steps) == ["block-job-complete"]
    arrived = seen("paused", MirrorState("concluded"))._replace(used=frozenset({ONE.target}))
    assert names(next_steps([ONE], arrived, Noted())) == ["Note"]
    after = next_steps([ONE], arrived, Noted(frozenset({ONE.job})))
    assert "cont" not in names(after)


def test_a_machine_that_stands_still_for_another_disk_is_left_alone() -> None:
    stopped = seen(IO_ERROR, MirrorState("running"), broken=frozenset({"another"}))
    assert next_steps([ONE], stopped, Noted()) == []
    assert names(next_steps([ONE], stopped._replace(broken=frozenset()), Noted())) == ["cont"]
    ours = stopped._replace(broken=frozenset({ONE.source}))
    assert names(next_steps([ONE], ours, Noted())) == ["cont"]


def test_attempts_are_not_made_faster_than_asked_for() -> None:
    failed = seen(IO_ERROR, MirrorState("paused", io_status="failed"), may_retry=False)
    assert next_steps([ONE], failed, Noted()) == []
    assert names(next_steps([ONE], failed._replace(may_retry=True), Noted())) == [
        "block-job-resume",
        "cont",
    ]


@pytest.mark.parametrize("status", ["paused", "standby"])
def test_a_job_whose_error_cont_has_made_forgotten_is_let_go_on(status: str) -> None:
    assert names(next_steps([ONE], seen(job=MirrorState(status)), Noted())) == ["block-job-resume"]


def test_a_full_target_is_waited_for_without_an_end() -> None:
    full = seen(job=MirrorState("paused", io_status="nospace"), failing_s={ONE.job: 86400.0})
    assert names(next_steps([ONE], full, Noted())) == ["block-job-resume"]


@pytest.mark.parametrize(("damage", "failing_s"), [("extent 7", 4.0), ("", 61.0)])
def test_what_never_succeeds_is_given_up_with_its_reason(damage: str, failing_s: float) -> None:
    state = seen(job=MirrorState("paused", io_status="failed"), damage=damage)
    early = state._replace(failing_s={ONE.job: 2.0})
    assert names(next_steps([ONE], early, Noted())) == ["block-job-resume"]
    (step,) = next_steps([ONE], state._replace(failing_s={ONE.job: failing_s}), Noted())
    assert isinstance(step, GiveUp)
    assert (damage or "60 s") in step.text
    still = seen(IO_ERROR, MirrorState("running"), damage=damage, failing_s={"": failing_s})
    (step,) = next_steps([ONE], still, Noted())
    assert isinstance(step, GiveUp)


def test_a_job_that_somebody_cancels_is_told_and_not_begun_again() -> None:
    for job in (MirrorState("concluded", os.strerror(errno.ECANCELED)), MirrorState("concluded")):
        dismiss, step = next_steps([ONE], seen(job=job), Noted())
        assert names([dismiss]) == ["job-dismiss"]
        assert isinstance(step, GiveUp)


def test_a_job_that_an_error_has_ended_is_begun_again_as_long_as_there_is_hope() -> None:
    failed = seen(job=MirrorState("concluded", "Input/output error"))
    assert names(next_steps([ONE], failed, Noted())) == ["job-dismiss"]
    assert next_steps([ONE], failed._replace(may_retry=False), Noted()) == []
    steps = next_steps([ONE], failed._replace(failing_s={ONE.job: 61.0}), Noted())
    assert names(steps) == ["job-dismiss", "GiveUp"]
    final = seen(job=MirrorState("concluded", "Input/output error", is_final=True))
    assert names(next_steps([ONE], final, Noted())) == ["job-dismiss", "GiveUp"]


def test_the_machine_goes_on_before_anything_is_given_up() -> None:
    job = MirrorState("concluded", "Input/output error")
    assert names(next_steps([ONE], seen("paused", job), Noted(held=True))) == ["cont"]


def test_the_speed_limit_is_shared_by_the_disks_that_are_left() -> None:
    two = move(1)
    state = MachineView(
        "running",
        {ONE.job: MirrorState("running", speed=50), two.job: MirrorState("running", speed=10)},
        frozenset({*ONE.below, *two.below}),
        frozenset({ONE.source, two.source}),
    )
    (step,) = next_steps([ONE, two], state, Noted(), 100)
    assert step == Command("block-job-set-speed", {"device": two.job, "speed": 50})


def test_what_changes_is_told_once() -> None:
    well, full = seen(), seen(IO_ERROR, MirrorState("paused", io_status="nospace"))
    assert len(changes([ONE], well, full)) == 2
    assert changes([ONE], full, full) == []
    assert changes([ONE], full, well) == ["the machine goes on"]


def test_a_disk_whose_job_somebody_has_dismissed_is_known_by_where_it_stands() -> None:
    arrived = seen()._replace(used=frozenset({ONE.target}))
    assert next_steps([ONE], arrived, Noted()) == [Note(Noted(frozenset({ONE.job})))]
