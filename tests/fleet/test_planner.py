# SPDX-License-Identifier: Apache-2.0
"""The planner as a model: limits hold, nothing starves, and a lost queue costs nothing."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vmapipe.fleet.catalogue import after
from vmapipe.fleet.inventory import (
    Fleet,
    FleetHost,
    FleetMachine,
    FleetTarget,
    Policy,
    Rule,
    SourceStorage,
)
from vmapipe.fleet.planner import FleetPlan, FleetTask, Waiting, back_off_s, plan
from vmapipe.fleet.records import RunRecord, Standing, Verb
from vmapipe.fleet.windows import DAY_S, parse_window

NOW = 1_800_000_000.0
HOUR = 3600.0
Standings = dict[tuple[str, Verb, str], Standing]


def fleet_of(
    hosts: int = 2, jobs: int = 2, total: int = 40, target_jobs: int = 8, **defaults: object
) -> Fleet:
    policy = Policy(target="b1", **defaults)  # type: ignore[arg-type]
    return Fleet(
        {f"pve{n}": FleetHost(f"pve{n}", jobs=jobs) for n in range(hosts)}
        | {"store": FleetHost("store", jobs=3)},
        {"b1": FleetTarget("b1", directory="/b", host="store", jobs=target_jobs)},
        {"ceph": SourceStorage("ceph", 1), "lvm": SourceStorage("lvm", 1)},
        defaults=policy,
        total=total,
    )


def machines_of(count: int, hosts: int = 2, storages: tuple[str, ...] = ()) -> list[FleetMachine]:
    return [
        FleetMachine(f"vm{n}", f"pve{n % hosts}", storages=storages, first_seen_s=NOW)
        for n in range(count)
    ]


def as_run(task: FleetTask, now_s: float, number: int = 0) -> RunRecord:
    return RunRecord(
        f"{task.machine}-{task.verb}-{number}",
        task.verb,
        task.machine,
        task.host,
        task.target,
        task.archive,
        "running",
        now_s,
        now_s,
        storages=",".join(task.storages),
    )


def why(plan: FleetPlan, machine: str, verb: Verb = "backup") -> Waiting:
    (found,) = [w for w in plan.waits if (w.task.machine, w.task.verb) == (machine, verb)]
    return found


def done(machine: str, done_s: float, verb: Verb = "backup", archive: str = "a.vma") -> Standings:
    return {(machine, verb, "b1"): Standing(machine, verb, "b1", done_s, done_s, archive)}


# --- Each reason ---


def test_a_machine_that_was_never_backed_up_starts_at_once() -> None:
    assert [t.machine for t in plan(fleet_of(), machines_of(1), {}, [], {}, NOW).starts] == ["vm0"]


@pytest.mark.parametrize(
    ("fleet", "machine", "down", "standings", "reason", "words"),
    [
        (fleet_of(), {}, {"pve0": "no answer"}, {}, "host-down", "no answer"),
        (fleet_of(window=(parse_window("22:00-23:00"),)), {}, {}, {}, "window", "not open"),
        (fleet_of(), {}, {}, done("vm0", NOW), "not-due", "when it was due"),
        (fleet_of(skip="by its owner"), {}, {}, {}, "skipped", "by its owner"),
        (fleet_of(jobs=0), {}, {}, {}, "limit-host", "pve0"),
        (fleet_of(total=0), {}, {}, {}, "limit-total", "fleet"),
        (fleet_of(target_jobs=0), {}, {}, {}, "limit-target", "b1"),
        (Fleet({}, {}), {}, {}, {}, "no-place", "no target"),
    ],
)
def test_what_does_not_start_says_why(
    fleet: Fleet,
    machine: dict[str, str],
    down: dict[str, str],
    standings: Standings,
    reason: str,
    words: str,
) -> None:
    found = plan(fleet, machines_of(1), standings, [], down, NOW)
    assert found.starts == []
    assert (why(found, "vm0").why, words in why(found, "vm0").text) == (reason, True)


def test_a_machine_of_which_a_backup_runs_is_not_started_again_wherever_it_is_now() -> None:
    running = [as_run(FleetTask("vm0", "backup", "b1", "pve0"), NOW)]
    moved = [FleetMachine("vm0", "pve1")]
    found = plan(fleet_of(), moved, {}, running, {}, NOW)
    assert (found.starts, why(found, "vm0").why) == ([], "running")


def test_of_two_that_must_not_run_together_one_waits() -> None:
    found = plan(fleet_of(not_together="db"), machines_of(2), {}, [], {}, NOW)
    assert len(found.starts) == 1
    running = [as_run(found.starts[0], NOW)]
    other = plan(fleet_of(not_together="db"), machines_of(2), {}, running, {}, NOW)
    assert [w.why for w in other.waits if w.why != "running"] == ["not-together"]


def test_a_failed_one_waits_longer_each_time_but_never_longer_than_half_its_interval() -> None:
    waits = [back_off_s(n, DAY_S) for n in range(1, 30)]
    assert waits == sorted(waits)
    assert (waits[0], waits[1], waits[-1]) == (600, 1200, DAY_S / 2)
    failed = Standing("vm0", "backup", "b1", failures=2, failed_s=NOW, text="no room")
    early = plan(fleet_of(), machines_of(1), {("vm0", "backup", "b1"): failed}, [], {}, NOW + 1199)
    assert (why(early, "vm0").why, why(early, "vm0").until_s) == ("back-off", NOW + 1200)
    assert "no room" in why(early, "vm0").text
    late = plan(fleet_of(), machines_of(1), {("vm0", "backup", "b1"): failed}, [], {}, NOW + 1200)
    assert len(late.starts) == 1


@pytest.mark.parametrize("ahead_s", [-600.0, 600.0])
def test_a_clock_that_is_minutes_off_neither_doubles_nor_stops_backups(ahead_s: float) -> None:
    standings = done("vm0", NOW + ahead_s)
    fleet = fleet_of(every_s=DAY_S)
    started = 0
    for hour in range(1, 73):
        now = NOW + hour * HOUR
        if plan(fleet, machines_of(1), standings, [], {}, now).starts:
            started += 1
            standings = done("vm0", now + ahead_s)
    assert started == 3


def test_what_a_wrong_clock_says_of_next_year_is_not_believed() -> None:
    found = plan(fleet_of(), machines_of(1), done("vm0", NOW + 365 * DAY_S), [], {}, NOW)
    assert len(found.starts) == 1


def test_what_was_missed_while_all_was_down_starts_when_the_next_window_opens() -> None:
    fleet = fleet_of(window=(parse_window("22:00-06:00"),))
    evening = NOW // DAY_S * DAY_S + 22 * HOUR
    standings = done("vm0", evening - 2 * DAY_S + 7 * HOUR)  # not last night
    assert plan(fleet, machines_of(1), standings, [], {}, evening - 60).starts == []
    assert len(plan(fleet, machines_of(1), standings, [], {}, evening + 60).starts) == 1


def test_priorities_go_first_and_who_waits_long_enough_overtakes() -> None:
    rules = [Rule("vm1", (("priority", 10),))]
    fleet = dataclasses.replace(fleet_of(hosts=1, jobs=1), rules=rules)
    machines = machines_of(2, hosts=1)
    assert [t.machine for t in plan(fleet, machines, {}, [], {}, NOW).starts] == ["vm1"]
    standings = done("vm0", NOW - 4 * DAY_S) | done("vm1", NOW - 2 * DAY_S)
    found = plan(fleet, machines, standings, [], {}, NOW)
    assert [t.machine for t in found.starts] == ["vm0"]
    assert why(found, "vm1").why == "priority"


def test_tests_copies_and_pruning_follow_what_is_stored() -> None:
    fleet = fleet_of(verify_every_s=7 * DAY_S, drill_every_s=30 * DAY_S, keep=(("last", 3),))
    off = FleetTarget("off", s3="s3://off/vm", copy_from="b1")
    fleet = dataclasses.replace(fleet, targets={**fleet.targets, "off": off})
    before = plan(fleet, machines_of(1), {}, [], {}, NOW)
    assert {w.why for w in before.waits if w.task.verb != "backup"} == {"no-archive"}
    standings = done("vm0", NOW)
    verbs = list[Verb]()
    for _ in range(5):
        found = plan(fleet, machines_of(1), standings, [], {}, NOW)
        for task in found.starts:
            verbs.append(task.verb)
            key = (task.machine, task.verb, task.target)
            standings[key] = Standing(*key, NOW, NOW, task.archive)
            assert task.host == "store" or task.target == "off"
    assert Counter(verbs) == {"copy": 1, "prune": 2, "verify": 1, "drill": 1}


def test_only_so_many_restore_tests_run_on_a_host_at_a_time() -> None:
    fleet = fleet_of(drill_every_s=DAY_S, hosts=1)
    standings = {k: v for n in range(4) for k, v in done(f"vm{n}", NOW).items()}
    found = plan(fleet, machines_of(4, 1), standings, [], {}, NOW)
    assert [t.verb for t in found.starts] == ["drill"]
    again = plan(fleet, machines_of(4, 1), standings, [as_run(found.starts[0], NOW)], {}, NOW)
    assert {w.why for w in again.waits if w.task.verb == "drill"} == {"running", "limit-drills"}


def test_who_needs_two_storages_is_not_overtaken_for_ever_by_those_that_need_one() -> None:
    fleet = fleet_of(hosts=1, jobs=9, every_s=HOUR)
    both = FleetMachine("both", "pve0", storages=("ceph", "lvm"), first_seen_s=NOW)
    ones = [
        FleetMachine(f"{s}{n}", "pve0", storages=(s,), first_seen_s=NOW)
        for s in ("ceph", "lvm")
        for n in range(4)
    ]
    assert _rounds_until(fleet, [*ones, both], "both") < 20


def _rounds_until(fleet: Fleet, machines: Sequence[FleetMachine], wanted: str) -> int:
    """Run jobs of half an hour that never end at the same time."""
    standings, running, now = Standings(), list[tuple[float, RunRecord]](), NOW
    for number in range(200):
        ended = [item for item in running if item[0] <= now]
        running = [item for item in running if item[0] > now]
        for _, run in ended:
            key = (run.machine, run.verb, run.target)
            end = dataclasses.replace(run, state="done", ended_s=now)
            standings[key] = after(standings.get(key) or Standing(*key), end)
        for task in plan(fleet, machines, standings, [r for _, r in running], {}, now).starts:
            if task.machine == wanted:
                return number
            running.append((now + 1200 + 600 * len(running), as_run(task, now, number)))
        now += 300
    return 200


# --- The model ---


class FleetModel(RuleBasedStateMachine):
    """A fleet that lives: jobs end well or not, hosts go and come, the queue is lost, clocks differ."""

    @initialize(
        jobs=st.integers(1, 3),
        total=st.integers(1, 6),
        target_jobs=st.integers(1, 4),
        every_h=st.sampled_from([1, 4, 24]),
        group=st.booleans(),
        count=st.integers(1, 9),
    )
    def begin(
        self, jobs: int, total: int, target_jobs: int, every_h: int, group: bool, count: int
    ) -> None:
        rules = [Rule("vm[01]", (("not_together", "db"),))] if group else []
        rules.append(Rule("vm2", (("priority", 50),)))
        defaults = {
            "every_s": every_h * HOUR,
            "verify_every_s": 4 * every_h * HOUR,
            "keep": (("last", 2),),
        }
        fleet = fleet_of(2, jobs, total, target_jobs, **defaults)
        self.fleet = dataclasses.replace(fleet, rules=rules)
        names = [("ceph",), ("lvm",), ("ceph", "lvm"), ()]
        self.machines = [
            dataclasses.replace(m, storages=names[n % 4]) for n, m in enumerate(machines_of(count))
        ]
        self.now = NOW
        self.standings = Standings()
        self.running = list[RunRecord]()
        self.down = dict[str, str]()
        self.number = 0

    @rule(hours=st.sampled_from([0.01, 0.3, 2, 30, 24 * 20]))
    def time_passes(self, hours: float) -> None:
        self.now += hours * HOUR

    @rule()
    def round(self) -> None:
        before = Counter((r.machine, r.verb == "backup") for r in self.running)
        found = plan(self.fleet, self.machines, self.standings, self.running, self.down, self.now)
        for task in found.starts:
            assert task.host not in self.down
            assert not before[task.machine, task.verb == "backup"]
            before[task.machine, task.verb == "backup"] += 1
            self.number += 1
            self.running.append(as_run(task, self.now, self.number))
        told = [(w.task.machine, w.task.verb, w.task.target) for w in found.waits]
        told += [(t.machine, t.verb, t.target) for t in found.starts]
        assert len(told) == len(set(told))  # each task has one answer
        assert len(told) == 3 * len(self.machines)

    def _end(self, index: int, state: str, skew_s: float = 0.0) -> None:
        if not self.running:
            return
        run = self.running.pop(index % len(self.running))
        archive = f"{run.machine}-{self.number}.vma" if run.verb == "backup" else run.archive
        end = dataclasses.replace(
            run,
            state=state,  # type: ignore[arg-type]
            archive=archive,
            started_s=run.started_s + skew_s,
            ended_s=self.now + skew_s,
        )
        key = (run.machine, run.verb, run.target)
        self.standings[key] = after(self.standings.get(key) or Standing(*key), end)

    @rule(index=st.integers(0, 50), skew_s=st.sampled_from([0.0, -400.0, 400.0]))
    def job_is_done(self, index: int, skew_s: float) -> None:
        self._end(index, "done", skew_s)

    @rule(index=st.integers(0, 50))
    def job_fails(self, index: int) -> None:
        self._end(index, "failed")

    @rule(index=st.integers(0, 50))
    def worker_is_killed(self, index: int) -> None:
        self._end(index, "lost")

    @rule()
    def queue_is_lost(self) -> None:
        while self.running:
            self._end(0, "lost")

    @rule(host=st.sampled_from(["pve0", "pve1", "store"]))
    def host_goes_or_comes(self, host: str) -> None:
        if self.down.pop(host, None) is None:
            self.down[host] = "cable pulled"

    @rule(index=st.integers(0, 8), host=st.sampled_from(["pve0", "pve1"]))
    def machine_moves(self, index: int, host: str) -> None:
        index %= len(self.machines)
        self.machines[index] = dataclasses.replace(self.machines[index], host=host)

    @invariant()
    def limits_hold(self) -> None:
        """Counted anew from what runs, by other means than the planner's."""
        if not hasattr(self, "running"):
            return
        fleet, running = self.fleet, self.running
        assert len(running) <= fleet.total
        for host in fleet.hosts.values():
            assert sum(r.host == host.name for r in running) <= host.jobs
        for target in fleet.targets.values():
            assert sum(r.target == target.name for r in running) <= target.jobs
        for storage in fleet.storages.values():
            readers = [r for r in running if storage.name in r.storages.split(",")]
            assert len(readers) <= storage.jobs
        policies = {m.name: fleet.policy(m) for m in self.machines}
        together = [r for r in running if r.verb == "backup" and policies[r.machine].not_together]
        assert len(together) <= 1

    def teardown(self) -> None:
        """Whatever has happened: when all is well again, everything is done within some time."""
        if not hasattr(self, "running"):
            return
        self.down.clear()
        while self.running:
            self._end(0, "lost")
        begin = self.now
        for _ in range(400):
            self.round()
            self.limits_hold()
            while self.running:
                self._end(0, "done")
            self.now += 600
            backups = [self.standings.get((m.name, "backup", "b1")) for m in self.machines]
            tests = [self.standings.get((m.name, "verify", "b1")) for m in self.machines]
            if all(s and s.done_s >= begin for s in backups) and all(s and s.done_s for s in tests):
                return
        raise AssertionError("something starves")


TestFleetModel = FleetModel.TestCase
TestFleetModel.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


@given(st.permutations(range(6)), st.floats(NOW, NOW + 1e7))
@settings(max_examples=30)
def test_a_plan_does_not_depend_on_the_order_in_which_machines_are_named(
    order: list[int], now_s: float
) -> None:
    machines = machines_of(6)
    fleet = fleet_of(verify_every_s=DAY_S)
    standings = done("vm1", now_s - DAY_S) | done("vm2", now_s - 3 * DAY_S)
    first = plan(fleet, machines, standings, [], {}, now_s)
    other = plan(fleet, [machines[n] for n in order], standings, [], {}, now_s)
    assert first.starts == other.starts
    assert set(first.waits) == set(other.waits)


def test_a_round_grows_with_the_number_of_machines_and_not_faster() -> None:
    """10,000 take some 0.5 s; a quadratic plan would take 100 times as long as 1,000."""
    fleet = fleet_of(
        hosts=50,
        target_jobs=99,
        window=(parse_window("22:00-06:00"),),
        verify_every_s=7 * DAY_S,
        drill_every_s=30 * DAY_S,
        keep=(("daily", 7),),
        time_zone="Europe/Berlin",
    )
    took = dict[int, float]()
    evening = NOW // DAY_S * DAY_S + 23 * HOUR
    for count in (1_000, 10_000):
        machines = machines_of(count, 50)
        standings = {k: v for m in machines for k, v in done(m.name, evening - DAY_S).items()}
        begin = time.process_time()
        found = plan(fleet, machines, standings, [], {}, evening)
        took[count] = time.process_time() - begin
        assert len(found.starts) == 40
    assert took[10_000] < 40 * took[1_000]
